"""What a rule's constructor takes and refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from metahpo.errors import NetError
from metahpo.inner import LBFGS, SGD, Adadelta, Adagrad, Adam, AdamW, Newton, RMSprop


@pytest.mark.parametrize("rule", [SGD, Adagrad, RMSprop, Adadelta, Adam, AdamW, LBFGS, Newton])
@pytest.mark.parametrize("lr", [math.nan, math.inf, -0.1, True, "0.1", [0.1], 1j, np.zeros(2)])
def test_a_rate_that_is_no_number_of_at_least_zero_is_refused_by_name(rule, lr):
    with pytest.raises(ValueError, match=rf"^{rule.__name__}: lr should be a number of at least 0, found ") as caught:
        rule(lr)
    assert isinstance(caught.value, NetError)


@pytest.mark.parametrize("lr", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5, requires_grad=True)])
def test_numbers_of_every_library_make_the_same_rate(lr):
    assert SGD(lr).lr.item() == 0.5
