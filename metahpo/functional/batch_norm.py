"""Per-step batch normalisation: statistics, scales and shifts that differ from inner step to inner step.

Antoniou et al. 2019, "How to train your MAML", section 4: per-step batch-norm running statistics (BNRS) and per-step
batch-norm weights and biases (BNWB).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metahpo import native
from metahpo.errors import NetError
from metahpo.functional.copies import copied

_CONVERTED = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}


class PerStepBatchNorm(nn.Module):
    """Batch normalisation over dimension 1 with one row of state an inner step; drop-in for ``BatchNorm1d/2d/3d``.

    ``weight`` and ``bias`` are [affine_rows, C], ``running_mean`` and ``running_var`` [statistics_rows, C]; step k uses
    row min(k, rows - 1), so one row is ordinary batch normalisation. Which step is running, and whether to normalise
    with the statistics of the batch or with the running ones, is set by ``FunctionalModule`` before a call (``step``,
    ``inductive``).

    As in the authors' program the batch's own statistics normalise in training and in evaluation alike (transductive);
    ``inductive`` uses the running ones, which training mode updates. Buffers are replaced, never written in place, so
    the module runs under ``vmap`` and the new ones can be handed out.
    """

    def __init__(
        self,
        num_features: int,
        *,
        statistics_rows: int = 1,
        affine_rows: int = 1,
        affine: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.1,
        dims: tuple[int, ...] = (2, 3, 4, 5),
    ):
        super().__init__()
        self.num_features, self.eps, self.momentum, self.dims = num_features, eps, momentum, dims
        self.weight = nn.Parameter(torch.ones(affine_rows, num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(affine_rows, num_features)) if affine else None
        self.running_mean = torch.nn.Buffer(torch.zeros(statistics_rows, num_features))
        self.running_var = torch.nn.Buffer(torch.ones(statistics_rows, num_features))
        self.step, self.inductive = 0, False

    @classmethod
    def from_batch_norm(cls, norm: _BatchNorm, statistics_rows: int, affine_rows: int):
        """The same normalisation with every row a copy of ``norm``'s scale, shift and running statistics.

        A layer without running statistics gets them; one that averages them over all batches (momentum None) gets
        torch's usual momentum of 0.1 instead.
        """
        new = cls(
            norm.num_features,
            statistics_rows=statistics_rows,
            affine_rows=affine_rows,
            affine=norm.affine,
            eps=norm.eps,
            momentum=0.1 if norm.momentum is None else norm.momentum,
            dims=_CONVERTED[type(norm)],
        )
        with torch.no_grad():
            for name, old in [*norm.named_parameters(), *norm.named_buffers()]:
                if name == "num_batches_tracked":
                    continue
                rows = getattr(new, name)
                setattr(new, name, _like(old, old.detach().expand(rows.shape[0], -1).clone()))
        return new.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast x is of a lower type than the statistics; torch's kernels have no second derivative of the mix.
        return self._normalise(x.to(self.running_mean.dtype)).to(x.dtype)

    def _normalise(self, x: Tensor) -> Tensor:
        if x.dim() not in self.dims:
            raise NetError(f"batch norm expects {' or '.join(f'{d}D' for d in self.dims)} input, got {x.dim()}D")
        scale, shift = (None if rows is None else self._row(rows) for rows in (self.weight, self.bias))
        mean, var = self._row(self.running_mean), self._row(self.running_var)
        if self.inductive:
            return torch.batch_norm(x, scale, shift, mean, var, False, 0.0, self.eps, False)
        if x.numel() <= x.shape[1]:
            raise NetError(
                f"batch norm needs more than one value a channel to take batch statistics, got input {tuple(x.shape)}"
            )
        out, batch_mean, batch_rstd = torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, self.eps)
        if self.training:
            self._update(mean, var, batch_mean.detach(), batch_rstd.detach(), x.numel() // x.shape[1])
        return out

    def fusible(self, x: Tensor) -> bool:
        """Whether ``fused`` can normalise ``x``: an image batch, by its own statistics."""
        fits = x.dim() == 4 and 4 in self.dims and x.shape[1] == self.num_features
        return not self.inductive and fits and x.numel() > x.shape[1]

    def fused(self, x: Tensor, slope: float, pool: int) -> Tensor:
        """``forward``, then a leaky ReLU of ``slope`` and max pooling by ``pool`` (1 or 2), in one C kernel."""
        ones = x.new_ones(self.num_features) if self.weight is None else self._row(self.weight)
        zeros = x.new_zeros(self.num_features) if self.bias is None else self._row(self.bias)
        out, mean, rstd = native.norm_act_pool(x, ones, zeros, eps=self.eps, slope=slope, pool=pool)
        if self.training:
            self._update(self._row(self.running_mean), self._row(self.running_var), mean, rstd, x.numel() // x.shape[1])
        return out

    def _row(self, rows: Tensor) -> Tensor:
        return rows[min(self.step, rows.shape[0] - 1)]

    def _update(self, mean: Tensor, var: Tensor, batch_mean: Tensor, batch_rstd: Tensor, count: int) -> None:
        # As torch does: the running variance averages the unbiased estimate.
        batch_var = (batch_rstd.pow(-2) - self.eps) * (count / (count - 1))
        self.running_mean = self._replace(self.running_mean, torch.lerp(mean, batch_mean.to(mean.dtype), self.momentum))
        self.running_var = self._replace(self.running_var, torch.lerp(var, batch_var.to(var.dtype), self.momentum))

    def _replace(self, rows: Tensor, new: Tensor) -> Tensor:
        row = min(self.step, rows.shape[0] - 1)
        return torch.cat([rows[:row], new.unsqueeze(0), rows[row + 1 :]])

    def extra_repr(self) -> str:
        return f"{self.num_features}, statistics_rows={self.running_mean.shape[0]}, eps={self.eps}"


def convert_batch_norm(net: nn.Module, *, statistics_rows: int = 1, affine_rows: int = 1) -> nn.Module:
    """A deep copy of ``net`` in which every ``BatchNorm1d/2d/3d`` is a ``PerStepBatchNorm``; ``net`` is left as it was.

    A layer used in several places stays one layer. Subclasses of the three (synchronised, lazy) are left alone.
    """
    net = copied(net)
    converted: dict[nn.Module, nn.Module] = {}
    for parent in list(net.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, _BatchNorm) and type(child) in _CONVERTED:
                if child not in converted:
                    converted[child] = PerStepBatchNorm.from_batch_norm(child, statistics_rows, affine_rows)
                parent._modules[name] = converted[child]
    if isinstance(net, _BatchNorm) and type(net) in _CONVERTED:
        return PerStepBatchNorm.from_batch_norm(net, statistics_rows, affine_rows)
    return net


def _like(old: Tensor, value: Tensor) -> Tensor:
    """``value`` as a parameter where ``old`` is one, frozen where it is frozen."""
    return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
