from __future__ import annotations

from itertools import product

import pytest

from metahpo.errors import SearchError
from metahpo.searchers import Choice, Float, Grid, Int, Random, Space, Study

SPACE = Space(
    rule=Choice("sgd", "adam"),
    rate=Float(0.1, 0.3, step=0.1),
    beta=Float(0, 1, step=0.5, when={"rule": "adam"}),
    steps=Int(1, 5, step=2),
    deep=Choice(False, True, when={"steps": [1, 5]}),
)


def test_grid_is_the_product_of_the_values():
    space = Space(a=Int(1, 3), b=Choice("x", None), c=Float(0, 1, step=0.25))
    expected = [dict(zip("abc", values)) for values in product([1, 2, 3], ["x", None], [0, 0.25, 0.5, 0.75, 1])]
    assert list(space.grid()) == expected


def test_grid_with_conditions_has_each_setting_once():
    expected = [
        {"rule": rule, "rate": rate, **beta, "steps": steps, **deep}
        for rule in ("sgd", "adam")
        for rate in (0.1, 0.2, 0.3)
        for beta in ([{"beta": b} for b in (0, 0.5, 1)] if rule == "adam" else [{}])
        for steps in (1, 3, 5)
        for deep in ([{"deep": d} for d in (False, True)] if steps != 3 else [{}])
    ]
    assert list(SPACE.grid()) == expected
    for settings in expected:
        SPACE.check(settings)


def test_grid_from_any_place_on():
    whole = list(SPACE.grid())
    for start in range(len(whole) + 2):
        assert list(SPACE.grid(start)) == whole[start:]
    # Without counting them all.
    large = Space({f"x{i}": Int(1, 100) for i in range(10)})
    assert next(large.grid(10**18 + 7)) == {f"x{i}": {0: 2, 9: 8}.get(i, 1) for i in range(10)}


def test_grid_search_tries_all_and_is_over():
    with Study(SPACE, Grid()) as study:
        best = study.optimize(lambda trial: -trial["rate"] - trial["steps"] - trial.settings.get("beta", 0))
        assert [t.settings for t in study.trials] == list(SPACE.grid())
        assert best.settings == {"rule": "adam", "rate": 0.3, "beta": 1.0, "steps": 5, "deep": False}
        with pytest.raises(SearchError, match=r"Grid\(\) suggests nothing any more: it is over"):
            study.ask()


def test_grid_needs_steps():
    with pytest.raises(SearchError, match=r"^space.b: Float\(0.0, 1.0\) is a continuous range; a grid needs its step$"):
        Study(Space(a=Int(0, 1), b=Float(0, 1, when={"a": 1})), Grid())


def test_random_search_is_seeded_and_knows_no_losses():
    def settings(seed, objective):
        with Study(SPACE, Random(), seed=seed) as study:
            study.optimize(objective, 20)
            return [t.settings for t in study.trials]

    first = settings(3, lambda trial: trial["rate"])
    assert settings(3, lambda trial: -trial["steps"]) == first
    assert settings(4, lambda trial: trial["rate"]) != first
    for one in first:
        SPACE.check(one)
    assert len({str(one) for one in first}) > 10
