"""CAVIA: fast context adaptation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metahpo.checks import check_type, check_whole
from metahpo.errors import NetArgumentError, NetError
from metahpo.functional import Params
from metahpo.functional.copies import unwrapped
from metahpo.functional.surgery import is_called, like, with_layers
from metahpo.learners.base import Adapted
from metahpo.learners.head import events
from metahpo.learners.maml import MAML
from metahpo.learners.phase import Phase

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
# Attributes in which layers say how many channels they give: in dimension 1, or in the last one.
SECOND = ("num_features", "out_channels", "num_channels")
LAST = ("out_features", "embedding_dim", "normalized_shape")


class FiLM(nn.Module):
    """x * (1 + scale) + shift by channel, both linear in a context (Perez et al. 2018, equation 1).

    size: of the context, a vector of zeros; channels: of x [N, channels, ...], or [N, ..., channels] if ``last``.
    """

    def __init__(self, size: int, channels: int, last: bool = False):
        super().__init__()
        self.last = last
        # Frozen to the outer loop: a task always begins at zero.
        self.context = nn.Parameter(torch.zeros(size), requires_grad=False)
        self.linear = nn.Linear(size, 2 * channels)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        shape = [-1] if self.last else [-1] + [1] * (x.dim() - 2)
        scale, shift = (part.view(shape) for part in self.linear(self.context).chunk(2))
        return x * (1 + scale) + shift


class CAVIA(MAML):
    """Adapts a context alone: a small vector, zero at the start of every task, which scales and shifts the features of
    a layer; the net is learnt by the outer loop and shared by all tasks (Zintgraf et al. 2019, algorithm 1, FiLM as in
    section 5.3).

    net and the rest: as in ``MAML``, without ``adapt_norms``. context: its size. after: the name of the layer that is
    followed by the FiLM layer; by default the last of the net's batch norms (before which a scale and shift would have
    no effect), or its first layer with weights where it has none, in the order in which it registers them; where it
    calls them in another order, that is refused on the first example.
    """

    def __init__(self, net: nn.Module, *, context: int = 100, after: str | None = None, **options: Any):
        check_type(self, "net", net, nn.Module, "a module", error=NetArgumentError)
        net = unwrapped(net)
        context = check_whole(self, "context", context, at_least=1, error=NetArgumentError)
        check_type(self, "after", after, (str, type(None)), "the name of a layer", error=NetArgumentError)
        if options.get("adapt_norms"):
            raise NetArgumentError("CAVIA: adapt_norms: the context alone is adapted; leave it off")
        self._after, self._by_default, self._looked = after or _place(net), after is None, False
        super().__init__(with_layers(net, [self._after], lambda layer: _film(context, layer)), **options)

    def look_at(self, x: Tensor) -> None:
        if self._looked:
            return
        net = self.module.net
        called = {name: net.get_submodule(name) for kind, name in events(self.module, x) if kind == "begin"}
        if self._by_default and (place := _place_of(called)) and called[place] is not net.get_submodule(self._after):
            raise NetArgumentError(
                f"CAVIA: after: the net registers {self._after!r} where it calls {place!r}; name the layer that the "
                f"context follows, such as after={place!r}"
            )
        if not any(isinstance(layer, FiLM) for layer in called.values()):
            raise NetArgumentError(
                f"CAVIA: after: the net never calls its layer {self._after!r}, so that nothing can follow it; name "
                "another by after='LAYER'"
            )
        self._looked = True

    def adapt(self, support_x: Tensor, support_y: Tensor, phase: Phase) -> Adapted:
        self.look_at(support_x)
        return super().adapt(support_x, support_y, phase)

    def adapted_names(self) -> list[str]:
        return list(self._contexts())

    def initial(self, phase: Phase) -> Adapted:
        return Adapted(self._contexts(), phase, self.module.buffers_by_name())

    def _contexts(self) -> Params:
        modules = self.module.net.named_modules()
        return {f"{name}.context": module.context for name, module in modules if isinstance(module, FiLM)}


def _place(net: nn.Module) -> str:
    place = _place_of(dict(net.named_modules()))
    if place is None:
        raise NetError(f"{type(net).__name__} has no batch norm, convolution or Linear layer; name one by after")
    return place


def _place_of(layers: dict[str, nn.Module]) -> str | None:
    """Of layers in order the last batch norm, or the first with weights."""
    norms = [name for name, layer in layers.items() if isinstance(layer, NORMS)]
    weighted = [name for name, layer in layers.items() if isinstance(layer, LAYERS) and is_called(layer)]
    return norms[-1] if norms else weighted[0] if weighted else None


def _film(context: int, layer: nn.Module) -> nn.Module:
    for name in (*SECOND, *LAST):
        if (channels := getattr(layer, name, None)) is not None:
            channels = channels if isinstance(channels, int) else channels[-1]
            return like(FiLM(context, channels, last=name in LAST), layer)
    kinds = ", ".join(kind.__name__ for kind in (*NORMS, *LAYERS))
    raise NetError(
        f"after: a {type(layer).__name__} does not say how many channels it gives; expected one of {kinds}, or a layer "
        f"with one of the attributes {', '.join((*SECOND, *LAST))}"
    )
