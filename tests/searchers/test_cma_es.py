from __future__ import annotations

import numpy as np
import pytest
from cmaes import CMA, CatCMAwM

from metahpo.searchers import CMAES, Choice, Float, Int, Space, Study
from metahpo.testing.running import run

UNIT = Space({f"x{i}": Float(0, 1) for i in range(5)})


def sphere(trial):
    return sum((value - 0.37) ** 2 for value in trial.settings.values())


def seed_of(number):
    """What the searcher draws from the generator of the study with seed 0."""
    return int(np.random.default_rng([0, number]).integers(2**32))


def test_sphere_in_five_dimensions():
    records = run(CMAES(), UNIT, sphere, 500)
    assert min(record.score for record in records) < 1e-6


def test_with_four_workers():
    records = run(CMAES(), UNIT, sphere, 600, workers=4)
    assert min(record.score for record in records) < 1e-6


def test_a_narrow_valley_that_is_turned():
    space = Space(x=Float(0, 1), y=Float(0, 1))
    records = run(CMAES(), space, lambda t: 1e4 * (t["x"] - t["y"]) ** 2 + (t["x"] + t["y"] - 1.2) ** 2, 500)
    assert min(record.score for record in records) < 1e-8


def test_trials_are_those_of_a_plain_loop():
    records = run(CMAES(sigma=0.3, population=6, initial=3), UNIT, sphere, 63)
    best = min(records[:3], key=lambda r: r.score).settings
    plain = CMA(np.array(list(best.values())), 0.3, np.tile([0.0, 1.0], (5, 1)), population_size=6)
    for generation in range(10):
        told = []
        for number in range(3 + 6 * generation, 9 + 6 * generation):
            plain.reseed_rng(seed_of(number))
            x = plain.ask()
            assert list(records[number].settings.values()) == pytest.approx(x, abs=1e-12)
            told.append((x, float(((x - 0.37) ** 2).sum())))
        plain.tell(told)


def test_mixed_trials_are_those_of_a_plain_loop_of_catcma_with_margin():
    space = Space(rule=Choice("a", "b", "c"), x=Float(0, 1), n=Int(0, 9), y=Float(0, 1), m=Int(0, 4))

    def loss(trial):
        s = trial.settings
        return (s["x"] - 0.3) ** 2 + (s["y"] - 0.6) ** 2 + abs(s["n"] - 3) + abs(s["m"] - 2) + (s["rule"] != "c")

    records = run(CMAES(initial=0, population=8), space, loss, 48)
    places = [[(i + 0.5) / n for i in range(n)] for n in (10, 5)]
    plain = CatCMAwM([[0, 1], [0, 1]], places, [3], 8, np.full(4, 0.5), 0.2, np.eye(4))
    for generation in range(6):
        told = []
        for number in range(8 * generation, 8 * generation + 8):
            plain.reseed_rng(seed_of(number))
            point, found = plain.ask(), records[number].settings
            assert [found["x"], found["y"]] == pytest.approx(point.x, abs=1e-12)
            assert [(found["n"] + 0.5) / 10, (found["m"] + 0.5) / 5] == pytest.approx(point.z)
            assert "abc".index(found["rule"]) == point.c.argmax()
            told.append((point, records[number].score))
        plain.tell(told)


def test_mixed_space_is_solved():
    space = Space(
        rule=Choice(*"abcdef"), x=Float(1e-4, 1, log=True), n=Int(0, 63), y=Float(0, 1), on=Choice(True, False)
    )

    def loss(trial):
        s = trial.settings
        return (np.log10(s["x"]) + 2) ** 2 + (s["y"] - 0.6) ** 2 + abs(s["n"] - 40) / 20 + (s["rule"] != "c") + s["on"]

    records = run(CMAES(), space, loss, 400)
    assert min(record.score for record in records) < 1e-3


def test_after_it_has_converged_it_begins_anew_with_twice_the_population():
    space = Space(x=Float(0, 1), y=Float(0, 1))
    records = run(CMAES(initial=0, population=20), space, lambda trial: 1.0, 1200)
    notes = [record.notes["cma_es"] for record in records]
    runs = [note["run"] for note in notes]
    assert runs == sorted(runs) and runs[-1] >= 1
    # 10 + 30 D / population generations without any difference end a run.
    assert runs.count(0) % 20 == 0 and 13 <= runs.count(0) / 20 <= 20
    means = {tuple(note["mean"]) for note in notes}
    assert len(means) == runs[-1] + 1 and (0.5, 0.5) in means
    second = runs.index(1)
    plain = CMA(np.array(notes[second]["mean"]), 0.2, np.tile([0.0, 1.0], (2, 1)), population_size=40)
    for number in range(second + 1, second + 40):
        plain.reseed_rng(seed_of(number))
        assert notes[number]["x"] == pytest.approx(plain.ask(), abs=1e-12)


def test_a_space_of_choices_alone():
    space = Space({f"s{i}": Choice(*range(5)) for i in range(5)})
    records = run(CMAES(), space, lambda t: float(sum(v != 3 for v in t.settings.values())), 200)
    assert min(record.score for record in records) == 0


def test_begins_at_the_best_of_the_users_own():
    study = Study(UNIT, CMAES(initial=2, sigma=1e-6))
    for value in (0.2, 0.8):
        study.tell(study.ask(dict.fromkeys(UNIT, value)), abs(value - 0.7))
    assert list(study.ask().settings.values()) == pytest.approx([0.8] * 5, abs=1e-4)
