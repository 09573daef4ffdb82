"""Differentiable update rules, one a file."""

from metahpo.inner.rules.base import UpdateRule as UpdateRule
from metahpo.inner.rules.layer_step_rates import LayerStepRates as LayerStepRates
from metahpo.inner.rules.sgd import SGD as SGD
