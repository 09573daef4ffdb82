"""Every run as one validated tree of settings."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, field_validator

from metahpo.errors import ConfigError
from metahpo.training.settings import Settings, TrainingSettings

# Where a name may be the user's own code, MODULE:ATTRIBUTE, found from the working directory.
CustomName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]


class EpisodeSettings(Settings):
    """N-way K-shot tasks."""

    ways: int = Field(5, ge=2)
    shots: int = Field(1, ge=1)
    queries: int = Field(15, ge=1, description="query images a class in training")
    eval_queries: int | None = Field(None, ge=1, description="the same in validation and test; null: as in training")


class GlyphsSettings(EpisodeSettings):
    """The bundled glyphs: 1,429 characters of 33 scripts, rendered from fonts, 28x28."""

    source: Literal["glyphs"]


class OmniglotSettings(EpisodeSettings):
    """Omniglot, 28x28, from its two zips or their folders."""

    source: Literal["omniglot"]
    root: Path = Path("data/omniglot")
    download: bool = Field(False, description="fetch it by torchvision if it is not there")
    split: Literal["shuffled", "alphabet"] = "shuffled"
    rotate: bool = Field(True, description="in training turn each class of a task by a random multiple of 90 degrees")


class FolderSettings(EpisodeSettings):
    """Images in ROOT/{train,val,test}/CLASS/."""

    source: Literal["folder"]
    root: Path
    size: int = Field(84, ge=1, description="height and width in pixels")
    channels: Literal[1, 3] = 3
    rotate: bool = False


class SinusoidSettings(Settings):
    """Sine waves (Finn et al. 2017)."""

    source: Literal["sinusoid"]
    shots: int = Field(10, ge=1)
    queries: int = Field(10, ge=1)
    eval_queries: int | None = Field(100, ge=1)


class CustomTasks(Settings):
    """Your own tasks: MODULE:FUNCTION, called with split="train"|"val"|"test", seed and args, gives a TaskSource."""

    source: CustomName
    args: dict[str, Any] = Field(default_factory=dict)


class Conv4Settings(Settings):
    name: Literal["conv4"]
    filters: int = Field(64, ge=1)
    slope: float = Field(0.01, ge=0, description="of the leaky ReLU; 0: ReLU")


class MLPSettings(Settings):
    name: Literal["mlp"]
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (40, 40)


class CustomNet(Settings):
    """Your own net: MODULE:FUNCTION, called with args, and with in_shape and out_features if it takes them."""

    name: CustomName
    args: dict[str, Any] = Field(default_factory=dict)


class MAMLSettings(Settings):
    name: Literal["maml"]
    steps: int = Field(5, ge=1)
    inner_lr: float = Field(0.1, gt=0)
    first_order: bool = False
    adapt_norms: bool = Field(False, description="adapt batch-norm scales and shifts in the inner loop too")


class MAMLPlusPlusSettings(Settings):
    name: Literal["maml_pp"]
    steps: int = Field(5, ge=1)
    inner_lr: float = Field(0.1, gt=0, description="initial rate")
    multi_step_epochs: int = Field(10, ge=0, description="annealing of the multi-step loss; 0: off")
    first_order_epochs: int = Field(0, ge=0, description="first-order epochs before second-order ones; 0: off")
    per_step_statistics: bool = True
    per_step_affine: bool = True
    layer_step_rates: bool = True


class CustomLearner(Settings):
    """Your own learner: MODULE:CLASS, called with the net, loss=... if it takes it, and args."""

    name: CustomName
    args: dict[str, Any] = Field(default_factory=dict)


def _tag(key: str):
    def tag(value: Any) -> str | None:
        name = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
        return "custom" if isinstance(name, str) and ":" in name else name

    return Discriminator(tag)


UNIONS: dict[str, dict[str, type[Settings]]] = {
    "data": {
        "glyphs": GlyphsSettings,
        "omniglot": OmniglotSettings,
        "folder": FolderSettings,
        "sinusoid": SinusoidSettings,
        "custom": CustomTasks,
    },
    "net": {"conv4": Conv4Settings, "mlp": MLPSettings, "custom": CustomNet},
    "learner": {"maml": MAMLSettings, "maml_pp": MAMLPlusPlusSettings, "custom": CustomLearner},
}
_NAME_KEY = {"data": "source", "net": "name", "learner": "name"}

Data = Annotated[
    Annotated[GlyphsSettings, Tag("glyphs")]
    | Annotated[OmniglotSettings, Tag("omniglot")]
    | Annotated[FolderSettings, Tag("folder")]
    | Annotated[SinusoidSettings, Tag("sinusoid")]
    | Annotated[CustomTasks, Tag("custom")],
    _tag("source"),
]
Net = Annotated[
    Annotated[Conv4Settings, Tag("conv4")] | Annotated[MLPSettings, Tag("mlp")] | Annotated[CustomNet, Tag("custom")],
    _tag("name"),
]
Learner = Annotated[
    Annotated[MAMLSettings, Tag("maml")]
    | Annotated[MAMLPlusPlusSettings, Tag("maml_pp")]
    | Annotated[CustomLearner, Tag("custom")],
    _tag("name"),
]


class RunConfig(Settings):
    """One run; ``data``, ``net``, ``learner`` are chosen by ``source`` or ``name``; a bare name takes the defaults."""

    data: Data
    net: Net
    learner: Learner
    training: TrainingSettings = TrainingSettings()
    run_dir: Path | None = Field(None, description="null: runs/CONFIG/DATE-TIME")

    @field_validator("training", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("run_dir", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("should be a path or null")
        return value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML config and applies ``key.sub=value`` overrides (values in YAML too).

    Raises ConfigError with every error at once, a line each, naming the dotted key, what was found and what was
    expected.
    """
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
        raise ConfigError(f"config {path} {found}; expected keys {', '.join(RunConfig.model_fields)}")
    for key in UNIONS:
        if isinstance(tree.get(key), str):
            tree[key] = {_NAME_KEY[key]: tree[key]}
    for override in overrides:
        _override(tree, override)
    return validate(tree, str(path))


def validate(tree: Mapping[str, Any], where: str) -> RunConfig:
    """The tree as a config; ``where`` begins the error's message."""
    try:
        config = RunConfig.model_validate(tree)
        lines = list(_converted(tree, config.model_dump()))
    except ValidationError as error:
        lines = [_line(dict(e), tree) for e in error.errors()]
    if lines:
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines))
    return config


def dump_config(config: RunConfig) -> str:
    """The config as YAML with every setting spelt out; ``load_config`` of it gives the same config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not an override; expected KEY.SUB=VALUE")
    try:
        value = _parse(text)
    except ValueError:
        raise ConfigError(f"the value in {override!r} is not YAML") from None
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {parent!r} is a value, not a section")
        node = child
    if not parents and key in UNIONS and isinstance(value, str):
        value = {_NAME_KEY[key]: value}
    node[last] = value


def _parse(text: str) -> Any:
    """The text as YAML; ValueError with the reason in one line."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None


# One line an error.


def _line(error: dict[str, Any], tree: Mapping[str, Any]) -> str:
    loc = list(error["loc"])
    model: type[BaseModel] | None = RunConfig
    if loc and loc[0] in UNIONS:
        model = UNIONS[str(loc[0])].get(str(loc.pop(1))) if len(loc) > 1 else None
    elif loc and loc[0] == "training":
        model = TrainingSettings
    path, found = ".".join(map(str, loc)), error["input"]
    kind = error["type"]
    if kind == "extra_forbidden":
        known = list((model or RunConfig).model_fields)
        near = difflib.get_close_matches(str(loc[-1]), known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"unknown key {path!r}; {hint}"
    if kind == "missing":
        return f"key {path!r} is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _tag_line(path, tree.get(path))
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{path}: should be a section of keys, found {found!r}"
    expected = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    expected = {"path_type": "should be a path", "string_pattern_mismatch": "should be MODULE:NAME"}.get(kind, expected)
    # A validator's own words may tell what was found.
    said = kind == "value_error" and repr(found) in expected
    return f"{path}: {expected}" if said else f"{path}: {expected}, found {found!r}"


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


def _tag_line(key: str, section: Any) -> str:
    names, name_key = [n for n in UNIONS[key] if n != "custom"], _NAME_KEY[key]
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
