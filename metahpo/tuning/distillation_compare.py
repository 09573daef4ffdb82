"""What distilled images are worth beside real ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metahpo.functional.copies import copied
from metahpo.functional.trees import Params
from metahpo.training.environment import seeded
from metahpo.training.metrics import Row
from metahpo.tuning.data import Labelled, minibatches

if TYPE_CHECKING:
    from metahpo.tuning.distillation import DistillationTuner

DRAWS = 5  # of real images, for the control.
STARTS = 8  # Fresh initialisations, where these are random.
CONTROL_STEPS = 100  # The most outer steps for the control's rates; their own rate is higher by as much.
TEST, CONTROL = -4, -5  # In place of the number of an outer step, so that nothing is drawn twice.


def compared(tuner: DistillationTuner, x: Tensor, y: Tensor) -> dict[str, Row]:
    """See ``DistillationTuner.compare``."""
    test = Labelled(x.to(tuner.data.x), y.to(tuner.data.y))
    nets = tuner.starts(TEST, STARTS)
    control = [_scores(real, nets, test) for real in _on_real_images(tuner)]
    whole = [_trained(net, tuner.data, tuner.settings.full_steps, tuner.settings.seed) for net in nets]
    return {
        "distilled images": _row(*_scores(tuner, nets, test)),
        "random real images": _row(*(torch.cat(each) for each in zip(*control))),
        "whole training set": _row(*(torch.cat(each) for each in zip(*(_score(net, test) for net in whole)))),
    }


def _on_real_images(tuner: DistillationTuner):
    """The tuner's twins on real images: as many of each class, drawn at random, with their rates learnt."""
    steps = min(tuner.iterations, CONTROL_STEPS)
    rate_lr = tuner.settings.rate_lr * tuner.iterations / steps
    settings = tuner.settings.model_copy(update={"iterations": steps, "rate_lr": rate_lr})
    for draw in range(DRAWS):
        with seeded(tuner.settings.seed, CONTROL, draw):
            order = torch.randperm(len(tuner.data.x))
        found = [_first_of_class(tuner, order, label) for label in range(tuner.classes)]
        images = tuner.data.x[torch.stack(found, 1).flatten()]
        twin = type(tuner)(tuner.data, tuner.starting.source, settings, images=images, learn_images=False)
        twin.run()
        yield twin


def _first_of_class(tuner: DistillationTuner, order: Tensor, label: int) -> Tensor:
    """[k] positions, repeated where the class has fewer images."""
    own = order[tuner.data.y.cpu()[order] == label]
    count = tuner.settings.images_per_class
    return own.repeat(-(-count // len(own)))[:count].to(tuner.data.y.device)


def _scores(tuner: DistillationTuner, nets: list[nn.Module], test: Labelled) -> tuple[Tensor, Tensor]:
    """(loss [R], accuracy [R]) of the nets once trained on the tuner's images."""
    training = tuner.training
    params: Params = training.fit(training.start(nets), tuner.hparams)
    with torch.no_grad():
        logits = training.logits(params, test.x.clone())
        return training.losses(params, *test), (logits.argmax(-1) == test.y).double().mean(1)


def _trained(net: nn.Module, data: Labelled, steps: int, seed: int) -> nn.Module:
    """A copy trained by Adam (3e-3, annealed to 0 by a cosine) on batches of 64, in evaluation mode as the others."""
    net = copied(net).eval()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = minibatches(data, 64, torch.Generator().manual_seed(seed))
    for _ in range(steps):
        x, y = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        schedule.step()
    return net


def _score(net: nn.Module, test: Labelled) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logits = net(test.x.clone())
    return F.cross_entropy(logits, test.y)[None], (logits.argmax(-1) == test.y).double().mean()[None]


def _row(losses: Tensor, accuracies: Tensor) -> Row:
    row = {"loss": float(losses.mean()), "accuracy": float(accuracies.mean()), "runs": float(len(accuracies))}
    return row | ({"accuracy_std": float(accuracies.std())} if len(accuracies) > 1 else {})
