from __future__ import annotations

import numpy as np
import pytest

from metahpo.searchers import Choice, Float, History, Int, Observation, Space
from metahpo.searchers.moves import beside, changed, completed, reflected, untried

SPACE = Space(
    rate=Float(1e-4, 1, log=True),
    share=Float(0, 1, step=0.1),
    width=Int(1, 100, log=True),
    batch=Int(4, 30, step=4),
    rule=Choice("sgd", "adam", 1, True),
    beta=Float(0, 1, when={"rule": "adam"}),
    momentum=Float(0, 1, when={"rule": ["sgd", 1]}),
)
BASE = {"rate": 0.01, "share": 0.3, "width": 10, "batch": 12, "rule": "sgd", "momentum": 0.5}


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", BASE)
def test_one_setting_has_another_value_and_the_rest_stays(name):
    for seed in range(200):
        new = changed(SPACE, BASE, name, rng(seed), 0.001)
        SPACE.check(new)
        assert [other for other in BASE if repr(new.get(other, BASE[other])) != repr(BASE[other])] == [name]
        assert set(BASE) - set(new) <= {"momentum"}


def test_what_exists_because_of_a_change_gets_any_value():
    new = [changed(SPACE, BASE, "rule", rng(seed), 0.1) for seed in range(300)]
    betas = [settings["beta"] for settings in new if settings["rule"] == "adam"]
    assert min(betas) < 0.1 and max(betas) > 0.9 and len(betas) == pytest.approx(100, abs=35)
    by_rule = {repr(settings["rule"]): settings for settings in new}
    assert {rule: settings.get("momentum") for rule, settings in by_rule.items()} == {
        "'adam'": None,
        "True": None,
        "1": 0.5,
    }


def test_a_step_is_normal_in_the_logarithm_and_grows_with_the_width():
    for width in (0.02, 0.1):
        steps = [np.log(changed(SPACE, BASE, "rate", rng(seed), width)["rate"] / 0.01) for seed in range(2000)]
        assert np.std(steps) == pytest.approx(width * np.log(1e4), rel=0.06)
        assert np.mean(steps) == pytest.approx(0, abs=4 * width * np.log(1e4) / 2000**0.5)


def test_small_steps_of_stepped_numbers_go_to_the_next_values():
    for name, near in {"share": {0.2, 0.4}, "width": {9, 11}, "batch": {8, 16}}.items():
        assert {changed(SPACE, BASE, name, rng(seed), 1e-6)[name] for seed in range(50)} == near
    assert {changed(SPACE, {**BASE, "batch": 28}, "batch", rng(seed), 1e-6)["batch"] for seed in range(20)} == {24}
    assert {changed(SPACE, {**BASE, "share": 0.0}, "share", rng(seed), 1e-6)["share"] for seed in range(20)} == {0.1}


def test_neighbours_are_the_values_beside_or_all_other_options():
    assert beside(SPACE, BASE, "share") == [0.4, 0.2] and beside(SPACE, BASE, "share", -1) == [0.2, 0.4]
    assert beside(SPACE, {**BASE, "share": 1.0}, "share") == [0.9]
    assert beside(SPACE, {**BASE, "width": 100}, "width") == [99]
    assert beside(SPACE, BASE, "batch") == [16, 8]
    assert list(map(repr, beside(SPACE, {**BASE, "rule": 1}, "rule"))) == ["'sgd'", "'adam'", "True"]


def test_missing_settings_are_drawn_and_others_left_out():
    full = completed(SPACE, {**BASE, "rule": "adam"}, rng())
    SPACE.check(full)
    assert {name: full[name] for name in BASE if name in full} == {
        "rate": 0.01,
        "share": 0.3,
        "width": 10,
        "batch": 12,
        "rule": "adam",
    }


def test_reflection_at_both_ends():
    assert [reflected(u) for u in (-0.25, 0.25, 1.25, 2.25, -1.25, 1.0, 0.0)] == [0.25, 0.25, 0.75, 0.25, 0.75, 1, 0]


def history(settings):
    return History([Observation(i, s, "pending") for i, s in enumerate(settings)])


def test_untried_ones_are_found_to_the_last_and_then_there_are_none():
    space = Space(a=Int(0, 19), b=Int(0, 19))
    tried = []
    while (settings := untried(history(tried), space, rng(len(tried)))) is not None:
        assert settings not in tried
        tried.append(settings)
    assert len(tried) == 400


def test_draws_come_first_and_then_any():
    space = Space(a=Int(0, 3))
    assert untried(history([]), space, rng(), lambda: {"a": 2}) == {"a": 2}
    assert untried(history([{"a": 2}, {"a": 1}]), space, rng(), lambda: {"a": 2})["a"] in (0, 3)


def test_a_continuous_space_is_never_used_up():
    space = Space(rule=Choice("a", "b"), rate=Float(0, 1, when={"rule": "b"}))
    settings = untried(history([{"rule": "a"}]), space, rng(), lambda: {"rule": "a"})
    assert settings["rule"] == "b"
