"""Each learner against its update rule, written out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.errors import NetError
from metahpo.inner import MetaCurvature as MetaCurvatureRule
from metahpo.learners import (
    ANIL,
    BOIL,
    CAVIA,
    MAML,
    LinearHead,
    MetaCurvature,
    MetaSGD,
    Phase,
    ProtoNet,
    Reptile,
    WarpMAML,
)
from metahpo.tasks import Task, minibatches
from metahpo.testing.learner_subject import Patterns, kinked_net
from metahpo.training.engines import Loop

TRAINING = Phase(training=True)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return kinked_net().double()


@pytest.fixture
def tasks() -> Task:
    return Patterns().batch(range(2))


def weights(learner, prefix="module.net."):
    """The outer gradient of the net's own parameters, by the net's names."""
    grads = Loop().meta_gradient(learner, Patterns().batch(range(2)), TRAINING).grads
    return {name.removeprefix(prefix): g for name, g in grads.items() if name.startswith(prefix)}


def test_anil_adapts_the_head_and_boil_the_body(net, tasks):
    head = {"3.weight", "3.bias"}
    task = tasks.select(0)
    for kind, names in ((ANIL, head), (BOIL, {"0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias"})):
        learner = kind(net, steps=2).double()
        adapted = learner.adapt(task.support_x, task.support_y, Phase())
        assert set(adapted.params) == names
        fitted = dict(learner.fitted(task.support_x, task.support_y).named_parameters())
        moved = {n for n, p in learner.module.params().items() if not torch.equal(fitted[n], p)}
        assert moved == names


def test_anils_step_is_that_of_a_linear_model_on_the_features(net, tasks):
    learner = ANIL(net, steps=1, inner_lr=0.3).double()
    task = tasks.select(0)
    body, head = net[:3].train(), net[3]
    features = body(task.support_x)
    wrong = F.softmax(head(features), -1) - F.one_hot(task.support_y, 3)
    expected = head.weight - 0.3 * wrong.mT @ features / len(features)
    adapted = learner.adapt(task.support_x, task.support_y, Phase())
    torch.testing.assert_close(adapted.params["3.weight"], expected)


def test_meta_sgd_begins_as_maml_and_each_rate_moves_its_weight(net, tasks):
    ours, maml = MetaSGD(net, steps=2, inner_lr=0.2).double(), MAML(net, steps=2, inner_lr=0.2).double()
    torch.testing.assert_close(weights(ours), weights(maml), rtol=1e-6, atol=1e-7)
    sizes = {name: p.shape for name, p in ours.rule.named_parameters()}
    assert [tuple(s[1:]) for s in sizes.values()] == [
        tuple(maml.module.params()[n].shape) for n in maml.adapted_names()
    ]
    with torch.no_grad():
        for rates in ours.rule.rates:
            rates.zero_()
        ours.rule.rates[0][0, 2] = 0.5  # One filter of the first convolution.
    task = tasks.select(0)
    change = ours.adapt(task.support_x, task.support_y, Phase()).params["0.0.weight"] - net[0][0].weight
    assert (change[[0, 1, 3]] == 0).all() and (change[2] != 0).all()


def test_meta_curvature_begins_as_maml(net):
    ours, maml = MetaCurvature(net, steps=2).double(), MAML(net, steps=2).double()
    torch.testing.assert_close(weights(ours), weights(maml), rtol=1e-6, atol=1e-7)
    with pytest.raises(NetError, match="learns its rates by its matrices"):
        MetaCurvature(net, learn_lr=True)


@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (4, 3), (4,), (1, 3), (4, 1, 2, 2), ()])
def test_meta_curvature_is_a_kronecker_product(shape):
    params = {"w": torch.randn(shape, dtype=torch.float64)}
    rule = MetaCurvatureRule(params, 0.1).double()
    grad, full = torch.randn(shape, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    with torch.no_grad():
        for matrix in rule.matrices[0]:
            matrix.copy_(torch.randn_like(matrix))
            full = torch.kron(full, matrix)
    new, _ = rule(params, {"w": grad}, None, 0)
    expected = params["w"].reshape(-1) - 0.1 * full @ grad.reshape(-1)
    torch.testing.assert_close(new["w"].reshape(-1), expected)


def test_reptiles_gradient_is_the_way_to_the_trained_weights(net, tasks):
    learner = Reptile(net, steps=3, inner_lr=0.2, minibatches=2).double()
    result = Loop().meta_gradient(learner, Task(*(t[:1] for t in tasks)), TRAINING)
    task, trained = tasks.select(0), copy.deepcopy(net).train()
    x, y = torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])
    optimizer = torch.optim.SGD(trained.parameters(), 0.2)
    for part in (0, 1, 0):
        optimizer.zero_grad()
        F.cross_entropy(trained(x[part::2]), y[part::2]).backward()
        optimizer.step()
    for name, p in net.named_parameters():
        expected = (p - dict(trained.named_parameters())[name]).detach()
        torch.testing.assert_close(result.grads[f"module.net.{name}"].view_as(p), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(result.loss, F.cross_entropy(trained(task.query_x), task.query_y).detach())
    # One example of each class in a set, then those of the other set: every second one would be of two classes.
    y = torch.tensor([0, 1, 2, 3, 2, 0, 3, 1])
    batches = minibatches(10 * y + torch.arange(8), y, 2)
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2, 3]] * 2
    assert [inputs.tolist() for inputs, _ in batches] == [[0, 11, 22, 33], [5, 17, 24, 36]]
    assert [len(labels) for _, labels in minibatches(y, y.double(), 3)] == [3, 3, 2]
    with pytest.raises(NetError, match="13 minibatches of 12 examples"):
        Reptile(net, minibatches=13).double().meta_loss(task, TRAINING)


def test_warp_layers_begin_as_the_identity_and_stay_in_the_inner_loop(net, tasks):
    ours, maml, task = WarpMAML(net, steps=2).double(), MAML(net, steps=2).double(), tasks.select(0)
    for phase in (TRAINING, Phase()):
        torch.testing.assert_close(ours.outputs(task, phase), maml.outputs(task, phase), rtol=1e-9, atol=1e-9)
    assert len(ours.adapted_names()) == len(maml.adapted_names())
    warps = [name for name, g in weights(ours).items() if name not in ours.adapted_names() and g.dim() == 4]
    assert len(warps) == 2
    assert all(weights(ours)[name].abs().max() > 0 for name in warps)


def test_cavia_adapts_its_context_alone(net, tasks):
    learner = CAVIA(net, context=3, steps=2, inner_lr=1.0).double()
    task, (name,) = tasks.select(0), learner.adapted_names()
    assert name.startswith("1.1.1.")  # After the last batch norm.
    adapted = learner.adapt(task.support_x, task.support_y, Phase())
    assert set(adapted.params) == {name} and adapted.params[name].shape == (3,)
    assert not any("context" in n for n in learner.outer_params())
    # By hand: the gradient of the support loss in a context that enters the features linearly.
    context = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    film = learner.module.net.get_submodule("1.1.1").linear
    for _ in range(2):
        scale, shift = film(context).chunk(2)
        features = net[1][:2](net[0](task.support_x)) * (1 + scale[:, None, None]) + shift[:, None, None]
        loss = F.cross_entropy(net[3](net[2](net[1][2:](features))), task.support_y)
        context = context - torch.autograd.grad(loss, context, create_graph=True)[0]
    torch.testing.assert_close(adapted.params[name], context)
    with pytest.raises(NetError, match="has no layer 'head'"):
        CAVIA(net, after="head")
    with pytest.raises(NetError, match="after: a Sequential does not say how many channels it gives; expected one of"):
        CAVIA(net, after="0")
    with pytest.raises(NetError, match="has no batch norm, convolution or Linear layer"):
        CAVIA(nn.Sequential(nn.LayerNorm(3)))


def test_proto_net_takes_the_nearest_mean_and_no_class_without_support(net, tasks):
    learner, task = ProtoNet(net, ways=4).double(), tasks.select(0)
    outputs = learner.outputs(task, Phase())["after"]
    body = net[:3].train()
    means = torch.stack([body(task.support_x)[task.support_y == c].mean(0) for c in range(3)])
    distances = torch.cdist(body(task.query_x), means).square()
    torch.testing.assert_close(outputs[:, :3].log_softmax(-1), (-distances).log_softmax(-1))
    assert (outputs[:, 3] < -1e300).all()
    assert "module.net.3.weight" not in learner.outer_params()


def test_the_linear_head_is_fitted_as_scikit_learn_would(net, tasks):
    from sklearn.linear_model import LogisticRegression

    learner, task = LinearHead(net, ways=3, classes=7, steps=20_000).double(), tasks.select(0)
    assert learner.classifier.out_features == 7
    # Noisy labels, so that the unregularised fit is finite.
    support_x, support_y = task.support_x.repeat(2, 1, 1, 1), torch.tensor([0, 0, 1, 1, 2, 2, 1, 0, 1, 2, 2, 0])
    head = learner.adapt(support_x, support_y, Phase()).params["head"]
    features = F.pad(net[:3].train()(support_x), (0, 1), value=1.0).detach()
    fit = LogisticRegression(C=1e8, fit_intercept=False, max_iter=10_000, tol=1e-10).fit(features, support_y)
    expected = torch.as_tensor(fit.predict_proba(features))
    torch.testing.assert_close((features @ head.mT).softmax(-1), expected, rtol=0, atol=1e-2)
    with pytest.raises(NetError, match="ends in a Linear layer"):
        LinearHead(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), 2, 2)
