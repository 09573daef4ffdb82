"""Policies on the command line: trained, tested and reported by their returns, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metahpo.cli import main
from metahpo.training.metrics import CsvLog, best_epochs

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = ["data.episodes=2", "data.horizon=8", "net.hidden=[4]", "training.engine=loop", "training.epochs=2"]
SMALL += ["training.iterations=1", "training.tasks=2", "training.val_tasks=2", "training.test_tasks=2"]


@pytest.mark.parametrize("name", ["navigation/fomaml", "pendulum/maml", "half_cheetah/direction"])
def test_a_shipped_config_trains_and_reports_returns(name, tmp_path, capsys):
    if "navigation" not in name:
        pytest.importorskip("gymnasium")
    if "cheetah" in name:
        pytest.importorskip("mujoco")
        pytest.importorskip("imageio", reason="gymnasium[mujoco] is not installed")
    run_dir = tmp_path / "run"
    assert main(["train", str(CONFIGS / f"{name}.yaml"), f"run_dir={run_dir}", *SMALL]) == 0
    out = capsys.readouterr().out
    best = next(row for row in CsvLog(run_dir / "metrics.csv").read() if f"return {row['val_return']!r}" in out)
    assert best["val_return"] == -best["val_loss"]
    rows = json.loads((run_dir / "test.json").read_text())["rows"]
    # The mean of several policies' returns is no ensemble's.
    assert set(rows) == {"best"}
    assert f"return {rows['best']['return']:.2f} ± {rows['best']['return_ci']:.2f}, before adapting" in out
    page = (run_dir / "report" / "report.md").read_text()
    assert f"| best, epoch {best['epoch']:.0f} | {rows['best']['return']:.2f} ±" in page
    assert (run_dir / "report" / "example.png").exists() == ("navigation" in name)


def test_the_best_epoch_has_the_highest_return():
    history = [{"epoch": e, "val_return": r, "val_loss": 1.0} for e, r in ((1, -5.0), (2, -3.0), (3, -4.0))]
    assert best_epochs(history, 3) == [2, 3, 1]


@pytest.mark.parametrize(
    ("config", "overrides", "expected"),
    [
        ("glyphs_5way_1shot/quick", ["learner=policy_maml"], "data.source: found glyphs, expected navigation or gym"),
        ("navigation/maml", ["learner=maml"], "learner.name: found maml, expected policy_maml"),
        ("navigation/maml", ["learner.steps=3"], "data.episodes: found 20, expected a multiple of learner.steps, 3"),
        ("navigation/maml", ["net={name: conv4}"], "net conv4 takes images"),
        ("pendulum/maml", ["data.vary={}"], "data.vary: is empty"),
        ("pendulum/maml", ["data.vary={m: [2, 1]}"], "data.vary: m should be a range [LOW, HIGH], found [2.0, 1.0]"),
        ("pendulum/maml", ["data.environment=half_cheetah_velocity"], "data.vary: half_cheetah_velocity has its own"),
        ("pendulum/maml", ["data.environment=CartPole-v1"], "environment CartPole-v1: its action space is Discrete(2)"),
        ("pendulum/maml", ["training.engine=trace"], "environment Pendulum-v1 is stepped in Python"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(config, overrides, expected, tmp_path, capsys):
    if config == "pendulum/maml":
        pytest.importorskip("gymnasium")
    assert main(["train", str(CONFIGS / f"{config}.yaml"), f"run_dir={tmp_path / 'run'}", *overrides]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1
