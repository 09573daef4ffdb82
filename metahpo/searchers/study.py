"""A search: trials asked for, run, told and kept."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from metahpo.checks import check_callable, check_number, check_type, check_whole, refuse
from metahpo.errors import SearchArgumentError, SearchError, shown
from metahpo.searchers.base import History, Observation, Proposal, Searcher
from metahpo.searchers.coordinator import Coordinator
from metahpo.searchers.executors.base import Executor, Objective, Result
from metahpo.searchers.executors.processes import Processes
from metahpo.searchers.executors.serial import Serial
from metahpo.searchers.front import pareto_front, scalarised
from metahpo.searchers.lock import FileLock
from metahpo.searchers.random import Random
from metahpo.searchers.records import TrialRecord, plain
from metahpo.searchers.settings import same
from metahpo.searchers.space import ARGUMENT, Space
from metahpo.searchers.store import StudyStore, sqlite_path
from metahpo.searchers.trial import Job, Trial

Direction = Literal["minimize", "maximize"]


class Study:
    """A search over ``space`` by ``searcher`` (default: ``Random()``).

    storage: the path of an SQLite file, made at first use; a database URL; or None, which keeps the study in memory.
    The same study is gone on with when it is there already, after a crash too. folder: where trials keep their files
    (default: study.files beside study.db). direction: "minimize", "maximize", or a list of them, one an objective.
    seed: the same seed gives the same trials. parallel: the workers by whose number the searcher's view of the results
    is ordered (see ``VirtualClock``; default: those of the first ``optimize``); with the same ``parallel`` any number
    of workers gives the same trials.

    context: plain values that the scores depend on; a study with other ones is refused.

    One process alone writes to a study: a second one is refused. Raises SearchError.
    """

    def __init__(
        self,
        space: Space,
        searcher: Searcher | None = None,
        storage: str | Path | None = None,
        direction: Direction | Sequence[Direction] = "minimize",
        seed: int = 0,
        *,
        folder: str | Path | None = None,
        parallel: int | None = None,
        name: str = "study",
        context: Mapping[str, Any] | None = None,
    ):
        self.space = check_type(self, "space", space, Space, "a Space", **ARGUMENT)
        self.searcher = Random() if searcher is None else searcher
        check_type(self, "searcher", self.searcher, Searcher, "a searcher, such as Random()", **ARGUMENT)
        self.directions = _directions(direction)
        self.seed = check_whole(self, "seed", seed, at_least=0, **ARGUMENT)
        if parallel is not None:
            parallel = check_whole(self, "parallel", parallel, at_least=1, **ARGUMENT)
        self.name = _checked_places(storage, folder, name)
        if context is not None:
            check_type(self, "context", context, Mapping, "a mapping of plain values", **ARGUMENT)
        self._context = None if context is None else plain(context)
        self.searcher.check(space)
        self.parallel, self._open = parallel, True
        self.folder = _folder(storage, folder, name)
        self._lock = _locked(storage, self.folder)
        try:
            self._store = StudyStore(storage, name)
            self._begin()
        except BaseException:
            if self._lock:
                self._lock.release()
            raise

    def _begin(self) -> None:
        kept = {"space": self.space.tree(), "directions": self.directions, "seed": self.seed}
        kept |= {"searcher": repr(self.searcher), "parallel": self.parallel}
        if self._context is not None:
            kept["context"] = self._context
        if not self._store.exists():
            self._check_fresh()
            self._store.create(kept)
        else:
            there = self._store.kept()
            _check_same(there, kept, self._store.storage)
            if self.parallel is None:
                self.parallel = there["parallel"]
            kept = {**kept, "parallel": self.parallel}
            if "context" in there:
                kept.setdefault("context", there["context"])
            if self.parallel != there["parallel"] or kept.get("context") != there.get("context"):
                self._store.set_kept(kept)
        self._kept = {**kept, "parallel": self.parallel}
        self._load()

    def _load(self) -> None:
        self._records = self._store.records(self.space)
        self._observed = [self._observation(record) for record in self._records]

    def _check_fresh(self) -> None:
        """A new study must not take the results and checkpoints of another for its own."""
        for kind in ("trials", "results"):
            if self.folder and any((self.folder / kind).glob("*")):
                raise SearchError(f"{self.folder / kind} is of another study; remove it, or give another folder")

    @classmethod
    def open(cls, storage: str | Path, *, folder: str | Path | None = None, name: str = "study") -> Study:
        """A study that is there, to look at: nothing can be asked or told. It may be at work in another process."""
        _checked_places(storage, folder, name)
        study = cls.__new__(cls)
        study._store, study._lock, study.name = StudyStore(storage, name, make=False), None, name
        study._open = False
        kept = study._kept = study._store.kept()
        study.space, study.directions, study.seed = Space.of(kept["space"]), kept["directions"], kept["seed"]
        study.searcher, study.folder, study.parallel = Random(), _folder(storage, folder, name), kept["parallel"]
        study._load()
        return study

    def close(self) -> None:
        """Lets go of the study, which another process may then go on with."""
        self._open = False
        self._store.close()
        if self._lock:
            self._lock.release()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # What there is.

    @property
    def trials(self) -> list[TrialRecord]:
        """All trials, by number."""
        return list(self._records)

    @property
    def best(self) -> TrialRecord | None:
        """The complete trial with the best first score, among those with the largest budget; None if there is none."""
        complete = [r for r in self._records if r.state == "complete"]
        most = max((_budget(r) for r in complete), default=None)
        signs = self._signs()
        ranked = [r for r in complete if _budget(r) == most]
        return min(ranked, key=lambda r: (signs[0] * (r.score or 0.0), r.number), default=None)

    @property
    def recommended(self) -> TrialRecord | None:
        """The trial that the searcher would take: ``best``, unless it has a model of how much luck is in the scores
        (of the first objective)."""
        found = self.searcher.recommend(self.history(), self.space)
        return self.best if found is None else self._records[found.number]

    @property
    def front(self) -> list[TrialRecord]:
        """The complete trials that no other one beats in all objectives, by the first objective."""
        complete = [r for r in self._records if r.state == "complete"]
        losses = np.array([self._losses(r) for r in complete]).reshape(len(complete), len(self.directions))
        return sorted((complete[i] for i in pareto_front(losses)), key=lambda r: self._losses(r) or ())

    def history(self, unseen: Collection[int] = ()) -> History:
        """What a searcher sees: all trials, of which those in ``unseen`` are pending even if they have ended."""
        observed = self._observed.copy()
        for number in unseen:
            observed[number] = self._observation(self._records[number], pending=True)
        return History(observed)

    def _observation(self, record: TrialRecord, pending: bool = False) -> Observation:
        about = record.number, record.settings
        whence = record.budget, record.parent
        # Not what the objective noted, which may go by the same name.
        if pending or record.state == "running":
            return Observation(*about, "pending", None, *whence, record.proposed)
        gradients = {name: self._signs()[0] * value for name, value in record.gradients.items()}
        return Observation(*about, record.state, self._losses(record), *whence, record.proposed, gradients)

    def _signs(self) -> list[float]:
        return [-1.0 if direction == "maximize" else 1.0 for direction in self.directions]

    def _losses(self, record: TrialRecord) -> tuple[float, ...] | None:
        return record.scores and tuple(sign * score for sign, score in zip(self._signs(), record.scores))

    # Asked and told by hand.

    @property
    def _identity(self) -> object:
        """What a trial knows its study by, also after that was closed and opened again."""
        where = self._store.storage
        path = None if where is None else sqlite_path(where)
        return id(self) if where is None else (str(path.resolve() if path else where), self.name)

    def ask(self, settings: Mapping[str, Any] | None = None) -> Trial:
        """The next trial, with settings of your own if you give some. Raises SearchError when the search is over."""
        self._check_open()
        if settings is not None:
            proposal = Proposal(self.space.plain(settings))
        else:
            proposal = self.suggest()
            if proposal is None:
                more = "before a trial that is at work is told" if self.history().pending else "any more: it is over"
                raise SearchError(f"{self.searcher!r} suggests nothing {more}")
        number = self.add(proposal)
        trial = Trial(self.job(number), lambda step, score: self.report(number, step, score))
        trial.study = self._identity
        return trial

    def tell(self, trial: Trial | int, score: Any = None, error: str | None = None) -> TrialRecord:
        """Ends a trial with what its objective gave (a score, a tuple of them, an ``Outcome``), or with an error."""
        self._check_open()
        if isinstance(trial, Trial):
            if trial.study not in (None, self._identity):
                raise SearchArgumentError(f"tell: trial {trial.number} is of another study")
            number = trial.number
        else:
            expected = {"at_least": 0, **ARGUMENT}
            number = check_whole("tell", "trial (a Trial of this study, or its number)", trial, **expected)
        if error is not None:
            check_type("tell", "error", error, str, "text", **ARGUMENT)
            if score is not None:
                raise SearchArgumentError(f"tell: found score {shown(score)} and an error, expected one of them")
        if not 0 <= number < len(self._records):
            raise SearchArgumentError(f"tell: there is no trial {number}; the study has {len(self._records)}")
        if self._records[number].state != "running":
            raise SearchArgumentError(f"tell: trial {number} has ended already: {self._records[number].state}")
        return self.end(number, Result(error=error) if error is not None else Result.of(score))

    def _check_open(self) -> None:
        if not self._open:
            raise SearchError(f"study {self._store.storage}: is closed, or was opened to look at; nothing can be added")

    # Run.

    def optimize(
        self,
        objective: Objective,
        trials: int | None = None,
        workers: int | Executor = 1,
        *,
        budget: float | None = None,
        max_failures: int = 10,
        max_attempts: int = 3,
        on_trial: Callable[[TrialRecord], None] | None = None,
    ) -> TrialRecord | None:
        """Runs trials until there are ``trials`` of them in all, or the searcher has no more; returns the best.

        objective: called with a ``Trial``; gives a score, a tuple of them, or an ``Outcome``. workers: 1: in this
        process; more: as many processes; or an executor. budget: no trial is begun once those there have used that much
        together. Trials that were at work when a study ended are run again first, each from what it kept in its folder;
        one whose worker dies is, too, at most ``max_attempts`` times in all. A trial that raises is kept as failed;
        after ``max_failures`` in a row the search stops with a SearchError. on_trial: called with each that has ended.

        Ctrl-C or SIGTERM asks the trainings at work to save themselves and raises ``Interrupted``.
        """
        self._check_open()
        owner = "optimize"
        check_callable(owner, "objective", objective, "a function of a trial", **ARGUMENT)
        if trials is not None:
            trials = check_whole(owner, "trials", trials, at_least=0, **ARGUMENT)
        if budget is not None:
            budget = check_number(owner, "budget", budget, above=0, infinite=True, **ARGUMENT)
        max_failures = check_whole(owner, "max_failures", max_failures, at_least=1, **ARGUMENT)
        max_attempts = check_whole(owner, "max_attempts", max_attempts, at_least=1, **ARGUMENT)
        if on_trial is not None:
            check_callable(owner, "on_trial", on_trial, "a function of a trial's record", **ARGUMENT)
        executor = workers if isinstance(workers, Executor) else Processes(workers) if workers != 1 else Serial()
        if self.parallel is None:
            self.parallel = self._kept["parallel"] = executor.workers
            self._store.set_kept(self._kept)
        Coordinator(self, executor, trials, budget, max_failures, max_attempts, on_trial).run(objective)
        return self.best

    # What the coordinator needs.

    def suggest(self, unseen: Collection[int] = ()) -> Proposal | None:
        """The searcher's next proposal, checked; unseen: the trials whose results it may not know yet."""
        rng = np.random.default_rng([self.seed, len(self._records)])
        given = self.searcher.suggest(scalarised(self.history(unseen), rng), self.space, rng)
        if given is None:
            return None
        proposal = given if isinstance(given, Proposal) else Proposal(given)
        try:
            proposal = replace(proposal, settings=self.space.plain(proposal.settings))
            if proposal.budget is not None:
                check_number("proposal", "budget", proposal.budget, above=0, **ARGUMENT)
            if proposal.parent is not None:
                check_whole("proposal", "parent", proposal.parent, at_least=0, **ARGUMENT)
        except SearchError as error:
            raise SearchError(f"{self.searcher!r} suggested what is not in the space: {error}") from error
        if proposal.parent is not None and not 0 <= proposal.parent < len(self._records):
            raise SearchError(f"{self.searcher!r} suggested to go on from trial {proposal.parent}, which there is not")
        return proposal

    def add(self, proposal: Proposal, times: tuple[float, float, int] | None = None) -> int:
        """Writes a new trial down, at work; gives its number."""
        number, notes = len(self._records), plain(proposal.notes)
        record = TrialRecord(
            number,
            proposal.settings,
            "running",
            budget=proposal.budget,
            parent=proposal.parent,
            notes=notes,
            proposed=notes,
            clock=times,
        )
        if self._store.add(record, self.space) != number:
            raise SearchError(
                f"{self._store.storage}: another process has written to study {self.name!r}; open it anew"
            )
        self._records.append(record)
        self._observed.append(self._observation(record))
        return number

    def duration(self, proposal: Proposal) -> float:
        """How much training a trial adds to that which it goes on from; 1 where there are no budgets."""
        if proposal.budget is None:
            return 1.0
        before = None if proposal.parent is None else self._records[proposal.parent].budget
        return max(proposal.budget - (before or 0.0), 0.0)

    def job(self, number: int) -> Job:
        record = self._records[number]
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        return Job(
            number,
            record.settings,
            seed,
            record.budget,
            self._path("trials", number),
            None if record.parent is None else self._path("trials", record.parent),
            self.result_path(number),
            record.deaths,
            record.parent,
        )

    def result_path(self, number: int) -> Path | None:
        """Where a worker leaves the result of a trial until it is told."""
        path = self._path("results", number)
        return path and path.with_suffix(".json")

    def _path(self, kind: str, number: int) -> Path | None:
        return self.folder and self.folder / kind / f"{number:05d}"

    def report(self, number: int, step: int, score: float) -> None:
        record = self._records[number]
        if record.reports.get(step) == score:
            return
        self._store.report(number, step, score)
        self._records[number] = replace(record, reports={**record.reports, step: score})

    def died(self, number: int) -> TrialRecord:
        record = self._records[number]
        reached = max(record.reports, default=-1)
        stalled = 1 if reached > record.reached else record.stalled + 1
        record = replace(record, deaths=record.deaths + 1, stalled=stalled, reached=max(reached, record.reached))
        self._store.died(record)
        self._records[number] = record
        return record

    def end(self, number: int, result: Result) -> TrialRecord:
        """Ends a trial; of a result with another number of scores than the study's objectives the trial fails."""
        if result.scores is not None and len(result.scores) != len(self.directions):
            found, expected = len(result.scores), len(self.directions)
            result = replace(result, scores=None, error=f"the objective gave {found} scores, expected {expected}")
        # Some may not have arrived before the study's process was killed.
        for step, score in result.reports.items():
            self.report(number, step, score)
        self._store.end(number, result, self._records[number].reports)
        if path := self.result_path(number):
            for left in (path, path.with_suffix(".lock")):
                left.unlink(missing_ok=True)
        record = self._records[number]
        self._records[number] = replace(
            record,
            state="failed" if result.scores is None else "complete",
            scores=result.scores,
            error=result.error,
            notes={**record.notes, **result.notes},
            gradients=result.gradients,
            seconds=result.seconds,
        )
        self._observed[number] = self._observation(self._records[number])
        return self._records[number]


def _checked_places(storage: Any, folder: Any, name: Any) -> str:
    """The name; raises SearchArgumentError for what is no storage, folder or name."""
    for argument, value in (("storage", storage), ("folder", folder)):
        if value is not None:
            check_type("Study", argument, value, (str, os.PathLike), "a path", **ARGUMENT)
            if not str(value) or "\0" in str(value):
                refuse("Study", argument, value, "a path", SearchArgumentError)
    check_type("Study", "name", name, str, "text", **ARGUMENT)
    if not name or "\0" in name:
        refuse("Study", "name", name, "a name", SearchArgumentError)
    return name


def _directions(given: Any) -> list[str]:
    directions = list(given) if isinstance(given, (list, tuple)) else [given]
    known = ("minimize", "maximize")
    if not directions or not all(isinstance(one, str) and one in known for one in directions):
        raise SearchArgumentError(f"direction: should be minimize, maximize, or a list of these, found {shown(given)}")
    return directions


def _check_same(there: Mapping[str, Any], kept: Mapping[str, Any], storage: Any) -> None:
    """Raises SearchError, naming what differs, if the study that is there is of another search."""
    for name in [*there["space"], *(n for n in kept["space"] if n not in there["space"])]:
        found, asked = there["space"].get(name, "nothing"), kept["space"].get(name, "nothing")
        if not same(found, asked):
            raise SearchError(f"{storage} is a study of another space: it has {found} for {name!r}, asked was {asked}")
    if list(there["space"]) != list(kept["space"]):
        raise SearchError(
            f"{storage} is a study of another space: its settings are in the order {list(there['space'])}"
        )
    for key in ("directions", "seed", "searcher"):
        if there[key] != kept[key]:
            raise SearchError(f"{storage} is a study with {key} {there[key]}, asked was {kept[key]}; use another file")
    if "context" in there and "context" in kept:
        _check_context(there["context"], kept["context"], storage)


def _check_context(there: Mapping[str, Any], asked: Mapping[str, Any], storage: Any) -> None:
    """Raises SearchError, naming the key, where what the scores depend on has changed."""
    found, given = dict(_leaves(there)), dict(_leaves(asked))
    for key in {**found, **given}:
        if not same(found.get(key), given.get(key)):
            raise SearchError(
                f"{storage} is a search with {key} {shown(found.get(key))}, asked was {shown(given.get(key))}; "
                "set it back, or search in another folder"
            )


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _budget(record: TrialRecord) -> float:
    return math.inf if record.budget is None else record.budget


def _folder(storage: str | Path | None, folder: str | Path | None, name: str) -> Path | None:
    """Where a study's trials and results are kept; None for one in memory.

    Absolute, for a worker may be elsewhere, and an objective may change the working directory.
    """
    if folder is not None:
        return Path(folder).absolute()
    if storage is None:
        return None
    path = sqlite_path(storage)
    base = path.with_suffix(".files") if path else Path("runs") / "studies"
    return (base / name if name != "study" or not path else base).absolute()


def _locked(storage: str | Path | None, folder: Path | None) -> FileLock | None:
    path = sqlite_path(storage) if storage is not None else None
    if path:
        lock = FileLock(path.absolute().with_name(f"{path.name}.lock"), f"study {storage}")
    elif folder:
        lock = FileLock(folder / "study.lock", f"study {storage or folder}")
    else:
        return None
    lock.acquire()
    return lock
