"""Pictures of odd names, pictures that fail, and files written whole or not at all."""

from __future__ import annotations

import errno
import os
import warnings
from io import BytesIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn

from metahpo.learners import MAML
from metahpo.picture import Picture, png
from metahpo.report import write_report
from metahpo.report.pictures import save_picture
from metahpo.report.rates import Rates, draw_rates
from metahpo.report.search import write_search_report
from metahpo.report.search_figures import Words, draw_parallel, draw_slices, parallel, slices
from metahpo.report.tuning import write_tuning_report
from metahpo.searchers import Choice, Float, Proposal, Random, Space, Study
from metahpo.tasks import Task
from metahpo.training.metrics import CsvLog

ODD = ["$x_{", "a$b$c", r"\frac{a}{b}$\alpha$", "x^_y", "學習率", "معدل", "long_" * 80, "line\nbreak", "\ud800", "%s{}"]


def pixels(figure: Figure) -> np.ndarray:
    return imread(BytesIO(png(figure)))


def test_a_name_between_dollars_is_no_formula_and_ticks_of_a_logarithm_still_are():
    def drawn(kind: type[Figure], name: str) -> np.ndarray:
        figure = kind(figsize=(4, 3))
        axis = figure.subplots()
        axis.set(title=name, yscale="log", ylim=(1e-3, 10))
        axis.plot([0, 1], [0.1, 1], label=name)
        axis.set_xticks([0, 1], [name, "b"])
        axis.legend(loc="center")
        return pixels(figure)

    # matplotlib's own way to write a dollar sign.
    np.testing.assert_array_equal(drawn(Picture, "a$^2$"), drawn(Figure, r"a\$^2\$"))


@pytest.mark.parametrize("draw", [lambda s, w: draw_parallel(parallel(s), w), lambda s, w: draw_slices(slices(s), w)])
def test_settings_and_objectives_of_any_name_have_pictures(draw):
    names = [f"{index}{name}" for index, name in enumerate(ODD)]
    space = Space({**{name: Float(0, 1) for name in names[::5]}, "other": Choice(*names)})
    study = Study(space, Random(), None, "maximize")
    for index in range(3):
        settings = {name: index / 3 for name in names[::5]}
        study.tell(study.add(Proposal({**settings, "other": names[index]})), index / 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(draw(study, Words((ODD[0] + ODD[6],), ("maximize",)))).std() > 0.02


def test_the_longest_names_leave_room_for_the_rates():
    figure = draw_rates(Rates(("layer." * 60, "b"), np.ones((2, 3)), True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels(figure)
    assert figure.axes[0].get_window_extent().width > 300


class Pair(nn.Module):
    """[N, 3] outputs for targets of one number, of which its loss looks at the first."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 3)

    def forward(self, x):
        return self.linear(x)


def first_output(outputs, targets):
    return F.mse_loss(outputs[:, :1], targets)


@pytest.fixture
def run_dir(tmp_path):
    CsvLog(tmp_path / "metrics.csv").write([{"epoch": 1, "lr": 0.1, "train_loss": 1.0, "val_loss": 1.0}])
    return tmp_path


def test_outputs_of_another_shape_than_the_targets_cost_a_picture_not_the_report(run_dir):
    x = torch.arange(4.0)[:, None]
    (run_dir / "report").mkdir()
    (run_dir / "report" / "example.png").write_bytes(b"of an earlier report")
    page = write_report(run_dir, MAML(Pair(), steps=1, loss=first_output), Task(x, x, x, x)).read_text()
    assert "The picture of the example task could not be drawn: " in page
    assert "![learning curves](curves.png)" in page
    assert not (run_dir / "report" / "example.png").exists()


class Failing:
    """What a tuning found, whose pictures fail."""

    def pictures(self):
        raise ValueError("no\nroom")

    def table(self):
        return "| a |"


def test_pictures_of_a_tuning_that_fail_become_a_sentence(tmp_path):
    CsvLog(tmp_path / "metrics.csv").write([{"iteration": 1, "loss": 1.0}, {"iteration": 2, "loss": 0.5}])
    page = write_tuning_report(tmp_path, Failing(), "rates").read_text()
    assert "The pictures could not be drawn: ValueError: no room" in page
    assert "![progress](progress.png)" in page


def test_a_figure_that_cannot_be_drawn_in_a_search_becomes_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("metahpo.report.search.draw_slices", lambda *_: 1 / 0)
    study = Study(Space(x=Float(0, 1)), Random(), None)
    study.tell(study.add(Proposal({"x": 0.5})), 1.0)
    page = write_search_report(tmp_path, study).read_text()
    assert "The picture of the slices could not be drawn: ZeroDivisionError: division by zero." in page
    assert "(history.png)" in page


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_full_disk_names_the_picture_and_leaves_the_earlier_one(tmp_path, monkeypatch, at):
    path = tmp_path / "curves.png"
    path.write_bytes(b"earlier")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, at, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_picture(path, "curves", lambda: Picture(figsize=(1, 1)))
    assert str(caught.value.filename) == str(path)
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["curves.png"]
