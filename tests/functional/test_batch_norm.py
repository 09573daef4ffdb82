from __future__ import annotations

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
