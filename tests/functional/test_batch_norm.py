from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from metahpo.errors import NetError
from metahpo.functional import FunctionalModule, PerStepBatchNorm, convert_batch_norm

CASES = [
    (nn.BatchNorm1d, (6, 3)),
    (nn.BatchNorm1d, (6, 3, 5)),
    (nn.BatchNorm2d, (6, 3, 4, 4)),
    (nn.BatchNorm3d, (2, 3, 4, 4, 2)),
]


def randomised(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in [*norm.parameters(), norm.running_mean, norm.running_var]:
            tensor.uniform_(0.5, 1.5)
    return norm.double()


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_one_row_equals_torch_in_value_statistics_and_second_derivatives(kind, shape):
    theirs = randomised(kind(3))
    ours = convert_batch_norm(theirs)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    sums = []
    for norm in (theirs, ours):
        out = norm(x)
        (grad,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.pow(2).sum(), x)
        sums.append((out, grad, second, norm.running_mean.flatten(), norm.running_var.flatten()))
    for theirs_value, ours_value in zip(*sums):
        torch.testing.assert_close(ours_value, theirs_value, rtol=1e-10, atol=1e-10)
    ours.inductive = True
    torch.testing.assert_close(ours(x), theirs.eval()(x))


def test_each_step_has_its_own_row_and_later_steps_the_last():
    norm = convert_batch_norm(nn.BatchNorm1d(2), statistics_rows=3, affine_rows=3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([[1.0, 1], [2, 2], [3, 3]]))
    x = torch.randn(8, 2)
    outs = []
    for step in range(5):
        norm.step = step
        before = norm.running_mean
        outs.append(norm(x))
        changed = (norm.running_mean != before).any(1)
        assert changed.tolist() == [row == min(step, 2) for row in range(3)]
    torch.testing.assert_close(outs[1], 2 * outs[0])
    torch.testing.assert_close(outs[2], 3 * outs[0])
    torch.testing.assert_close(outs[4], outs[2])


def test_evaluation_leaves_the_running_statistics_alone():
    norm = convert_batch_norm(nn.BatchNorm1d(2)).eval()
    before = norm.running_mean.clone()
    norm(torch.randn(8, 2) + 3)
    assert torch.equal(norm.running_mean, before)


def test_conversion_copies_the_net_and_keeps_shared_and_frozen_layers():
    shared = nn.BatchNorm1d(4)
    shared.weight.requires_grad_(False)
    net = nn.Sequential(nn.Linear(4, 4), shared, nn.ReLU(), shared)
    new = convert_batch_norm(net, affine_rows=2)
    assert isinstance(net[1], nn.BatchNorm1d), "the net given is left as it was"
    assert isinstance(new[1], PerStepBatchNorm)
    assert new[1] is new[3]
    assert not new[1].weight.requires_grad
    assert new[1].bias.requires_grad


def test_under_vmap_every_task_hands_out_its_own_statistics():
    module = FunctionalModule(nn.BatchNorm1d(2))
    x = torch.randn(5, 8, 2)

    def run(task):
        return module.apply_with(module.params(), module.buffers_by_name(), task)

    outs, buffers = torch.func.vmap(run)(x)
    for index in range(5):
        out, alone = run(x[index])
        torch.testing.assert_close(outs[index], out)
        for name, value in alone.items():
            torch.testing.assert_close(buffers[name][index], value)
    assert torch.equal(module.net.running_mean, torch.zeros(1, 2)), "nothing is written in place"


def test_inductive_predictions_do_not_depend_on_the_batch():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    module = FunctionalModule(net)
    x = torch.randn(6, 1, 5, 5)

    def run(inputs):
        return module.apply_with({}, module.buffers_by_name(), inputs, training=False, inductive=True)[0]

    torch.testing.assert_close(run(x), torch.cat([run(x[i : i + 1]) for i in range(6)]))


def test_one_value_a_channel_is_refused():
    with pytest.raises(NetError, match="more than one value a channel"):
        convert_batch_norm(nn.BatchNorm1d(2))(torch.randn(1, 2))


class Named(nn.BatchNorm1d):
    """A subclass that keeps the forward method and adds to the rest."""

    def __init__(self, features: int):
        super().__init__(features)
        self.gate, self.label = nn.Parameter(torch.ones(1)), "mine"
        self.register_buffer("calls", torch.tensor(0))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, Named, nn.SyncBatchNorm])
def test_conversion_keeps_the_class_hooks_attributes_and_further_tensors(kind):
    norm = kind(3)
    norm.note = ["kept"]
    norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    new = convert_batch_norm(norm).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    plain = torch.batch_norm(x + 1, None, None, None, None, True, 0.0, norm.eps, False)
    torch.testing.assert_close(new(x), 2 * plain, rtol=1e-12, atol=1e-12)
    assert isinstance(new, PerStepBatchNorm) and isinstance(new, kind) and new.note == ["kept"]
    assert {*dict(norm.named_parameters())} == {*dict(new.named_parameters())}
    assert ("calls" in dict(new.named_buffers())) == (kind is Named)
    assert not isinstance(norm, PerStepBatchNorm), "the layer given is left as it was"


def test_converted_norms_can_be_copied_and_pickled():
    norm = convert_batch_norm(Named(3), statistics_rows=2)
    x = torch.randn(5, 3)
    twins = copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))
    expected = norm(x)
    for twin in twins:
        assert type(twin) is type(norm) and twin.label == "mine"
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(twin.state_dict(), norm.state_dict(), rtol=0, atol=0)


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_computed_and_shared_scales_stay_computed_and_shared():
    first, second, third = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    second.weight = first.weight
    nn.utils.parametrize.register_parametrization(third, "weight", Half())
    net = nn.Sequential(first, nn.Linear(3, 3), second, third)
    net.gain = third.bias
    new = convert_batch_norm(net, affine_rows=2)
    assert new[0].weight is new[2].weight and new[0].weight.shape == (2, 3)
    assert new.gain is new[3].bias
    x = torch.randn(5, 3)
    with torch.no_grad():
        new[3].parametrizations.weight.original.fill_(4.0)
        net[3].parametrizations.weight.original.fill_(4.0)
    torch.testing.assert_close(new(x), net(x))
    assert FunctionalModule(net).norm_names() >= {"3.parametrizations.weight.original", "0.weight", "0.bias"}


def test_the_cumulative_mean_is_over_the_batches_of_each_step():
    theirs = [nn.BatchNorm1d(2, momentum=None).double() for _ in range(2)]
    ours = convert_batch_norm(theirs[0], statistics_rows=2)
    for batch in range(5):
        x = torch.randn(6, 2, dtype=torch.float64) + batch
        ours.step = batch % 2
        ours(x), theirs[batch % 2](x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        wanted = torch.stack([getattr(each, name) for each in theirs])
        torch.testing.assert_close(getattr(ours, name), wanted, rtol=1e-12, atol=1e-12)
    before = {n: t for n, t in ours.state_dict().items() if n != "num_batches_tracked"}
    fresh = convert_batch_norm(theirs[0], statistics_rows=2)
    fresh.load_state_dict(before)
    torch.testing.assert_close(fresh.running_mean, ours.running_mean)
