"""The training loop: the outer loop over tasks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch

from metahpo.checks import check_callable, check_type, check_whole
from metahpo.errors import CheckpointError, ConfigArgumentError, NetArgumentError, NonFiniteError, one_line, shown
from metahpo.functional.buffers import whole_state
from metahpo.functional.turns import TURN
from metahpo.learners.base import MetaLearner
from metahpo.learners.phase import Phase
from metahpo.runs.files import write_json
from metahpo.tasks.task import Task, TaskSource
from metahpo.training.checkpoint import CheckpointStore, State, load_learner
from metahpo.training.distributed import current
from metahpo.training.engines import ENGINES, Auto, MetaGradient, check_engine, check_gradient
from metahpo.training.environment import intra_op_threads, progress, seeded, versions
from metahpo.training.evaluation import check_parts, evaluate
from metahpo.training.finite import FiniteCheck
from metahpo.training.first_batch import check_batch, check_outputs, check_reaches, explained
from metahpo.training.interrupts import Interrupted, Interrupts
from metahpo.training.metrics import CsvLog, Row, SumOfMetrics, best_epochs, summarise
from metahpo.training.outer import Freed, load_optimizer, optimizer_names
from metahpo.training.precision import precision
from metahpo.training.prefetch import batches_of
from metahpo.training.schedules import cosine
from metahpo.training.settings import TrainingSettings


class Trainer:
    """Trains any ``MetaLearner`` on numbered tasks and keeps the run in a folder.

    learner: moved to the settings' device. run_dir: where checkpoints, metrics.csv and versions go; None keeps nothing.
    After each epoch the learner is validated on the first ``val_tasks`` tasks of ``val_tasks`` and saved. Iteration i
    of epoch e sees the tasks numbered from (e * iterations + i) * tasks on, and draws its randomness (dropout, and what
    a net takes from ``random`` and ``numpy.random``) from (seed, e, i): a run that was interrupted and resumed is bit
    for bit the run that was not (on the CPU, with the same torch and number of threads).

    ``optimizer`` may be changed and replaced between epochs, also by a scheduler of your own: a group's rate is the
    settings' (``lr``, ``min_lr``) only as long as nobody else sets it. Trainings in several threads of a process take
    turns step by step, and the methods of a learner may be called in another thread while it is trained.

    Inside a process group of ``torch.distributed`` every rank makes the same trainer and calls the same methods; each
    step's tasks are shared among them, and rank 0 alone keeps the run. W ranks give the numbers of one process to
    rounding, except that what a step draws (dropout) differs from rank to rank and so with W.

    Raises NonFiniteError when a loss or gradient is NaN or infinite: on the CPU before the update, on CUDA within
    ``read_every`` steps and before anything is saved.
    """

    def __init__(
        self,
        learner: MetaLearner,
        train_tasks: TaskSource,
        val_tasks: TaskSource,
        settings: TrainingSettings | None = None,
        run_dir: str | Path | None = None,
    ):
        check_parts(self, learner, settings, train_tasks=train_tasks, val_tasks=val_tasks)
        check_type(self, "run_dir", run_dir, (str, PathLike, type(None)), "a path or None", error=ConfigArgumentError)
        self.settings = settings or TrainingSettings()
        self.device = self.settings.torch_device()
        self.learner = learner.to(self.device)
        self.train_tasks, self.val_tasks = train_tasks, val_tasks
        with intra_op_threads(self.settings.threads):
            self.engine = ENGINES[self.settings.engine]()
        self.optimizer, self._freed = self._optimizer(), Freed(self.learner)
        self._rate = self.settings.lr
        self.epoch, self.iteration = 0, 0
        self.history: list[Row] = []
        self._partial = SumOfMetrics()
        self._finite = FiniteCheck(self.settings.read_every if self.device.type == "cuda" else 1)
        self._seconds: list[float] = []
        self._checked = not self.settings.check
        self._first = True
        self.ranks = current()
        self.run_dir = Path(run_dir) if run_dir is not None and self.ranks.first else None
        self.store = CheckpointStore(self.run_dir / "checkpoints") if self.run_dir else None
        if self.store and self.store.list():
            raise CheckpointError(f"{self.run_dir} already holds a run; resume it or choose another folder")

    @classmethod
    def resume(
        cls,
        run_dir: str | Path,
        learner: MetaLearner,
        train_tasks: TaskSource,
        val_tasks: TaskSource,
        settings: TrainingSettings | None = None,
    ) -> Trainer:
        """The run's trainer as its newest whole checkpoint left it; damaged ones are named and passed over.

        settings: the checkpoint's by default; with another device or engine the run goes on equal to rounding.
        """
        store = CheckpointStore(Path(run_dir) / "checkpoints")
        path, state, damaged = current().on_first(store.latest)
        for line in damaged if current().first else ():
            print(f"{line}; going on from {path.name}", file=sys.stderr)
        trainer = cls(learner, train_tasks, val_tasks, settings or TrainingSettings(**state["settings"]))
        if trainer.ranks.first:
            trainer.run_dir, trainer.store = Path(run_dir), store
        trainer._load(state, path)
        return trainer

    def fit(
        self,
        until_epoch: int | None = None,
        on_epoch: Callable[[Row], None] | None = None,
        *,
        until_iteration: int | None = None,
    ) -> list[Row]:
        """Trains up to ``until_epoch`` epochs in all (default: the settings'), and returns the history, a row an epoch.

        on_epoch: called with each new row. until_iteration: stop after so many outer updates in all, also within an
        epoch, which then has no row yet. Ctrl-C or SIGTERM ends the current step, saves, and raises ``Interrupted``.
        """
        for name, end in (("until_epoch", until_epoch), ("until_iteration", until_iteration)):
            if end is not None:
                check_whole(self, name, end, at_least=0, error=ConfigArgumentError)
        if on_epoch is not None:
            check_callable(self, "on_epoch", on_epoch, "a function of a row", error=ConfigArgumentError)
        size = self.settings.iterations
        ends = [self.settings.epochs * size, until_iteration, None if until_epoch is None else until_epoch * size]
        until = min(end for end in ends if end is not None)
        with intra_op_threads(self.settings.threads):
            return self._fit(until, on_epoch)

    def _fit(self, until: int, on_epoch: Callable[[Row], None] | None) -> list[Row]:
        size = self.settings.iterations
        if self.updates < until:
            check_reaches("train_tasks", self.train_tasks, until * self.settings.tasks)
            check_reaches("val_tasks", self.val_tasks, self.settings.val_tasks)
        if self.run_dir and self.updates < until:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            content = {**versions(self.device), "ranks": str(self.ranks.size)}
            write_json(self.run_dir / "versions.json", content)
        self.ranks.share_state(self.learner)
        self._finite.signum = None  # That of a stop before.
        with Interrupts() as interrupts:
            # One that was stopped while it validated has all its updates and no row.
            while self.updates < until or self.epoch < until // size:
                row = self._run_epoch(interrupts, until - self.epoch * size)
                if row and on_epoch:
                    on_epoch(row)
            if signum := self.ranks.agreed_signal(interrupts.signum):  # It came after the last step; all is saved.
                raise Interrupted(signum)
        return self.history

    @property
    def updates(self) -> int:
        """How many outer updates there were in all."""
        return self.epoch * self.settings.iterations + self.iteration

    def settled_engine(self) -> str:
        """The name of the engine that trains; auto makes its choice for it, on the next batch."""
        if not isinstance(self.engine, Auto):
            return self.engine.name
        tasks = self.train_tasks.batch(self.ranks.share(self._numbers(self.iteration))).to(self.device)
        with intra_op_threads(self.settings.threads), precision(self.learner, self.settings):
            return self.engine.settle("training", self.learner, tasks, self._phase()).name

    def evaluate(self, tasks: TaskSource, count: int) -> Row:
        """Means and 95% intervals over the first ``count`` tasks of ``tasks``, with the learner as it is."""
        metrics, _ = evaluate(self.learner, tasks, count, self.settings, self.engine)
        return summarise(metrics)

    def _optimizer(self) -> torch.optim.Optimizer:
        kind, settings = getattr(torch.optim, self.settings.optimizer), self.settings
        params = list(self.learner.outer_params().values())
        if not params:
            raise NetArgumentError(f"{type(self.learner).__name__}: has no parameter for the outer loop to learn")
        try:
            return kind(params, lr=settings.lr, **settings.optimizer_args)
        except (TypeError, ValueError) as error:
            raise ConfigArgumentError(
                f"optimizer_args: found {shown(settings.optimizer_args)}, expected arguments of torch.optim."
                f"{settings.optimizer}: {one_line(error)}"
            ) from error

    # One epoch.

    def _run_epoch(self, interrupts: Interrupts, end: int) -> Row | None:
        """Runs the epoch up to iteration ``end``, and validates if that is its last; None if it is not."""
        settings, start = self.settings, time.perf_counter()
        rate = self._set_rates()
        phase = self._phase()
        end = min(end, settings.iterations)
        shares = (self.ranks.share(self._numbers(i)) for i in range(self.iteration, end))
        batches = batches_of(self.train_tasks, shares, self.device)
        title = f"epoch {self.epoch + 1}/{settings.epochs}"
        with progress(title, settings.iterations, self.iteration) as bar, closing(batches):
            for _, tasks in batches:
                self._step(tasks, phase, interrupts.signum)
                self.iteration += 1
                bar.update()
                if self._finite.loss is not None:
                    bar.set_postfix_str(f"loss {self._finite.loss:.3f}", refresh=False)
                self._stop_if(interrupts.signum if self.ranks.size == 1 else self._finite.signum)
        if end < settings.iterations:
            self._save()
            return None
        self._refuse(self._finite.look())
        try:
            validation = self._validate(interrupts)
        except Exception:
            # Not the training of an epoch for its validation; resuming validates again.
            self._save()
            raise
        row = {"epoch": self.epoch + 1, "lr": rate}
        row.update({f"train_{name}": value for name, value in self._partial.means().items()})
        row.update({f"val_{name}": value for name, value in validation.items()})
        self.history.append(row)
        self._seconds.append(time.perf_counter() - start)
        self.epoch, self.iteration, self._partial = self.epoch + 1, 0, SumOfMetrics()
        self._save()
        return {**row, "seconds": self._seconds[-1]}

    def _set_rates(self) -> float:
        """Sets the epoch's rate in the groups that have the one before it; gives the first group's."""
        settings, before = self.settings, self._rate
        self._rate = settings.lr
        if settings.min_lr is not None:
            self._rate = cosine(self.epoch, settings.epochs, settings.lr, settings.min_lr)
        for group in self.optimizer.param_groups:
            if group["lr"] == before:
                group["lr"] = self._rate
        return float(self.optimizer.param_groups[0]["lr"])

    def _phase(self) -> Phase:
        phase = self.learner.training_phase(self.epoch)
        if phase.step_weights is None:
            return phase
        return replace(phase, step_weights=phase.step_weights.to(self.device))

    def _step(self, tasks: Task, phase: Phase, signum: int | None) -> None:
        numbers = self._numbers(self.iteration)
        seed = (self.settings.seed, self.epoch, self.iteration, *self.ranks.seed)
        with seeded(*seed, device=self.device), precision(self.learner, self.settings):
            if self.settings.check_gradient and self.updates == 0 and self.ranks.first:
                check_gradient(self.learner, tasks, phase)
            if not self._checked:
                check_engine(self.engine, self.learner, tasks, phase)
                self._checked = True
            if self._first:
                check_batch(self.train_tasks, tasks, self.ranks.share(numbers))
                with seeded(*seed, device=self.device):
                    check_outputs(self.learner, tasks, phase)
            with explained(self.learner, tasks) if self._first else nullcontext():
                result = self.engine.meta_gradient(self.learner, tasks, phase)
            self._first = False
        result, signals = self.ranks.mean(result, numbers, signum)
        self._refuse(self._finite.add(self.epoch + 1, self.iteration + 1, numbers, result, signals))
        with TURN:
            self._update(result)

    def _update(self, result: MetaGradient) -> None:
        if "loss" in result.metrics:
            raise NetArgumentError(
                f"{type(self.learner).__name__}.meta_loss: gives a metric 'loss', expected another name: this one is "
                "the outer loss's"
            )
        params = self.learner.outer_params()
        self._freed.add_to(self.optimizer, params)
        for name, param in params.items():
            # As torch does: what no task used stays as it is, whatever the optimizer's decay and momentum.
            param.grad = None if name in result.unused else result.grads[name]
        if self.settings.clip_value is not None:
            # Of a complex entry, as of two: torch does not clamp complex numbers.
            for grad in (p.grad for p in params.values() if p.grad is not None):
                part = torch.view_as_real(grad) if grad.is_complex() else grad
                part.clamp_(-self.settings.clip_value, self.settings.clip_value)
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(params.values(), self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        scalars = dict(result.metrics)
        self.learner.update_buffers(scalars.pop("buffers", {}))
        self._partial.add({"loss": result.loss, **scalars})

    def _numbers(self, iteration: int) -> range:
        first = (self.epoch * self.settings.iterations + iteration) * self.settings.tasks
        return range(first, first + self.settings.tasks)

    def _refuse(self, problem: str | None) -> None:
        if problem:
            kept = self.store.list() if self.store else []
            raise NonFiniteError(problem + (f"; the last good checkpoint is {kept[-1]}" if kept else ""))

    def _validate(self, interrupts: Interrupts) -> Row:
        metrics, _ = evaluate(
            self.learner,
            self.val_tasks,
            self.settings.val_tasks,
            self.settings,
            self.engine,
            title="validating",
            each=lambda: self._stop_if(self.ranks.agreed_signal(interrupts.signum)),
        )
        return summarise(metrics)

    def _stop_if(self, signum: int | None) -> None:
        if signum is not None:
            self._save()
            self.ranks.wait()  # Once one has gone, torchrun ends the others.
            raise Interrupted(signum)

    # The state of the run.

    def _save(self) -> None:
        self._refuse(self._finite.look())
        if self.store is None or self.run_dir is None:
            return
        state = {
            "epoch": self.epoch,
            "iteration": self.iteration,
            "learner": whole_state(self.learner),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_names": optimizer_names(self.optimizer, self.learner),
            "rate": self._rate,
            "history": self.history,
            "partial": self._partial.state(),
            "settings": self.settings.model_dump(),
            "engines": dict(self.engine.chosen) if isinstance(self.engine, Auto) else {},
        }
        # Those of the epoch before too: should this checkpoint be damaged, they are the best again.
        keep = [best_epochs(rows, self.settings.keep_best) for rows in (self.history, self.history[:-1])]
        # The log last: one without a checkpoint is not gone on with, and one that lacks a row is written again.
        self.store.save(state, self.epoch, self.iteration, {*keep[0], *keep[1]})
        CsvLog(self.run_dir / "metrics.csv").write(
            [{**row, "seconds": round(seconds, 3)} for row, seconds in zip(self.history, self._seconds)]
        )

    def _load(self, state: State, path: Path) -> None:
        load_learner(self.learner, state["learner"], path)
        load_optimizer(self.optimizer, self.learner, state, path)
        # The version before let no group have another.
        self._rate = state.get("rate", self.optimizer.param_groups[0]["lr"])
        self.epoch, self.iteration, self.history = state["epoch"], state["iteration"], state["history"]
        self._partial = SumOfMetrics(**state["partial"])
        if isinstance(self.engine, Auto):
            self.engine.chosen.update(state.get("engines", {}))
        log = CsvLog(self.run_dir / "metrics.csv") if self.run_dir else None
        self._seconds = log.restore(self.history) if log else [0.0] * len(self.history)
