"""The report of small runs: the data behind the pictures, the pictures, and the page."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread

from metahpo.errors import DataError, MetaHPOError
from metahpo.inner import SGD, LayerStepRates
from metahpo.learners import MAML, Adapted, MAMLPlusPlus, MetaLearner, Phase
from metahpo.nets import MLP, Conv4
from metahpo.report import write_report
from metahpo.report.completion import CompletionExample
from metahpo.report.curves import draw_curves, learning_curves
from metahpo.report.example import CurveExample, ImageExample, draw_example, example
from metahpo.report.rates import draw_rates, inner_rates, rates_table
from metahpo.tasks import Episodes, ImageCompletion, LabelledImages, Sinusoid, Task
from metahpo.training.metrics import CsvLog
from metahpo.training.settings import TrainingSettings
from metahpo.training.trainer import Trainer

SHORT = TrainingSettings(epochs=2, iterations=2, tasks=2, val_tasks=3, device="cpu", engine="loop")


class Mean(MetaLearner):
    """A learner without a rule and without "before": it answers with the mean of the support targets."""

    def __init__(self):
        super().__init__(F.mse_loss)

    def adapt(self, support_x, support_y, phase):
        return Adapted({"mean": support_y.mean(0)}, phase)

    def predict(self, adapted, x):
        return adapted.params["mean"].expand(len(x), -1)


def random_images(channels: int = 1, ways: int = 3, shots: int = 1, queries: int = 3) -> Episodes:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8 * 12, channels, 14, 14), generator=generator, dtype=torch.uint8)
    names = tuple(f"class {i}" for i in range(8))
    data = LabelledImages(images, torch.arange(8).repeat_interleave(12), names, {"train": tuple(range(8))})
    return Episodes(data, "train", ways=ways, shots=shots, queries=queries)


def small_net(ways: int = 3, channels: int = 1) -> Conv4:
    torch.manual_seed(0)
    return Conv4((channels, 14, 14), ways, filters=8)


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    tasks, run_dir = random_images(), tmp_path_factory.mktemp("runs") / "images"
    learner = MAMLPlusPlus(small_net(), steps=2)
    Trainer(learner, tasks, tasks, SHORT, run_dir).fit()
    rows = {
        "best": {"epoch": 2, "loss": 0.5, "accuracy": 0.98764, "accuracy_ci": 0.00123, "accuracy_inductive": 0.9011},
        "ensemble of 2": {"loss": 0.4, "accuracy": 0.99, "accuracy_ci": float("nan"), "accuracy_before": 0.33},
    }
    (run_dir / "test.json").write_text(json.dumps({"split": "test", "tasks": 600, "rows": rows}))
    (run_dir / "config.yaml").write_text("net:\n  name: conv4  # not ```fenced\n")
    return run_dir, learner, tasks


@pytest.fixture(scope="module")
def curve_run(tmp_path_factory):
    tasks, run_dir = Sinusoid(), tmp_path_factory.mktemp("runs") / "waves"
    torch.manual_seed(0)
    learner = MAML(MLP((1,), 1), steps=1, inner_lr=0.01, loss=F.mse_loss)
    Trainer(learner, tasks, tasks, SHORT, run_dir).fit()
    return run_dir, learner, tasks


def assert_picture(path):
    pixels = imread(path)[..., :3]
    assert 1000 <= pixels.shape[1] <= 1200
    assert pixels.std() > 0.05


def row(epoch, accuracy, inductive, loss=1.0):
    known = {"epoch": epoch, "lr": 0.1 / epoch, "train_loss": 2 * loss, "val_loss": loss, "val_loss_ci": 0.25}
    return {**known, "val_accuracy": accuracy, "val_accuracy_ci": 0.02, "val_accuracy_inductive": inductive}


# Curves.


def test_curves_hold_the_columns_of_the_history():
    curves = learning_curves([row(1, 0.5, 0.4), row(2, 0.75, 0.5), row(3, 0.7, 0.6)])
    assert curves.epochs.tolist() == [1, 2, 3]
    assert curves.best_epoch == 2
    panels = {panel.name: {line.label: line for line in panel.lines} for panel in curves.panels}
    assert list(panels) == ["loss", "accuracy", "outer learning rate"]
    assert list(panels["accuracy"]) == ["val, transductive", "val, inductive"]
    assert panels["accuracy"]["val, transductive"].values.tolist() == [0.5, 0.75, 0.7]
    assert panels["accuracy"]["val, transductive"].half_widths.tolist() == [0.02] * 3
    assert panels["accuracy"]["val, inductive"].half_widths is None
    assert panels["loss"]["train"].values.tolist() == [2.0] * 3
    np.testing.assert_allclose(panels["outer learning rate"]["outer rate"].values, [0.1, 0.05, 0.1 / 3])


def test_inductive_is_left_out_where_it_is_the_same():
    curves = learning_curves([row(1, 0.5, 0.5), row(2, 0.75, 0.75)])
    assert [line.label for line in curves.panels[1].lines] == ["val"]


@pytest.mark.parametrize(("last", "log"), [(0.3, False), (0.19, True)])
def test_the_loss_axis_is_logarithmic_beyond_a_decade(last, log):
    # The largest loss is the first train loss, 2.0; the smallest is the last val loss.
    curves = learning_curves([row(1, 0.5, 0.4), row(2, 0.6, 0.5, loss=last)])
    assert curves.panels[0].log is log
    axis = draw_curves(curves).axes[0]
    assert axis.get_yscale() == ("log" if log else "linear")
    assert axis.get_ylim()[0] > 0 or not log


def test_rows_with_gaps_and_a_single_epoch_can_be_drawn(tmp_path):
    gaps = [{"epoch": 1, "val_loss": 3.0, "lr": 0.1}, {"epoch": 2, "val_loss": 2.0, "train_loss": 1.0}]
    curves = learning_curves(gaps)
    assert np.isnan(curves.panels[0].lines[0].values[0])
    draw_curves(curves).savefig(tmp_path / "gaps.png")
    draw_curves(learning_curves([row(1, 0.5, 0.4)])).savefig(tmp_path / "single.png")
    assert_picture(tmp_path / "gaps.png")
    assert_picture(tmp_path / "single.png")


# Rates.


def learner_with(rule):
    learner = Mean()
    learner.rule = rule
    return learner


def test_layer_step_rates_are_read_by_name_and_negative_ones_drawn_the_other_way():
    rule = LayerStepRates(["a.weight", "b|weight"], 3, 0.1)
    with torch.no_grad():
        rule.rates.copy_(torch.tensor([[0.1, -0.2, 0.05], [0.0, 0.4, 0.3]]))
    rates = inner_rates(learner_with(rule))
    assert rates.learnt
    assert rates.names == ("a.weight", "b|weight")
    np.testing.assert_allclose(rates.values, [[0.1, -0.2, 0.05], [0.0, 0.4, 0.3]], atol=1e-7)
    lines = rates_table(rates).splitlines()
    assert lines[0] == "| tensor | step 1 | step 2 | step 3 |"
    assert lines[2] == "| `a.weight` | 0.100 | -0.200 | 0.050 |"
    figure = draw_rates(rates)
    assert figure.axes[0].images[0].get_clim() == pytest.approx((-0.4, 0.4))
    assert [text.get_text() for text in figure.axes[0].texts][1] == "-0.200"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a.weight", "b|weight"]


@pytest.mark.parametrize("learnable", [True, False])
def test_a_scalar_rate_is_one_row_without_a_heat_map(learnable):
    rates = inner_rates(learner_with(SGD(0.01, learnable=learnable)))
    assert rates.learnt is learnable
    assert rates.values == pytest.approx(np.array([[0.01]]))
    assert "0.0100" in rates_table(rates)
    assert draw_rates(rates) is None


@pytest.mark.parametrize("rule", [None, torch.nn.Identity()])
def test_a_learner_without_rates_has_none(rule):
    assert inner_rates(learner_with(rule)) is None


def test_rates_that_are_all_zero_or_not_finite_can_be_drawn():
    rule = LayerStepRates(["w"], 2, 0.0)
    assert draw_rates(inner_rates(learner_with(rule))) is not None
    with torch.no_grad():
        rule.rates[0, 0] = float("inf")
    assert "inf" in rates_table(inner_rates(learner_with(rule)))
    assert draw_rates(inner_rates(learner_with(rule))) is not None


# Examples.


@pytest.mark.parametrize(("ways", "queries", "shown"), [(2, 9, 16), (5, 4, 15), (8, 1, 8)])
def test_an_image_example_shows_the_classes_in_turn_with_the_learners_own_answers(ways, queries, shown):
    task = random_images(ways=ways, queries=queries).task(0)
    shuffled = torch.randperm(len(task.query_y), generator=torch.Generator().manual_seed(1))
    task = task._replace(query_x=task.query_x[shuffled], query_y=task.query_y[shuffled])
    learner = MAMLPlusPlus(small_net(ways), steps=2)
    data = example(learner, task)
    assert isinstance(data, ImageExample)
    assert data.columns % ways == 0
    assert data.query_labels.tolist() == [i % ways for i in range(shown)]
    outputs = learner.outputs(task, Phase())
    for kind in ("after", "before"):
        assert data.predictions[kind].accuracy == pytest.approx(
            learner.measure(outputs[kind], task.query_y)["accuracy"]
        )
    # Each picture keeps its own label and answer.
    for image, label, answer in zip(data.query, data.query_labels, data.predictions["after"].labels):
        (place,) = (i for i, x in enumerate(task.query_x) if np.array_equal(x[0].numpy(), image))
        assert task.query_y[place] == label
        assert outputs["after"][place].argmax() == answer


def test_colour_images_and_normalised_ones_are_drawn(tmp_path):
    task = random_images(channels=3).task(0)
    task = task._replace(support_x=task.support_x * 4 - 2, query_x=task.query_x * 4 - 2)
    data = example(MAMLPlusPlus(small_net(channels=3), steps=1), task)
    assert data.query.shape[1:] == (14, 14, 3)
    assert 0 <= data.query.min() < 0.1 and 0.9 < data.query.max() <= 1
    draw_example(data).savefig(tmp_path / "example.png")
    assert_picture(tmp_path / "example.png")


def test_a_curve_example_gives_the_learners_curve_and_errors():
    task = Sinusoid(queries=7).task(3)
    data = example(Mean(), task)
    assert isinstance(data, CurveExample)
    assert set(data.curves) == {"after"}
    np.testing.assert_allclose(data.curves["after"], float(task.support_y.mean()), rtol=1e-5)
    assert data.errors["after"] == pytest.approx(F.mse_loss(task.support_y.mean().expand(7, 1), task.query_y).item())
    assert data.x.min() < data.query_x.min() and data.x.max() > data.query_x.max()
    assert data.query_y.tolist() == task.query_y.flatten().tolist()


def test_a_completion_example_has_every_pixel_in_its_place(tmp_path):
    images = torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(0))
    task = ImageCompletion(images, "train", shots=6).task(2)
    data = example(MAML(MLP((2,), 1, hidden=(5,)), loss=F.mse_loss), task)
    assert isinstance(data, CompletionExample)
    (image,) = (image for image in images.numpy() if np.array_equal(image, data.truth))
    assert np.isfinite(data.given).sum() == 6
    assert np.array_equal(data.given[np.isfinite(data.given)], image[np.isfinite(data.given)])
    hidden = ~np.isfinite(data.given)
    for kind in ("before", "after"):
        error = np.square(data.completed[kind] - image)[hidden].mean()
        assert data.errors[kind] == pytest.approx(error, rel=1e-5)
    assert data.errors["before"] != data.errors["after"]
    draw_example(data).savefig(tmp_path / "example.png")
    assert_picture(tmp_path / "example.png")
    scattered = task._replace(support_x=torch.rand(6, 2), query_x=torch.rand(9, 2))
    assert example(MAML(MLP((2,), 1), loss=F.mse_loss), scattered) is None


def test_other_tasks_have_no_example():
    vectors, labels, values = torch.zeros(4, 6), torch.tensor([0, 1, 0, 1]), torch.zeros(4, 2)
    assert example(Mean(), Task(vectors, labels, vectors, labels)) is None
    assert example(Mean(), Task(vectors, values, vectors, values)) is None


# The page.


def test_the_page_of_an_image_run(image_run):
    run_dir, learner, tasks = image_run
    page = write_report(run_dir, learner, tasks.task(0), title="Random images")
    assert page == run_dir / "report" / "report.md"
    text = page.read_text()
    assert text.startswith("# Random images\n\n| model | accuracy, transductive | inductive | before adapting |")
    assert "| best, epoch 2 | 98.8% ± 0.1% | 90.1% | – |" in text
    assert "| ensemble of 2 | 99.0% | – | 33.0% |" in text
    assert "Over 600 test tasks" in text and "*Inductive*" in text
    for name, rates in learner.rule.by_name().items():
        assert f"| `{name}` | " + " | ".join(f"{rate:.3f}" for rate in rates.tolist()) + " |" in text
    assert "````yaml\nnet:\n  name: conv4  # not ```fenced\n````" in text
    assert f"| torch | {torch.__version__} |" in text
    pictures = re.findall(r"!\[[^]]*\]\((.*?)\)", text)
    assert pictures == ["curves.png", "rates.png", "example.png"]
    for name in pictures:
        assert_picture(page.parent / name)


def test_the_page_of_an_untested_regression_run(curve_run):
    run_dir, learner, tasks = curve_run
    text = write_report(run_dir, learner, tasks.task(0)).read_text()
    best = min(CsvLog(run_dir / "metrics.csv").read(), key=lambda row: row["val_loss"])
    cells = f"{best['val_loss']:.4f} ± {best['val_loss_ci']:.4f} | {best['val_loss_before']:.4f}"
    assert text.startswith("# Run waves\n\n| model | MSE after adapting | before adapting |")
    assert f"| best, epoch {best['epoch']:.0f} | {cells}" in text
    assert "not been tested" in text and "ransductive" not in text and "## Config" not in text
    assert re.findall(r"!\[[^]]*\]\((.*?)\)", text) == ["curves.png", "example.png"]
    assert not (run_dir / "report" / "rates.png").exists()
    assert_picture(run_dir / "report" / "example.png")


def test_a_picture_that_is_no_longer_right_goes(curve_run):
    run_dir, _, tasks = curve_run
    (run_dir / "report").mkdir(exist_ok=True)
    (run_dir / "report" / "rates.png").write_bytes(b"old")
    text = write_report(run_dir, Mean(), tasks.task(0)).read_text()
    assert not (run_dir / "report" / "rates.png").exists()
    assert "Inner rates" not in text


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("metrics.csv", None, "missing"),
        ("metrics.csv", "", "empty"),
        ("metrics.csv", "epoch,val_loss\n", "empty"),
        ("metrics.csv", "epoch,val_loss\n1,much\n", "damaged"),
        ("metrics.csv", "epoch,val_loss\n1,2.0,3.0\n", "damaged"),
        ("metrics.csv", "epoch,lr\n1,0.1\n", "row 1 has no val_loss"),
        ("test.json", "{", "damaged"),
        ("test.json", "[1]", "expected an object"),
        ("test.json", "{}", "expected rows"),
        ("versions.json", "not json", "damaged"),
    ],
)
def test_missing_and_damaged_files_are_named_in_one_line(tmp_path, file, content, says):
    (tmp_path / "metrics.csv").write_text("epoch,val_loss\n1,2.0\n")
    (tmp_path / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=says) as raised:
        write_report(tmp_path, Mean(), Sinusoid().task(0))
    assert isinstance(raised.value, MetaHPOError)
    assert str(tmp_path / file) in str(raised.value) and "\n" not in str(raised.value)
