from __future__ import annotations

import numpy as np
import pytest

from metahpo.searchers import Choice, Float, Genetic, History, Observation, Space

MANY = Space({f"s{i}": Choice(*range(10)) for i in range(12)})


def told(losses):
    """Trial i has option i everywhere."""
    return History([Observation(i, dict.fromkeys(MANY, i), "complete", (loss,)) for i, loss in enumerate(losses)])


def children(searcher, history, count, space=MANY):
    return [searcher.suggest(history, space, np.random.default_rng(seed)) for seed in range(count)]


def parents(child):
    """How many settings a child has of each trial."""
    return np.bincount(list(child.values()), minlength=10)


def test_parents_win_tournaments_as_often_as_they_should():
    history = told([0.4, 0.1, 0.3, 0.0, 0.2])
    found = children(Genetic(population=5, tournament=2, crossover=0, initial=1), history, 1500)
    shares = np.bincount([int(parents(child).argmax()) for child in found], minlength=5) / 1500
    # That the best of 2 of 5, drawn with replacement, has rank r: ((5 - r)^2 - (4 - r)^2) / 25.
    by_rank = {3: 9, 1: 7, 4: 5, 2: 3, 0: 1}
    assert shares == pytest.approx([by_rank[i] / 25 for i in range(5)], abs=0.045)


def test_crossover_takes_each_setting_from_either_parent_and_mutation_changes_one_in_all():
    found = np.array(
        [parents(child) for child in children(Genetic(population=2, crossover=1, initial=1), told([0, 1]), 1500)]
    )
    mixed = found[(found[:, 0] > 1) & (found[:, 1] > 1)]
    # The parents differ in 14 of 64 draws, for the best of 3 is the better one in 7 of 8. Children of equal parents
    # that do not mutate were tried already and are drawn again.
    assert len(mixed) / len(found) == pytest.approx(14 / 64 / (1 - 50 / 64 * (11 / 12) ** 12), abs=0.04)
    assert mixed[:, 0].mean() == pytest.approx(mixed[:, 1].mean(), abs=0.5)
    # Of the 9 options that a mutation may lead to, 8 are of no parent.
    assert mixed[:, 2:].sum(1).mean() == pytest.approx(8 / 9, abs=0.15)


def test_without_crossover_a_child_is_a_mutated_parent():
    found = children(Genetic(population=2, crossover=0, initial=1), told([0, 1]), 500)
    changes = [12 - parents(child).max() for child in found]
    # Binomial with 12 draws of 1 in 12, none having been tried already.
    assert min(changes) == 1 and np.mean(changes) == pytest.approx(1 / (1 - (11 / 12) ** 12), abs=0.15)


def test_the_population_is_the_best_of_all_trials():
    losses = [9, 0.1, 8, 0.2, 7, 6, 5, 4]
    found = children(Genetic(population=2, crossover=0, initial=1), told(losses), 200)
    assert {int(parents(child).argmax()) for child in found} == {1, 3}


def test_failed_trials_are_the_worst_and_ones_at_work_no_parents():
    observations = list(told([0.5, 0.4, 0.3]))
    observations[2] = Observation(2, observations[2].settings, "failed")
    observations.append(Observation(3, dict.fromkeys(MANY, 3), "pending"))
    found = children(Genetic(population=2, crossover=0, initial=1), History(observations), 200)
    assert {int(parents(child).argmax()) for child in found} == {0, 1}


def test_a_conditional_setting_comes_from_the_parent_that_has_it():
    space = Space(
        rule=Choice("a", "b"), beta=Float(0, 1, when={"rule": "b"}), **{f"s{i}": Choice(0, 1) for i in range(8)}
    )
    rest = {f"s{i}": 0 for i in range(8)}
    history = History(
        [
            Observation(0, {"rule": "a", **rest}, "complete", (0.0,)),
            Observation(1, {"rule": "b", "beta": 0.123, **rest}, "complete", (0.0,)),
        ]
    )
    found = children(Genetic(population=2, crossover=1, initial=1, tournament=1), history, 400, space)
    having = [child["beta"] for child in found if child["rule"] == "b"]
    assert np.mean(np.array(having) == 0.123) > 0.5
