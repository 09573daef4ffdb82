"""Which labels are wrong, judged by nets that have not seen them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metahpo.errors import NonFiniteError
from metahpo.tuning.data import Labelled

# Trains on examples with weights and gives a function from inputs [N, ...] to logits [N, C].
Train = Callable[[Labelled, Tensor, int], Callable[[Tensor], Tensor]]

FOLDS, ROUNDS, STEPS = 5, 3, 200
# The weight of every example for nets that learn from the trusted ones: small, but not 0, as there may be no trusted
# example beside a fold.
FAINT = 1e-3
# So many examples a class are imagined whose mistakes fall on all other classes alike.
IMAGINED = 10.0


@dataclass(frozen=True)
class SecondLook:
    """What cross-validation says of the labels.

    right [N]: the probability that an example's label is right; suggested [N]: the likeliest other
    one.
    gain: by how much the cross-entropy of trusted examples that a net has not seen falls if the
    suspected examples are left out, its probabilities at their best temperature; error: the
    standard error of that.
    """

    right: Tensor
    suggested: Tensor
    gain: float
    error: float

    @property
    def worthwhile(self) -> bool:
        """Whether to leave the suspected examples out does no harm: no loss beyond the standard error.

        The probabilities already say that these labels are wrong. Few trusted examples show no gain
        even where that is true, so they have to speak against it.
        """
        return self.gain > -self.error


def second_look(
    data: Labelled, trusted: Labelled, weights: Tensor, threshold: float, train: Train
) -> SecondLook:
    """Judges each label by a net that was trained without it.

    Both sets are cut into folds. For each fold a net is trained on the weighted examples and the
    trusted ones of the others; in the first round so is one on hardly more than the trusted ones,
    which no wrong label misleads, and the two give the mean of their probabilities. On the fold's
    trusted examples a net learns how far its probabilities are to be believed (one temperature:
    Guo et al. 2017), and on the other examples it is asked. From its answers and the labels follow
    the rates at which one class is labelled as another, by expectation maximisation, and so the
    probability that a label is right: where few are wrong, a net has to be very sure to contradict
    one. These are the weights of the next round.

    Args:
        data, trusted: The examples; ``trusted`` have right labels.
        weights: Of ``data`` [N] for the nets of the first round, such as a hypergradient's.
        threshold: An example whose label is right with less probability is suspected.
        train: Makes a net; the third argument numbers the training.

    Raises:
        NonFiniteError: The nets' outputs are not finite.
    """
    folds = [_folds(part.y, shift) for part, shift in ((data, 0), (trusted, 1))]

    def outputs(weights: Tensor, number: int) -> tuple[Tensor, Tensor]:
        return _unseen(data, trusted, weights, folds, train, number)

    posterior = torch.empty(0)
    rows = torch.arange(len(data.y), device=data.y.device)
    for number in range(ROUNDS):
        judges = [weights] if number else [weights, torch.full_like(weights, FAINT)]
        probabilities = []
        for each in judges:
            logits, known = outputs(each, number)
            probabilities.append((_temperature(known, trusted.y) * logits).softmax(1))
        posterior = label_posterior(torch.stack(probabilities).mean(0), data.y)
        weights = posterior[rows, data.y]
    kept = weights >= threshold
    gain = error = 0.0
    if not bool(kept.all()):
        # The same numbers: of the two trainings only the examples differ.
        before, after = (
            outputs(each, ROUNDS)[1] for each in (torch.ones_like(weights), kept.to(weights))
        )
        difference = _calibrated_losses(before, trusted.y) - _calibrated_losses(after, trusted.y)
        gain = float(difference.mean())
        error = float(difference.std(correction=0)) / len(difference) ** 0.5
    if posterior.shape[1] > 1:
        posterior[rows, data.y] = -1
    return SecondLook(weights, posterior.argmax(1), gain, error)


def label_posterior(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The probability of each class to be the right one, given the label that was written.

    Args:
        probabilities: Of the classes by the inputs alone [N, C].
        labels: As written [N].

    Returns:
        [N, C], by the rates of mistakes [C, C] that make the labels likeliest.
    """
    count, rate = len(labels), 0.05
    rates = _alike(rate, probabilities)
    posterior = probabilities
    for _ in range(STEPS):
        posterior = probabilities * rates[:, labels].T
        posterior = posterior / posterior.sum(1, keepdim=True).clamp(min=1e-300)
        written = torch.zeros_like(rates).index_add_(1, labels, posterior.T.contiguous())
        rate = float(1 - written.diagonal().sum() / count)
        rates = written + IMAGINED * _alike(rate, probabilities)
        rates = rates / (written.sum(1, keepdim=True) + IMAGINED)
    return posterior


def _alike(rate: float, like: Tensor) -> Tensor:
    """Rates of mistakes [C, C] of which each other class has the same share."""
    classes = like.shape[1]
    if classes == 1:
        return like.new_ones(1, 1)
    rates = like.new_full((classes, classes), rate / (classes - 1))
    return rates.fill_diagonal_(1 - rate)


def _folds(labels: Tensor, shift: int) -> Tensor:
    """A fold for each example [N], each class spread over all of them.

    The examples' order has no say in it; shift: with another one, two sets of one example each fall
    into different folds, so that no net is without any.
    """
    generator = torch.Generator().manual_seed(shift)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    order = order[labels[order].argsort(stable=True)]
    folds = torch.empty_like(labels)
    folds[order] = (torch.arange(len(labels), device=labels.device) + shift) % FOLDS
    return folds


def _unseen(
    data: Labelled,
    trusted: Labelled,
    weights: Tensor,
    folds: list[Tensor],
    train: Train,
    number: int,
) -> tuple[Tensor, Tensor]:
    """Logits of ``data`` and of ``trusted``, float64, each by the net of its own fold."""
    found: list[list[Tensor]] = [[], []]
    for fold in range(FOLDS):
        among, beside = (each != fold for each in folds)
        if bool(among.all()) and bool(beside.all()):
            continue
        parts = data.select(among), trusted.select(beside)
        examples = Labelled(*(torch.cat(pair) for pair in zip(*parts)))
        ones = weights.new_ones(int(beside.sum()))
        net = train(examples, torch.cat([weights[among], ones]), number * FOLDS + fold)
        for rows, part, held in zip(found, (data, trusted), (~among, ~beside)):
            if bool(held.any()):
                rows.append(net(part.x[held].clone()).double())
    places = [
        torch.cat([(each == fold).nonzero()[:, 0] for fold in range(FOLDS)]) for each in folds
    ]
    logits = tuple(torch.cat(rows)[place.argsort()] for rows, place in zip(found, places))
    if not all(bool(torch.isfinite(each).all()) for each in logits):
        raise NonFiniteError(
            "second look at the labels: a net's outputs are not finite after an ordinary training; "
            "expected a smaller lr"
        )
    return logits


def _temperature(logits: Tensor, labels: Tensor) -> float:
    """The factor of the logits that makes the labels likeliest."""
    factors = torch.logspace(-1.5, 1.5, 121).tolist()
    return min(factors, key=lambda factor: float(F.cross_entropy(factor * logits, labels)))


def _calibrated_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each example [N]; a net that is too sure of itself is not blamed for it."""
    return F.cross_entropy(_temperature(logits, labels) * logits, labels, reduction="none")
