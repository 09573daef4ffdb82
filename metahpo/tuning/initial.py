"""Nets with new initial weights."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metahpo.errors import NetArgumentError, NetError, one_line
from metahpo.functional.copies import copied
from metahpo.tasks.arguments import check_device
from metahpo.training.environment import seeded

NetOrFactory = nn.Module | Callable[[], nn.Module]

# Two draws of one distribution differ by less than this many standard errors and this share.
_ERRORS, _SHARE = 6.0, 0.1
# Fewer values say too little of their deviation.
_FEWEST = 8


class InitialNets:
    """The nets that a tuning starts from: built anew by a function, or redrawn by their layers.

    source: a net, or a function without parameters that builds one; seed: the numbers that draw ``net``, the first of
    the nets; device: where they go, None: where they are; fixed: how the caller keeps a net's own weights, for
    messages.
    """

    def __init__(
        self,
        source: NetOrFactory,
        *seed: int,
        device: torch.device | str | None = None,
        fixed: str = "fresh=False",
    ):
        self.source, self.fixed = source, fixed
        self.device = None if device is None else check_device("tuning", device)
        if not isinstance(source, nn.Module) and not callable(source):
            raise NetArgumentError(
                f"net: found {type(source).__name__}, expected a torch.nn.Module or a function that builds one"
            )
        self.net = self._moved(copied(source)) if isinstance(source, nn.Module) else self._built(seed)

    def draw(self, *seed: int) -> nn.Module:
        """A net with initial weights drawn from the numbers ``seed``, and from them alone."""
        if isinstance(self.source, nn.Module):
            return _redrawn(self.net, seed, self.fixed)
        return self._built(seed)

    def checked(self, *seed: int) -> nn.Module:
        """``draw``, once it is known to give nets like the first one.

        Raises:
            NetError: Where it does not; the line names the tensor and what to do.
        """
        new = self.draw(*seed)
        if isinstance(self.source, nn.Module):
            _refuse_others(self.net, new, self.fixed)
            return new
        if any(p is q and p.requires_grad for p, q in zip(new.parameters(), self.net.parameters())):
            raise NetError("net: the function gave the same weights twice; it should build a new net at each call")
        shapes = ({name: tuple(p.shape) for name, p in net.named_parameters()} for net in (self.net, new))
        before, after = (set(each.items()) for each in shapes)
        if before != after:
            name, shape = sorted(before ^ after)[0]
            raise NetError(
                f"net: the function built {type(new).__name__}s of different parts, only one has {name} {list(shape)}"
            )
        return new

    def _built(self, seed: tuple[int, ...]) -> nn.Module:
        # It may draw on the GPU.
        device = "cuda" if self.device is None and torch.cuda.is_initialized() else self.device
        with seeded(*seed, device=None if device is None else torch.device(device)):
            try:
                net = self.source()
            except TypeError as error:
                line = one_line(error)
                raise NetError(f"net: the function that builds it fails without arguments: {line}") from error
        if not isinstance(net, nn.Module):
            raise NetError(f"net: the function gave {type(net).__name__}, expected a torch.nn.Module")
        _refuse_lazy(net)
        return self._moved(net)

    def _moved(self, net: nn.Module) -> nn.Module:
        return net if self.device is None else net.to(self.device)


def reinitialised(net: nn.Module, *seed: int) -> nn.Module:
    """A copy of the net whose trainable parameters are drawn from the numbers ``seed``, and from them alone.

    Every submodule that has it calls ``reset_parameters``, inner ones first, so that a net with an initialisation of
    its own has the last word. Of the draws of weights that several layers share that one is taken which is like the
    weights there are. Frozen parameters (no ``requires_grad``) stay as they are.

    Raises:
        NetError: For a trainable parameter that no ``reset_parameters`` draws, and for one that it draws with another
            deviation or mean than the parameter has now: the net's constructor drew it otherwise, or it is trained.
    """
    return InitialNets(net).checked(*seed)


def _redrawn(net: nn.Module, seed: tuple[int, ...], fixed: str) -> nn.Module:
    present, net = net, copied(net)
    _refuse_lazy(net)
    device = next((p.device for p in net.parameters()), None)
    with torch.no_grad(), seeded(*seed, device=device):
        frozen = [(p, p.clone()) for p in net.parameters() if not p.requires_grad]
        for p in net.parameters():
            if p.requires_grad:
                p.fill_(math.nan)  # What is still NaN afterwards was not drawn.
        shared = _Shared(net, present)
        for module in reversed(list(net.modules())):
            # torch names it with an underscore in attention and in transformers.
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            # One that needs arguments is called by a module around it.
            if callable(reset) and not _needs_arguments(reset):
                reset()
                shared.note()
        shared.settle()
        for p, before in frozen:
            p.copy_(before)
    for name, p in net.named_parameters():
        if not bool(torch.isfinite(p).all()):
            owner = name.rpartition(".")[0]
            kind = type(net.get_submodule(owner)).__name__
            raise NetError(
                f"{type(net).__name__}.{name}: cannot be drawn anew, as no reset_parameters() of {kind} "
                f"{owner or 'itself'} or around it sets it without arguments; {_advice(fixed)}, or give the module "
                "that method"
            )
    return net


class _Shared:
    """The draws of weights that several layers share (tied weights), which each of these draws in its own way.

    Whose draw is the constructor's shows in the weights that there are.
    """

    def __init__(self, net: nn.Module, present: nn.Module):
        owners = Counter(id(p) for m in net.modules() for p in {id(p): p for p in m.parameters(recurse=False)}.values())
        pairs = zip(net.parameters(), present.parameters())
        self.tensors = [(p, old, [p.clone()]) for p, old in pairs if owners[id(p)] > 1 and p.requires_grad]

    def note(self) -> None:
        """Keeps the draws that a layer has just made."""
        for p, _, draws in self.tensors:
            if not torch.equal(p, draws[-1]) and bool(torch.isfinite(p).all()):
                draws.append(p.clone())

    def settle(self) -> None:
        """Takes of each the last draw that is like the weights there are, if any is."""
        for p, present, draws in self.tensors:
            fitting = [draw for draw in draws[1:] if not _difference(present, draw)]
            if fitting:
                p.copy_(fitting[-1])


def _needs_arguments(function: Callable[..., object]) -> bool:
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):
        return True
    return False


def _advice(fixed: str) -> str:
    return f"pass a function that builds the net in its place, or {fixed} to keep its weights"


def _refuse_lazy(net: nn.Module) -> None:
    lazy = next((name for name, p in net.named_parameters() if is_lazy(p)), None)
    if lazy:
        raise NetError(f"{type(net).__name__}.{lazy} is lazy; run the net once on an example batch first")


def _refuse_others(net: nn.Module, new: nn.Module, fixed: str) -> None:
    """Raises NetError where a redrawn tensor is clearly not of the distribution of the present one."""
    with torch.no_grad():
        for (name, present), drawn in zip(net.named_parameters(), new.parameters()):
            difference = _difference(present, drawn) if present.requires_grad else None
            if difference:
                raise NetError(
                    f"{type(net).__name__}.{name}: {difference}; the net's constructor draws it otherwise, or it is "
                    f"trained: {_advice(fixed)}"
                )


def _difference(present: Tensor, drawn: Tensor) -> str | None:
    """How two draws differ by more than chance; None where they do not."""
    count = present.numel()
    if count < 2:
        return None
    (mean, spread, error), (new_mean, new_spread, new_error) = _moments(present), _moments(drawn)
    if not math.isfinite(mean + spread):
        return None
    if (spread == 0) != (new_spread == 0):
        ratio_differs = True
    elif spread == 0 or count < _FEWEST:
        ratio_differs = False
    else:
        ratio_differs = abs(math.log(new_spread / spread)) > _SHARE + _ERRORS * math.hypot(error, new_error)
    if ratio_differs:
        return f"has a deviation of {spread:.3g}, but reset_parameters() draws it with {new_spread:.3g}"
    allowed = (_SHARE + _ERRORS / math.sqrt(count)) * math.hypot(spread, new_spread)
    if (spread == 0 or count >= _FEWEST) and abs(mean - new_mean) > allowed + 1e-6 * abs(mean):
        return (
            f"has a mean of {mean:.3g} (deviation {spread:.3g}), but reset_parameters() draws it with {new_mean:.3g} "
            f"({new_spread:.3g})"
        )
    return None


def _moments(tensor: Tensor) -> tuple[float, float, float]:
    """(mean, deviation, relative standard error of the deviation)."""
    values = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten().double()
    if bool((values == values[0]).all()):
        return float(values[0]), 0.0, 0.0
    centred = values - values.mean()
    variance = float(centred.square().mean())
    # A normal distribution's at least: the sample's own is too low where it is small.
    kurtosis = max(3.0, float(centred.pow(4).mean()) / variance**2) if variance else 3.0
    return float(values.mean()), math.sqrt(variance), math.sqrt((kurtosis - 1) / (4 * len(values)))
