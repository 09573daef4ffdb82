"""A clock by which a search with several workers is the same each time."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from metahpo.searchers.records import TrialRecord


class VirtualClock:
    """Says in which order the searcher sees the results of ``workers`` workers, whatever their real timing.

    Each worker is taken to need as long for a trial as the training it adds: its budget less that of the trial it goes
    on from (1 without budgets). Of trials that end at once the one with the lower number comes first.
    """

    def __init__(self, workers: int):
        self.workers, self.now, self.ended = workers, 0.0, 0
        self._busy: list[tuple[float, int]] = []

    @classmethod
    def of(cls, records: Iterable[TrialRecord], workers: int) -> VirtualClock:
        """The clock as it was when the last of the trials was proposed."""
        clock, timed = cls(workers), []
        for record in records:
            # One that was asked for and told by hand has no times: it is over since the beginning, or at once.
            start, end, ended = record.clock or (0.0, 0.0, 0)
            timed.append((end, record.number))
            clock.now, clock.ended = max(clock.now, start), max(clock.ended, ended)
        clock._busy = sorted(timed)[clock.ended :]
        return clock

    @property
    def full(self) -> bool:
        return len(self._busy) >= self.workers

    def next(self) -> int | None:
        """The trial at work that ends first; None if there is none."""
        return self._busy[0][1] if self._busy else None

    def end(self) -> None:
        """Lets that trial end."""
        self.now = max(self.now, heapq.heappop(self._busy)[0])
        self.ended += 1

    def start(self, number: int, duration: float) -> None:
        heapq.heappush(self._busy, (self.now + duration, number))

    def times(self, duration: float) -> tuple[float, float, int]:
        """What a trial that starts now is kept with."""
        return self.now, self.now + duration, self.ended

    @property
    def at_work(self) -> set[int]:
        return {number for _, number in self._busy}
