"""Configs as YAML files: read, overridden, validated with a line an error, written."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from inspect import isclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from metahpo.config import NAME_KEY, RUN, Schema
from metahpo.errors import ConfigError, did_you_mean, one_line
from metahpo.training.settings import Settings


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
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {path} is not text") from None
    except ValueError as error:  # A name that no file can have.
        raise ConfigError(f"cannot read config {str(path)!r}: {error}") from None
    try:
        tree = _parse(text)
    except ValueError as error:
        raise ConfigError(f"config {path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"holds {tree!r:.60}"
        raise ConfigError(f"config {path} {found}; expected keys {', '.join(schema.model.model_fields)}")
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
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines))
    return config


def dump_config(config: Settings) -> str:
    """The config as YAML with every setting spelt out; ``load_config`` of it gives the same config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


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
        raise ConfigError(f"{override!r} is not an override; expected KEY.SUB=VALUE")
    try:
        value = _parse(text)
    except ValueError:
        raise ConfigError(f"the value in {override!r} is not YAML") from None
    return key, value


def apply_override(tree: dict[str, Any], override: str, schema: Schema = RUN) -> None:
    """Puts the value of KEY.SUB=VALUE in its place in the tree."""
    key, value = parse_override(override)
    try:
        set_key(tree, key, value, schema)
    except ConfigError as error:
        raise ConfigError(f"{override!r}: {error}") from None


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


def _parse(text: str) -> Any:
    """The text as YAML; ValueError with the reason in one line."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(one_line(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None


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
        return f"{path}: should be a section of keys, found {found!r}"
    expected: str = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    expected = {"path_type": "should be a path", "string_pattern_mismatch": "should be MODULE:NAME"}.get(kind, expected)
    # A validator's own words may tell what was found.
    said = kind == "value_error" and (isinstance(found, Mapping) or repr(found) in expected)
    return f"{path}: {expected}" if said else f"{path}: {expected}, found {found!r}"


def _section(model: type[BaseModel], keys: Sequence[Any]) -> type[BaseModel]:
    """The model of the section that lies under these keys of a model's own."""
    for key in keys:
        annotation = model.model_fields[key].annotation
        model = next((k for k in (annotation, *get_args(annotation)) if isclass(k) and issubclass(k, BaseModel)), model)
    return model


def _converted(tree: Any, settings: Any, path: str = "") -> Iterator[str]:
    """A line for each value that pydantic turned into a number (true into 1, "3" into 3), or that is not finite."""
    if isinstance(tree, Mapping) and isinstance(settings, Mapping):
        for key, value in tree.items():
            yield from _converted(value, settings.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(tree, (bool, str)) and isinstance(settings, (int, float)) and type(tree) is not type(settings):
        expected = "true or false" if isinstance(settings, bool) else "a number"
        yield f"{path}: should be {expected}, found {tree!r}"
    elif isinstance(settings, float) and not math.isfinite(settings):
        yield f"{path}: should be finite, found {settings!r}"


def _tag_line(key: str, section: Any, kinds: Mapping[str, Any]) -> str:
    names, name_key = [n for n in kinds if n != "custom"], NAME_KEY[key]
    if not isinstance(section, Mapping):
        return f"{key}: should be a name or a section, found {section!r}"
    if name_key not in section:
        return f"key '{key}.{name_key}' is missing; one of {', '.join(names)}, or MODULE:NAME of your own"
    near = difflib.get_close_matches(str(section[name_key]), names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    expected = f"should be one of {', '.join(names)}, or MODULE:NAME of your own"
    return f"{key}.{name_key}: {hint}{expected}, found {section[name_key]!r}"


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number (YAML 1.1 wants 1.0e-3) and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key in _repeated(k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            raise yaml.YAMLError(f"key {key!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def _repeated(keys: Iterator[Any]) -> Iterator[Any]:
    seen: set[Any] = set()
    for key in keys:
        if key in seen:
            yield key
        seen.add(key)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that ``_Loader`` would read as numbers."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
# A run directory named 2024-05-17 is a name, not a date.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
