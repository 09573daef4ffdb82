"""Sections of a config whose model is chosen by a name in them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from metahpo.training.settings import Settings

# Where a name may be the user's own code, MODULE:ATTRIBUTE, found from the working directory.
CustomName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]


def tag(key: str) -> Discriminator:
    """Chooses a section's model by the name under ``key``; a name with a colon is the user's own."""

    def chosen(value: Any) -> str | None:
        name = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
        return "custom" if isinstance(name, str) and ":" in name else name

    return Discriminator(chosen)


def union(models: Mapping[str, type[Settings]], key: str) -> Any:
    """The type of a section that is one of ``models``, chosen by the name under ``key``."""
    tagged = [Annotated[model, Tag(name)] for name, model in models.items()]
    return Annotated[functools.reduce(operator.or_, tagged), tag(key)]
