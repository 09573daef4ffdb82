"""Other ways to the same outer gradient: plain PyTorch, torch.func, higher, learn2learn, TorchOpt; JAX has a file of
its own. None of them uses metahpo."""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.func import grad as func_grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from inner_loop.workloads import Problem
from metahpo.tasks import Task

Step = Callable[[], Any]
Grads = dict[str, Tensor]


class LeftOut(Exception):
    """Why a contender does not take part."""


class Broken(LeftOut):
    """It would have, and failed."""


def load(module: str) -> ModuleType:
    """An installed module; what its import prints or warns of is not shown. Raises LeftOut if it is not installed."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise LeftOut("not installed")
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def only_maml(problem: Problem) -> None:
    """Raises LeftOut where batch norms and rates differ from step to step."""
    if problem.rows:
        raise LeftOut("has no per-step batch norm; its user would write the plain loop")


def sequence(tasks: Task) -> Iterator[Task]:
    return (tasks.select(index) for index in range(len(tasks.query_x)))


def meta_loss(problem: Problem, outer: Grads, task: Task, inner_grad) -> Tensor:
    """The outer loss of one task; ``inner_grad(function, params)`` differentiates the inner one."""
    net, loss = problem.net, problem.loss
    fast = {name: outer[name] for name in problem.fast}
    total = torch.zeros((), device=task.query_x.device)
    for step, weight in enumerate(problem.step_weights):
        slow = problem.slow(outer, step)

        def inner(fast: Grads, slow: Grads = slow) -> Tensor:
            return loss(functional_call(net, {**fast, **slow}, (task.support_x,)), task.support_y)

        grads, rates = inner_grad(inner, fast), problem.rates(outer, step)
        fast = {name: p - rate * g for (name, p), g, rate in zip(fast.items(), grads, rates)}
        if weight:
            total = total + weight * loss(functional_call(net, {**fast, **slow}, (task.query_x,)), task.query_y)
    return total


def plain_loop(problem: Problem, tasks: Task) -> Step:
    """``torch.autograd.grad(..., create_graph=True)``, task after task."""

    def inner_grad(function, params: Grads) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(params), tuple(params.values()), create_graph=True)

    return lambda: backward(problem, tasks, lambda task: meta_loss(problem, problem.outer, task, inner_grad))


def backward(problem: Problem, tasks: Task, loss_of: Callable[[Task], Tensor]) -> Grads:
    """The gradient of the mean loss, accumulated task by task in ``.grad`` as a training would."""
    for leaf in problem.outer.values():
        leaf.grad = None
    count = len(tasks.query_x)
    for task in sequence(tasks):
        (loss_of(task) / count).backward()
    return {name: leaf.grad for name, leaf in problem.outer.items() if leaf.grad is not None}


def plain_vmap(problem: Problem, tasks: Task) -> Step:
    """``torch.func``: the gradient of one task, which itself differentiates, by ``vmap`` over the tasks."""
    outer = {name: leaf.detach() for name, leaf in problem.outer.items()}

    def loss_of(outer: Grads, *task: Tensor) -> Tensor:
        return meta_loss(problem, outer, Task(*task), lambda function, params: func_grad(function)(params).values())

    each = vmap(func_grad(loss_of), in_dims=(None, 0, 0, 0, 0))
    return lambda: {name: grad.mean(0) for name, grad in each(outer, *tasks).items()}


def higher(problem: Problem, tasks: Task) -> Step:
    """``higher.innerloop_ctx``; an optimizer over some of the parameters leaves the others alone.

    It would still differentiate each inner loss by them, back through all the steps before; detached they cost nothing.
    """
    only_maml(problem)
    library, net, loss = load("higher"), problem.net, problem.loss
    adapted = [name in problem.fast for name, _ in net.named_parameters()]
    optimizer = torch.optim.SGD([problem.outer[name] for name in problem.fast], lr=problem.lr)

    def loss_of(task: Task) -> Tensor:
        with library.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (patched, rule):
            params = list(patched.parameters())
            for _ in problem.step_weights:
                value = loss(patched(task.support_x, params=params), task.support_y)
                new = rule.step(value, [p if wanted else p.detach() for p, wanted in zip(params, adapted)])
                params = [n if wanted else p for n, p, wanted in zip(new, params, adapted)]
            return loss(patched(task.query_x, params=params), task.query_y)

    return lambda: backward(problem, tasks, loss_of)


def learn2learn(problem: Problem, tasks: Task) -> Step:
    """``MAML.clone`` and ``maml_update``, for which a gradient of None leaves a parameter alone (``MAML.adapt`` would
    adapt batch-norm scales and shifts)."""
    only_maml(problem)
    library, loss = load("learn2learn.algorithms"), problem.loss
    maml = library.MAML(problem.net, lr=problem.lr)
    adapted = [name in problem.fast for name, _ in problem.net.named_parameters()]

    def loss_of(task: Task) -> Tensor:
        clone = maml.clone()
        for _ in problem.step_weights:
            value = loss(clone(task.support_x), task.support_y)
            if all(adapted):
                clone.adapt(value)
                continue
            params = [p for p, wanted in zip(clone.module.parameters(), adapted) if wanted]
            grads = iter(torch.autograd.grad(value, params, create_graph=True))
            library.maml_update(clone.module, problem.lr, [next(grads) if wanted else None for wanted in adapted])
        return loss(clone(task.query_x), task.query_y)

    return lambda: backward(problem, tasks, loss_of)


def torchopt(problem: Problem, tasks: Task) -> Step:
    """``torchopt.FuncOptimizer`` over the adapted parameters (``MetaSGD`` would adapt every parameter of the net)."""
    only_maml(problem)
    library, net, loss, outer = load("torchopt"), problem.net, problem.loss, problem.outer

    def loss_of(task: Task) -> Tensor:
        rule = library.FuncOptimizer(library.sgd(lr=problem.lr))
        fast, slow = tuple(outer[name] for name in problem.fast), problem.slow(outer, 0)
        for _ in problem.step_weights:
            output = functional_call(net, {**dict(zip(problem.fast, fast)), **slow}, (task.support_x,))
            fast = rule.step(loss(output, task.support_y), fast)
        output = functional_call(net, {**dict(zip(problem.fast, fast)), **slow}, (task.query_x,))
        return loss(output, task.query_y)

    return lambda: backward(problem, tasks, loss_of)


def jax(problem: Problem, tasks: Task) -> Step:
    """``jax.jit`` of ``vmap`` of ``grad``."""
    # Else it takes most of the GPU's memory for itself.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    load("jax")
    from inner_loop.peer_jax import make

    return make(problem, tasks)


PEERS: dict[str, Callable[[Problem, Task], Step]] = {
    "plain_loop": plain_loop,
    "plain_vmap": plain_vmap,
    "higher": higher,
    "learn2learn": learn2learn,
    "torchopt": torchopt,
    "jax": jax,
}


def make_peer(name: str, problem: Problem, tasks: Task) -> Step:
    """A peer's meta-step: a function that gives gradients by the names of ``problem.outer``."""
    step = PEERS[name](problem, tasks)

    def twice_differentiable() -> Any:
        # The fused attention kernels have no double backward.
        with sdpa_kernel(SDPBackend.MATH):
            return step()

    return twice_differentiable
