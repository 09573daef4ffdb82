from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

import pytest

from metahpo.errors import SearchError
from metahpo.searchers import BOHB, TPE, Choice, Float, Hyperband, Proposal, Searcher, Space, Study

SPACE = Space(x=Float(0, 1), y=Float(0, 1), z=Float(0, 1), kind=Choice("a", "b", "c"))


def loss(trial):
    """Ends at the distance from a point; after little training x alone counts."""
    off = (trial["x"] - 0.2) ** 2 + (1 - 1 / trial.budget) * ((trial["y"] - 0.7) ** 2 + (trial["z"] - 0.4) ** 2)
    return off + 0.3 * (trial["kind"] != "b")


@dataclass(frozen=True)
class Told(Searcher):
    """Notes that the model was asked, and what it saw."""

    def suggest(self, history, space, rng):
        return Proposal(space.sample(rng), notes={"losses": [o.loss for o in history]})


def test_model_is_of_the_largest_budget_that_has_enough():
    study = Study(SPACE, BOHB(1, 27, 3, Told(), 0.0), seed=1)
    study.optimize(loss, trials=160)
    seen = []
    for record in study.trials:
        if record.parent is not None:
            continue
        earlier = study.trials[: record.number]
        at = {b: [r.score for r in earlier if r.budget == b] for b in (1, 3, 9, 27)}
        enough = [b for b in at if len(at[b]) >= len(SPACE) + 3]
        assert ("base" in record.notes) == bool(enough)
        if enough:
            seen.append(enough[-1])
            assert record.notes["base"]["losses"] == at[enough[-1]]
    # A bracket that begins on a rung of its own brings its budget enough.
    assert seen == sorted(seen)
    assert set(seen) == {1, 3, 9, 27}


def test_fraction_of_random_settings():
    study = Study(SPACE, BOHB(1, 9, 3, Told()), seed=2)
    study.optimize(loss, trials=400)
    begun = [r for r in study.trials if r.parent is None and r.number > 20]
    # Of about 280 Bernoulli draws; three standard deviations.
    assert mean("base" not in r.notes for r in begun) == pytest.approx(1 / 3, abs=0.085)
    study = Study(SPACE, BOHB(1, 9, 3, Told(), 1.0), seed=2)
    study.optimize(loss, trials=60)
    assert not any("base" in r.notes for r in study.trials)


def test_it_begins_as_hyperband_and_learns_where_to_look():
    ends: dict[type, list[float]] = {Hyperband: [], BOHB: []}
    for seed in range(2):
        first = []
        for kind, found in ends.items():
            study = Study(SPACE, kind(1, 27, 3), seed=seed)
            study.optimize(loss, budget=27 * 50)
            found.append(study.best.score)
            first.append([r.settings for r in study.trials[: len(SPACE) + 3]])
        assert first[0] == first[1]
    # Regrets: those of Hyperband are several times as large.
    assert mean(ends[BOHB]) < 0.5 * mean(ends[Hyperband])


def test_options():
    assert isinstance(BOHB().base, TPE)
    line = r"^BOHB: random_fraction should be a number of at least 0 and at most 1, found 1\.5$"
    with pytest.raises(SearchError, match=line):
        BOHB(random_fraction=1.5)
