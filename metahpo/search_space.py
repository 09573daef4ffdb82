"""Checks of a space against the config of the run whose keys it sets."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from metahpo.config import NAME_KEY, UNIONS, RunConfig
from metahpo.errors import ConfigError, shown
from metahpo.searchers.run_settings import trial_config
from metahpo.searchers.settings import Choice, Setting
from metahpo.searchers.space import Space
from metahpo.training.settings import Settings, TrainingSettings


def check_keys(space: Space, tree: Mapping[str, Any]) -> None:
    """Raises ConfigError unless each key is one that a run's config may have, for each kind of its section that there
    can be, and its lowest and highest value, or each option, gives a valid config. tree: the run's."""
    lines = [line for name in space for line in _unknown(name, space, tree)]
    lines = lines or [line for name in space for line in _refused(name, space, tree)]
    if lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))


def _unknown(name: str, space: Space, tree: Mapping[str, Any]) -> Iterator[str]:
    section, _, rest = name.partition(".")
    if section == "training" and rest:
        known = {"training": TrainingSettings}
    elif section in UNIONS:
        if not rest or rest == NAME_KEY[section]:
            return
        known = _kinds(section, space, tree)
    else:
        known = {}
    field, _, inside = rest.partition(".")
    having = [kind for kind, model in known.items() if _has(model, field, inside)]
    if not having:
        yield f"space.{name}: unknown config key; {_nearest(name, space, tree)}"
    elif lacking := [kind for kind in known if kind not in having and _can_be(kind, section, space[name], space)]:
        key = f"{section}.{NAME_KEY[section]}" if f"{section}.{NAME_KEY[section]}" in space else section
        good = having[0] if len(having) == 1 else f"[{', '.join(having)}]"
        yield (
            f"space.{name}: {section} {', '.join(lacking)} has no {field!r}; let it exist for the others alone: "
            f"when: {{{key}: {good}}}"
        )


def _kinds(section: str, space: Space, tree: Mapping[str, Any]) -> dict[str, type[Settings] | None]:
    """The kinds that a section can be of, by name: the run's own, or those that the space chooses among."""
    name_key = NAME_KEY[section]
    names = [_name((tree.get(section) or {}), name_key)]
    for key in (section, f"{section}.{name_key}"):
        if key in space and isinstance(setting := space[key], Choice):
            names = [_name(option, name_key) for option in setting.options]
    return {str(n): UNIONS[section].get("custom" if ":" in str(n) else str(n)) for n in names}


def _name(section: Any, name_key: str) -> Any:
    return section.get(name_key) if isinstance(section, Mapping) else section


def _has(model: type[Settings] | None, field: str, inside: str) -> bool:
    """Whether the model has the field, and that takes keys of its own if any are meant."""
    if model is None:
        return True  # A name that is not known is told of on its own.
    found = model.model_fields.get(field)
    return found is not None and (not inside or "dict" in str(found.annotation))


def _can_be(kind: str, section: str, setting: Setting, space: Space) -> bool:
    """Whether the setting may exist while the section is of that kind."""
    name_key = NAME_KEY[section]
    for key in (section, f"{section}.{name_key}"):
        if key in setting.when:
            return any(str(_name(value, name_key)) == kind for value in setting.when[key])
    return True


def _nearest(name: str, space: Space, tree: Mapping[str, Any]) -> str:
    known = [f"training.{field}" for field in TrainingSettings.model_fields]
    for section in UNIONS:
        for model in _kinds(section, space, tree).values():
            known += [section, *(f"{section}.{field}" for field in (model.model_fields if model else ()))]
    near = difflib.get_close_matches(name, known, 1)
    section = name.partition(".")[0]
    listed = [key for key in dict.fromkeys(known) if key.startswith(f"{section}.")] or [*UNIONS, "training"]
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(listed)}"


def _refused(name: str, space: Space, tree: Mapping[str, Any]) -> Iterator[str]:
    """A line for each of the setting's extreme values that gives no valid config, all else as in the run's own."""
    setting = space[name]
    for value in setting.options if isinstance(setting, Choice) else (setting.at(0.0), setting.at(1.0)):
        settings = {**_conditions(name, space), name: value}
        try:
            trial_config(tree, settings, f"space.{name} at {shown(value)}")
        except ConfigError as error:
            yield from str(error).splitlines()


def _conditions(name: str, space: Space) -> dict[str, Any]:
    """Values of other settings for which this one exists."""
    chosen: dict[str, Any] = {}
    for other, values in space[name].when.items():
        chosen |= {**_conditions(other, space), other: values[0]}
    return chosen


def check_run(tree: Mapping[str, Any] | None) -> RunConfig:
    """The run's own config. Raises ConfigError, each line beginning with ``run``."""
    if tree is None:
        raise ConfigError("key 'run' is missing: the config of a training, or its path")
    return trial_config(tree, {}, "run")
