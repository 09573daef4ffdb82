"""Meta-SGD."""

from __future__ import annotations

from metahpo.inner import UpdateRule, WeightRates
from metahpo.learners.maml import MAML


class MetaSGD(MAML):
    """Learns, with the initial weights, a rate for every weight: w <- w - rates * gradient, elementwise (Li et al.
    2017, equation 2 and algorithm 1).

    Arguments as in ``MAML``; ``inner_lr`` is what all rates begin at, and ``learn_lr`` is always on. Of the
    improvements ``layer_step_rates`` gives every step rates of its own.
    """

    def default_rule(self, lr: float, learnable: bool) -> UpdateRule:
        params = self.module.params()
        steps = self.steps if self.improvements.layer_step_rates else None
        return WeightRates({name: params[name] for name in self.adapted_names()}, lr, steps=steps)
