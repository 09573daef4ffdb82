from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import yaml
from scipy import stats

from metahpo.errors import SearchError
from metahpo.searchers import Choice, Float, Int, Space
from metahpo.searchers.settings import same

SPACE = Space(
    {
        "learner.inner_lr": Float(1e-5, 0.7, log=True),
        "decay": Float(0, 0.3, step=0.1),
        "momentum": Float(-1, 1),
        "filters": Int(4, 1000, log=True),
        "steps": Int(1, 10, step=4),
        "rule": Choice("sgd", "adam", None, 1, 1.0, True, [1, [2.5]], {"name": "lslr", "rate": 1e-3}),
        "beta": Float(0, 1, when={"rule": ("adam", [1, [2.5]])}),
        "deep": Int(0, 3, when={"steps": 5, "rule": ("adam", "sgd")}),
        "deeper": Choice(False, True, when={"deep": (0, 3)}),
    }
)


def units(count: int) -> np.ndarray:
    """The middles of ``count`` equal shares of the unit interval."""
    return (np.arange(count) + 0.5) / count


class TestRoundTrip:
    def test_of_repr(self):
        assert eval(repr(SPACE)) == SPACE
        assert "when={'deep': [0, 3]}" in repr(SPACE)

    def test_of_plain_values(self):
        assert Space.of(SPACE.tree()) == SPACE

    def test_of_yaml(self):
        text = yaml.safe_dump(SPACE.tree(), sort_keys=False)
        again = Space.of(yaml.safe_load(text))
        assert again == SPACE
        assert yaml.safe_dump(again.tree(), sort_keys=False) == text

    def test_keeps_the_bits_of_a_float(self):
        for value in (0.1 + 0.2, 1 / 3, 5e-324, 1e308):
            setting = Space(x=Float(value, math.nextafter(value, math.inf)))
            assert Space.of(yaml.safe_load(yaml.safe_dump(setting.tree())))["x"].low == value

    def test_tells_values_apart_by_type(self):
        spaces = [Space(x=Choice(*options)) for options in ((1, 0), (True, False), (1.0, 0.0), ("1", "0"))]
        for i, first in enumerate(spaces):
            assert [first == second for second in spaces] == [i == j for j in range(4)]

    def test_order_counts(self):
        assert Space(a=Int(0, 1), b=Int(0, 1)) != Space(b=Int(0, 1), a=Int(0, 1))

    def test_tuples_are_lists(self):
        assert Space(x=Choice((1, 2), [3])) == Space(x=Choice([1, 2], [3]))
        nested = Space(x=Choice([1, 2], [3]), y=Int(0, 1, when={"x": ((1, 2),)}))
        assert nested.active({"x": [1, 2]}) == ["x", "y"]
        assert Space.of(nested.tree()) == nested


class TestUnitInterval:
    @pytest.mark.parametrize("name", list(SPACE))
    def test_every_value_has_its_place(self, name):
        setting = SPACE[name]
        for u in np.linspace(0, 1, 101):
            value = setting.at(u)
            setting.check(value)
            again = setting.at(setting.unit(value))
            assert again == pytest.approx(value, rel=1e-12) if isinstance(value, float) else same(again, value)
            assert 0 <= setting.unit(value) <= 1

    def test_ends_are_the_bounds(self):
        for setting in (Float(1e-5, 0.7, log=True), Float(-1, 1), Float(0.1, 0.7, step=0.1), Int(4, 1000, log=True)):
            assert (setting.at(0.0), setting.at(1.0)) == (setting.low, setting.high)
        # The last step ends before the bound.
        assert Float(0, 1, step=0.3).at(1.0) == 0.9
        assert Int(1, 11, step=4).at(1.0) == 9

    def test_float_is_uniform(self):
        values = [Float(-3, 5).at(u) for u in units(1000)]
        assert stats.kstest(values, stats.uniform(-3, 8).cdf).statistic <= 0.5e-3 + 1e-12

    def test_log_float_is_log_uniform(self):
        values = [Float(1e-4, 10, log=True).at(u) for u in units(1000)]
        assert stats.kstest(values, stats.loguniform(1e-4, 10).cdf).statistic <= 0.5e-3 + 1e-12

    def test_stepped_values_are_exact_decimals_and_equally_likely(self):
        setting = Float(0.1, 0.8, step=0.1)
        assert list(setting.values()) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
        assert Counter(setting.at(u) for u in units(800)) == dict.fromkeys(setting.values(), 100)
        # Low itself, whatever its digits, and steps that a product would miss.
        for low, high, step in (
            (0.1234567890123456, 1, 0.1),
            (1e6, 1e6 + 1e-3, 1e-7),
            (0, 0.9, 0.1 + 0.2),
            (0, 1, 1 / 3),
        ):
            setting = Float(low, high, step=step)
            assert setting.at(0.0) == low
            assert len(set(setting.values())) == setting.count == len(setting.values())
            for value in setting.values():
                setting.check(value)
        assert Float(0, 0.9, step=0.1 + 0.2).count == 4

    def test_int_is_equally_likely(self):
        assert Counter(Int(-2, 5).at(u) for u in units(800)) == dict.fromkeys(range(-2, 6), 100)
        assert Counter(Int(1, 11, step=4).at(u) for u in units(300)) == {1: 100, 5: 100, 9: 100}

    def test_log_int_has_the_share_of_its_logarithm(self):
        low, high, n = 1, 30, 100_000
        counts = Counter(Int(low, high, log=True).at(u) for u in units(n))
        whole = math.log((high + 0.5) / (low - 0.5))
        for k in range(low, high + 1):
            assert counts[k] / n == pytest.approx(math.log((k + 0.5) / (k - 0.5)) / whole, abs=1e-4)

    def test_choice_is_equally_likely(self):
        setting = Choice(True, 1, "1", [1])
        assert [type(setting.at(u)) for u in units(4)] == [bool, int, str, list]
        assert [setting.index(option) for option in setting.options] == [0, 1, 2, 3]

    def test_the_widest_ranges(self):
        wide = Float(1e-300, 1e300, log=True)
        assert wide.unit(wide.at(0.75)) == pytest.approx(0.75)
        assert Float(-1e307, 1e307).at(0.5) == 0
        whole = Int(-(2**53), 2**53)
        assert whole.at(whole.unit(2**53)) == 2**53


class TestConditions:
    def test_a_setting_exists_with_the_value_of_another_alone(self):
        settings = SPACE.decode(np.full(len(SPACE), 0.5))
        assert settings["rule"] == 1.0
        assert not {"beta", "deep", "deeper"} & set(settings)
        there = {**settings, "rule": "adam", "beta": 0.5, "steps": 5, "deep": 3, "deeper": True}
        assert SPACE.active(there) == list(SPACE)
        SPACE.check(there)
        # One whose own condition does not hold takes those that depend on it along.
        assert SPACE.active({**there, "steps": 9}) == [name for name in SPACE if name not in ("deep", "deeper")]

    def test_one_and_true_are_two_values(self):
        space = Space(a=Choice(1, True), b=Int(0, 1, when={"a": True}))
        assert space.active({"a": 1}) == ["a"]
        assert space.active({"a": True}) == ["a", "b"]

    def test_order_in_the_space_does_not_matter(self):
        space = Space(b=Int(0, 1, when={"a": "x"}), a=Choice("x", "y"))
        assert space.active({"a": "x"}) == ["b", "a"]
        assert space.parents_first() == ["a", "b"]
        assert list(space.grid()) == [{"b": 0, "a": "x"}, {"b": 1, "a": "x"}, {"a": "y"}]

    def test_samples_are_of_the_space_and_seeded(self):
        draws = [SPACE.sample(np.random.default_rng(seed)) for seed in range(200)]
        for settings in draws:
            SPACE.check(settings)
            again = SPACE.decode(SPACE.encode(settings))
            assert again.keys() == settings.keys()
        assert {"beta" in settings for settings in draws} == {True, False}
        assert draws == [SPACE.sample(np.random.default_rng(seed)) for seed in range(200)]

    def test_encode_puts_what_does_not_exist_in_the_middle(self):
        space = Space(a=Choice("x", "y"), b=Float(0, 1, when={"a": "x"}))
        assert space.encode({"a": "y"}).tolist() == [0.75, 0.5]
        assert math.isnan(space.encode({"a": "y"}, missing=math.nan)[1])


BAD_SETTINGS = {
    "Float(1, 1)": "low should be below high",
    "Float(2, 1)": "Float(2.0, 1.0): low should be below high",
    "Int(3, 3)": "low should be below high",
    "Int(5, 2)": "low should be below high",
    "Float(0, 1, log=True)": "a log range should begin above 0, found 0.0",
    "Float(-1, 1, log=True)": "a log range should begin above 0",
    "Int(0, 8, log=True)": "a log range should begin above 0, found 0",
    "Float(float('nan'), 1)": "low should be a finite number, found nan",
    "Float(0, float('inf'))": "high should be a finite number, found inf",
    "Float(-1.7e308, 1.7e308)": "high - low is too large",
    "Float('1e-3', 1)": "low should be a finite number, found '1e-3'",
    "Float(True, 2)": "low should be a finite number, found True",
    "Float(0, 1, step=0)": "step should be above 0",
    "Float(0, 1, step=2)": "at most high - low, found 2.0",
    "Float(0, 1e308, step=1e-9)": "step is too small",
    "Float(0.1, 1, log=True, step=0.1)": "a log range takes no step",
    "Float(0, 1, log='yes')": "log should be True or False",
    "Int(1.0, 3)": "low should be a whole number within 2**53, found 1.0",
    "Int(0, 2**60)": "high should be a whole number within 2**53",
    "Int(0, 4, step=1.5)": "step should be a whole number",
    "Choice()": "should have at least one option",
    "Choice('a', 'b', 'a')": "option 'a' is given twice",
    "Choice([1], (1,))": "option [1] is given twice",
    "Choice(object)": "options should be plain",
    "Choice({1: 2})": "options should be plain",
    "Choice(float('nan'))": "options should be plain",
    "Int(0, 1, when=3)": "when should map settings to values, found 3",
    "Int(0, 1, when={'a': []})": "when 'a' should have at least one value",
    "Int(0, 1, when={'a': object})": "when 'a' should be plain",
}

BAD_SPACES = {
    "Space()": "space: has no setting",
    "Space(3)": "space: should map names to settings, found 3",
    "Space(x=3)": "space.x: should be a Float, an Int or a Choice, found 3",
    "Space({3: Int(0, 1)})": "a setting's name should be text, found 3",
    "Space(a=Int(0, 1, when={'b': 1}))": "space.a: when names 'b', known: a",
    "Space(rule=Int(0, 1), a=Int(0, 1, when={'rul': 1}))": "did you mean 'rule'?",
    "Space(b=Int(0, 1), a=Int(0, 1, when={1: 1}))": "space.a: when names 1",
    "Space(a=Float(0, 1), b=Int(0, 1, when={'a': 0.5}))": "should be a Choice or an Int",
    "Space(a=Choice('x'), b=Int(0, 1, when={'a': 'y'}))": "space.b: when 'a' should be one of 'x', found 'y'",
    "Space(a=Choice(1), b=Int(0, 1, when={'a': True}))": "should be one of 1, found True",
    "Space(a=Int(0, 1, when={'b': 1}), b=Int(0, 1, when={'a': 1}))": "when goes round in a circle",
    "Space(a=Int(0, 1, when={'a': 1}))": "when goes round in a circle",
}

BAD_TREES = {
    "[1]": "space: should be a section of settings, found [1]",
    "{}": "space: has no setting",
    "{x: 3}": "space.x: should be {float: [LOW, HIGH]}, {int: [LOW, HIGH]} or {choice: [...]}, found 3",
    "{x: {float: [0, 1], int: [0, 1]}}": "space.x: should be {float",
    "{x: {flaot: [0, 1]}}": "space.x: should be {float",
    "{x: {float: 3}}": "space.x: float should be [LOW, HIGH], found 3",
    "{x: {int: [1, 2, 3]}}": "space.x: int should be [LOW, HIGH], found [1, 2, 3]",
    "{x: {float: [1, 2], lgo: true}}": "a setting of kind float has no key 'lgo'; known: log, step, when",
    "{x: {choice: [1, 2], step: 1}}": "a setting of kind choice has no key 'step'; known: when",
    "{x: {choice: adam}}": "space.x: choice should be a list of options, found 'adam'",
    "{x: {choice: [2020-01-01]}}": "options should be plain",
    "{x: {float: [0, 1], log: null}}": "log should be True or False",
    "{x: {float: [0, 1], when: rule}}": "when should map settings to values, found 'rule'",
}

BAD_VALUES = [
    ({}, "setting 'lr' is missing"),
    ({"lr": 0.5}, "setting 'rule' is missing"),
    ({"lr": 0.5, "rule": "sgd", "rat": 1}, "no setting 'rat' in the space; did you mean 'rate'?"),
    ({"lr": 0.5, "rule": "sgd", 3: 1}, "no setting 3 in the space"),
    ({"lr": 2, "rule": "sgd"}, "setting 'lr' should be a number in [0.1, 1.0], found 2"),
    ({"lr": math.nan, "rule": "sgd"}, "setting 'lr' should be a number in [0.1, 1.0], found nan"),
    ({"lr": True, "rule": "sgd"}, "setting 'lr' should be a number"),
    ({"lr": 0.5, "rule": "SGD"}, "setting 'rule' should be one of 'sgd', 'adam', found 'SGD'"),
    ({"lr": 0.5, "rule": "adam"}, "setting 'rate' is missing"),
    ({"lr": 0.5, "rule": "sgd", "rate": 2}, "setting 'rate' should not be there: it exists when {'rule': ('adam',)}"),
    ({"lr": 0.5, "rule": "adam", "rate": 3}, "setting 'rate' should be 0 and a number of steps of 2, found 3"),
    ({"lr": 0.5, "rule": "adam", "rate": 2.0}, "setting 'rate' should be a whole number in [0, 4], found 2.0"),
]


def refused(call) -> str:
    with pytest.raises(SearchError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


class TestBadInput:
    @pytest.mark.parametrize("text", [*BAD_SETTINGS, *BAD_SPACES])
    def test_from_python(self, text):
        assert {**BAD_SETTINGS, **BAD_SPACES}[text] in refused(lambda: eval(text))

    @pytest.mark.parametrize("text", BAD_TREES)
    def test_from_yaml(self, text):
        assert BAD_TREES[text] in refused(lambda: Space.of(yaml.safe_load(text)))

    def test_all_lines_at_once(self):
        with pytest.raises(SearchError) as raised:
            Space.of({"a": {"int": [5, 1]}, "b": {"float": [0, 1]}, "c": {"float": [0, 1], "log": True}})
        lines = str(raised.value).splitlines()
        assert len(lines) == 2
        assert lines[0].startswith("space.a: Int(5, 1)")
        assert lines[1].startswith("space.c: Float(0.0, 1.0, log=True)")

    @pytest.mark.parametrize("settings, said", BAD_VALUES)
    def test_of_settings(self, settings, said):
        space = Space(lr=Float(0.1, 1), rule=Choice("sgd", "adam"), rate=Int(0, 4, step=2, when={"rule": "adam"}))
        assert said in refused(lambda: space.check(settings))

    def test_stepped_values(self):
        space = Space(x=Float(0, 1, step=0.1))
        space.check({"x": 0.1 + 0.2})
        assert "should be 0.0 and a number of steps of 0.1, found 0.25" in refused(lambda: space.check({"x": 0.25}))

    def test_values_of_a_continuous_range(self):
        assert "is a continuous range" in refused(lambda: Float(0, 1).values())
