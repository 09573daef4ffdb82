"""A torch module as a pure function of its parameters and buffers."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._pytree import tree_map

from metahpo.errors import NetError
from metahpo.functional.batch_norm import PerStepBatchNorm, convert_batch_norm
from metahpo.functional.conv_choice import batched_convolutions
from metahpo.functional.formulas import ByFormula
from metahpo.functional.fused import fuse
from metahpo.functional.kernels import is_recurrent, twice_differentiable
from metahpo.functional.lending import Lender
from metahpo.functional.levels import under_torch_func
from metahpo.functional.strays import refuse_strays
from metahpo.functional.swap import call_with
from metahpo.functional.trees import Params
from metahpo.functional.writes import later_write, refuse_writes, versions


class FunctionalModule(nn.Module):
    """Any ``nn.Module`` as a pure function: ``module(params, x, step=k)``.

    net: the net; it is copied, and its batch-norm layers become ``PerStepBatchNorm`` with ``statistics_rows`` and
    ``affine_rows`` rows (1: ordinary batch norm). ``self.net`` is the copy, whose parameters are the initial ones.

    Modules in ``eval()`` while the net was in training mode stay so in training, and so do those that the net's own
    ``train()`` keeps there: a batch norm among them always normalises with its running statistics, which stay.

    Parameters that do not require grad are frozen: part of the net, absent from ``params()``. A tensor shared by
    several layers (tied weights) appears once, under its first name, and stays tied in every call.

    Raises NetError for lazy modules that have not run yet, and at the first call for a net that checkpoints activations
    inside: the recomputation would read the net's own weights instead of the ones given, which is silently wrong. The
    same at the first two calls for a net that reaches weights which require grad past its registered parameters (a
    Python list, a function or a hook over ``self``): they would neither adapt nor learn; and at any call for one that
    writes into its parameters, as ``Embedding`` with max_norm does: its initial weights would change. (Of what is
    written after the first two calls by way of ``.data`` torch keeps no count.)
    """

    def __init__(self, net: nn.Module, *, statistics_rows: int = 1, affine_rows: int = 1):
        super().__init__()
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
                raise NetError(f"{type(net).__name__}.{name} is lazy; run the net once on an example batch first")
        self.net = convert_batch_norm(net, statistics_rows=statistics_rows, affine_rows=affine_rows)
        self._weights = list(self.net.parameters())
        self._norms = [m for m in self.net.modules() if isinstance(m, PerStepBatchNorm)]
        self.seen = Seen()
        self._evaluating = [m for m in self.net.modules() if not m.training] if net.training else []
        self._set_mode(True)
        self._recurrent = is_recurrent(self.net)
        # The type to which autocast lowers what it can of the net's forward pass, or None. It is entered in every call
        # and not around several, as autocast is a thread's own, and a backward pass may call again from another.
        self.autocast: torch.dtype | None = None
        own = {
            f"{name}.{kind}"
            for name, m in self.net.named_modules()
            if m in self._norms
            for kind, _ in m.named_buffers(recurse=False)
        }
        self._foreign_buffers = [name for name, _ in self.net.named_buffers() if name.removeprefix(".") not in own]
        aliases: dict[int, str] = {}
        self._alias = {
            name: aliases.setdefault(id(p), name) for name, p in self.net.named_parameters(remove_duplicate=False)
        }

    def fuse(self) -> None:
        """Runs the net on the C kernels from now on, where they can stand in (``metahpo.functional.fused``)."""
        fuse(self.net)

    def train(self, mode: bool = True) -> FunctionalModule:
        self.training = mode
        self._set_mode(mode)
        return self

    def _set_mode(self, training: bool) -> None:
        self.net.train(training)
        if training:
            for module in self._evaluating:
                module.training = False
            for norm in self._norms:
                norm.hold(not norm.training)

    def freeze_statistics(self) -> None:
        """Has the batch norms normalise with their running statistics until the net trains again, but for those that
        had none when they were given: as torch's do in a net in evaluation mode."""
        for norm in self._norms:
            norm.hold(True)

    @property
    def batch_dependent(self) -> bool:
        """Whether an output depends on the rest of its batch, through batch normalisation."""
        return not all(norm.frozen_statistics for norm in self._norms)

    def params(self) -> Params:
        """The trainable parameters by dotted name (the net's own tensors, not copies)."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}

    def norm_names(self) -> set[str]:
        """The names of the batch-norm scales and shifts."""
        norms = {id(p) for norm in self._norms for p in norm.parameters()}
        return {name for name, p in self.params().items() if id(p) in norms}

    def buffers_by_name(self) -> Params:
        """The net's buffers (running statistics and others) by dotted name."""
        return dict(self.net.named_buffers())

    def forward(self, params: Params, *inputs: Tensor, step: int = 0) -> Tensor:
        """The net's output for ``inputs`` with ``params``, on batch statistics; ``apply_with`` has all the choices."""
        return self.apply_with(params, self.buffers_by_name(), *inputs, step=step, training=self.training)[0]

    def apply_with(
        self,
        params: Params,
        buffers: Params,
        *inputs: Tensor,
        step: int = 0,
        training: bool = True,
        inductive: bool = False,
    ) -> tuple[Tensor, Params]:
        """Runs the net purely: ``(params, buffers, inputs) -> (output, new buffers)``.

        params: any subset of ``params()`` by name, the rest being the net's own; step: the row of per-step batch norm;
        training: dropout and the update of running statistics; inductive: batch norm uses running statistics, so that
        each input's output is independent of the others. Raises NetError for names that the net does not have and for
        tied parameters given different tensors.
        """
        state = {**self._resolve(params), **buffers}
        if self.net.training != training:
            self._set_mode(training)
        for norm in self._norms:
            norm.step, norm.inductive = step, inductive
        # Those of layers that may write in place (spectral norm, tracking instance norm); ours never does.
        state |= {name: buffers[name].clone() for name in self._foreign_buffers if name in buffers}
        # There is one profile hook: where a profiler has it, or a compiler is at work, a later call looks.
        kind = (training, torch.is_grad_enabled(), threading.get_ident())
        # The second call too: what the first left behind may be in its way.
        watch = self.seen.calls[kind] < 2 and sys.getprofile() is None and not torch.compiler.is_compiling()
        needed = self.seen.by_formula or (self.seen.under_vmap and under_torch_func())
        formulas = ByFormula() if watch or needed else nullcontext()
        weights = [*params.values(), *self._weights]
        inputs, check_inputs = self.seen.lender(type(self.net).__name__, kind).lend(inputs)
        before = versions(weights)
        with (
            formulas,
            # Where no gradient is asked for too the graph shows what the net computes with.
            torch.enable_grad() if watch else nullcontext(),
            refuse_checkpointing(self.net) if watch else nullcontext(),
            refuse_writes(self.net, params) if watch else nullcontext(),
            refuse_strays(self.net, state, inputs) if watch else nullcontext([]) as outputs,
            twice_differentiable(self._recurrent),
            batched_convolutions(inputs),
        ):
            output = self._call(state, inputs)
            outputs.append(output)
        check_inputs()
        if before != versions(weights):
            raise later_write(self.net, params, before)
        if watch and not kind[1]:
            output, state = tree_map(_without_graph, (output, state))
        if watch:
            self.seen.calls[kind] += 1
            self.seen.by_formula |= formulas.used  # type: ignore[union-attr]
            self.seen.under_vmap |= formulas.under_vmap  # type: ignore[union-attr]
        # call_with writes buffers that the net replaced back into the dict it was given.
        return output, {name: _as(old, state[name]) for name, old in buffers.items()}

    def _call(self, state: Params, inputs: tuple[Tensor, ...]) -> Tensor:
        if self.autocast is None:
            return call_with(self.net, state, inputs)
        # Without its cache of lowered weights, which knows neither inner steps nor levels of torch.func.
        with torch.autocast(inputs[0].device.type, self.autocast, cache_enabled=False):
            output = call_with(self.net, state, inputs)
        return tree_map(lambda t: t.float() if isinstance(t, Tensor) and t.dtype == self.autocast else t, output)

    def _resolve(self, params: Params) -> Params:
        unknown = sorted(set(params) - set(self._alias))
        if unknown:
            raise NetError(
                f"{type(self.net).__name__} has no parameter {unknown[0]!r}; it has {', '.join(self.params())}"
            )
        resolved: Params = {}
        for name, tensor in params.items():
            if resolved.setdefault(self._alias[name], tensor) is not tensor:
                raise NetError(
                    f"{name!r} and {self._alias[name]!r} are one tied parameter and were given different tensors"
                )
        return resolved


def _as(old: Tensor, new: Tensor) -> Tensor:
    # Where nothing has to be done the tensor itself, which ``to`` would wrap under torch.func: it would look new.
    return new if new.dtype == old.dtype else new.to(old.dtype)


def _without_graph(leaf: object) -> object:
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.grad_fn is not None else leaf


@dataclass
class Seen:
    """What the first calls of a net showed; the copies of an engine's threads have it in common.

    calls: those looked at, by kind and thread; lenders: of the inputs, by kind and thread; by_formula: whether
    ``ByFormula`` has to be entered; under_vmap: whether it has to be there.
    """

    calls: Counter[tuple[bool, bool, int]] = field(default_factory=Counter)
    by_formula: bool = False
    under_vmap: bool = False
    lenders: dict[tuple[bool, bool, int], Lender] = field(default_factory=dict)

    def lender(self, net: str, kind: tuple[bool, bool, int]) -> Lender:
        """What lends the net its inputs in calls of this kind."""
        if kind not in self.lenders:
            self.lenders[kind] = Lender(net)
        return self.lenders[kind]


@contextmanager
def refuse_checkpointing(net: nn.Module) -> Iterator[None]:
    """Raises NetError when the code inside calls ``torch.utils.checkpoint``.

    The call is seen by a profile hook rather than by patching torch, so that every way of importing the function is
    caught.
    """
    checkpoint_file = torch.utils.checkpoint.__file__
    message = (
        f"{type(net).__name__} checkpoints activations inside (torch.utils.checkpoint), which is silently wrong "
        f"when its parameters are passed from outside; switch that off in the net"
    )
    seen = False

    def watch(frame, event, arg):
        nonlocal seen
        if event == "call" and frame.f_code.co_filename == checkpoint_file and frame.f_code.co_name == "checkpoint":
            seen = True

    sys.setprofile(watch)
    try:
        yield
    except RuntimeError as error:
        if seen:
            raise NetError(message) from error
        raise
    finally:
        sys.setprofile(None)
    if seen:
        raise NetError(message)
