"""The head of a net: of its layers the one that runs last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from metahpo.checks import check_type
from metahpo.errors import NetArgumentError, NetError, did_you_mean
from metahpo.functional import FunctionalModule, Params
from metahpo.functional.copies import copied
from metahpo.functional.levels import under_torch_func
from metahpo.functional.surgery import is_called
from metahpo.inner.randomness import python_draws, set_python_draws
from metahpo.learners.base import MetaLearner

# ("begin", layer), ("end", layer) or ("use", parameter).
Event = tuple[str, str]


class WithHead(MetaLearner):
    """A learner that treats the head of its net ``self.module`` in another way than the rest.

    The head is the layer with parameters, batch norms aside, that runs last on an example, with all its tensors, also
    those that other layers share. Until an example is seen it is the one that the net registers last.
    """

    module: FunctionalModule
    # Whether layers whose parameters are all frozen are passed over.
    _trainable_head = False

    def _name_head(self, head: str | None) -> None:
        """head: its name in the net; None: the first example shows it."""
        check_type(self, "head", head, (str, type(None)), "the name of a layer or None", error=NetArgumentError)
        self.head, self._looked = head, False

    def look_at(self, x: Tensor) -> None:
        if self._looked:
            return
        happened = events(self.module, x)
        begun = [name for kind, name in happened if kind == "begin"]
        if self.head is None:
            self.head = self._last(happened)
        elif not any(layer is self.head_layer() for layer in map(self.module.net.get_submodule, begun)):
            self._refuse(f"the net never calls its layer {self.head!r}")
        self._looked = True

    def head_layer(self) -> nn.Module:
        """The head, as far as it is known."""
        if self.head is None:
            *_, last = [None, *self._layers().values()]
            if last is None:
                raise NetError(f"{type(self).__name__}: the net has no layer with parameters to be its head")
            return last
        try:
            layer = self.module.net.get_submodule(self.head)
        except AttributeError:
            layer = None
        if layer is None or not any(True for _ in layer.parameters()):
            hint = did_you_mean(self.head, filter(None, self._layers()))
            self._refuse(f"the net has no layer {self.head!r} with parameters; {hint}")
        return layer

    def _layers(self) -> dict[str, nn.Module]:
        """The layers that may be the head, by name, in the order in which the net registers them."""
        return {
            name: layer
            for name, layer in self.module.net.named_modules()
            if not isinstance(layer, _BatchNorm)
            and is_called(layer)
            and ".parametrizations." not in f".{name}."
            and any(map(self._counts, layer.parameters(recurse=is_parametrized(layer))))
        }

    def _counts(self, param: Tensor) -> bool:
        return param.requires_grad or not self._trainable_head

    def _last(self, happened: list[Event]) -> str:
        layers = self._layers()
        places = [place for place, (kind, name) in enumerate(happened) if kind == "begin" and name in layers]
        if not places:
            self._refuse("the net calls no layer with parameters")
        name = happened[places[-1]][1]
        passed = [layers[name], *(m for m in self.module.net.modules() if isinstance(m, _BatchNorm))]
        known = {id(p) for layer in passed for p in layer.parameters()}
        later = [used for kind, used in happened[happened.index(("end", name), places[-1]) :] if kind == "use"]
        for used in later:
            p = self.module.net.get_parameter(used)
            # A scale of the outputs is no head.
            if p.numel() > 1 and self._counts(p) and id(p) not in known:
                self._refuse(f"the net uses its parameter {used!r} after {name!r}, the last layer that it calls")
        return name

    def _refuse(self, why: str) -> NoReturn:
        raise NetArgumentError(f"{type(self).__name__}: head: {why}; name the head by head='LAYER'")


class WithoutHead(WithHead):
    """A learner for which what the head is given is the net's output; the head itself is not learnt."""

    def check_body(self) -> None:
        """Raises NetError for a net of one layer, and for a head that it does not have."""
        if len(self._layers()) < 2:
            raise NetError(
                f"{type(self.module.net).__name__} has no layers before its head; expected a net of at least two"
            )
        self.head_layer()

    def outer_params(self) -> Params:
        params = super().outer_params()
        if not self._looked:
            return params
        within = set(self.head_layer().modules())
        elsewhere = {id(p) for m in self.modules() if m not in within for p in m.parameters(recurse=False)}
        return {name: p for name, p in params.items() if id(p) in elsewhere}

    def current_state(self, state: Params) -> Params:
        """Checkpoints of the version before lack the layer that the net registers last."""
        net = self.module.net
        layers = [(name, m) for name, m in net.named_modules() if name and any(True for _ in m.parameters(False))]
        own = {f"module.net.{layers[-1][0]}.{name}": t for name, t in layers[-1][1].state_dict().items()}
        return super().current_state(state if any(name in state for name in own) else {**state, **own})

    def features(self, x: Tensor, buffers: Params, **how: Any) -> tuple[Tensor, Params]:
        """What the head is given for ``x`` [N, ...] at its last call, as [N, features], and the new buffers.

        how: as for ``FunctionalModule.apply_with``.
        """
        inputs: list[Tensor] = []

        def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))

        handle = self.head_layer().register_forward_pre_hook(keep, with_kwargs=True)
        try:
            _, buffers = self.module.apply_with({}, buffers, x, **how)
        finally:
            handle.remove()
        if not inputs:
            self._refuse(f"the net does not call {self.head!r} now")
        return inputs[-1].flatten(1), buffers


@torch.no_grad()
def events(module: FunctionalModule, x: Tensor) -> list[Event]:
    """What a net does with an example batch [N, ...] in evaluation: the layers that it calls, by name, and the
    parameters that it uses. It leaves no trace in the net and in the generators of random numbers."""
    found: list[Event] = []
    # Under torch.func random numbers cannot be drawn again, and a copy would be of this level.
    plain = not under_torch_func()
    twin = copied(module) if plain else module
    handles = []
    for name, layer in twin.net.named_modules():
        handles.append(layer.register_forward_pre_hook(lambda *_, name=name: found.append(("begin", name))))
        handles.append(layer.register_forward_hook(lambda *_, name=name: found.append(("end", name))))
    try:
        with _unchanged_draws(x) if plain else nullcontext(), _Uses(twin.net, found):
            twin.apply_with({}, twin.buffers_by_name(), x, training=False, inductive=True)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def _unchanged_draws(x: Tensor) -> Iterator[None]:
    drawn = python_draws()
    try:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            yield
    finally:
        set_python_draws(drawn)


class _Uses(TorchFunctionMode):
    """Notes from which parameters of the net tensors are made; to ask for a shape is no use."""

    def __init__(self, net: nn.Module, found: list[Event]):
        super().__init__()
        self.names = {id(p): name for name, p in net.named_parameters()}
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            leaves = tree_leaves((args, kwargs))
            self.found += [("use", self.names[id(leaf)]) for leaf in leaves if id(leaf) in self.names]
        return result
