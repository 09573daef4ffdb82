"""What a training is judged by: metrics of some tasks, names that are taken, outputs that meet other targets."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.errors import DataError, NetError
from metahpo.learners import ANIL, BOIL, CAVIA, MAML, MAMLPlusPlus, MetaCurvature, MetaSGD, WarpMAML
from metahpo.learners.accuracy import accuracy
from metahpo.learners.phase import Phase
from metahpo.nets import MLP
from metahpo.tasks import Task
from metahpo.training import Trainer, TrainingSettings
from metahpo.training.engines import Loop, Threads, VMap
from metahpo.training.metrics import SumOfMetrics, judged_by, summarise
from metahpo.tuning import tune_rates

SETTINGS = TrainingSettings(epochs=1, iterations=2, tasks=4, val_tasks=4, engine="loop", device="cpu")


class Lines:
    """Lines through the origin; targets [N, 1] or, as ``flat``, [N]."""

    def __init__(self, flat: bool = False):
        self.flat = flat

    def task(self, index: int) -> Task:
        x = torch.rand(8, 1, generator=torch.Generator().manual_seed(index))
        y = (1 + index % 3) * x
        y = y[:, 0] if self.flat else y
        return Task(x[:4], y[:4], x[4:], y[4:])

    def batch(self, indices) -> Task:
        return Task(*(torch.stack(parts) for parts in zip(*map(self.task, indices))))


class Steep(MAML):
    """Has the metric "steepness" for lines that are steep alone; by NaN where ``missing`` is "nan"."""

    missing = "none"

    def measure(self, outputs, targets):
        steepness = targets.max()
        if self.missing == "nan":
            return {"steepness": steepness.where(steepness > 1, math.nan)}
        return {"steepness": steepness} if steepness > 1 else {}


def maml(kind=MAML, loss=F.mse_loss, net=None, **arguments):
    torch.manual_seed(0)
    return kind(net or MLP((1,), 1, (4,)), steps=1, loss=loss, **arguments)


def steep(numbers) -> list[float]:
    tops = [float(Lines().task(i).query_y.max()) for i in numbers]
    return [top for top in tops if top > 1]


@pytest.mark.parametrize(
    ("engine", "missing"), [(Loop, "none"), (Loop, "nan"), (Threads, "none"), (Threads, "nan"), (VMap, "nan")]
)
def test_a_metric_that_some_tasks_have_is_averaged_over_those(engine, missing):
    learner = maml(Steep)
    learner.missing = missing
    tops = steep(range(4))
    assert 1 <= len(tops) < 4
    tasks = Lines().batch(range(4))
    found = engine().meta_gradient(learner, tasks, Phase(training=True))
    assert float(found.metrics["steepness"]) == pytest.approx(sum(tops) / len(tops))
    metrics, _ = engine().evaluate(learner, tasks, Phase())
    row = summarise(metrics)
    assert row["steepness"] == pytest.approx(sum(tops) / len(tops))
    assert row["loss"] == pytest.approx(float(metrics["loss"].mean()))


def test_a_run_averages_such_a_metric_over_the_steps_and_batches_that_have_it():
    trainer = Trainer(maml(Steep), Lines(), Lines(), SETTINGS.model_copy(update={"tasks": 1, "iterations": 6}))
    row = trainer.fit()[0]
    trained, tested = steep(range(6)), steep(range(4))
    assert 1 <= len(trained) < 6
    assert row["train_steepness"] == pytest.approx(sum(trained) / len(trained))
    assert row["val_steepness"] == pytest.approx(sum(tested) / len(tested))


def test_a_metric_that_no_task_has_is_left_out_and_a_loss_never_is():
    nothing = torch.tensor([math.nan, math.nan])
    assert "odd" not in summarise({"odd": nothing})
    assert math.isnan(summarise({"loss": nothing})["loss"])
    sums = SumOfMetrics()
    sums.add({"odd": nothing[0], "loss": nothing[0]})
    assert math.isnan(sums.means()["loss"]) and "odd" not in sums.means()


def test_sums_of_a_checkpoint_without_counts_are_of_all_steps():
    assert SumOfMetrics(4, {"loss": 2.0}).means() == {"loss": 0.5}


class NamesLoss(MAML):
    def measure(self, outputs, targets):
        return {"loss": targets.mean()}


def test_a_metric_called_loss_is_refused():
    with pytest.raises(NetError, match=r"NamesLoss\.\w+: gives (a metric )?'loss', expected another name"):
        Trainer(maml(NamesLoss), Lines(), Lines(), SETTINGS).fit()
    with pytest.raises(NetError, match=r"NamesLoss\.measure: gives 'loss', expected another name"):
        Trainer(maml(NamesLoss), Lines(), Lines(), SETTINGS).evaluate(Lines(), 2)


# Targets [N] and outputs [N, 1].


@pytest.mark.parametrize(
    "loss", [F.mse_loss, nn.L1Loss(), lambda outputs, targets: ((outputs - targets) ** 2).mean(), F.huber_loss]
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loss_that_pairs_each_output_with_each_target_is_refused(loss):
    line = r"outputs are \[4, 1\] and targets \[4\], which the loss pairs each with each; expected targets of"
    trainer = Trainer(maml(loss=loss), Lines(flat=True), Lines(flat=True), SETTINGS)
    with pytest.raises(DataError, match=line):
        trainer.fit()
    with pytest.raises(DataError, match=line):
        trainer.evaluate(Lines(flat=True), 4)


def test_a_loss_that_brings_them_together_itself_passes_and_other_shapes_too():
    def loss(outputs, targets):
        return F.mse_loss(outputs[:, 0], targets)

    flat = Trainer(maml(loss=loss), Lines(flat=True), Lines(flat=True), SETTINGS).fit()
    assert flat[0]["val_loss"] == pytest.approx(Trainer(maml(), Lines(), Lines(), SETTINGS).fit()[0]["val_loss"])


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_tuning_of_rates_refuses_such_a_loss_too():
    x = torch.rand(12, 1)
    data = torch.utils.data.TensorDataset(x, x[:, 0])
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    with pytest.raises(DataError, match=r"train_loader: outputs are \[4, 1\] and targets \[4\]"):
        tune_rates(nn.Linear(1, 1), F.mse_loss, loader, loader, steps=4)


# Whole numbers that are amounts.


@pytest.mark.parametrize("loss", [F.mse_loss, nn.HuberLoss(), partial(F.smooth_l1_loss, beta=2.0)])
def test_amounts_have_no_accuracy(loss):
    assert accuracy(torch.rand(5, 1), torch.arange(5), loss) is None
    assert accuracy(torch.rand(5), torch.arange(5), loss) is None


def test_one_logit_says_nothing_of_a_third_label():
    assert accuracy(torch.rand(5), torch.arange(5), lambda outputs, targets: outputs.sum()).isnan()
    ignored = torch.tensor([0, 1, -100])
    assert accuracy(torch.tensor([-1.0, 1.0, 1.0]), ignored) == 1.0
    assert judged_by({"val_loss": 0.0}) == "loss"


# The fitted net, where the net has a loading of its own.


class Stubborn(nn.Sequential):
    """Loads nothing, as nets that keep their pretrained weights do."""

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return nn.modules.module._IncompatibleKeys([], [])


@pytest.mark.parametrize("kind", [MAML, ANIL, BOIL, MetaSGD, MetaCurvature, MAMLPlusPlus, CAVIA, WarpMAML])
def test_a_fitted_net_holds_the_learners_weights_whatever_the_net_loads(kind):
    learner = maml(kind, net=Stubborn(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    task = Lines().task(2)
    adapted = learner.adapt(task.support_x, task.support_y, Phase())
    fitted = learner.fitted(task.support_x, task.support_y)
    torch.testing.assert_close(fitted(task.query_x), learner.predict(adapted, task.query_x))
    assert not torch.allclose(fitted(task.query_x), learner.module.net(task.query_x))
