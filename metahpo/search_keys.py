"""Every key of a search's config, in words."""

from __future__ import annotations

from dataclasses import MISSING, fields

from metahpo.config_file import describe_keys
from metahpo.search_config import SEARCH
from metahpo.searchers.base import Searcher
from metahpo.searchers.registry import SEARCHERS

SPACE = """space: a key of run (learner.inner_lr, net.filters, learner), or a name that your own objective knows, and
  {float: [LOW, HIGH], log: true}     a number; log: by its logarithm
  {float: [LOW, HIGH], step: 0.1}     LOW, LOW + 0.1, ... alone
  {int: [LOW, HIGH], log: true, step: 2}
  {choice: [maml, maml_pp]}
  {..., when: {KEY: VALUE}}           exists only where KEY has that value, or one of a list"""


def describe_search_keys() -> str:
    """Every key of a search's config with its default and meaning, and every searcher with its options."""
    lines = [describe_keys(SEARCH), SPACE, "searchers (metahpo.searchers says what their options mean):"]
    for name, kind in SEARCHERS.items():
        options = [f"{f.name}={_default(f.default)}" for f in fields(kind)]  # type: ignore[arg-type]
        lines.append(f"  {name:23}{' '.join(options)}".rstrip())
    return "\n".join(lines)


def _default(value: object) -> str:
    if isinstance(value, Searcher):
        return next(name for name, kind in SEARCHERS.items() if type(value) is kind)
    return "required" if value is MISSING else f"{value:.4g}" if isinstance(value, float) else str(value)
