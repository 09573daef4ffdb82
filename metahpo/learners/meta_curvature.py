"""Meta-Curvature."""

from __future__ import annotations

from metahpo.errors import NetError
from metahpo.inner import MetaCurvature as MetaCurvatureRule
from metahpo.inner import UpdateRule
from metahpo.learners.maml import MAML


class MetaCurvature(MAML):
    """Learns, with the initial weights, matrices that transform the gradient of each layer: w <- w - lr * MC(gradient)
    (Park and Oliva 2019, equation 7 and algorithm 1).

    Arguments as in ``MAML``. Not for ``learn_lr`` and ``layer_step_rates``: the matrices hold the rates already.
    """

    def default_rule(self, lr: float, learnable: bool) -> UpdateRule:
        if self.improvements.layer_step_rates or learnable:
            raise NetError("MetaCurvature learns its rates by its matrices; leave learn_lr and layer_step_rates off")
        params = self.module.params()
        return MetaCurvatureRule({name: params[name] for name in self.adapted_names()}, lr)
