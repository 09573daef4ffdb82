from __future__ import annotations

import random

import pytest

from metahpo.searchers.clock import VirtualClock
from metahpo.searchers.records import TrialRecord


def run(durations, workers):
    """The clock as a study drives it: (records, and for each trial those that had ended when it started)."""
    clock, records, known = VirtualClock(workers), [], []
    for number, duration in enumerate(durations):
        while clock.full:
            clock.end()
        known.append(set(range(number)) - clock.at_work)
        records.append(TrialRecord(number, {}, "complete", clock=clock.times(duration)))
        clock.start(number, duration)
    return clock, records, known


def by_hand(durations, workers):
    """Each trial goes to the worker that is free first; the starts, and those that had ended by then."""
    free, starts, ends = [0.0] * workers, [], []
    for duration in durations:
        worker = min(range(workers), key=lambda w: free[w])
        starts.append(free[worker])
        free[worker] += duration
        ends.append(free[worker])
    return starts, ends


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_trials_start_and_end_as_with_real_workers(workers):
    rng = random.Random(workers)
    durations = [rng.uniform(0.1, 5) for _ in range(60)]
    _, records, known = run(durations, workers)
    starts, ends = by_hand(durations, workers)
    assert [r.clock[0] for r in records] == pytest.approx(starts)
    assert [r.clock[1] for r in records] == pytest.approx(ends)
    for number, seen in enumerate(known):
        assert seen == {other for other in range(number) if ends[other] <= starts[number] + 1e-9}


@pytest.mark.parametrize("workers", [1, 3])
def test_it_is_the_same_when_it_is_made_anew_from_the_trials(workers):
    rng = random.Random(0)
    # Equal ends, and trials that add nothing.
    durations = [rng.choice([0, 1, 1, 2, 3]) for _ in range(50)]
    for count in range(len(durations)):
        clock, records, _ = run(durations[:count], workers)
        again = VirtualClock.of(records, workers)
        assert (again.now, again.ended, again.at_work) == (clock.now, clock.ended, clock.at_work)
        order = []
        while clock.at_work:
            order.append(clock.next())
            clock.end()
        for number in order:
            assert again.next() == number
            again.end()
            assert again.ended <= len(records)
        assert again.next() is None


def test_of_trials_that_end_at_once_the_lower_number_comes_first():
    clock = VirtualClock(3)
    for number in (2, 0, 1):
        clock.start(number, 1.0)
    order = []
    while clock.next() is not None:
        order.append(clock.next())
        clock.end()
    assert order == [0, 1, 2]
    assert clock.now == 1.0


def test_trials_told_by_hand_are_over_before_all_others():
    records = [TrialRecord(0, {}, "complete"), TrialRecord(1, {}, "complete", clock=(0.0, 2.0, 0))]
    clock = VirtualClock.of(records, 2)
    assert clock.full
    assert clock.next() == 0
    clock.end()
    assert (clock.now, clock.at_work) == (0.0, {1})
