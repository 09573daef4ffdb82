"""From a run's config and a trial's settings to the trial's config."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metahpo.config import NAME_KEY, UNIONS, RunConfig
from metahpo.config_file import load_config, set_key, validate


def run_tree(config: RunConfig | Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """The keys that a config sets, as plain values; a path is read first. What is left to defaults is not in it."""
    read = load_config(config) if isinstance(config, (str, Path)) else config
    if isinstance(read, RunConfig):
        return read.model_dump(mode="json", exclude_unset=True, exclude={"run_dir"})
    tree = copy.deepcopy({key: value for key, value in read.items() if key != "run_dir"})
    for section in UNIONS:
        if isinstance(tree.get(section), str):
            tree[section] = {NAME_KEY[section]: tree[section]}
    return tree


def with_settings(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with every setting, by dotted key, in its place.

    Where a setting chooses another kind of a section (``learner.name``), those of the section's keys in the tree go
    that the new kind has not; ``learner`` itself as a key replaces the whole section.
    """
    tree = copy.deepcopy(dict(tree))
    names = [f"{section}.{NAME_KEY[section]}" for section in UNIONS]
    # Whole sections come first and then names, lest they undo the rest.
    for key in sorted(settings, key=lambda k: ("." in k, k not in names)):
        set_key(tree, key, copy.deepcopy(settings[key]))
        section = key.partition(".")[0]
        if key in names:
            kinds, name = UNIONS[section], settings[key]
            kind = kinds.get("custom" if isinstance(name, str) and ":" in name else name)
            known = kind.model_fields if kind else tree[section]
            tree[section] = {k: v for k, v in tree[section].items() if k in known}
    return tree


def trial_config(tree: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> RunConfig:
    """The validated config of a trial; raises ConfigError, each line beginning with ``where``."""
    return validate(with_settings(tree, settings), where)
