"""Hyperparameters by tensor and by phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from metahpo.checks import check_flag, check_whole, refuse
from metahpo.errors import NetArgumentError, NetError
from metahpo.inner.rules.base import Hyper, PerTensorRule


class ByLayer(PerTensorRule):
    """``rule`` with every hyperparameter of its own for each tensor and each phase of the training.

    rule: gives the update and the initial values; names: the tensors, one row each; phases: the columns; steps: the
    length of the training, which the phases share evenly (step t is in phase t * phases // steps, a later one in the
    last). Each hyperparameter of the rule becomes one ``nn.Parameter`` [len(names), phases] of the same name.
    learnable: whether the outer loop learns them.

    Raises NetError for a rule without scalars of its own, names given twice, phases without steps or fewer steps than
    phases; and in a step for a tensor that it was not made for.
    """

    def __init__(
        self,
        rule: PerTensorRule,
        names: Iterable[str],
        phases: int = 1,
        steps: int | None = None,
        *,
        learnable: bool = True,
    ):
        super().__init__()
        phases = check_whole(self, "phases", phases, at_least=1, error=NetArgumentError)
        steps = None if steps is None else check_whole(self, "steps", steps, at_least=1, error=NetArgumentError)
        learnable = check_flag(self, "learnable", learnable, error=NetArgumentError)
        self.names, self.phases, self.steps = checked_names(self, names), phases, steps or phases
        own = dict(rule.named_parameters()) if isinstance(rule, PerTensorRule) else {}
        if not own or any(p.ndim for p in own.values()):
            refuse(self, "rule", rule, "a rule with scalar hyperparameters, such as SGD(lr)", NetArgumentError)
        if (phases > 1 and steps is None) or self.steps < phases:
            raise NetArgumentError(f"ByLayer: {phases} phases need at least as many steps, found steps={steps}")
        for key, value in own.items():
            table = value.detach().repeat(len(self.names), phases)
            self.register_parameter(key, nn.Parameter(table, requires_grad=learnable))
        # In a tuple, as its scalars are not in use and should not be among the parameters.
        self._rule = (rule,)
        self.decoupled_decay = rule.decoupled_decay
        self._row = {name: i for i, name in enumerate(self.names)}

    def tensor_state(self, param: Tensor) -> dict[str, Tensor]:
        return self._rule[0].tensor_state(param)

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int, hyper: Hyper
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self._rule[0].update(param, grad, state, step, hyper)

    def hyper(self, names: Iterable[str], step: int) -> Mapping[str, Hyper]:
        phase = min(step * self.phases // self.steps, self.phases - 1)
        keys = list(self._parameters)
        rows = list(zip(*[self._parameters[key][:, phase].unbind() for key in keys]))  # type: ignore[index]
        try:
            return {name: dict(zip(keys, rows[self._row[name]])) for name in names}
        except KeyError as error:
            raise NetError(f"ByLayer has no row for {error}; it was made for {', '.join(self.names)}") from None

    def by_name(self, hyperparameter: str = "lr") -> dict[str, Tensor]:
        """The values of one hyperparameter for each tensor, [phases]."""
        return dict(zip(self.names, self._parameters[hyperparameter].detach().unbind()))  # type: ignore[union-attr]


def checked_names(owner: object, names: Iterable[str]) -> tuple[str, ...]:
    """The names of tensors; raises NetArgumentError for no list of them, an empty one, and names given twice."""
    listed = tuple(names) if isinstance(names, Iterable) and not isinstance(names, str) else ()
    if not listed or not all(isinstance(name, str) for name in listed) or len(set(listed)) != len(listed):
        refuse(owner, "names", names, "a list of the tensors' names, at least one and all different", NetArgumentError)
    return listed
