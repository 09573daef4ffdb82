from __future__ import annotations

import importlib
import os
import warnings
from contextlib import redirect_stderr
from io import StringIO
from types import ModuleType

import pytest
import torch


def imported(name: str) -> ModuleType:
    """The package; without it the test skips, but for continuous integration, where it is to be there."""
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("CI"):
            raise
        return pytest.skip(f"{error}; scripts/test installs it")


@pytest.fixture(scope="session")
def higher() -> ModuleType:
    return imported("higher")


@pytest.fixture(scope="session")
def l2l() -> ModuleType:
    return imported("learn2learn")


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
