"""Losses with weights by formula: torch's own values, and differences for what its kernels do not differentiate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from metahpo.functional.formulas import ByFormula

LABELS = torch.tensor([0, 2, 1, -100, 2])
DENSE = torch.tensor([[[0, 1], [2, -100]], [[1, 1], [0, 2]]])
YES = torch.tensor([1.0, 0.0, 1.0, 0.3, 0.0], dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHTS = draw(3, seed=1).exp()
EACH = draw(5, seed=2).exp()
CASES = {
    "cross entropy": (lambda w, how: F.cross_entropy(draw(5, 3), LABELS, w, reduction=how), WEIGHTS),
    "smoothed": (lambda w, how: F.cross_entropy(draw(5, 3), LABELS, w, reduction=how, label_smoothing=0.2), WEIGHTS),
    "dense": (
        lambda w, how: F.cross_entropy(draw(2, 3, 2, 2), DENSE, weight=w, reduction=how, label_smoothing=0.1),
        WEIGHTS,
    ),
    "one example": (lambda w, how: F.cross_entropy(draw(3), torch.tensor(1), w, reduction=how), WEIGHTS),
    "soft labels": (lambda w, how: F.cross_entropy(draw(5, 3), draw(5, 3).softmax(1), w, reduction=how), WEIGHTS),
    "nll": (
        lambda w, how: F.nll_loss(draw(5, 3).log_softmax(1), LABELS.clamp(min=0), w, ignore_index=2, reduction=how),
        WEIGHTS,
    ),
    "a module's": (lambda w, how: torch.nn.CrossEntropyLoss(weight=w, reduction=how)(draw(5, 3), LABELS), WEIGHTS),
    "logits": (lambda w, how: F.binary_cross_entropy_with_logits(draw(5), YES, w, reduction=how), EACH),
    "positive": (
        lambda w, how: F.binary_cross_entropy_with_logits(draw(5), YES, EACH, reduction=how, pos_weight=w),
        draw(1, seed=3).exp(),
    ),
    "binary": (lambda w, how: F.binary_cross_entropy(draw(5).sigmoid(), YES, w, reduction=how), EACH),
    "margins": (
        lambda w, how: F.multi_margin_loss(draw(5, 3), LABELS.clamp(min=0), 2, 0.9, w, reduction=how),
        WEIGHTS,
    ),
}


@pytest.mark.parametrize("how", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_torch_and_gradients_their_differences(case, how):
    loss, weights = CASES[case]
    wanted = weights.clone().requires_grad_()
    with ByFormula() as mode:
        value = loss(wanted, how)
    assert mode.used
    torch.testing.assert_close(value.detach(), loss(weights, how), rtol=1e-12, atol=1e-14)
    (grad,) = torch.autograd.grad(value.sum(), wanted)
    shifts = 1e-5 * torch.eye(len(weights), dtype=torch.float64)
    differences = [(loss(weights + s, how) - loss(weights - s, how)).sum() / 2e-5 for s in shifts]
    torch.testing.assert_close(grad, torch.stack(differences), rtol=1e-7, atol=1e-9)


def test_other_calls_are_left_to_torch():
    with ByFormula() as mode:
        F.cross_entropy(draw(5, 3), LABELS)
        F.binary_cross_entropy_with_logits(draw(5), YES, None)
    assert not mode.used
