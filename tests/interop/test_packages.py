"""What is said where a package is missing."""

from __future__ import annotations

import sys

import pytest
import torch

from metahpo.errors import NetError
from metahpo.interop import HigherRule, Learn2LearnLearner


@pytest.mark.parametrize(
    ("package", "use", "message"),
    [
        ("higher", lambda: HigherRule(torch.optim.SGD), r"^higher cannot .*: pip install \"metahpo\[interop\]\"$"),
        ("learn2learn", lambda: Learn2LearnLearner(None), r"^learn2learn.utils cannot .*: scripts/install_learn2learn"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(package, use, message, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "learn2learn.utils", raising=False)
    with pytest.raises(NetError, match=message):
        use()
