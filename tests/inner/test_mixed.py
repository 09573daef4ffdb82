"""Mixed mode and rematerialisation against plain reverse mode, in float64."""

from __future__ import annotations

import re
import threading
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from metahpo.errors import NetError
from metahpo.functional.turns import TURN
from metahpo.inner import SGD, Every, FirstOrder, LayerStepRates, Mixed, NoRemat, Reverse, Sqrt, UpdateRule, unroll

FORMS = [Mixed("func"), Mixed("dual")]
REMATS = [NoRemat(), Every(1), Every(2), Sqrt()]
# Reverse with no remat is the reference; all the others are to equal it.
WAYS = [(g, r) for g, r in product([Reverse(), *FORMS], REMATS) if (g, r) != (Reverse(), NoRemat())]


class Momentum(UpdateRule):
    """Has a state and a learnt rate."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def init(self, params):
        return {name: torch.zeros_like(p) for name, p in params.items()}, 0

    def forward(self, params, grads, state, step):
        velocity, count = state
        velocity = {name: 0.9 * velocity[name] + g for name, g in grads.items()}
        return {name: p - self.rate * velocity[name] for name, p in params.items()}, (velocity, count + 1)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, cotangent):
        return 3 * ctx.saved_tensors[0] ** 2 * cotangent


RULES = {
    "sgd": lambda: SGD(0.3, learnable=True).double(),
    "rates": lambda: LayerStepRates(["a", "b"], 3, 0.3).double(),
    "momentum": Momentum,
}


def inner_loss(params, carry, batch, step):
    """Nonlinear in all: parameters, a running carry, data, and a hyperparameter that decays towards the start."""
    x, y, decay, start = batch
    hidden = torch.tanh(x @ params["a"] + carry["shift"])
    pull = sum((p - start[name]).pow(2).sum() for name, p in params.items())
    loss = (hidden @ params["b"] - y).pow(2).mean() + decay.exp() * pull + 0.01 * step * params["b"].pow(3).sum()
    return loss, {"shift": 0.5 * carry["shift"] + hidden.mean(0), "calls": carry["calls"] + 1, "fixed": carry["fixed"]}


def problem():
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    return {"a": make(3, 4), "b": make(4, 2), "x": make(5, 3), "y": make(5, 2), "decay": make(), "shift": make(4)}


def outer(given, rule, steps, gradient=Reverse(), remat=NoRemat(), keep_steps=True):
    """Depends on the final parameters, every step's, the carry and the inner losses."""
    params = {name: given[name] for name in ("a", "b")}
    carry = {"shift": given["shift"], "calls": 0, "fixed": torch.arange(3)}
    # The start is in the batch too: a tensor in two roles.
    batches = [(given["x"] + 0.1 * step, given["y"], given["decay"], params) for step in range(steps)]
    result = unroll(
        inner_loss, rule, params, batches, carry=carry, gradient=gradient, remat=remat, keep_steps=keep_steps
    )
    assert result.carry["calls"] == steps
    assert torch.equal(result.carry["fixed"], torch.arange(3))
    assert len(result.steps) == (steps if keep_steps else 1)
    kept = sum((1 + i) * (p["a"] ** 2).sum() for i, p in enumerate(result.steps))
    inner = sum((1 + i) * loss**2 for i, loss in enumerate(result.losses))
    return result.params["b"].pow(3).sum() + 0.3 * kept + 0.2 * inner + result.carry["shift"].pow(2).sum()


def gradients(rule, value, given):
    return torch.autograd.grad(value, [*given.values(), *rule.parameters()])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("steps", "keep"), [(1, True), (2, False), (3, True), (5, False)])
def test_every_way_gives_the_gradient_of_reverse_mode(rule, steps, keep):
    rule, given = RULES[rule](), problem()
    value = outer(given, rule, steps, keep_steps=keep)
    expected = gradients(rule, value, given)
    for gradient, remat in WAYS:
        found = outer(given, rule, steps, gradient, remat, keep)
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(rule, found, given), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("gradient", "remat"), [(Mixed(), NoRemat()), (Mixed("dual"), Every(2)), (Reverse(), Sqrt())])
def test_outer_gradient_and_its_own_pass_finite_differences(gradient, remat):
    rule, given = SGD(0.3).double(), problem()

    def value(*tensors):
        return outer(dict(zip(given, tensors)), rule, 3, gradient, remat)

    assert torch.autograd.gradcheck(value, tuple(given.values()))
    assert torch.autograd.gradgradcheck(value, tuple(given.values()), fast_mode=True)


@pytest.mark.parametrize(("gradient", "remat"), [way for way in WAYS if way[0] != Mixed("dual")])
def test_under_torch_func_too(gradient, remat):
    rule, given = Momentum(), {name: t.detach() for name, t in problem().items()}
    tasks = {name: torch.stack([t, 1.1 * t, 0.8 * t]) for name, t in given.items()}
    rates = {"rate": torch.tensor(0.2, dtype=torch.float64)}

    class Run(nn.Module):
        def __init__(self, *way):
            super().__init__()
            self.rule, self.way = rule, way

        def forward(self, given):
            return outer(given, self.rule, 2, *self.way)

    def all_grads(*way):
        def value(rates, given):
            return functional_call(Run(*way), {f"rule.{name}": rate for name, rate in rates.items()}, (given,))

        def slope(rates, given):
            return grad(value)(rates, given)["rate"]

        one = grad(value, argnums=(0, 1))(rates, given)
        each = vmap(grad(value, argnums=(0, 1)), in_dims=(None, 0))(rates, tasks)
        # An outer transform's gradient through the inner transform's; each level multiplies what is computed again.
        twice = (
            grad(slope, argnums=(0, 1))(rates, given)
            if (gradient, remat) in ((Mixed(), NoRemat()), (Reverse(), Sqrt()))
            else None
        )
        return one, each, twice

    torch.testing.assert_close(all_grads(gradient, remat), all_grads(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gradient", FORMS)
def test_a_captured_tensor_that_requires_grad_is_refused(gradient):
    w, captured = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(loss, **options):
        result = unroll(loss, SGD(0.1).double(), {"w": w}, [None] * 2, **options)
        return torch.autograd.grad(result.params["w"].sum(), [w, captured], allow_unused=True)

    def bad(params, carry, batch, step):
        return (params["w"] * captured).pow(2).sum(), carry

    def fine(params, carry, batch, step):
        return (params["w"] * captured.detach()).pow(2).sum(), carry

    for options in ({"gradient": gradient}, {"remat": Sqrt()}, {"gradient": gradient, "remat": Every(1)}):
        with pytest.raises(NetError, match=r"the inner loss computes \(mul\) with a tensor \[3\] that requires grad"):
            run(bad, **options)
        assert run(fine, **options)[1] is None

    rule = SGD(0.1).double()

    def captures(captured):
        def loss(params, carry, batch, step):
            return (params["w"] * captured).pow(2).sum(), carry

        return unroll(loss, rule, {"w": w}, [None], remat=Every(1)).params["w"].sum()

    for take, shape in ((grad(captures), (3,)), (vmap(grad(captures)), (2, 3))):
        with pytest.raises(NetError, match="the inner loss computes"):
            take(torch.ones(shape, dtype=torch.float64))


def test_a_rate_captured_by_a_plain_function_is_refused():
    w, rate = (torch.tensor(value, requires_grad=True) for value in (2.0, 0.1))

    def rule(params, grads, state, step):
        return {name: p - rate * grads[name] for name, p in params.items()}, state

    rule.init = lambda params: None
    with pytest.raises(NetError, match="the update rule computes"):
        unroll(lambda p, c, b, s: (p["w"].pow(2), c), rule, {"w": w}, [None], remat=Every(1))
    # Without remat autograd sees it.
    result = unroll(lambda p, c, b, s: (p["w"].pow(2), c), rule, {"w": w}, [None], gradient=Mixed())
    assert torch.autograd.grad(result.params["w"], rate)[0].item() == -4


def test_saved_tensor_hooks_need_the_dual_form():
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def run(gradient, remat=NoRemat()):
        result = unroll(lambda p, c, b, s: (p["w"].pow(4).sum(), c), SGD(0.01).double(), {"w": w}, [None] * 3,
                        gradient=gradient, remat=remat)  # fmt: skip
        return result.params["w"].sum()

    expected = torch.autograd.grad(run(Reverse()), w)
    for remat in (NoRemat(), Sqrt()):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            with pytest.raises(NetError, match=r"saved-tensor hooks .*choose Mixed\(form='dual'\)"):
                torch.autograd.grad(run(Mixed("func")), w)
            found = torch.autograd.grad(run(Mixed("dual"), remat), w)
            assert torch.equal(torch.autograd.grad(run(Mixed()), w)[0], found[0])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, Mixed("dual"), use_reentrant=False), w)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_dual_form_and_missing_derivatives_are_refused_by_name():
    def run(w, net=torch.tanh, gradient=FORMS[1]):
        loss = lambda p, c, b, s: (net(p["w"]).pow(2).sum(), c)  # noqa: E731
        return unroll(loss, SGD(0.1), {"w": w}, [None], gradient=gradient).params["w"].sum()

    with pytest.raises(NetError, match=r"Mixed\(form='dual'\) does not run under torch.func"):
        grad(run)(torch.ones(3))
    for form in FORMS:
        value = run(torch.ones(4, 3, requires_grad=True), lambda w: torch.cdist(w, w + 1), form)
        with pytest.raises(NetError, match=r"needs forward mode.*cdist.*choose Reverse\(\) with remat Every\(1\)"):
            value.backward()
        with pytest.raises(NetError, match=r"needs forward mode.*must implement the jvp function"):
            run(torch.ones(4, 3, requires_grad=True), NoForwardMode.apply, form).backward()
    for make in (lambda: Mixed("both"), lambda: Every(0), lambda: Every(True), lambda: Every("sqrt")):
        with pytest.raises(NetError, match="should be"):
            make()


@pytest.mark.parametrize(("gradient", "remat"), WAYS)
def test_dropout_is_drawn_once_and_repeated(gradient, remat):
    w = torch.randn(40, dtype=torch.float64, requires_grad=True)

    def run(w, gradient, remat):
        torch.manual_seed(5)
        loss = lambda p, c, b, s: (nn.functional.dropout(p["w"] ** 2, 0.5).pow(2).sum(), c)  # noqa: E731
        final = unroll(loss, SGD(0.01).double(), {"w": w}, [None] * 3, gradient=gradient, remat=remat).params["w"]
        after = torch.rand(())
        return final.pow(3).sum(), after

    (value, after), (expected, expected_after) = run(w, gradient, remat), run(w, Reverse(), NoRemat())
    assert after == expected_after
    assert value == expected
    before = torch.get_rng_state()
    torch.testing.assert_close(torch.autograd.grad(value, w), torch.autograd.grad(expected, w), rtol=1e-10, atol=1e-10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.AlphaDropout(0.5)])
def test_dropout_under_vmap_has_the_gradient_of_reverse_mode_by_the_same_numbers(layer):
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), layer, nn.Linear(5, 1)).double()
    params, x = {name: p.detach() for name, p in net.named_parameters()}, torch.randn(2, 3, 4, dtype=torch.float64)

    def outer(params, x, gradient):
        loss = lambda p, c, b, s: (functional_call(net, p, (b,)).pow(2).mean(), c)  # noqa: E731
        fitted = unroll(loss, SGD(0.125, learnable=False), params, [x] * 2, gradient=gradient).params
        return functional_call(net, fitted, (x,)).sum()

    def gradients(gradient):
        torch.manual_seed(2)
        of_each = vmap(grad(lambda p, x: outer(p, x, gradient)), in_dims=(None, 0), randomness="different")
        return of_each(params, x)

    torch.testing.assert_close(gradients(Mixed("func")), gradients(Reverse()), rtol=1e-10, atol=1e-12)


def test_threads_run_it_without_dropout_and_are_refused_with_it():
    rule, given = Momentum(), problem()
    expected = gradients(rule, outer(given, rule, 3), given)
    found, refused, ran = [None] * 4, [], threading.Barrier(4)

    def work(index):
        TURN.help()  # As an engine's own threads.
        found[index] = gradients(rule, outer(given, rule, 3, FORMS[index % 2], Sqrt()), given)
        ran.wait(60)  # Draws of one thread look like draws of any other that is at work.
        try:
            drops = lambda p, c, b, s: (nn.functional.dropout(p["a"], 0.5).sum(), c)  # noqa: E731
            unroll(drops, rule, given, [None], gradient=Mixed())
        except NetError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-10)
    assert len(refused) == 4
    assert "not possible on threads" in refused[0]


def test_a_rule_that_runs_again_is_never_changed_itself():
    """Another thread may be reading its parameters."""
    seen = []

    class Watching(Momentum):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Identity(), Momentum())
            self.tied = self.inner[1].rate

        def forward(self, params, grads, state, step):
            seen.extend(p is q for p, q in zip(rule.parameters(), own, strict=True))
            params, _ = self.inner[1](params, grads, state, step)
            return super().forward(params, {name: self.tied * g for name, g in grads.items()}, state, step)

    rule, given = Watching(), problem()
    own = list(rule.parameters())
    assert len(own) == 2
    expected = gradients(rule, outer(given, rule, 3), given)
    found = gradients(rule, outer(given, rule, 3, Mixed(), Sqrt()), given)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert all(seen)


@pytest.mark.parametrize("remat", REMATS)
def test_without_gradients_it_is_the_plain_loop(remat):
    rule, given = Momentum(), problem()
    expected = outer(given, rule, 3)
    with torch.no_grad():
        for gradient in (Reverse(), *FORMS, FirstOrder()):
            found = outer(given, rule, 3, gradient, remat)
            assert not found.requires_grad
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def kept_bytes(gradient, remat, steps) -> int:
    """The bytes of all tensors that the outer graph holds after the forward pass."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    x = torch.randn(200, 8)
    result = unroll(
        lambda p, c, b, s: (functional_call(net, p, (b,)).pow(2).mean(), c), SGD(0.1), dict(net.named_parameters()),
        [x] * steps, gradient=gradient, remat=remat, keep_steps=False,
    )  # fmt: skip
    kept, nodes, seen = {}, [result.params["0.weight"].grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        saved = list(getattr(node, "saved_tensors", ()))
        saved += [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for tensor in saved:
            if isinstance(tensor, torch.Tensor):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        nodes += [following for following, _ in node.next_functions]
    return sum(kept.values())


def test_what_the_graph_keeps():
    assert (
        kept_bytes(Mixed(), Sqrt(), 16) < kept_bytes(Mixed(), NoRemat(), 16) < kept_bytes(Reverse(), NoRemat(), 16) / 5
    )
    assert kept_bytes(Reverse(), Sqrt(), 16) == kept_bytes(Mixed(), Sqrt(), 16)


@pytest.mark.parametrize("gradient", FORMS)
def test_a_loss_that_takes_a_gradient_itself_is_run_rightly_or_refused(gradient):
    x = torch.arange(3, dtype=torch.float64)[None]

    def force(params, carry, batch, step):
        place = batch.detach().clone().requires_grad_()
        energy = torch.tanh(F.linear(place, params["w"], params["b"])) @ params["v"]
        (slope,) = torch.autograd.grad(energy.sum(), place, create_graph=True)
        return slope.square().sum(), carry

    def run(**options):
        generator = torch.Generator().manual_seed(0)
        shapes = [("w", (4, 3)), ("b", (4,)), ("v", (4, 1))]
        start = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes}
        start = {n: p.requires_grad_() for n, p in start.items()}
        end = unroll(force, SGD(0.1).double(), start, [x] * 2, **options).params
        return torch.autograd.grad(sum(p.square().sum() for p in end.values()), list(start.values()))

    torch.testing.assert_close(run(remat=Every(1)), run(), rtol=1e-10, atol=0)
    try:
        found = run(gradient=gradient)
    except NetError as error:
        assert re.search("Mixed cannot run a net or loss that takes a gradient itself .* choose Reverse", str(error))
    else:
        torch.testing.assert_close(found, run(), rtol=1e-10, atol=0)
