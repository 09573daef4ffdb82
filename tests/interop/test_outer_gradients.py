"""Our learners against learn2learn's and against loops on higher: the same tasks and net, several outer updates."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metahpo.learners import ANIL, MAML, MetaSGD
from metahpo.nets import Conv4
from metahpo.tasks import Episodes, Task
from metahpo.tasks.glyphs import load_glyphs
from metahpo.training.engines import Loop

STEPS, LR, TASKS = 3, 0.2, 2
# (outer parameters, loss of one task)
Peer = tuple[list[Tensor], Callable[[Task], Tensor]]


def by_learn2learn(l2l, method: str, net: nn.Module) -> Peer:
    body, head = nn.Sequential(net.blocks, nn.Flatten()), net.linear
    algorithm = {
        "MAML": lambda: l2l.algorithms.MAML(net, lr=LR),
        "FOMAML": lambda: l2l.algorithms.MAML(net, lr=LR, first_order=True),
        # As its ANIL examples; they normalise support and query together, and so let the one know of the other.
        "ANIL": lambda: l2l.algorithms.MAML(head, lr=LR),
        "Meta-SGD": lambda: l2l.algorithms.MetaSGD(net, lr=LR),
    }[method]()
    features = body if method == "ANIL" else nn.Identity()

    def loss_of(task: Task) -> Tensor:
        support, query, clone = features(task.support_x), features(task.query_x), algorithm.clone()
        for _ in range(STEPS):
            clone.adapt(F.cross_entropy(clone(support), task.support_y))
        return F.cross_entropy(clone(query), task.query_y)

    return [*(body.parameters() if method == "ANIL" else []), *algorithm.parameters()], loss_of


def by_higher(higher, method: str, net: nn.Module) -> Peer:
    groups = [{"params": [p]} for p in (net.linear if method == "ANIL" else net).parameters()]
    optimizer, override, rates = torch.optim.SGD(groups, lr=LR), None, []
    if method == "Meta-SGD":
        rates = [torch.full_like(p, LR, requires_grad=True) for p in net.parameters()]
        override = {"lr": rates}

    def constant(grads):
        return [None if g is None else g.detach() for g in grads]

    def loss_of(task: Task) -> Tensor:
        with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False, override=override) as (patched, rule):
            for _ in range(STEPS):
                loss = F.cross_entropy(patched(task.support_x), task.support_y)
                rule.step(loss, grad_callback=constant if method == "FOMAML" else None)
            return F.cross_entropy(patched(task.query_x), task.query_y)

    return [*net.parameters(), *rates], loss_of


OURS = {
    "MAML": lambda net: MAML(net, steps=STEPS, inner_lr=LR, adapt_norms=True),
    "FOMAML": lambda net: MAML(net, steps=STEPS, inner_lr=LR, adapt_norms=True, first_order=True),
    "ANIL": lambda net: ANIL(net, steps=STEPS, inner_lr=LR),
    "Meta-SGD": lambda net: MetaSGD(net, steps=STEPS, inner_lr=LR, adapt_norms=True),
}


def vector(tensors) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def difference(ours, theirs) -> float:
    return float((vector(ours) - vector(theirs)).norm() / vector(theirs).norm())


@pytest.mark.parametrize("package", ["learn2learn", "higher"])
@pytest.mark.parametrize("method", OURS)
def test_the_outer_gradient_at_equal_iterations(method, package, request, float64):
    # In float32 all three are 2e-5 from this, and so as far from each other.
    net = Conv4((1, 28, 28), 5, filters=8)
    learner = OURS[method](net)
    if package == "higher":
        params, loss_of = by_higher(request.getfixturevalue("higher"), method, copy.deepcopy(net))
    else:
        params, loss_of = by_learn2learn(request.getfixturevalue("l2l"), method, copy.deepcopy(net))
    source = Episodes(load_glyphs(), "train", ways=5, shots=1, queries=3)
    outer = learner.outer_params()
    # Not Adam: it makes whole steps of the gradient of a bias before batch norm, which is rounding alone.
    ours, theirs = torch.optim.SGD(outer.values(), lr=0.1), torch.optim.SGD(params, lr=0.1)
    start = vector(params)
    for iteration in range(4):
        batch = source.batch(range(iteration * TASKS, (iteration + 1) * TASKS))
        batch = Task(batch.support_x.double(), batch.support_y, batch.query_x.double(), batch.query_y)
        result = Loop().meta_gradient(learner, batch, learner.training_phase(0))
        theirs.zero_grad()
        loss = sum(loss_of(batch.select(i)) for i in range(TASKS)) / TASKS
        loss.backward()
        for name, p in outer.items():
            p.grad = result.grads[name]
        assert difference([result.loss], [loss]) < 1e-10
        assert difference(result.grads.values(), [p.grad for p in params]) < 1e-8
        ours.step()
        theirs.step()
    assert difference(outer.values(), params) < 1e-8
    assert difference(params, [start]) > 1e-2
