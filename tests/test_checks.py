import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from metahpo import errors
from metahpo.checks import (
    check_callable,
    check_choice,
    check_flag,
    check_number,
    check_type,
    check_whole,
)


@pytest.mark.parametrize("three", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_whole_numbers_of_every_library_are_taken_as_int(three):
    assert type(check_whole("CG", "steps", three, at_least=3, at_most=3)) is int


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.True_,
        2.0,
        2.5,
        math.nan,
        math.inf,
        "2",
        None,
        [2],
        np.array([2]),
        torch.tensor(True),
        0,
        -1,
        9,
    ],
)
def test_a_whole_number_refuses_all_else_by_name(value):
    with pytest.raises(
        ValueError, match=r"^CG: steps should be a whole number of at least 1 and at most 8, found "
    ):
        check_whole("CG", "steps", value, at_least=1, at_most=8)


HALVES = [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)]


@pytest.mark.parametrize("half", HALVES)
def test_numbers_of_every_library_are_taken_as_float(half):
    value = check_number("CG", "tolerance", half, above=0, at_most=0.5)
    assert value == 0.5 and type(value) is float


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.False_,
        math.nan,
        np.nan,
        math.inf,
        "0.1",
        None,
        1j,
        [0.1],
        10**400,
        torch.zeros(2),
        0,
        1,
        -1.5,
    ],
)
def test_a_number_refuses_all_else_by_name(value):
    with pytest.raises(
        errors.ArgumentError, match=r"^CG: tolerance should be a number above 0 and below 1, found "
    ):
        check_number("CG", "tolerance", value, above=0, below=1)


def test_a_number_without_bounds_is_finite_unless_infinity_is_allowed():
    assert check_number("f", "x", math.inf, infinite=True) == math.inf
    for infinite in (False, True):
        with pytest.raises(errors.ArgumentError, match="found nan"):
            check_number("f", "x", math.nan, infinite=infinite)
    with pytest.raises(errors.ArgumentError, match=r"a finite number, found inf$"):
        check_number("f", "x", math.inf)


def test_flags_choices_types_and_functions_refuse_what_only_looks_like_one():
    assert check_flag("f", "x", np.True_) is True
    with pytest.raises(errors.ArgumentError, match=r"^f: x should be True or False, found 'no'$"):
        check_flag("f", "x", "no")
    assert check_choice("f", "x", None, ("a", None)) is None
    with pytest.raises(errors.ArgumentError, match=r"^f: x should be one of 0, a, found False$"):
        check_choice("f", "x", False, (0, "a"))
    with pytest.raises(errors.ArgumentError, match="ndarray"):
        check_choice("f", "x", np.arange(3), (0, "a"))
    with pytest.raises(
        errors.ArgumentError, match=r"^int: x should be of type list or dict, found 3$"
    ):
        check_type(int, "x", 3, (list, dict))
    with pytest.raises(errors.ArgumentError, match=r"^f: loss should be a function, found None$"):
        check_callable("f", "loss", None)


def test_a_message_stays_one_short_line():
    with pytest.raises(errors.ArgumentError) as caught:
        check_whole("f", "x", "line\n" * 1000)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("room", ["Config", "Data", "Net", "Hypergradient", "Search"])
def test_the_error_of_a_room_is_the_rooms_own_and_a_value_error(room):
    kind = getattr(errors, f"{room}ArgumentError")
    with pytest.raises(getattr(errors, f"{room}Error")) as caught:
        check_flag("f", "x", 1, error=kind)
    assert isinstance(caught.value, ValueError)
