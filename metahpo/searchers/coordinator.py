"""The loop of a search: keeps an executor's workers busy and writes down what they give."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from metahpo.errors import SearchError, one_line
from metahpo.searchers.clock import VirtualClock
from metahpo.searchers.executors.base import Died, Event, Executor, Finished, Objective, Reported, Result, read_result
from metahpo.searchers.records import TrialRecord
from metahpo.training.environment import progress
from metahpo.training.interrupts import Interrupted, Interrupts

if TYPE_CHECKING:
    from metahpo.searchers.study import Study

# How long a training may take to save itself when the search is stopped.
GRACE_SECONDS = 30.0
LOOK_SECONDS = 0.2


class Coordinator:
    """One call of ``Study.optimize``: see there."""

    def __init__(
        self,
        study: Study,
        executor: Executor,
        trials: int | None,
        budget: float | None,
        max_failures: int,
        max_attempts: int,
        on_trial: Callable[[TrialRecord], None] | None,
    ):
        self.study, self.executor, self.trials, self.budget = study, executor, trials, budget
        self.max_failures, self.max_attempts, self.on_trial = max_failures, max_attempts, on_trial
        records = study.trials
        self._clock = VirtualClock.of(records, study.parallel or executor.workers)
        self._spent = sum(r.clock[1] - r.clock[0] for r in records if r.clock)
        # Those of a coordinator that is gone come first.
        self._waiting = deque(r.number for r in records if r.state == "running")
        self._working: set[int] = set()
        self._failures, self._over = 0, False

    def run(self, objective: Objective) -> None:
        self.executor.start(objective, self.study.folder)
        grace = 0.0
        with Interrupts() as interrupts, progress("trials", self.trials or 0, self._ended()) as self._bar:
            try:
                while True:
                    self._submit()
                    if not self._working:
                        return
                    self.executor.wait(self._take, LOOK_SECONDS)
                    if self._failures >= self.max_failures:
                        self._refuse()
                    if interrupts.signum is not None:
                        grace = GRACE_SECONDS
                        raise Interrupted(interrupts.signum)
            finally:
                self.executor.stop(grace)

    def _submit(self) -> None:
        while len(self._working) < self.executor.workers:
            number = self._waiting.popleft() if self._waiting else self._propose()
            if number is None:
                return
            self._working.add(number)
            self.executor.submit(self.study.job(number))

    def _propose(self) -> int | None:
        """A new trial's number; None if there is none to begin now."""
        study, clock = self.study, self._clock
        records = study.trials
        if self._over or (self.trials is not None and len(records) >= self.trials):
            return None
        if self.budget is not None and self._spent >= self.budget:
            return None
        blind = not study.searcher.adaptive
        while True:
            if not clock.full or blind:
                proposal = study.suggest(() if blind else clock.at_work)
                if proposal is not None:
                    break
                self._over = clock.next() is None or blind
                if self._over:
                    return None
            # The searcher has to see one more result, the next by the clock; it may not be there yet.
            first = clock.next()
            if first is None or records[first].state == "running":
                return None
            clock.end()
        duration = study.duration(proposal)
        number = study.add(proposal, clock.times(duration))
        clock.start(number, duration)
        self._spent += duration
        return number

    def _take(self, event: Event) -> None:
        if isinstance(event, Reported):
            self.study.report(event.number, event.step, event.score)
        elif isinstance(event, Died):
            self._working.discard(event.number)
            path = self.study.result_path(event.number)
            if path and (result := read_result(path)) is not None:
                # It died after its trial's end, before it could say so.
                self._finish(event.number, result)
                return
            record = self.study.died(event.number)
            # One that gets further each time is on its way.
            if record.stalled < self.max_attempts:
                self._waiting.append(event.number)
            else:
                why = f"its worker died {record.deaths} times, the last time {event.why}"
                self._finish(event.number, Result(error=why))
        elif isinstance(event, Finished):
            self._working.discard(event.number)
            self._finish(event.number, event.result)

    def _finish(self, number: int, result: Result) -> None:
        record = self.study.end(number, result)
        self._failures = self._failures + 1 if record.state == "failed" else 0
        self._last = record
        self._bar.update()
        if not self._bar.disable and (best := self.study.best) is not None:
            self._bar.set_postfix_str(f"best {best.score:.5g}, trial {best.number}", refresh=False)
        if self.on_trial:
            self.on_trial(record)

    def _refuse(self) -> None:
        # Of a traceback what comes after the last line of code.
        lines = (self._last.error or "").splitlines()
        code = max((i for i, line in enumerate(lines) if line.startswith(" ")), default=-1)
        last = one_line(" ".join(lines[code + 1 :] or lines[-1:]))
        raise SearchError(
            f"stopped after {self._failures} failures in a row; the last, trial {self._last.number}: {last} "
            "(the study keeps the tracebacks)"
        )

    def _ended(self) -> int:
        return sum(r.state != "running" for r in self.study.trials)
