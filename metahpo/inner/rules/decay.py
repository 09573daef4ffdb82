"""The weight decay of a rule as a term of the loss that it minimises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from metahpo.errors import NetError
from metahpo.functional.swap import call_with
from metahpo.functional.trees import Params
from metahpo.inner.rules.base import PerTensorRule, UpdateRule


def loss_decays(rule: UpdateRule, names: Iterable[str], step: int, own: Params | None = None) -> Params:
    """The weight decay of each tensor at a step: where a training by ``rule`` ends, it is the minimum of the loss plus
    weight_decay / 2 |w|^2.

    Args:
        rule: any; one that does not treat each tensor on its own has no decay that is known here.
        names: of the tensors.
        step: the number of the last step.
        own: hyperparameters in place of the rule's, by the rule's own names.

    Returns:
        A decay for each tensor that has one, differentiable in ``own`` and the rule's parameters.

    Raises:
        NetError: For a rule that takes the decay off the parameters and not through the gradient (AdamW): the training
            does not end at a minimum of such a sum.
    """
    if not isinstance(rule, PerTensorRule):
        return {}
    given = {f"rule.{name}": tensor for name, tensor in (own or {}).items()}
    decays = call_with(_Decays(rule), given, (list(names), step))
    if rule.decoupled_decay and any(bool((decay != 0).any()) for decay in decays.values()):
        raise NetError(
            f"{type(rule).__name__} takes weight_decay off the parameters and not through the gradient, so its "
            "training ends at no minimum, as an implicit gradient needs; give the rule weight_decay=None and the "
            "loss a decay, or take a rule such as Adam(weight_decay=...)"
        )
    return decays


class _Decays(nn.Module):
    """The rule's decays as a module's call, in which other tensors can stand for its own."""

    def __init__(self, rule: PerTensorRule):
        super().__init__()
        self.rule = rule

    def forward(self, names: list[str], step: int) -> Params:
        by_name = self.rule.hyper(names, step)
        return {name: hyper["weight_decay"] for name, hyper in by_name.items() if hyper.get("weight_decay") is not None}


def half_square(params: Params, decays: Mapping[str, Tensor]) -> Tensor | float:
    """The sum of weight_decay / 2 |w|^2 over the tensors that have a decay."""
    return sum((0.5 * decay * params[name].square().sum() for name, decay in decays.items()), 0.0)
