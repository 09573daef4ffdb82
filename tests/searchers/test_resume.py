"""The same seed gives the same trials, however often the search is stopped and however its workers are timed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from metahpo.errors import SearchError
from metahpo.searchers import Choice, Float, Outcome, Proposal, Random, Searcher, Space, Study
from metahpo.searchers.executors.base import Died, Executor, Finished, Reported, run_job, write_result

SPACE = Space(x=Float(-1, 1), y=Float(-1, 1), z=Choice(0, 1))
TRIALS = 20


class Killed(Exception):
    """The study's process, were it one of its own."""


@dataclass(frozen=True)
class Descent(Searcher):
    """From the best so far a step at random, which what has failed or is at work turns round."""

    def suggest(self, history, space, rng):
        if not history.complete:
            return space.sample(rng)
        best = min(history.complete, key=lambda o: (o.loss, o.number))
        sign = (-1) ** (len(history.failed) + len(history.pending) + sum(len(o.notes) for o in history))
        step = 0.2 * sign * rng.standard_normal(len(space))
        budget = 1 + float(rng.integers(3))
        return Proposal(space.decode(np.clip(space.encode(best.settings) + step, 0, 1)), budget, notes={"step": sign})


def bowl(trial):
    """Least at (0.3, -0.2); some trials diverge and some raise."""
    if trial.number % 7 == 3:
        return math.nan
    if trial.number % 7 == 5:
        raise ZeroDivisionError(f"trial {trial.number}")
    trial.report(1, trial["x"])
    score = (trial["x"] - 0.3) ** 2 + (trial["y"] + 0.2) ** 2
    return Outcome(score, notes={"number": trial.number} if trial.number % 2 else {})


@dataclass
class Shuffled(Executor):
    """Workers of this process of which a random one is done next; the study's end comes after ``life`` trials."""

    workers: int = 3
    seed: int = 0
    life: float = math.inf
    jobs: list = field(default_factory=list)

    def start(self, objective, folder):
        self.objective, self.random = objective, random.Random(self.seed)

    def submit(self, job):
        self.jobs.append(job)
        assert len(self.jobs) <= self.workers

    def wait(self, emit, seconds):
        if self.life <= 0:
            raise Killed
        self.life -= 1
        job = self.jobs.pop(self.random.randrange(len(self.jobs)))
        result = run_job(self.objective, job, lambda step, score: emit(Reported(job.number, step, score)))
        emit(Finished(job.number, result))

    def stop(self, grace):
        self.jobs.clear()


def told(study):
    """What a search came to, without what its timing changes."""
    return [(t.settings, t.state, t.scores, dict(t.reports), dict(t.notes), t.budget) for t in study.trials]


@pytest.fixture(scope="module")
def undisturbed():
    """What the search gives with one worker at a time, by the number that it may count with."""

    def run(parallel):
        with Study(SPACE, Descent(), seed=5, parallel=parallel) as study:
            study.optimize(bowl, TRIALS, max_failures=99)
            return told(study)

    return {parallel: run(parallel) for parallel in (1, 3)}


def test_the_searcher_of_these_tests_sees_what_it_should(undisturbed):
    assert undisturbed[1] != undisturbed[3]
    assert {state for _, state, *_ in undisturbed[3]} == {"complete", "failed"}
    with Study(SPACE, Descent(), seed=6, parallel=3) as study:
        study.optimize(bowl, TRIALS, max_failures=99)
        assert told(study) != undisturbed[3]


@pytest.mark.parametrize("seed", range(10))
def test_whatever_the_timing_of_several_workers(seed, undisturbed):
    with Study(SPACE, Descent(), seed=5) as study:
        study.optimize(bowl, TRIALS, Shuffled(3, seed), max_failures=99)
        assert told(study) == undisturbed[3]


@pytest.mark.parametrize("seed", range(2))
def test_whatever_the_moments_of_its_deaths(seed, tmp_path, undisturbed):
    moments, deaths = random.Random(seed), 0
    while True:
        # Also with fewer or more workers than it counts with.
        workers = 3 if deaths == 0 else moments.randint(1, 5)
        with Study(SPACE, Descent(), tmp_path / "study.db", seed=5) as study:
            try:
                study.optimize(bowl, TRIALS, Shuffled(workers, seed, moments.randint(1, 7)), max_failures=99)
                break
            except Killed:
                deaths += 1
    assert deaths >= 3
    with Study.open(tmp_path / "study.db") as study:
        assert told(study) == undisturbed[3]
        assert not list((tmp_path / "study.files" / "results").iterdir())


def test_asked_and_told_by_hand_too(tmp_path):
    def go_on(count):
        with Study(SPACE, Descent(), tmp_path / "study.db", seed=5) as study:
            for _ in range(count):
                trial = study.ask()
                study.tell(trial, (trial["x"] - 0.3) ** 2)
            return told(study)

    go_on(4)
    go_on(1)
    found = go_on(3)
    with Study(SPACE, Descent(), seed=5) as study:
        for _ in range(8):
            trial = study.ask()
            study.tell(trial, (trial["x"] - 0.3) ** 2)
        assert told(study) == found


def test_trials_by_hand_between_runs(tmp_path):
    """What was asked by hand is seen at once; the clock goes on from there, after a restart as without one."""

    def begin(path):
        study = Study(SPACE, Descent(), path, seed=5)
        study.optimize(bowl, 6, Shuffled(3), max_failures=99)
        study.tell(study.ask({"x": 0.25, "y": -0.25, "z": 1}), 0.005)
        return study

    with begin(tmp_path / "whole.db") as study:
        study.optimize(bowl, 12, Shuffled(3, 1), max_failures=99)
        whole = told(study)
    with begin(tmp_path / "parts.db") as study, pytest.raises(Killed):
        study.optimize(bowl, 12, Shuffled(3, 2, life=3), max_failures=99)
    with Study(SPACE, Descent(), tmp_path / "parts.db", seed=5) as study:
        study.optimize(bowl, 12, Shuffled(2, 3), max_failures=99)
        assert told(study) == whole


def test_every_trial_has_a_seed_of_its_own(tmp_path):
    def seeds(seed, path=None):
        found = []
        with Study(SPACE, Random(), path, seed=seed) as study:
            study.optimize(lambda trial: found.append(trial.seed) or 0.0, 8)
        return found

    first = seeds(0)
    assert len(set(first)) == 8
    assert not set(first) & set(seeds(1))
    with Study(SPACE, Random(), tmp_path / "study.db") as study:
        study.optimize(lambda trial: 0.0, 3)
    assert seeds(0, tmp_path / "study.db") == first[3:]


def test_a_trial_that_had_ended_is_not_run_again(tmp_path):
    """The study's process died after a worker had left its result, and before the study had it."""
    with Study(SPACE, Random(), tmp_path / "study.db") as study:
        job = study.job(study.ask().number)
    result = run_job(lambda trial: trial.report(3, 0.5) or Outcome(0.25, {"x": 1.0}, {"a": [1]}), job, lambda *_: None)
    with Study(SPACE, Random(), tmp_path / "study.db") as study:
        study.optimize(refuse, 1)
        (trial,) = study.trials
    assert (trial.score, dict(trial.reports), trial.gradients, trial.notes) == (0.25, {3: 0.5}, {"x": 1.0}, {"a": [1]})
    assert trial.seconds == result.seconds


def refuse(trial):
    raise AssertionError("it is not called")


class Dying(Shuffled):
    """Each worker dies ``deaths`` times with its trial, the last time after the result was left if ``late``."""

    def __init__(self, deaths, late=False):
        super().__init__(1)
        self.deaths, self.late, self.attempts = deaths, late, []

    def wait(self, emit, seconds):
        job = self.jobs.pop()
        self.attempts.append(job.attempt)
        if job.attempt < self.deaths:
            if self.late and job.attempt == self.deaths - 1:
                write_result(job.result, run_job(self.objective, job, lambda *_: None))
            emit(Died(job.number, "killed by SIGKILL"))
        else:
            emit(Finished(job.number, run_job(self.objective, job, lambda *_: None)))


def test_a_trial_whose_worker_dies_is_run_at_most_so_often():
    with Study(SPACE, Random()) as study:
        dying = Dying(2)
        study.optimize(lambda trial: trial.attempt, 1, dying, max_attempts=3)
        assert (study.trials[0].score, study.trials[0].deaths, dying.attempts) == (2, 2, [0, 1, 2])
        study.optimize(lambda trial: 0.0, 2, Dying(2), max_attempts=2)
        assert study.trials[1].state == "failed"
        assert study.trials[1].error == "its worker died 2 times, the last time killed by SIGKILL"


def test_deaths_are_counted_over_restarts(tmp_path):
    for _ in range(2):
        with Study(SPACE, Random(), tmp_path / "study.db") as study, pytest.raises(Killed):
            study.optimize(bowl, 1, DiesThenEnds())
    with Study(SPACE, Random(), tmp_path / "study.db") as study:
        study.optimize(bowl, 1, Dying(9), max_attempts=3)
        assert (study.trials[0].deaths, study.trials[0].state) == (3, "failed")


class DiesThenEnds(Shuffled):
    """A worker dies, and then the study's process."""

    def wait(self, emit, seconds):
        if not self.life:
            raise Killed
        self.life = 0
        emit(Died(self.jobs.pop().number, "killed by SIGKILL"))


def test_a_worker_that_dies_after_its_trial_has_ended_costs_nothing(tmp_path):
    with Study(SPACE, Random(), tmp_path / "study.db") as study:
        study.optimize(lambda trial: 0.5, 1, Dying(1, late=True), max_attempts=1)
        assert (study.trials[0].score, study.trials[0].deaths) == (0.5, 0)


def test_a_trial_that_takes_the_studys_own_process_along_is_given_up_at_last(tmp_path, start):
    program = f"""
import os, signal
from metahpo.searchers import *
def objective(trial):
    print("attempt", trial.attempt, flush=True)
    if trial.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return 0.0
study = Study(Space(x=Float(0, 1)), storage={str(tmp_path / "study.db")!r})
study.optimize(objective, 3, max_attempts=2)
print([t.state for t in study.trials], study.trials[1].error)
"""
    outputs = []
    for _ in range(3):
        code, out, err = start(program).finished()
        outputs.append((code, out.splitlines()))
    assert outputs[:2] == [(-9, ["attempt 0", "attempt 0"]), (-9, ["attempt 1"])], err
    assert outputs[2][0] == 0, err
    assert outputs[2][1][-1] == (
        "['complete', 'failed', 'complete'] its worker died 2 times, the last time with the study's own process"
    )


def test_of_a_search_with_other_settings_of_the_clock_nothing_is_begun(tmp_path):
    for parallel in (0, -1, True, 2.0, "3"):
        with pytest.raises(SearchError, match=r"^Study: parallel should be a whole number of at least 1, found"):
            Study(SPACE, parallel=parallel)
