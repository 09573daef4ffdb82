"""Nets with new initial weights."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from metahpo.errors import NetError
from metahpo.functional.copies import copied
from metahpo.training.environment import seeded


def reinitialised(net: nn.Module, *seed: int) -> nn.Module:
    """A copy of the net whose trainable parameters are drawn anew from the numbers ``seed``, and from them alone.

    Every submodule that has it calls ``reset_parameters``, inner ones first, so that a net with an initialisation of
    its own has the last word. Frozen parameters (no ``requires_grad``) stay as they are.

    Raises NetError that names the module of a trainable parameter which no ``reset_parameters`` draws.
    """
    net = copied(net)
    lazy = next((name for name, p in net.named_parameters() if is_lazy(p)), None)
    if lazy:
        raise NetError(f"{type(net).__name__}.{lazy} is lazy; run the net once on an example batch first")
    device = next((p.device for p in net.parameters()), None)
    with torch.no_grad(), seeded(*seed, device=device):
        frozen = [(p, p.clone()) for p in net.parameters() if not p.requires_grad]
        for p in net.parameters():
            if p.requires_grad:
                p.fill_(math.nan)  # What is still NaN afterwards was not drawn.
        for module in reversed(list(net.modules())):
            # torch names it with an underscore in attention and in transformers.
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
        for p, before in frozen:
            p.copy_(before)
    for name, p in net.named_parameters():
        if not bool(torch.isfinite(p).all()):
            owner = name.rpartition(".")[0]
            kind = type(net.get_submodule(owner)).__name__
            raise NetError(
                f"{type(net).__name__}.{name}: cannot be drawn anew, as no reset_parameters() of {kind} "
                f"{owner or 'itself'} or around it sets it; give the module that method"
            )
    return net
