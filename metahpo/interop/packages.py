"""Importing a package that an extra brings."""

from __future__ import annotations

import importlib
from types import ModuleType

from metahpo.errors import NetError, one_line


def load(name: str, install: str) -> ModuleType:
    """The module ``name``; raises NetError, which names the command ``install``, if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # torchvision beside a torch it was not built for: the last.
        raise NetError(f"{name} cannot be imported ({one_line(error)}); install it by: {install}") from error
