"""The net of a tuning: checked against its data, and handed back with other weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metahpo.errors import DataArgumentError, NetError, one_line
from metahpo.functional.copies import copied
from metahpo.functional.trees import Params
from metahpo.tasks.arguments import check_device
from metahpo.tuning.data import Labelled

Loss = Callable[[Tensor, Tensor], Tensor]


class WholeBatch(nn.Module):
    """A net that gives the loss of a batch of any kind, by ``forward(net, batch)``."""

    def __init__(self, net: nn.Module, function: Callable[[nn.Module, Any], Tensor]):
        super().__init__()
        self.net, self.function = net, function

    def forward(self, batch: Any) -> Tensor:
        return self.function(self.net, batch)


def with_weights(net: nn.Module, params: Params, buffers: Params | None = None) -> nn.Module:
    """A copy of the net, in evaluation mode, that holds these tensors of a ``FunctionalModule`` of it."""
    net = copied(net).eval()
    own = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    with torch.no_grad():
        # A batch norm of a FunctionalModule has a row for each inner step, here one, and always running statistics.
        known = {name: b for name, b in (buffers or {}).items() if name in own}
        for name, tensor in {**params, **known}.items():
            own[name].copy_(tensor.view_as(own[name]))
    return net


def check_fits(net: nn.Module, device: torch.device, **parts: Labelled) -> None:
    """Raises NetError or DataArgumentError, a line that begins with the part's name, where the net cannot take its
    examples or has no output for one of its labels, or where an example is NaN or infinite."""
    net = copied(net).to(device).eval()
    for what, data in parts.items():
        for name, values in zip(("examples", "targets"), data):
            bad = ~torch.isfinite(values.flatten(1) if values.dim() > 1 else values[:, None]).all(1)
            if bool(bad.any()):
                raise DataArgumentError(
                    f"{what}: {int(bad.sum())} of {len(bad)} {name} hold NaN or infinite values, the first is number "
                    f"{int(bad.nonzero()[0])}"
                )
        try:
            with torch.no_grad():
                out = net(data.x[:2].clone().to(device))
        except (RuntimeError, ValueError, TypeError) as error:
            raise NetError(
                f"{what}: {type(net).__name__} cannot take examples {list(data.x.shape[1:])}: {one_line(error)}"
            ) from None
        if not data.y.is_floating_point():
            if out.dim() != 2:
                raise NetError(
                    f"{type(net).__name__} gives {list(out.shape)} for {len(data.x[:2])} examples of {what}, "
                    "expected a row of logits each"
                )
            if data.classes > out.shape[1]:
                raise DataArgumentError(
                    f"{what}: found label {data.classes - 1}, but {type(net).__name__} has {out.shape[1]} outputs"
                )


def device_for(net: nn.Module, device: torch.device | str | None) -> torch.device:
    """The device asked for; None: the net's own."""
    own = next((p.device for p in net.parameters()), torch.device("cpu"))
    return own if device is None else check_device("tuning", device)
