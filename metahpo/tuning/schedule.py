"""Learnt rates as a user takes them away: a table, a picture, and what ``torch.optim`` needs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from metahpo.errors import NetError, shown
from metahpo.functional.copies import trainable
from metahpo.picture import Picture

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass(frozen=True)
class Rates:
    """The hyperparameters of a training by layer and by phase.

    rule: "sgd", "adam" or "adamw"; groups: the parameters' names of each row, by the row's name; steps: of the
    training, which its phases share evenly; values: by hyperparameter ("lr", "momentum", ...), each [rows, phases];
    history: the figures of each outer step; warnings: what went wrong on the way, a line each.
    """

    rule: str
    groups: Mapping[str, Sequence[str]]
    steps: int
    values: Mapping[str, Tensor]
    history: Sequence[Mapping[str, float]] = ()
    warnings: Sequence[str] = field(default=())

    @property
    def phases(self) -> int:
        return next(iter(self.values.values())).shape[1]

    def at(self, step: int) -> list[dict[str, Any]]:
        """The settings of each row at a step (from 0), as ``torch.optim`` names them."""
        phase = min(step * self.phases // self.steps, self.phases - 1)
        columns = {name: table[:, phase].tolist() for name, table in self.values.items()}
        rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        for row in rows:
            # torch's AdamW has one of its own.
            row.setdefault("weight_decay", 0.0)
            if "beta1" in row:
                row["betas"] = (row.pop("beta1"), row.pop("beta2"))
        return rows

    def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        """The net's parameters in groups with their settings at the first step: ``torch.optim.SGD(...)`` of it, or what
        ``rule`` names. Each group's "name" is its row's.

        Raises NetError for a net whose trainable parameters are not those that were tuned.
        """
        own = trainable(net)
        tuned = [name for names in self.groups.values() for name in names]
        for name in [*own, *tuned]:
            if name not in own or name not in tuned:
                where = "the tuned net" if name in own else type(net).__name__
                raise NetError(
                    f"param_groups: {where} has no trainable parameter {name!r}; give the net that was tuned"
                )
        return [
            {"params": [own[name] for name in names], "name": row, **settings}
            for (row, names), settings in zip(self.groups.items(), self.at(0))
        ]

    def optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        """The ``torch.optim`` optimizer of ``rule`` on ``param_groups(net)``."""
        return OPTIMIZERS[self.rule](self.param_groups(net))

    def scheduler(self, optimizer: torch.optim.Optimizer) -> RateSchedule:
        """The phases as a scheduler of an optimizer made of ``param_groups``; call its ``step()`` after each
        ``optimizer.step()``."""
        return RateSchedule(optimizer, self)

    def varied(self) -> dict[str, Tensor]:
        """The hyperparameters that differ between layers or phases; all of them where none does."""
        found = {name: table for name, table in self.values.items() if bool((table != table[0, 0]).any())}
        return found or dict(self.values)

    def table(self) -> str:
        """A markdown table, one row a layer, one column a phase of each hyperparameter that varies."""
        varied = self.varied()
        heads = [f"{name}, {span}" for name in varied for span in self.spans()]
        lines = [f"| layer | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
        for index, row in enumerate(self.groups):
            cells = [f"{float(value):.3g}" for table in varied.values() for value in table[index]]
            lines.append(f"| `{row}` | {' | '.join(cells)} |")
        same = [f"{name} {float(table[0, 0]):.3g}" for name, table in self.values.items() if name not in varied]
        return "\n".join(lines + ([f"\nEverywhere: {', '.join(same)}."] if same else []))

    def spans(self) -> list[str]:
        """The steps of each phase, from 1."""
        firsts = [-(-phase * self.steps // self.phases) for phase in range(self.phases)] + [self.steps]
        return [f"steps {a + 1}-{b}" if b > a + 1 else f"step {b}" for a, b in itertools.pairwise(firsts)]

    def pictures(self) -> dict[str, Figure]:
        return {"rates": self.heat_map()}

    def heat_map(self) -> Figure:
        """A panel for each hyperparameter that varies, rows by phases; rates and decays on a log scale."""
        varied = self.varied()
        rows, count = len(self.groups), len(varied)
        width = 2.2 + count * max(2.4, 0.75 * self.phases + 0.8)
        figure = Picture(figsize=(width, 1.5 + 0.32 * rows), dpi=100, layout="constrained")
        axes = figure.subplots(1, count, squeeze=False)[0]
        for axis, (name, table) in zip(axes, varied.items()):
            values = table.detach().cpu().double().numpy()
            log = name in ("lr", "weight_decay") and bool((values > 0).all()) and values.max() > values.min()
            image = axis.imshow(values, cmap="viridis", aspect="auto", norm=LogNorm() if log else None)
            for (row, phase), value in np.ndenumerate(values):
                colour = "black" if image.norm(value) > 0.6 else "white"
                axis.text(phase, row, f"{value:.2g}", ha="center", va="center", color=colour, fontsize=8)
            axis.set_xticks(range(self.phases), [span.partition(" ")[2] for span in self.spans()], fontsize=8)
            axis.set(title=name, xlabel="steps")
            axis.set_yticks(range(rows), list(self.groups) if axis is axes[0] else [], family="monospace", fontsize=8)
            axis.tick_params(length=0)
        return figure

    def tensors(self) -> dict[str, Any]:
        groups = {row: list(names) for row, names in self.groups.items()}
        return {
            "rule": self.rule,
            "steps": self.steps,
            "groups": groups,
            "values": {name: table.cpu() for name, table in self.values.items()},
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Any]) -> Rates:
        """The rates from what ``tensors()`` gave (a run's result.pt, by ``load_result``)."""
        return cls(**{name: tensors[name] for name in ("rule", "groups", "steps", "values")})


class RateSchedule(LRScheduler):
    """Sets each group's rate, momentum (betas) and weight decay to those of the step's phase."""

    def __init__(self, optimizer: torch.optim.Optimizer, rates: Rates):
        self.rates = rates
        names = [group.get("name") for group in optimizer.param_groups]
        if set(names) != set(rates.groups) or len(names) != len(rates.groups):
            raise NetError(
                f"scheduler: the names of the optimizer's groups are {shown(names)}, expected "
                f"{shown(list(rates.groups))}, those of param_groups(net)"
            )
        super().__init__(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Without the rates themselves, so that a checkpoint of it is plain values."""
        return {name: value for name, value in super().state_dict().items() if name != "rates"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also sets the rates of the step that it was at; those of the first are there since it was made."""
        super().load_state_dict(state_dict)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr()):
            group["lr"] = rate

    def get_lr(self) -> list[float | Tensor]:
        settings = dict(zip(self.rates.groups, self.rates.at(self.last_epoch)))
        groups = self.optimizer.param_groups
        for group in groups:
            group.update({name: value for name, value in settings[group["name"]].items() if name != "lr"})
        return [settings[group["name"]]["lr"] for group in groups]
