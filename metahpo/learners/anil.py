"""ANIL: almost no inner loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from metahpo.errors import NetArgumentError
from metahpo.learners.base import Adapted
from metahpo.learners.head import WithHead
from metahpo.learners.maml import MAML
from metahpo.learners.phase import Phase


class HeadMAML(WithHead, MAML):
    """MAML that adapts the head of the net otherwise than the rest; head: see ``ANIL``."""

    _trainable_head = True

    def __init__(self, net: nn.Module, *, head: str | None = None, **options: Any):
        self._name_head(head)
        super().__init__(net, **options)

    def head_names(self) -> list[str]:
        """The parameters of the head that can be adapted."""
        own = {id(p) for p in self.head_layer().parameters()}
        params = self.module.params()
        return [name for name in super().adapted_names() if id(params[name]) in own]

    def look_at(self, x: Tensor) -> None:
        before = self._looked
        super().look_at(x)
        rates = getattr(self.rule, "names", None)
        if not before and rates is not None and not set(self.adapted_names()) <= set(rates):
            head, self.head, self._looked = self.head, None, False
            raise NetArgumentError(
                f"{type(self).__name__}: head: {head!r} is the last layer that the net calls, but the last that it "
                f"registers is another, for which the rule was made; give head={head!r}"
            )

    def adapt(self, support_x: Tensor, support_y: Tensor, phase: Phase) -> Adapted:
        self.look_at(support_x)
        return super().adapt(support_x, support_y, phase)


class ANIL(HeadMAML):
    """Adapts the head alone, w_head <- w_head - lr * gradient; the body is learnt by the outer loop and stays as it is
    within a task (Raghu et al. 2020, section 4).

    Arguments as in ``MAML``, without ``adapt_norms``. head: the name of a layer; by default the layer with parameters
    to adapt, batch norms aside, that runs last on the first example, with all its tensors: one that another layer
    shares (tied weights) is adapted for both.
    """

    def __init__(self, net: nn.Module, *, head: str | None = None, **options: Any):
        if options.get("adapt_norms"):
            raise NetArgumentError(f"{type(self).__name__}: adapt_norms: the head alone is adapted; leave it off")
        super().__init__(net, head=head, **options)

    def adapted_names(self) -> list[str]:
        return self.head_names()
