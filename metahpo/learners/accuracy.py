"""The share of labels that a net's outputs get right, for every layout that torch's losses know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What nets that give a dict call the output that they are judged by.
NAMES = ("logits", "out", "output", "outputs", "prediction", "predictions", "pred")


def accuracy(outputs: Any, targets: Tensor, loss: Any = None) -> Tensor | None:
    """The share of the targets that are predicted.

    Args:
        outputs: Logits: [N, C, ...] for targets [N, ...], as ``torch.nn.CrossEntropyLoss`` takes
            them; where only that fits, with the classes last, [N, ..., C]; or one logit for each
            target, [N, 1] or as the targets, for labels 0 and 1. Of a tuple the first, of a dict
            the one called "logits", "out" or the like.
        targets: Labels [N, ...]. Those that are the loss's ``ignore_index`` (-100) do not count.
        loss: Of the learner: after ``binary_cross_entropy`` an output is a probability.

    Returns:
        A scalar of at least float32; NaN where one logit stands for a label other than 0 and 1. None
        for targets that are no labels, under a loss for regression too, and for outputs of other
        shapes.
    """
    logits = main_output(outputs)
    if logits is None or targets.is_floating_point() or targets.is_complex() or _is_for_regression(loss):
        return None
    right, binary = _right(logits.detach(), targets, loss)
    if right is None:
        return None
    counted = targets != getattr(loss, "ignore_index", -100)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    share = (right & counted).sum().to(dtype) / counted.sum().to(dtype)
    if not binary:
        return share
    # One logit says nothing of a third label, or of an amount.
    known = ((targets == 0) | (targets == 1) | ~counted).all()
    return share.where(known, math.nan)


def main_output(outputs: Any) -> Tensor | None:
    """Of what a net gives, the tensor that it is judged by; None where nothing says which."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        named = [outputs[name] for name in NAMES if isinstance(outputs.get(name), Tensor)]
        tensors = [value for value in outputs.values() if isinstance(value, Tensor)]
        return named[0] if named else tensors[0] if len(tensors) == 1 else None
    if isinstance(outputs, (tuple, list)):
        return main_output(outputs[0]) if outputs else None
    logits = getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) else None


# Losses of torch's whose targets are amounts, though they be whole numbers.
REGRESSION = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss)
REGRESSION_FUNCTIONS = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.poisson_nll_loss)


def _right(logits: Tensor, targets: Tensor, loss: Any) -> tuple[Tensor | None, bool]:
    """Which targets are predicted, and whether by one logit each."""
    if logits.shape == targets.shape:
        return _binary(logits, targets, loss), True
    if logits.dim() != targets.dim() + 1:
        return None, False
    if logits.dim() > 1 and (logits.shape[0], *logits.shape[2:]) == targets.shape:
        axis = 1
    elif logits.shape[:-1] == targets.shape:
        axis = -1
    else:
        return None, False
    if logits.shape[axis] == 1:
        return _binary(logits.squeeze(axis), targets, loss), True
    return logits.argmax(axis) == targets, False


def _is_for_regression(loss: Any) -> bool:
    loss = loss.func if isinstance(loss, partial) else loss
    return isinstance(loss, REGRESSION) or any(loss is function for function in REGRESSION_FUNCTIONS)


def _binary(logits: Tensor, targets: Tensor, loss: Any) -> Tensor:
    loss = loss.func if isinstance(loss, partial) else loss
    sure = loss is F.binary_cross_entropy or isinstance(loss, nn.BCELoss)
    return (logits > (0.5 if sure else 0.0)).to(targets.dtype) == targets
