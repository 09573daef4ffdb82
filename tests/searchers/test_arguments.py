"""Whatever is passed to a study or a space that cannot be meant is refused in one line."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from metahpo.errors import MetaHPOError
from metahpo.searchers import (
    ASHA,
    BOHB,
    CMAES,
    TPE,
    Bayesian,
    Choice,
    DifferentialEvolution,
    Float,
    Genetic,
    Gradient,
    Grid,
    Hyperband,
    Int,
    LocalSearch,
    Outcome,
    Processes,
    Random,
    Ray,
    RegularizedEvolution,
    Space,
    Study,
)

SPACE = Space(x=Float(0, 1), n=Int(1, 9))
NONSENSE = {
    "nan": math.nan,
    "infinite": math.inf,
    "negative": -1,
    "text": "no",
    "a flag": True,
    "a list": [1],
    "an object": object(),
}
WHOLE = {
    "trials": lambda v: Study(SPACE).optimize(lambda t: 1.0, v),
    "max_failures": lambda v: Study(SPACE).optimize(lambda t: 1.0, 1, max_failures=v),
    "max_attempts": lambda v: Study(SPACE).optimize(lambda t: 1.0, 1, max_attempts=v),
    "workers": lambda v: Processes(v),
    "threads": lambda v: Processes(1, v),
    "seed": lambda v: Study(SPACE, seed=v),
    "parallel": lambda v: Study(SPACE, parallel=v),
    "step": lambda v: Study(SPACE).ask().report(v, 1.0),
    "trial": lambda v: Study(SPACE).tell(v, 1.0),
    "start": lambda v: Space(n=Int(0, 3)).grid(v),
    "initial": lambda v: Bayesian(initial=v),
    "candidates": lambda v: TPE(candidates=v),
    "population": lambda v: CMAES(population=v),
    "tournament": lambda v: Genetic(tournament=v),
    "starts": lambda v: Gradient(starts=v),
    "patience": lambda v: LocalSearch(patience=v),
    "sample": lambda v: RegularizedEvolution(sample=v),
}
NUMBERS = {
    "min_budget": lambda v: Hyperband(min_budget=v),
    "eta": lambda v: ASHA(eta=v),
    "random_fraction": lambda v: BOHB(random_fraction=v),
    "radius": lambda v: Gradient(radius=v),
    "hops": lambda v: Gradient(hops=v),
    "tolerance": lambda v: Gradient(tolerance=v),
    "weight": lambda v: DifferentialEvolution(weight=v),
    "noise": lambda v: Bayesian(noise=v),
    "gpus": lambda v: Ray(1, gpus=v),
}
OTHERS = {
    "budget": (lambda v: Study(SPACE).optimize(lambda t: 1.0, budget=v), {"infinite"}),
    "space": (Study, set()),
    "searcher": (lambda v: Study(SPACE, v), set()),
    "storage": (lambda v: Study(SPACE, storage=v), {"text"}),
    "name": (lambda v: Study(SPACE, name=v), {"text"}),
    "direction": (lambda v: Study(SPACE, direction=v), set()),
    "objective": (lambda v: Study(SPACE).optimize(v, 1), set()),
    "on_trial": (lambda v: Study(SPACE).optimize(lambda t: 1.0, 1, on_trial=v), set()),
    "settings": (lambda v: Study(SPACE).ask(v), set()),
    "error": (lambda v: (lambda s: s.tell(s.ask(), error=v))(Study(SPACE)), {"text"}),
    "low": (lambda v: Float(v, 2), {"negative"}),
    "log": (lambda v: Float(1, 2, log=v), {"a flag"}),
    "when": (lambda v: Choice(1, when=v), set()),
    "multivariate": (lambda v: TPE(multivariate=v), {"a flag"}),
    "strategy": (lambda v: DifferentialEvolution(strategy=v), set()),
    "acquisition": (lambda v: Bayesian(acquisition=v), set()),
    "base": (lambda v: ASHA(base=v), set()),
    "gradients": (lambda v: Outcome(1.0, gradients=v), set()),
    "address": (lambda v: Ray(1, address=v), {"text"}),
}
CASES = [(name, call, kind) for table in (WHOLE, NUMBERS) for name, call in table.items() for kind in NONSENSE] + [
    (name, call, kind) for name, (call, fine) in OTHERS.items() for kind in NONSENSE if kind not in fine
]


@pytest.mark.parametrize("name, call, kind", CASES, ids=[f"{n}-{k}" for n, _, k in CASES])
def test_nonsense_is_refused_in_one_line_that_names_the_argument(name, call, kind):
    with pytest.raises(MetaHPOError) as raised:
        call(NONSENSE[kind])
    assert isinstance(raised.value, ValueError)
    assert "\n" not in str(raised.value)
    assert name in str(raised.value) or name in ("start", "low")


def test_numpys_and_torchs_numbers_are_taken_wherever_a_number_is():
    two, half = np.int64(2), np.float32(0.5)
    space = Space(x=Float(half, np.float64(1)), n=Int(np.int8(1), two), c=Choice(two, half, np.bool_(True)))
    assert space == Space(x=Float(0.5, 1.0), n=Int(1, 2), c=Choice(2, 0.5, True))
    with Study(space, Random(), seed=two, parallel=two) as study:
        assert type(study.seed) is type(study.parallel) is int
        asked = study.ask({"x": half, "n": torch.tensor(2), "c": two})
        assert list(map(type, asked.settings.values())) == [float, int, int]
        asked.report(two, half)
        study.tell(np.int64(0), half)
        study.optimize(lambda trial: half, np.int64(3), two - 1, budget=np.float64(9), max_failures=two)
        assert [trial.score for trial in study.trials] == [0.5] * 3
    for searcher, expected in (
        (TPE(two, two, np.bool_(True)), TPE(2, 2, True)),
        (LocalSearch(step=np.float64(0.5)), LocalSearch(step=0.5)),
        (ASHA(np.float64(1), np.int64(9), two), ASHA(1.0, 9, 2)),
        (Gradient(hops=np.float64(0.5)), Gradient(hops=0.5)),
    ):
        # By its text a study knows its searcher again.
        assert repr(searcher) == repr(expected)


def test_another_studys_trial_is_not_told(tmp_path):
    with Study(SPACE) as first, Study(SPACE) as second:
        trial = first.ask()
        second.ask()
        with pytest.raises(ValueError, match=r"^tell: trial 0 is of another study$"):
            second.tell(trial, 1.0)
        assert first.tell(trial, 1.0).state == "complete"
    with Study(SPACE, storage=tmp_path / "study.db") as study:
        trial = study.ask()
    with Study(SPACE, storage=tmp_path / "study.db") as study:
        assert study.tell(trial, 1.0).state == "complete"


@pytest.mark.parametrize("score", [True, "1", b"1"])
def test_what_only_reads_as_a_number_is_no_score(score):
    with Study(SPACE) as study:
        study.optimize(lambda trial: score, 1)
        assert "expected a number" in study.trials[0].error
        study.optimize(lambda trial: trial.report(1, score) or 1.0, 2)
        assert "trial.report: score should be a number" in study.trials[1].error


FINE = {
    "float": Space(x=Float(0, 1, step=1e-7), y=Float(0, 1)),
    "int": Space(x=Int(0, 10**7), y=Choice("a", "b")),
    "all": Space(x=Int(-(2**53), 2**53), y=Int(1, 10**7, log=True)),
    "odd": Space(x=Float(0, 1, step=0.3), y=Float(0, 1)),
}


@pytest.mark.parametrize("space", FINE)
@pytest.mark.parametrize("searcher", [TPE(2), TPE(2, multivariate=False), BOHB(1, 3, 3, base=TPE(0))])
def test_models_of_densities_take_millions_of_steps(searcher, space):
    with Study(FINE[space], searcher) as study:
        study.optimize(lambda trial: float(trial["x"]), 9)
        assert all(trial.state == "complete" for trial in study.trials)


def test_a_grid_of_millions_makes_only_the_values_that_are_asked_for():
    made = []

    class Counted(Float):
        def at(self, u):
            made.append(u)
            return super().at(u)

    space = Space(c=Counted(0, 1, step=1e-7), n=Int(0, 10**7), m=Int(0, 1, when={"n": 5}))
    with Study(space, Grid()) as study:
        study.optimize(lambda trial: 0.0, 8)
        settings = [(t.settings["c"], t.settings["n"], t.settings.get("m")) for t in study.trials]
    assert settings == [(0.0, n, None) for n in range(5)] + [(0.0, 5, 0), (0.0, 5, 1), (0.0, 6, None)]
    assert len(made) < 100
