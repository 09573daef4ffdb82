"""From the config of a search to its objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from metahpo.building import build
from metahpo.building_data import data_identity
from metahpo.custom import find
from metahpo.errors import ConfigError, MetaHPOError, SearchError, did_you_mean, shown
from metahpo.search_config import CustomObjective, SearchConfig, SearchSettings
from metahpo.search_space import check_keys, check_run
from metahpo.searchers.base import Searcher
from metahpo.searchers.executors import Executor, Processes, Ray
from metahpo.searchers.executors.serial import Serial
from metahpo.searchers.gradient import Gradient
from metahpo.searchers.grid import Grid
from metahpo.searchers.registry import SEARCHERS
from metahpo.searchers.rungs import MultiFidelity
from metahpo.searchers.space import Space
from metahpo.searchers.store import sqlite_path
from metahpo.searchers.study import Study
from metahpo.searchers.training_objective import TrainingObjective


@dataclass(frozen=True)
class Search:
    """What a search is made of.

    objective: called with a Trial; training: the same where it is the run's training; data: the identity of its data.
    """

    config: SearchConfig
    space: Space
    searcher: Searcher
    objective: Callable[..., Any]
    training: TrainingObjective | None
    directions: list[str]
    data: dict[str, Any]

    def study(self, run_dir: Path) -> Study:
        """The study in ``run_dir`` or where the config puts it, begun or gone on with."""
        search = self.config.search
        storage = search.storage or run_dir / "study.db"
        # Beside its file, if it has one, so that both are found again together.
        folder = None if sqlite_path(storage) else run_dir / "study.files"
        return Study(
            self.space,
            self.searcher,
            storage,
            self.directions,  # type: ignore[arg-type]
            search.seed,
            folder=folder,
            parallel=search.parallel,
            name=search.name,
            context=self._context,
        )

    @property
    def _context(self) -> dict[str, Any]:
        """What the scores depend on beside space, searcher and seed; none of it may change."""
        run = self.training.config({}).model_dump(mode="json", exclude={"run_dir"}) if self.training else None
        return {"run": run, "objective": self.config.objective.model_dump(mode="json")}

    @property
    def names(self) -> list[str]:
        """Of the objectives."""
        if self.training:
            return list(self.training.objectives)
        count = len(self.directions)
        return ["score"] if count == 1 else [f"score {i + 1}" for i in range(count)]


def build_search(config: SearchConfig, where: str) -> Search:
    """The search's objects, all tried: what cannot work is refused before any work.

    Raises ConfigError or SearchError, each line beginning with ``where``.
    """
    try:
        space = Space.of(config.space)
        training, objective = _objective(config)
        if training:
            check_run(training.tree)
            check_keys(space, training.tree)
        searcher = make_searcher(config.searcher, "searcher", training)
        _check_ends(config.search, searcher)
        if training:
            _check_fit(space, searcher, training)
        _check(searcher, space)
        directions = _directions(config, training)
    except (ConfigError, SearchError) as error:
        raise type(error)("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from error
    data = _try(training) if training else {}
    return Search(config, space, searcher, objective, training, directions, data)


def _try(training: TrainingObjective) -> dict[str, Any]:
    """Builds the run as metahpo train would: what cannot be trained at all is found now. Gives its data's identity."""
    config = training.config({})
    tasks, _ = build(config)
    training.check(tasks["val"].task(0))
    return data_identity(config, tasks)


def _objective(config: SearchConfig) -> tuple[TrainingObjective | None, Callable[..., Any]]:
    settings = config.objective
    if isinstance(settings, CustomObjective):
        if config.run is not None:
            raise ConfigError(f"run: is not used by the objective {settings.name}; take one of them out")
        function = find(settings.name, "objective.name")
        return None, partial(function, **settings.args) if settings.args else function
    if config.run is None:
        raise ConfigError("key 'run' is missing: the config of a training, or its path")
    training = TrainingObjective(config.run, **settings.model_dump(exclude={"name"}))
    return training, training


def _directions(config: SearchConfig, training: TrainingObjective | None) -> list[str]:
    given = config.search.direction
    if training:
        if given is not None:
            raise ConfigError("search.direction: is for an objective of your own; that of a training is known")
        return training.directions
    if given is None:
        raise ConfigError("key 'search.direction' is missing: minimize or maximize, or a list for several scores")
    return [given] if isinstance(given, str) else list(given)


def _check_ends(search: SearchSettings, searcher: Searcher) -> None:
    if search.trials is None and search.budget is None and not isinstance(searcher, Grid):
        raise ConfigError("search.trials: this search has no end of its own; give it search.trials or search.budget")


def _check_fit(space: Space, searcher: Searcher, training: TrainingObjective) -> None:
    """A searcher with rungs, and it alone, says how far trials are trained; one by gradient needs some."""
    if isinstance(searcher, Gradient) and not training.gradients:
        raise ConfigError("objective.gradients: should be true for the searcher gradient (and objectives [loss])")
    if not isinstance(searcher, MultiFidelity):
        return
    full = training.full_budget
    if searcher.max_budget > full:
        raise SearchError(
            f"searcher.max_budget: {searcher.max_budget:g} is more than the run's full training, "
            f"{full:g} ({training.fidelity})"
        )
    for name in ("training.epochs", "training.iterations"):
        if name in space:
            raise SearchError(f"space.{name}: should not be there: the searcher says how far each trial is trained")


def _check(searcher: Searcher, space: Space) -> None:
    try:
        searcher.check(space)
    except SearchError as error:
        text = str(error)
        raise SearchError(text if text.startswith("space") else f"searcher: {text}") from None


# Searchers.


def make_searcher(tree: Any, where: str, training: TrainingObjective | None = None) -> Searcher:
    """The searcher that a name, or {name: ..., options}, describes; options that hold another one likewise.

    training: what a searcher with rungs takes its largest budget from where none is given. Raises ConfigError or
    SearchError, which begins with ``where``.
    """
    tree = {"name": tree} if isinstance(tree, str) else tree
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}: should be a name, or a section with one, found {shown(tree)}")
    if "name" not in tree:
        raise ConfigError(f"key '{where}.name' is missing; known: {', '.join(SEARCHERS)}, or MODULE:CLASS of your own")
    kind = _searcher_kind(tree["name"], f"{where}.name")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    given = {key: value for key, value in tree.items() if key != "name"}
    for key in given:
        if key not in known:
            hint = did_you_mean(str(key), known) if known else f"{tree['name']} has no options"
            raise ConfigError(f"unknown key '{where}.{key}'; {hint}")
    for key, value in given.items():
        default = known[key].default
        if isinstance(default, Searcher) or (isinstance(value, Mapping) and "name" in value):
            given[key] = make_searcher(value, f"{where}.{key}")
        elif isinstance(value, list):
            given[key] = tuple(value)
    if training and issubclass(kind, MultiFidelity):
        given.setdefault("max_budget", training.full_budget)
    required = [key for key, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [key for key in required if key not in given]:
        raise ConfigError(f"key '{where}.{missing[0]}' is missing")
    try:
        return kind(**given)
    except MetaHPOError as error:
        raise SearchError(f"{where}: {error}") from None


def _searcher_kind(name: Any, where: str) -> type[Searcher]:
    if isinstance(name, str) and ":" in name:
        kind = find(name, where)
        if not (isinstance(kind, type) and issubclass(kind, Searcher)):
            raise ConfigError(f"{where}: {name} is no Searcher")
        return kind
    if not isinstance(name, str) or name not in SEARCHERS:
        raise ConfigError(f"{where}: no searcher {shown(name)}; {did_you_mean(str(name), SEARCHERS)}")
    return SEARCHERS[name]


# Where trials run.


def make_executor(search: SearchSettings) -> Executor:
    kind = search.executor
    if kind == "auto":
        kind = "serial" if search.workers == 1 and search.threads is None else "processes"
    if kind == "serial":
        if search.workers > 1 or search.threads is not None:
            raise ConfigError("search.executor: serial is one worker with this process's threads; choose processes")
        return Serial()
    if kind == "ray":
        return Ray(search.workers, search.threads, search.gpus, search.address)
    return Processes(search.workers, search.threads)
