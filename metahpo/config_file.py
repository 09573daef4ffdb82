"""Configs as YAML files: read, overridden, validated with a line an error, written."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from inspect import isclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from metahpo import yaml_text
from metahpo.config import NAME_KEY, RUN, Schema
from metahpo.config_data import DatasetSettings
from metahpo.errors import ConfigError, did_you_mean, shown
from metahpo.training.settings import Settings

# Of an error's message: characters of a line, and lines.
_LONGEST, _MOST = 1000, 30
AnySettings = TypeVar("AnySettings", bound=Settings)


def load_config(path: str | Path, overrides: Sequence[str] = (), schema: Schema = RUN) -> Any:
    """Reads a YAML config and applies ``key.sub=value`` overrides (values in YAML too); gives the schema's model.

    Raises ConfigError with every error at once, a line each, naming the dotted key, what was found and what was
    expected.
    """
    tree = read_tree(path, schema)
    for override in overrides:
        apply_override(tree, override, schema)
    return validate(tree, str(path), schema)


def read_tree(path: str | Path, schema: Schema = RUN) -> dict[str, Any]:
    """A config file's content, not yet validated; bare names of sections as {name: ...}. Raises ConfigError."""
    path = Path(path)
    try:
        tree = yaml_text.read(path)
    except OSError as error:
        raise ConfigError(f"cannot read config {_name(path)}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"config {_name(path)} {error}") from None
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"holds {shown(tree)}"
        raise ConfigError(
            f"config {_name(path)} {found}; expected keys {', '.join(schema.model.model_fields)}"
        )
    for key in schema.unions:
        if isinstance(tree.get(key), str):
            tree[key] = {NAME_KEY[key]: tree[key]}
    return tree


def validate(tree: Mapping[str, Any], where: str, schema: Schema = RUN) -> Any:
    """The tree as a config; ``where`` begins the error's message."""
    config = None
    try:
        config = schema.model.model_validate(tree)
        lines = list(_converted(tree, config.model_dump()))
    except ValidationError as error:
        lines = [_line(dict(e), tree, schema) for e in error.errors()]
    if config is None or lines:
        shortened = [line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..." for line in lines[:_MOST]]
        more = [f"and {len(lines) - _MOST:,} more errors"] if len(lines) > _MOST else []
        raise ConfigError("\n".join(f"{where}: {line}" for line in [*shortened, *more]))
    return config


def dump_config(config: Settings) -> str:
    """The config as YAML with every setting spelt out; ``load_config`` of it gives the same config."""
    return yaml_text.dump(config.model_dump(mode="json"))


def located(settings: AnySettings, folder: Path | None = None) -> AnySettings:
    """The settings with every path absolute, for the user's code may change the working directory.

    folder: where relative paths begin (default: the working directory).
    """
    folder = folder or Path.cwd()
    changes: dict[str, Any] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            changes[name] = located(value, folder)
        elif isinstance(value, Path):
            changes[name] = folder / value
    # What torchvision's data sets call the folder of their files; the arguments of your own function are your own.
    of_torchvision = isinstance(settings, DatasetSettings) and ":" not in settings.dataset
    if of_torchvision and isinstance(root := settings.args.get("root"), str):
        changes["args"] = {**settings.args, "root": str(folder / root)}
    return settings.model_copy(update=changes)


def describe_keys(schema: Schema = RUN) -> str:
    """Every key of a config with its default and meaning, a line each."""
    lines: list[str] = []
    for section, kinds in schema.unions.items():
        for kind, model in kinds.items():
            lines.append(f"{section}: {NAME_KEY[section]} {'MODULE:NAME' if kind == 'custom' else kind}")
            lines += _fields(section, model)
    for section, model in schema.sections.items():
        lines += [f"{section}:", *_fields(section, model)]
    for name, field in schema.model.model_fields.items():
        if name not in (*schema.unions, *schema.sections):
            lines.append(f"{name}: {field.description}")
    return "\n".join(lines)


def _fields(section: str, model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if name == NAME_KEY.get(section):
            continue
        value = field.get_default(call_default_factory=True)
        default = "required" if field.is_required() else json.dumps(value, default=str)
        yield f"  {section}.{name:22} {default:16} {field.description or ''}".rstrip()


def parse_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value of KEY.SUB=VALUE."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{shown(override)} is not an override; expected KEY.SUB=VALUE")
    try:
        value = yaml_text.parse(text)
    except ValueError as error:
        raise ConfigError(f"the value in {shown(override)} is not YAML: {error}") from None
    return key, value


def apply_override(tree: dict[str, Any], override: str, schema: Schema = RUN) -> None:
    """Puts the value of KEY.SUB=VALUE in its place in the tree."""
    key, value = parse_override(override)
    try:
        set_key(tree, key, value, schema)
    except ConfigError as error:
        raise ConfigError(f"{shown(override)}: {error}") from None


def set_key(tree: dict[str, Any], key: str, value: Any, schema: Schema = RUN) -> None:
    """Puts a value in its place in the tree, a bare name of a section as {name: ...}."""
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{parent!r} is a value, not a section")
        node = child
    if not parents and key in schema.unions and isinstance(value, str):
        value = {NAME_KEY[key]: value}
    node[last] = value


# One line an error.


def _line(error: dict[str, Any], tree: Mapping[str, Any], schema: Schema) -> str:
    loc = list(error["loc"])
    model: type[BaseModel] | None = schema.model
    if loc and loc[0] in schema.unions:
        model = schema.unions[str(loc[0])].get(str(loc.pop(1))) if len(loc) > 1 else None
    elif loc and loc[0] in schema.sections:
        model = schema.sections[str(loc[0])]
    path, found = ".".join(map(str, loc)), error["input"]
    kind = error["type"]
    if kind == "extra_forbidden":
        inner = _section(model or schema.model, loc[1:-1] if model else loc[:-1])
        known = list(inner.model_fields)
        return f"unknown key {path!r}; {did_you_mean(str(loc[-1]), known)}"
    if kind == "missing":
        return f"key {path!r} is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _tag_line(path, tree.get(path), schema.unions[path])
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{path}: should be a section of keys, found {shown(found)}"
    expected: str = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    expected = {"path_type": "should be a path", "string_pattern_mismatch": "should be MODULE:NAME"}.get(kind, expected)
    # A validator's own words may tell what was found.
    said = kind == "value_error" and (isinstance(found, Mapping) or repr(found) in expected)
    return f"{path}: {expected}" if said else f"{path}: {expected}, found {shown(found)}"


def _section(model: type[BaseModel], keys: Sequence[Any]) -> type[BaseModel]:
    """The model of the section that lies under these keys of a model's own."""
    for key in keys:
        annotation = model.model_fields[key].annotation
        model = next((k for k in (annotation, *get_args(annotation)) if isclass(k) and issubclass(k, BaseModel)), model)
    return model


def _converted(tree: Any, settings: Any, path: str = "") -> Iterator[str]:
    """A line for each value that pydantic turned into a number (true into 1, "3" into 3), or that no computation can
    take: infinite, or a whole number of more than 64 bits."""
    if isinstance(tree, Mapping) and isinstance(settings, Mapping):
        for key, value in tree.items():
            yield from _converted(value, settings.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(tree, (list, tuple)) and isinstance(settings, (list, tuple)):
        for index, (value, setting) in enumerate(zip(tree, settings)):
            yield from _converted(value, setting, f"{path}.{index}")
    elif isinstance(tree, (bool, str)) and isinstance(settings, (int, float)) and type(tree) is not type(settings):
        expected = "true or false" if isinstance(settings, bool) else "a number"
        yield f"{path}: should be {expected}, found {shown(tree)}"
    elif isinstance(settings, float) and not math.isfinite(settings):
        yield f"{path}: should be finite, found {shown(settings)}"
    elif isinstance(settings, int) and abs(settings) >= 2**63:
        yield f"{path}: should be below 2^63, found {shown(settings)}"


def _tag_line(key: str, section: Any, kinds: Mapping[str, Any]) -> str:
    names, name_key = [n for n in kinds if n != "custom"], NAME_KEY[key]
    if not isinstance(section, Mapping):
        return f"{key}: should be a name or a section, found {shown(section)}"
    if name_key not in section:
        return f"key '{key}.{name_key}' is missing; one of {', '.join(names)}, or MODULE:NAME of your own"
    near = difflib.get_close_matches(str(section[name_key]), names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    expected = f"should be one of {', '.join(names)}, or MODULE:NAME of your own"
    return f"{key}.{name_key}: {hint}{expected}, found {shown(section[name_key])}"


def _name(path: Path) -> str:
    """The path as a message names it."""
    return str(path) if str(path).isprintable() and len(str(path)) <= 300 else shown(str(path))
