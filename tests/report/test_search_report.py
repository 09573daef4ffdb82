"""The report of small searches: the data behind the pictures, the pictures, and the page."""

from __future__ import annotations

import math
import re
import sys
from itertools import combinations

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.stats import rankdata

from metahpo.errors import DataError, MetaHPOError, SearchError
from metahpo.report.search import write_search_report
from metahpo.report.search_figures import (
    Words,
    draw_parallel,
    draw_rungs,
    draw_slices,
    front,
    history,
    importance,
    parallel,
    rungs,
    slices,
)
from metahpo.report.search_figures.looks import Scale
from metahpo.report.search_figures.rungs import rungs_table
from metahpo.report.search_figures.ticks import ticks
from metahpo.searchers import Choice, Float, Int, Proposal, Random, Space, Study

LINE = Space(x=Float(0, 1))
RULES = Space(
    {
        "rule": Choice("sgd", "adam"),
        "sgd.momentum": Float(0, 0.9, when={"rule": "sgd"}),
        "lr": Float(1e-4, 1, log=True),
        "steps": Int(1, 5),
    }
)
ACCURACY = Words(("accuracy",), ("maximize",), "epochs")


def study_of(trials, space=LINE, direction="maximize"):
    """A study in memory of (settings, score or error or None: at work, budget, parent)."""
    study = Study(space, Random(), None, direction)
    for settings, score, *more in trials:
        number = study.add(Proposal(settings, *more))
        if isinstance(score, str):
            study.tell(number, error=score)
        elif score is not None:
            study.tell(number, score)
    return study


def line(*scores, direction="maximize"):
    return study_of([({"x": i / 10}, score) for i, score in enumerate(scores)], direction=direction)


def halving(reports=True):
    """Four trials of 1 epoch, one of which failed; two go on to 3, one to 9; then one that is at work."""
    plan = [
        (0.1, 0.5, 1, None),
        (0.2, "lost", 1, None),
        (0.3, 0.4, 1, None),
        (0.4, 0.3, 1, None),
        (0.1, 0.6, 3, 0),
        (0.3, 0.65, 3, 2),
        (0.3, 0.8, 9, 5),
        (0.5, None, 1, None),
    ]
    study = Study(LINE, Random(), None, "maximize")
    for x, score, budget, parent in plan:
        number = study.add(Proposal({"x": x}, budget, parent))
        if reports and isinstance(score, float):
            begin = 0 if parent is None else study.trials[parent].budget
            for epoch in range(begin + 1, budget + 1):
                study.report(number, epoch, score + epoch / 1000)
        if score is not None:
            study.tell(number, score) if isinstance(score, float) else study.tell(number, error=score)
    return study


def searched(space, objective, trials, direction="minimize"):
    study = Study(space, Random(), None, direction)
    study.optimize(lambda trial: objective(trial.settings), trials=trials)
    return study


def assert_picture(path):
    pixels = imread(path)[..., :3]
    assert 450 <= pixels.shape[1] <= 4100
    assert pixels.std() > 0.02


def pictures(page):
    return re.findall(r"!\[[^]]*\]\((.*?)\)", page.read_text())


# History.


def test_history_is_by_trial_with_the_best_so_far():
    data = history(line(0.3, "bad", 0.2, 0.7, None, 0.5))
    assert not data.by_budget
    assert data.x.tolist() == [0, 2, 3, 5]
    assert data.scores.tolist() == [0.3, 0.2, 0.7, 0.5]
    assert data.failed_x.tolist() == [1]
    # To the end of the search.
    assert data.best_x.tolist() == [0, 2, 3, 5, 5]
    assert data.best.tolist() == [0.3, 0.3, 0.7, 0.7, 0.7]


def test_the_best_of_a_loss_falls():
    assert history(line(0.3, 0.4, 0.1, direction="minimize")).best.tolist() == [0.3, 0.3, 0.1, 0.1]


def test_history_of_several_fidelities_is_by_what_was_used_and_its_best_is_of_the_top_rung():
    data = history(halving())
    # A trial that goes on adds what it trains beyond its parent.
    assert data.by_budget
    assert data.x.tolist() == [1, 3, 4, 6, 8, 14]
    assert data.failed_x.tolist() == [2]
    assert data.budgets == (1, 3, 9)
    assert data.rungs.tolist() == [0, 0, 0, 1, 1, 2]
    assert data.best_x.tolist() == [14, 15]
    assert data.best.tolist() == [0.8, 0.8]


# Parallel coordinates and slices.


def test_parallel_coordinates_have_gaps_and_the_best_last():
    sgd, adam = {"rule": "sgd", "sgd.momentum": 0.45, "lr": 0.01, "steps": 3}, {"rule": "adam", "lr": 1.0, "steps": 1}
    study = study_of([(sgd, 0.9), (adam, 0.2), (adam, "bad"), (adam, 0.5)], RULES)
    data = parallel(study)
    assert data.numbers == (1, 3, 0) and data.best == 0
    assert data.scores.tolist() == [0.2, 0.5, 0.9]
    # The middle of the first of two options; half of 0.9; 2 of 4 decades; the middle of five values.
    np.testing.assert_allclose(data.places[2], [0.25, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(data.places[0], [0.75, math.nan, 1.0, 0.1])
    loss = study_of([(sgd, 0.9), (adam, 0.2)], RULES, "minimize")
    assert parallel(loss).numbers == (0, 1)


def test_of_trials_that_went_on_parallel_coordinates_show_the_last():
    assert parallel(halving()).numbers == (3, 4, 6)


def test_slices_leave_out_what_does_not_exist_or_is_at_work():
    adam = {"rule": "adam", "lr": 1e-4, "steps": 5}
    sgd = {"rule": "sgd", "sgd.momentum": 0.9, "lr": 1.0, "steps": 1}
    data = slices(study_of([(adam, 0.1), (sgd, 0.2), (adam, None), (sgd, "bad")], RULES))
    panels = {panel.name: panel for panel in data.panels}
    assert list(panels) == list(RULES) and data.best == 1
    assert panels["lr"].places.tolist() == [0.0, 1.0] and panels["lr"].scores.tolist() == [0.1, 0.2]
    assert panels["sgd.momentum"].places.tolist() == [1.0] and panels["sgd.momentum"].numbers.tolist() == [1]
    assert panels["rule"].failed.tolist() == [0.25] and panels["rule"].failed_numbers.tolist() == [3]


@pytest.mark.parametrize(
    ("setting", "labels"),
    [
        (Float(1e-4, 1, log=True), ["0.0001", "0.001", "0.01", "0.1", "1"]),
        (Float(0.02, 0.3, log=True), ["0.02", "0.05", "0.1", "0.2"]),
        (Float(0.021, 0.049, log=True), ["0.021", "0.049"]),
        (Float(0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (Float(0, 0.5, step=0.25), ["0", "0.25", "0.5"]),
        (Int(1, 3), ["1", "2", "3"]),
        (Int(8, 128, log=True), ["10", "20", "50", "100"]),
        (Choice(True, None, "a_rather_long_option", [1, 2]), ["true", "null", "a_rath…_option", "[1, 2]"]),
    ],
)
def test_ticks_are_values_of_the_setting_at_their_places(setting, labels):
    places, found = ticks(setting)
    assert found == labels
    assert places == sorted(places) and places[0] >= 0 and places[-1] <= 1


@pytest.mark.parametrize(
    ("scores", "higher", "expected"),
    [
        ([1.0, 2.0], True, Scale(1.0, 2.0)),
        ([1e-3, 0.1, 1.0], False, Scale(1e-3, 1.0, log=True)),
        ([0.0, 0.5, 1.0], False, Scale(0.0, 1.0)),
        ([-1e6, *[0.0] * 9, *[0.5] * 10], True, Scale(-0.5, 0.5)),
        ([4.0], True, Scale(2.0, 6.0)),
        ([0.0, math.nan, math.inf], True, Scale(-0.5, 0.5)),
        ([], True, Scale(0.0, 1.0)),
    ],
)
def test_the_scale_of_scores(scores, higher, expected):
    assert Scale.of(scores, higher) == expected


def test_texts_do_not_overlap_with_ten_settings_and_long_names():
    space = Space(
        {
            **{f"learner.some_group.a_setting_{i}": Float(1e-6, 1, log=True) for i in range(5)},
            **{f"net.group.choice_{i}": Choice(*(f"{'long' * i}_{k}" for k in range(9))) for i in range(3)},
            "net.filters": Int(1, 100_000),
            "training.a_setting_that_exists_sometimes": Float(0, 1, when={"net.group.choice_0": ["_1", "_2", "_3"]}),
        }
    )
    rng = np.random.default_rng(0)
    study = study_of([(space.sample(rng), rng.random()) for _ in range(30)], space)
    figures = draw_slices(slices(study), ACCURACY), draw_parallel(parallel(study), ACCURACY)
    for figure in figures:
        figure.draw_without_rendering()
    panels = figures[0].axes
    titles = [panel.title for panel in panels] + [text for panel in panels for text in panel.texts]
    levels = [text for text in figures[1].axes[0].texts]
    rows = [[label for label in panel.get_xticklabels() if label.get_rotation() == 0] for panel in panels]
    for texts in (titles, levels, *rows):
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


# Rungs.


def test_rungs_count_what_came_in_and_went_on():
    data = rungs(halving())
    by_budget = {rung.budget: rung for rung in data.rungs}
    assert [(r.trials, r.failed, r.promoted, r.best, r.used) for r in data.rungs] == [
        (5, 1, 2, 0.5, 5),
        (2, 0, 1, 0.65, 4),
        (1, 0, 0, 0.8, 6),
    ]
    assert list(by_budget) == [1, 3, 9]
    assert rungs_table(data, ACCURACY).splitlines()[2:4] == [
        "| 9 epochs | 1 | 0 | 0 | 0.8 | 6 |",
        "| 3 epochs | 2 | 0 | 1 | 0.65 | 4 |",
    ]


def test_curves_are_joined_over_parents():
    data = rungs(halving())
    curves = {curve.number: curve for curve in data.curves}
    assert set(curves) == {1, 3, 4, 6, 7} and data.by_report and data.same_unit
    assert curves[6].rung == 2 and curves[6].steps.tolist() == list(range(1, 10))
    np.testing.assert_allclose(curves[6].scores, [0.401, 0.652, 0.653, *(0.8 + e / 1000 for e in range(4, 10))])
    assert len(curves[7].steps) == 0
    without = {curve.number: curve for curve in rungs(halving(reports=False)).curves}
    assert without[6].steps.tolist() == [1, 3, 9] and without[6].scores.tolist() == [0.4, 0.65, 0.8]


def test_reports_in_another_unit_than_budgets_are_not_drawn_at_the_rungs():
    study = Study(LINE, Random(), None, "maximize")
    for budget in (100, 300, 900):
        number = study.add(Proposal({"x": 0.5}, budget))
        study.report(number, budget // 100, 0.1)
        study.tell(number, 0.1)
    data = rungs(study)
    assert not data.same_unit
    axis = draw_rungs(data, Words(("accuracy",), ("maximize",), "iterations")).axes[0]
    assert axis.get_xlabel() == "epoch" and axis.get_xlim()[1] < 20


# Importance.


def main_effects(space, objective, points=40_000, bins=20):
    """The shares of the variance of the scores' ranks that each setting explains alone, by plain sampling."""
    rng = np.random.default_rng(1)
    units = rng.random((points, len(space)))
    ranks = rankdata([objective(space.decode(u)) for u in units])
    variances = []
    for column in units.T:
        place = np.minimum((column * bins).astype(int), bins - 1)
        variances.append(np.var([ranks[place == b].mean() for b in range(bins)]))
    return dict(zip(space, np.array(variances) / sum(variances)))


def test_importance_is_the_share_of_variance_also_where_settings_do_not_always_exist():
    def objective(settings):
        momentum = settings.get("sgd.momentum", 0.0)
        return (math.log10(settings["lr"]) + 2) ** 2 / 2 + (2.0 if settings["rule"] == "adam" else 2.5 * momentum)

    data = importance(searched(RULES, objective, 60))
    expected = main_effects(RULES, objective)
    assert data.trials == 60 and data.budget is None
    assert sum(data.shares) == pytest.approx(1)
    assert list(data.shares) == sorted(data.shares, reverse=True)
    for name, share, low, high in zip(data.names, data.shares, data.low, data.high):
        assert share == pytest.approx(expected[name], abs=0.12), name
        assert 0 <= low <= share <= high <= 1


def test_importance_is_measured_at_the_budget_with_most_trials(monkeypatch):
    seen = []

    def resampled(space, records, scores, rng):
        seen.extend(record.number for record in records)
        return np.array([[1.0]])

    # The package's name of the same name is the function.
    monkeypatch.setattr(sys.modules[importance.__module__], "_resampled", resampled)
    trials = [({"x": i / 20}, i / 20, 1) for i in range(12)] + [({"x": i / 20}, 0.9, 3, i) for i in range(4)]
    assert importance(study_of(trials)).budget == 1
    assert seen == list(range(12))


def test_importance_says_why_there_is_none():
    assert importance(line(*range(9))).endswith("needs 10 complete trials; there are 9.")
    assert "there are 3" in importance(halving()) and "of one budget" in importance(halving())
    assert "All scores are the same" in importance(line(*[0.5] * 11))


# The front.


def test_the_front_is_what_no_trial_beats():
    scores = [(0.9, 10.0), (0.5, 2.0), (0.8, 11.0), (0.7, 5.0), (0.4, 2.0)]
    study = study_of([({"x": 0.1}, pair) for pair in scores], direction=["maximize", "minimize"])
    data = front(study)
    assert data.numbers == (0, 3, 1)
    assert data.scores.tolist() == [[0.9, 10.0], [0.7, 5.0], [0.5, 2.0]]
    assert sorted(data.beaten.tolist()) == [[0.4, 2.0], [0.8, 11.0]]


# The page.


def test_the_page_of_a_search_kept_in_a_file(tmp_path):
    def objective(trial):
        if trial["steps"] == 5:
            raise ValueError("too `many`\n  | steps")
        return math.log10(trial["lr"]) ** 2

    with Study(RULES, Random(), tmp_path / "study.db", seed=1) as study:
        study.optimize(objective, trials=14)
        trials, best = study.trials, study.best
    (tmp_path / "config.yaml").write_text("objective:\n  objectives: [loss]\n")
    (tmp_path / "versions.json").write_text('{"torch": "2.14"}')
    page = write_search_report(tmp_path)
    assert page == tmp_path / "report" / "report.md"
    text = page.read_text()
    failed = [r.number for r in trials if r.state == "failed"]
    assert text.startswith(
        f"# Search {tmp_path.name}\n\n14 trials: {14 - len(failed)} complete, {len(failed)} failed. "
    )
    assert f"## Best: trial {best.number}, loss {best.score:.5g}\n" in text and "lower is better" in text
    assert f"| `lr` | {best.settings['lr']} |" in text
    rows = re.findall(r"^\| (\d+) \| ([\d.e-]+) \|", text, re.M)
    ranked = sorted((r for r in trials if r.score is not None), key=lambda r: r.score)[:10]
    assert [int(number) for number, _ in rows] == [r.number for r in ranked]
    listed = ", ".join(map(str, failed))
    assert failed and f"- trial{'s' if len(failed) > 1 else ''} {listed}: `ValueError: too 'many' | steps`" in text
    assert "| torch | 2.14 |" in text and "```yaml\nobjective:" in text
    assert f"optuna-dashboard sqlite:///{tmp_path / 'study.db'}" in text
    names = ["history.png", "parallel.png", "slices.png"]
    assert pictures(page)[:3] == names
    for name in pictures(page):
        assert_picture(page.parent / name)


def test_the_page_of_several_fidelities(tmp_path):
    (tmp_path / "config.yaml").write_text("objective:\n  fidelity: epochs\n  objectives: [accuracy]\n")
    page = write_search_report(tmp_path, halving())
    text = page.read_text()
    assert "8 trials: 6 complete, 1 failed, 1 at work." in text and "Budget used: 15 epochs." in text
    assert "## Best: trial 6, accuracy 0.8 at 9 epochs" in text
    assert "| 1 epoch | 5 | 1 | 2 | 0.5 | 5 |" in text
    assert [int(n) for n in re.findall(r"^\| (\d+) \| 0", text, re.M)] == [6, 5, 4, 0, 2, 3]
    assert pictures(page) == ["history.png", "rungs.png", "parallel.png", "slices.png"]
    assert "- trial 1: `lost`" in text


@pytest.mark.parametrize("objectives", [2, 3])
def test_the_page_of_several_objectives(tmp_path, objectives):
    directions = ["maximize", "minimize", "minimize"][:objectives]
    scores = [(0.9, 10.0, 1.0), (0.5, 2.0, 3.0), (0.8, 11.0, 2000.0)]
    study = study_of([({"x": 0.1 * i}, scores[i][:objectives]) for i in range(3)], direction=directions)
    page = write_search_report(tmp_path, study)
    assert "Objectives: score 1 (higher is better), score 2 (lower is better)" in page.read_text()
    assert pictures(page) == ["history.png", "front.png", "parallel.png", "slices.png"]
    assert_picture(page.parent / "front.png")


@pytest.mark.parametrize(
    "study",
    [
        pytest.param(lambda: line(0.5), id="one trial"),
        pytest.param(lambda: line(0.0), id="one score of zero"),
        pytest.param(lambda: line(*[0.25] * 11), id="constant scores"),
        pytest.param(lambda: line(0.1, 0.2, -1e12, *[0.15] * 6), id="one far off"),
        pytest.param(lambda: line(1e300, -1e300), id="huge"),
        pytest.param(lambda: line(*[1e-3 * 10**i for i in range(9)], direction="minimize"), id="log"),
        pytest.param(lambda: study_of([({"c": "a"}, i) for i in range(11)], Space(c=Choice("a"))), id="one option"),
        pytest.param(lambda: study_of([({"x": 0.1}, 1.0, 3), ({"x": 0.1}, 2.0)]), id="budgets for some"),
        pytest.param(
            lambda: study_of([({"x": 0.1}, 0.1 * i, 1 + 0.37 * i) for i in range(9)]), id="a budget for each trial"
        ),
        pytest.param(lambda: study_of([({"x": 0.1}, "bad", 3), ({"x": 0.1}, 0.2, 1)]), id="the top rung failed"),
        pytest.param(
            lambda: study_of(
                [({"rule": "adam", "lr": 0.1, "steps": 1}, 0.1), ({"rule": "adam", "lr": 0.2, "steps": 2}, 0.3)], RULES
            ),
            id="a setting that no trial has",
        ),
    ],
)
def test_odd_studies_have_a_page(tmp_path, study):
    page = write_search_report(tmp_path, study())
    found = pictures(page)
    assert {"history.png", "parallel.png", "slices.png"} <= set(found)
    for name in found:
        assert_picture(page.parent / name)


@pytest.mark.parametrize(
    "study",
    [
        pytest.param(lambda: line("bad", "worse", ""), id="all failed"),
        pytest.param(lambda: line(None), id="at work"),
        pytest.param(lambda: study_of([({"x": 0.1}, "bad", 1), ({"x": 0.2}, None, 1)]), id="rungs without a score"),
    ],
)
def test_without_a_complete_trial_there_is_a_page_without_pictures(tmp_path, study):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "history.png").write_bytes(b"old")
    page = write_search_report(tmp_path, study())
    assert "No trial is complete" in page.read_text()
    assert pictures(page) == [] and not (tmp_path / "report" / "history.png").exists()


def test_reports_that_are_not_finite_are_left_out(tmp_path):
    study = Study(LINE, Random(), None, "maximize")
    number = study.add(Proposal({"x": 0.5}, 4))
    for step, score in enumerate([math.nan, 0.2, math.inf, 0.3], start=1):
        study.report(number, step, score)
    study.tell(number, 0.3)
    number = study.add(Proposal({"x": 0.6}, 4))
    study.report(number, 1, math.nan)
    study.tell(number, math.nan)
    (first, second) = rungs(study).curves
    assert first.steps.tolist() == [2, 4] and first.scores.tolist() == [0.2, 0.3] and len(second.steps) == 0
    page = write_search_report(tmp_path, study)
    assert "rungs.png" in pictures(page) and "- trial 1: `the score is nan`" in page.read_text()


def test_the_storage_that_the_config_names_is_opened(tmp_path):
    with Study(LINE, Random(), tmp_path / "elsewhere.db", name="mine") as study:
        study.tell(study.ask({"x": 0.5}), 1.0)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(f"search:\n  storage: {tmp_path / 'elsewhere.db'}\n  name: mine\n")
    assert "\n\n1 trial: 1 complete, 0 failed." in write_search_report(run_dir).read_text()


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda d: None, SearchError, "expected a study file|no such study file"),
        (lambda d: (d / "study.db").write_bytes(b""), SearchError, "not a study file|holds no study"),
        (lambda d: (d / "study.db").write_bytes(b"not a database, " * 99), SearchError, "not a study file"),
        (lambda d: Study(LINE, storage=d / "study.db").close(), DataError, "no trial yet"),
        (lambda d: (d / "config.yaml").write_text("a: [\n"), DataError, "config.yaml is damaged"),
        (lambda d: (d / "config.yaml").write_bytes(b"\xff\xfe"), DataError, "config.yaml is damaged"),
    ],
)
def test_a_run_without_a_search_is_named_in_one_line(tmp_path, make, error, says):
    make(tmp_path)
    with pytest.raises(error, match=says) as raised:
        write_search_report(tmp_path)
    assert isinstance(raised.value, MetaHPOError)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "report").exists()
