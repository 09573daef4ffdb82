"""What ``tune_decay`` found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from metahpo.errors import NetError
from metahpo.functional.copies import take_over, tensors_of, trainable
from metahpo.functional.trees import Params
from metahpo.picture import Picture, spread_out
from metahpo.training.metrics import Row

# The name of the one decay of by="all".
ALL = "all"


@dataclass(frozen=True)
class Decay:
    """The weight decays of a net, and the net trained with them.

    by: "all", "layer" or "parameter"; log_decays: natural logarithms, a scalar under "all", a scalar for each parameter
    tensor by its name, or a tensor of its shape; net: the trained net, in evaluation mode; history: a row an update;
    warnings: a line each.
    """

    by: str
    log_decays: Params
    net: nn.Module
    history: tuple[Row, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def decays(self) -> Params:
        """The decays as ``weight_decay`` of ``torch.optim.SGD`` and ``Adam`` counts them, by the same names."""
        return {name: log.exp() for name, log in self.log_decays.items()}

    def load_into(self, net: nn.Module) -> None:
        """Gives a net of the same parts the tuned weights and buffers. Raises NetError where the parts differ."""
        tensors, own = tensors_of(self.net), tensors_of(net)
        if tensors.keys() != own.keys():
            one = min(tensors.keys() ^ own.keys())
            raise NetError(f"load_into: {one!r} is in {'the tuned net' if one in tensors else 'this net'} alone")
        try:
            take_over(net, tensors)
        except NetError as error:
            raise NetError(f"load_into: {error}") from None

    def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        """``[{"params": ..., "weight_decay": ...}, ...]`` of the net's trainable parameters, for ``torch.optim``.

        Raises NetError for decays by parameter, which torch.optim does not know, and for a net of other parts.
        """
        if self.by == "parameter":
            raise NetError('param_groups: torch.optim has no decay by parameter; tune by="layer" or by="all"')
        params, decays = trainable(net), self.decays
        if self.by == ALL:
            return [{"params": list(params.values()), "weight_decay": float(decays[ALL])}]
        if set(params) != set(decays):
            name = sorted(set(params) ^ set(decays))[0]
            whose = "the tuned net" if name in decays else type(net).__name__
            raise NetError(f"param_groups: only {whose} has a trainable parameter {name!r}")
        return [{"params": [p], "weight_decay": float(decays[name])} for name, p in params.items()]

    def table(self) -> str:
        """A line a parameter tensor: its size and its decay, or the quantiles of its decays."""
        if self.by == "parameter":
            lines = ["| parameter | weights | 10% below | median | 90% below |", "| --- | --- | --- | --- | --- |"]
            for name, size, log in self._rows():
                low, middle, high = np.exp(np.quantile(log, [0.1, 0.5, 0.9]))
                lines.append(f"| {name} | {size} | {low:.2e} | {middle:.2e} | {high:.2e} |")
        else:
            lines = ["| parameter | weights | decay |", "| --- | --- | --- |"]
            lines += [f"| {name} | {size} | {np.exp(log[0]):.2e} |" for name, size, log in self._rows()]
        return "\n".join(lines)

    def pictures(self) -> dict[str, Figure]:
        """ "decays": by parameter tensor, a histogram each or a bar; "curves": losses and mean decay by update."""
        return {"decays": self._draw_decays(), **({"curves": self._draw_curves()} if self.history else {})}

    def tensors(self) -> dict[str, Any]:
        return {
            "by": self.by,
            "log_decays": {name: log.cpu() for name, log in self.log_decays.items()},
            "net": {name: value.cpu() for name, value in self.net.state_dict().items()},
        }

    def _rows(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """(parameter tensor, its size, its log decays [size] or [1])."""
        params = dict(self.net.named_parameters())
        if self.by == ALL:
            yield ALL, sum(p.numel() for p in params.values() if p.requires_grad), _flat(self.log_decays[ALL])
            return
        for name, log in self.log_decays.items():
            yield name, params[name].numel(), _flat(log)

    def _draw_decays(self) -> Figure:
        rows = list(self._rows())
        figure = Picture(figsize=(9, 1.2 + 0.45 * len(rows)), dpi=100, layout="constrained")
        axis = figure.subplots()
        values = [log / np.log(10) for _, _, log in rows]
        low, high = min(v.min() for v in values) - 0.5, max(v.max() for v in values) + 0.5
        for row, value in enumerate(values):
            if len(value) > 1:
                counts, edges = np.histogram(value, 80, (low, high))
                axis.stairs(row + 0.4 - 0.8 * counts / counts.max(), edges, baseline=row + 0.4, fill=True)
            else:
                axis.barh(row, value[0] - low, left=low, height=0.8)
        axis.set_yticks(range(len(rows)), [f"{name} ({size})" for name, size, _ in rows], family="monospace")
        axis.invert_yaxis()
        axis.set(xlabel="log10 of the decay", xlim=(low, high), title=f"weight decay by {self.by}")
        return figure

    def _draw_curves(self) -> Figure:
        figure = Picture(figsize=(9, 3.5), dpi=100, layout="constrained")
        losses, decays = figure.subplots(1, 2)
        updates = [row["iteration"] for row in self.history]
        losses.plot(updates, [row["train_loss"] for row in self.history], color="0.35", label="train, without decay")
        losses.plot(updates, [row["val_loss"] for row in self.history], color="tab:blue", label="validation")
        losses.set(xlabel="update of the decays", title="loss")
        spread_out(losses.yaxis, [row[name] for row in self.history for name in ("train_loss", "val_loss")])
        losses.legend(frameon=False)
        decays.plot(updates, [row["decay"] for row in self.history], color="tab:green")
        decays.set(xlabel="update of the decays", title="geometric mean of the decays")
        spread_out(decays.yaxis, [row["decay"] for row in self.history])
        return figure


def _flat(log: Tensor) -> np.ndarray:
    return log.detach().double().cpu().flatten().numpy()
