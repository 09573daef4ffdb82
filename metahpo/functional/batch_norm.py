"""Per-step batch normalisation: statistics, scales and shifts that differ from inner step to inner step.

Antoniou et al. 2019, "How to train your MAML", section 4: per-step batch-norm running statistics (BNRS) and per-step
batch-norm weights and biases (BNWB).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from metahpo import native
from metahpo.errors import NetError
from metahpo.functional.copies import copied

_AFFINE, _STATISTICS = ("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")


class PerStepBatchNorm(_BatchNorm):
    """Batch normalisation over dimension 1 with one row of state an inner step, as ``convert_batch_norm`` makes it of a
    batch norm of torch's: an instance of that layer's class too, with all that the layer carried.

    ``weight`` and ``bias`` are [affine_rows, C], ``running_mean`` and ``running_var`` [statistics_rows, C]; step k uses
    row min(k, rows - 1), so one row is ordinary batch normalisation. A tensor [C] is the one row of all steps. Which
    step is running, and whether to normalise with the statistics of the batch or with the running ones, is set by
    ``FunctionalModule`` before a call (``step``, ``inductive``).

    As in the authors' program the batch's own statistics normalise in training and in evaluation alike (transductive);
    ``inductive`` uses the running ones, which training mode updates: an average with ``momentum``, or where that is
    None the mean of all batches, which ``num_batches_tracked`` [statistics_rows] counts. ``frozen_statistics``: always
    the running ones, which never change, as torch does in a layer that stays in ``eval()`` while its net trains.
    Buffers are replaced, never written in place, so the module runs under ``vmap`` and the new ones can be handed out.
    """

    step: int
    inductive: bool
    frozen_statistics: bool
    # Names in the state dict that checkpoints of before the class kept them do not have.
    optional_state: tuple[str, ...]
    # Whether training updates the running statistics; whether it counts batches; whether the layer had statistics when
    # it was converted; its class then.
    _tracks: bool
    _counts: bool
    _had_statistics: bool
    _kind: type[_BatchNorm]

    def forward(self, input: Tensor) -> Tensor:
        try:
            self._check_input_dim(input)
        except ValueError as error:
            raise NetError(f"batch norm {error}") from None
        # Under autocast x is of a lower type than the statistics; torch's kernels have no second derivative of the mix.
        x = input.to(self.running_mean.dtype)
        scale, shift = (None if rows is None else self._row(rows) for rows in (self.weight, self.bias))
        if self.inductive or self.frozen_statistics:
            mean, var = self._row(self.running_mean), self._row(self.running_var)
            return torch.batch_norm(x, scale, shift, mean, var, False, 0.0, self.eps, False).to(input.dtype)
        return self._by_batch(x, scale, shift, self.eps).to(input.dtype)

    def _by_batch(
        self, x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float, momentum: float | None = None
    ) -> Tensor:
        """``x`` normalised by its own statistics, of which the running ones take their share in training."""
        if x.numel() <= x.shape[1]:
            raise NetError(
                f"batch norm needs more than one value a channel to take batch statistics, got input {tuple(x.shape)}"
            )
        out, mean, rstd = torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, eps)
        if self.training:
            self._update(mean.detach(), rstd.detach().pow(-2) - eps, x.numel() // x.shape[1], momentum)
        return out

    def hold(self, frozen: bool) -> None:
        """Sets ``frozen_statistics``, where the layer had statistics: one without has nothing else than the batch's."""
        self.frozen_statistics = frozen and self._had_statistics

    def fusible(self, x: Tensor) -> bool:
        """Whether ``fused`` can normalise ``x``: an image batch, by its own statistics."""
        fits = x.dim() == 4 and issubclass(self._kind, nn.BatchNorm2d) and x.shape[1] == self.num_features
        return not self.inductive and not self.frozen_statistics and fits and x.numel() > x.shape[1]

    def fused(self, x: Tensor, slope: float, pool: int) -> Tensor:
        """``forward``, then a leaky ReLU of ``slope`` and max pooling by ``pool`` (1 or 2), in one C kernel."""
        ones = x.new_ones(self.num_features) if self.weight is None else self._row(self.weight)
        zeros = x.new_zeros(self.num_features) if self.bias is None else self._row(self.bias)
        out, mean, rstd = native.norm_act_pool(x, ones, zeros, eps=self.eps, slope=slope, pool=pool)
        if self.training:
            self._update(mean, rstd.pow(-2) - self.eps, x.numel() // x.shape[1])
        return out

    def _row(self, rows: Tensor, dim: int = 1) -> Tensor:
        """This step's row, which has ``dim`` dimensions."""
        return rows if rows.dim() == dim else rows[min(self.step, rows.shape[0] - 1)]

    def _update(self, mean: Tensor, var: Tensor, count: int, momentum: Any = None) -> None:
        """Averages into the running statistics those of a batch with ``count`` values a channel.

        momentum: the share of the batch; by default the layer's, and the batch is counted.
        """
        if not self._tracks:
            return
        if momentum is None:
            momentum = self.momentum
            if self._counts:
                seen = self._row(self.num_batches_tracked, 0) + 1
                self.num_batches_tracked = self._replace(self.num_batches_tracked, seen)
                momentum = seen.to(mean.dtype).reciprocal() if momentum is None else momentum
        # As torch does: the running variance averages the unbiased estimate.
        for name, value in (("running_mean", mean), ("running_var", var * (count / (count - 1)))):
            rows = getattr(self, name)
            old = self._row(rows)
            setattr(self, name, self._replace(rows, torch.lerp(old, value.to(old.dtype), momentum)))

    def _replace(self, rows: Tensor, new: Tensor) -> Tensor:
        """The rows with ``new`` in this step's place."""
        if rows.dim() == new.dim():
            return new
        row = min(self.step, rows.shape[0] - 1)
        return torch.cat([rows[:row], new.unsqueeze(0), rows[row + 1 :]])

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:  # type: ignore[override]
        for name in self.optional_state:
            state_dict.setdefault(prefix + name, getattr(self, name))
        # Not torch's own method, which adds a count of batches where there is none.
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)

    def __reduce_ex__(self, protocol):
        # The class is made when it is needed, so that pickle finds it by the one it was made of.
        return _empty, (self._kind, isinstance(self, OwnForward)), *super().__reduce_ex__(protocol)[2:]

    def extra_repr(self) -> str:
        rows = self.running_mean.numel() // self.num_features
        return f"{self.num_features}, statistics_rows={rows}, eps={self.eps}"


class OwnForward(_BatchNorm):
    """What a ``PerStepBatchNorm`` is besides where its layer has a forward method of its own, as timm's
    ``BatchNormAct2d``.

    The method sees one row of each tensor, copies of the buffers, and ``training`` as True wherever the batch's
    statistics are to normalise, in evaluation too, where what it leaves in the buffers is dropped.
    """

    # Of the instance alone, where it had one.
    _forward: Callable[..., Any] | None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        training, by_running = self.training, self.inductive or self.frozen_statistics
        held = [(tensors, name, t) for tensors in (self._parameters, self._buffers) for name, t in tensors.items()]
        for tensors, name, t in held:
            if t is not None and name in (*_AFFINE, *_STATISTICS):
                t = self._row(t, 0 if name == "num_batches_tracked" else 1)
            tensors[name] = t.clone() if t is not None and tensors is self._buffers else t
        self.training = not by_running
        try:
            with _ByBatch(self):
                output = (self._forward or super().forward)(*args, **kwargs)
            new = dict(self._buffers)
        finally:
            self.training = training
            for tensors, name, t in held:
                tensors[name] = t
        if training and not by_running:
            for name, old in self._buffers.items():
                self._buffers[name] = old if old is None else self._replace(old, new[name])
        return output


class _ByBatch(TorchFunctionMode):
    """Inside it ``F.batch_norm`` replaces the running statistics of ``norm``, where torch's writes into them."""

    def __init__(self, norm: Any):
        super().__init__()
        self.norm = norm

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (self._batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))

    def _batch_norm(
        self, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ) -> Tensor:
        own = running_mean is self.norm.running_mean
        if not training or not (own or (running_mean is None and not self.norm._had_statistics)):
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        x = input.to(self.norm.running_mean.dtype)
        return self.norm._by_batch(x, weight, bias, eps, momentum if own else None).to(input.dtype)


def convert_batch_norm(net: nn.Module, *, statistics_rows: int = 1, affine_rows: int = 1) -> nn.Module:
    """A deep copy of ``net`` in which every batch norm is a ``PerStepBatchNorm``; ``net`` is left as it was.

    A batch norm is any module of torch's ``BatchNorm1d/2d/3d`` and ``SyncBatchNorm`` or of a subclass, which may have a
    forward method of its own (``OwnForward``). It stays the module it was: registered where it was, with its hooks,
    attributes, further parameters and parametrizations. A tensor that other layers hold too, or that is computed from
    others, has no rows by step.
    """
    net = copied(net)
    norms = [module for module in net.modules() if _convertible(module)]
    owners: dict[int, set[nn.Module]] = defaultdict(set)
    for module in net.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            owners[id(tensor)].add(module)
    rows_of: dict[int, Tensor] = {}
    for norm in norms:
        # Other classes were not converted once, and checkpoints hold their tensors as they are.
        plain = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        _complete(norm, plain)
        for names, rows in ((_AFFINE, affine_rows), (_STATISTICS, statistics_rows)):
            for tensors in (norm._parameters, norm._buffers):
                for name in names:
                    tensor = tensors.get(name)
                    if tensor is None or not owners[id(tensor)] <= set(norms) or not (plain or rows > 1):
                        continue
                    if id(tensor) not in rows_of:
                        rows_of[id(tensor)] = _expanded(tensor, rows)
                    tensors[name] = rows_of[id(tensor)]
    for norm in norms:
        norm._kind, norm._forward = type(norm), vars(norm).pop("forward", None)
        own = norm._forward is not None or type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        norm.__class__ = _per_step(type(norm), own)
    return net


def _convertible(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and not isinstance(module, LazyModuleMixin)


def _complete(norm: Any, plain: bool) -> None:
    """Gives ``norm`` the running statistics and the settings that a ``PerStepBatchNorm`` has."""
    norm._had_statistics = norm.running_mean is not None
    norm._tracks = norm.track_running_stats or not norm._had_statistics
    norm.step, norm.inductive, norm.frozen_statistics = 0, False, False
    like = next((t for t in [*norm.parameters(), *norm.buffers()] if t.is_floating_point()), torch.empty(0))
    optional = []
    if not norm._had_statistics:
        norm.running_mean = nn.Buffer(like.new_zeros(norm.num_features))
        norm.running_var = nn.Buffer(like.new_ones(norm.num_features))
        optional += [] if plain else ["running_mean", "running_var"]
    if norm.momentum is None:
        if norm.num_batches_tracked is None:
            norm.num_batches_tracked = nn.Buffer(torch.zeros((), dtype=torch.long, device=like.device))
        optional.append("num_batches_tracked")
    elif plain:
        norm.num_batches_tracked = None  # Which nothing would read.
    norm._counts, norm.optional_state = norm.num_batches_tracked is not None, tuple(optional)


def _expanded(old: Tensor, rows: int) -> Tensor:
    """``rows`` copies of ``old``, a parameter where ``old`` is one, frozen where it is frozen."""
    value = old.detach().expand(rows, *old.shape).clone()
    return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value


@functools.cache
def _per_step(kind: type[_BatchNorm], own: bool) -> type[PerStepBatchNorm]:
    bases = (OwnForward, kind, PerStepBatchNorm) if own else (PerStepBatchNorm, kind)
    return type(kind.__name__, bases, {"__module__": kind.__module__})


def _empty(kind: type[_BatchNorm], own: bool) -> PerStepBatchNorm:
    made = _per_step(kind, own)
    return made.__new__(made)
