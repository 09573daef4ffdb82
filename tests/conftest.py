from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    """A failure can be repeated."""
    torch.manual_seed(0)
