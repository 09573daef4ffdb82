"""The configs of ``metahpo search``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from metahpo.config import RunDir, Schema
from metahpo.config_file import apply_override, parse_override, read_tree, validate
from metahpo.config_union import CustomName, tag
from metahpo.errors import ConfigError, shown
from metahpo.searchers.run_settings import with_settings
from metahpo.training.settings import MOST_THREADS, Settings


class TrainingObjectiveSettings(Settings):
    """The training that the section ``run`` describes, judged by validation."""

    name: Literal["training"]
    fidelity: Literal["epochs", "iterations", "tasks", "data"] = Field(
        default="epochs", description="what a trial's budget counts; data: the fraction of the training classes"
    )
    objectives: tuple[Literal["accuracy", "loss", "seconds", "parameters"], ...] = Field(
        default=("accuracy",), description="what a trial is judged by; the first decides which is best"
    )
    seeds: int = Field(default=1, ge=1, description="trainings of each trial, with seeds from training.seed on")
    folds: int | None = Field(
        default=None, ge=2, description="k-fold cross-validation over the classes of train and val, in place of seeds"
    )
    gradients: bool = Field(
        default=False, description="of the loss by learner.inner_lr; objectives should begin with loss"
    )


class CustomObjective(Settings):
    """Your own: MODULE:FUNCTION, called with a Trial and args, gives a score, a tuple of them, or an Outcome."""

    name: CustomName
    args: dict[str, Any] = Field(default_factory=dict)


class SearchSettings(Settings):
    """How the search runs."""

    trials: int | None = Field(default=None, ge=1, description="how many in all")
    budget: float | None = Field(
        default=None, gt=0, description="no trial begins once all have trained so much together, in the fidelity's unit"
    )
    workers: int = Field(default=1, ge=1, le=MOST_THREADS, description="trials at a time")
    threads: int | None = Field(
        default=None, ge=1, le=MOST_THREADS, description="of each worker; null: its share of the cores"
    )
    executor: Literal["auto", "serial", "processes", "ray"] = Field(
        default="auto", description="where trials run; auto: processes for several workers, else serial"
    )
    address: str | None = Field(default=None, description="ray: of a running cluster, or auto; null: this machine")
    gpus: float = Field(default=0.0, ge=0, description="ray: GPUs of each worker")
    seed: int = Field(default=0, ge=0, description="the same one gives the same trials")
    parallel: int | None = Field(
        default=None, ge=1, description="give the trials that so many workers would have; null: workers"
    )
    max_failures: int = Field(default=10, ge=1, description="the search stops after so many failures in a row")
    max_attempts: int = Field(default=3, ge=1, description="how often a trial whose worker died is begun in all")
    direction: Literal["minimize", "maximize"] | tuple[Literal["minimize", "maximize"], ...] | None = Field(
        default=None, description="of your own objective: minimize, maximize, or a list, one for each score"
    )
    storage: str | None = Field(default=None, description="a file or a database URL; null: RUN_DIR/study.db")
    name: str = Field(default="study", min_length=1, description="of the study in a database that holds several")


# What may change when a search is gone on with.
CHANGEABLE = ("trials", "budget", "workers", "threads", "executor", "address", "gpus", "max_failures", "max_attempts")

OBJECTIVES: dict[str, type[Settings]] = {"training": TrainingObjectiveSettings, "custom": CustomObjective}
Objective = Annotated[
    Annotated[TrainingObjectiveSettings, Tag("training")] | Annotated[CustomObjective, Tag("custom")], tag("name")
]


class SearchConfig(Settings):
    """One search. run: the config of a training, inline or the path of one; searcher: a name, or with its options."""

    run: dict[str, Any] | None = Field(
        default=None,
        description="a config of metahpo train: its path, {config: PATH, KEY.SUB: VALUE}, or inline",
    )
    space: dict[str, Any] = Field(
        min_length=1, description="key of run: {float: [LOW, HIGH]}, {int: [LOW, HIGH]} or {choice: [A, B]}"
    )
    searcher: dict[str, Any] = Field(default={"name": "random"}, description="a name, or {name: ..., options}")
    objective: Objective = TrainingObjectiveSettings(name="training")
    search: SearchSettings = SearchSettings()
    run_dir: RunDir = None


SEARCH = Schema(SearchConfig, {"objective": OBJECTIVES}, {"search": SearchSettings})


def load_search(path: str | Path, overrides: Sequence[str] = ()) -> SearchConfig:
    """Reads the config of a search; overrides reach the config that ``run`` names too (``run.training.epochs=3``).

    ``space.KEY=...`` is about the setting KEY, dots and all. Raises ConfigError with a line an error.
    """
    path = Path(path)
    tree = read_tree(path, SEARCH)
    _expand(tree, path)
    for override in overrides:
        key, value = parse_override(override)
        if key.startswith("space.") and isinstance(tree.get("space"), dict):
            tree["space"][key.removeprefix("space.")] = value
        else:
            apply_override(tree, override, SEARCH)
            _expand(tree, path)
    return validate(tree, str(path), SEARCH)


def _expand(tree: dict[str, Any], path: Path) -> None:
    """Puts in what ``run`` names, and bare names as sections."""
    run = tree.get("run")
    named = run if isinstance(run, str) else run.get("config") if isinstance(run, Mapping) else None
    if isinstance(named, str):
        beside = path.parent / named
        tree["run"] = read_tree(beside if beside.exists() else named)
        changes = {key: value for key, value in run.items() if key != "config"} if isinstance(run, Mapping) else {}
        tree["run"] = with_settings(tree["run"], changes)
    if isinstance(tree.get("searcher"), str):
        tree["searcher"] = {"name": tree["searcher"]}
    if isinstance(tree.get("objective"), Mapping):
        # Without a name the options are those of the training.
        tree["objective"] = {"name": "training", **tree["objective"]}
    for section in ("run", "space"):
        if isinstance(tree.get(section), Mapping) and not all(isinstance(key, str) for key in tree[section]):
            raise ConfigError(f"{path}: {section}: keys should be text, found {shown(list(tree[section]))}")
