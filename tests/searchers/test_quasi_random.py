from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import qmc

from metahpo.searchers import Choice, Float, Int, QuasiRandom, Space, Study, SuccessiveHalving

UNIT = Space(x=Float(0, 1), y=Float(0, 1), z=Float(0, 1))


def points(records):
    return np.array([list(record.settings.values()) for record in records])


def searched(trials, **options):
    study = Study(UNIT, QuasiRandom(), **options)
    study.optimize(lambda trial: 0.0, trials)
    return study.trials


def test_points_are_those_of_scipys_sobol_sequence():
    trials = searched(32)
    expected = qmc.Sobol(3, scramble=True, rng=trials[0].notes["sobol"]).random(32)
    assert points(trials) == pytest.approx(expected, abs=1e-12)


def test_a_power_of_two_of_them_fills_every_share_of_the_space_evenly():
    found = points(searched(64))
    for axis in range(3):
        assert np.bincount((found[:, axis] * 64).astype(int), minlength=64).tolist() == [1] * 64
    boxes = (found[:, 0] * 8).astype(int) * 8 + (found[:, 1] * 8).astype(int)
    assert np.bincount(boxes, minlength=64).tolist() == [1] * 64
    uniform = np.mean([qmc.discrepancy(np.random.default_rng(i).random((64, 3))) for i in range(20)])
    assert qmc.discrepancy(found) < uniform / 3


def test_the_studys_seed_scrambles():
    assert searched(1, seed=1)[0].settings != searched(1, seed=2)[0].settings


def test_settings_of_the_users_own_leave_no_gap_in_the_sequence():
    study = Study(UNIT, QuasiRandom())
    for i in range(8):
        if i in (0, 3, 4):
            study.ask({"x": 0.5, "y": 0.5, "z": 0.5})
        study.ask()
    own = [record for record in study.trials if "sobol" in record.notes]
    expected = qmc.Sobol(3, scramble=True, rng=own[0].notes["sobol"]).random(8)
    assert points(own) == pytest.approx(expected, abs=1e-12)


def test_as_the_base_of_successive_halving():
    study = Study(UNIT, SuccessiveHalving(max_budget=9, base=QuasiRandom()))
    study.optimize(lambda trial: trial["x"], 20)
    new = [record for record in study.trials if record.parent is None]
    seed = new[0].notes["base"]["sobol"]
    assert len(new) < 20
    assert points(new) == pytest.approx(qmc.Sobol(3, scramble=True, rng=seed).random(32)[: len(new)], abs=1e-12)


def test_stepped_numbers_and_choices_come_equally_often():
    space = Space(n=Int(0, 3), rule=Choice("a", "b"))
    study = Study(space, QuasiRandom())
    study.optimize(lambda trial: 0.0, 64)
    pairs = [(record.settings["n"], record.settings["rule"]) for record in study.trials]
    assert {pairs.count(pair) for pair in pairs} == {8}
