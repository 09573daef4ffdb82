"""CAVIA: fast context adaptation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metahpo.checks import check_type, check_whole
from metahpo.errors import NetArgumentError, NetError
from metahpo.functional import Params
from metahpo.functional.copies import unwrapped
from metahpo.functional.surgery import Followed, is_called, like, with_layers
from metahpo.learners.base import Adapted
from metahpo.learners.maml import MAML
from metahpo.learners.phase import Phase

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class FiLM(nn.Module):
    """x * (1 + scale) + shift by channel, both linear in a context (Perez et al. 2018, equation 1).

    size: of the context, a vector of zeros; channels: of x [N, channels, ...], or [N, ..., channels] if ``last``.
    """

    def __init__(self, size: int, channels: int, last: bool):
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

    net and the rest: as in ``MAML``. context: its size. after: the name of the layer that is followed by the FiLM
    layer; by default the last of the net's batch norms (before which a scale and shift would have no effect), or its
    first layer with weights where it has none.
    """

    def __init__(self, net: nn.Module, *, context: int = 100, after: str | None = None, **options: Any):
        check_type(self, "net", net, nn.Module, "a module", error=NetArgumentError)
        net = unwrapped(net)
        context = check_whole(self, "context", context, at_least=1, error=NetArgumentError)
        check_type(self, "after", after, (str, type(None)), "the name of a layer", error=NetArgumentError)
        net = with_layers(net, [after or _place(net)], lambda layer: _film(context, layer), _Modulated)
        super().__init__(net, **options)

    def adapted_names(self) -> list[str]:
        return list(self._contexts())

    def initial(self, phase: Phase) -> Adapted:
        return Adapted(self._contexts(), phase, self.module.buffers_by_name())

    def _contexts(self) -> Params:
        modules = self.module.net.named_modules()
        return {f"{name}.context": module.context for name, module in modules if isinstance(module, FiLM)}


class _Modulated(Followed):
    def __getattr__(self, name: str) -> Any:
        layer = self.__dict__.get("_modules", {}).get("0")
        if layer is not None and name in layer._parameters:
            raise NetError(
                f"after: the net reads the {name} of this {type(layer).__name__} and does not call it, so that nothing "
                "can follow it; name another layer"
            )
        return super().__getattr__(name)


def _film(context: int, layer: nn.Module) -> nn.Module:
    return like(FiLM(context, _channels(layer), isinstance(layer, nn.Linear)), layer)


def _place(net: nn.Module) -> str:
    names = [name for name, module in net.named_modules() if isinstance(module, NORMS)]
    names = names or [name for name, m in net.named_modules() if isinstance(m, LAYERS) and is_called(m)][:1]
    if not names:
        raise NetError(f"{type(net).__name__} has no batch norm, convolution or Linear layer; name one by after")
    return names[-1]


def _channels(layer: nn.Module) -> int:
    for name in ("num_features", "out_channels", "out_features"):
        if hasattr(layer, name):
            return getattr(layer, name)
    kinds = ", ".join(kind.__name__ for kind in (*NORMS, *LAYERS))
    raise NetError(f"after: a {type(layer).__name__} does not say how many channels it gives; expected one of {kinds}")
