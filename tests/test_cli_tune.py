"""``metahpo tune``: runs, resuming, reports, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from metahpo.cli import main
from metahpo.config_file import dump_config, load_config
from metahpo.tune_config import SCHEMAS
from metahpo.tuning import load_result

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "digits"
# What makes each kind's run a matter of a second.
QUICK = {
    "rates": ["tune.steps=4", "tune.phases=2", "tune.iterations=3", "net={name: mlp, hidden: [8]}"],
    "decay": ["tune.steps=6", "tune.every=2", "tune.by=layer", "net={name: mlp, hidden: [8]}"],
    "clean": ["tune.steps=3", "tune.iterations=3"],
    "distill": ["tune.steps=2", "tune.iterations=3", "tune.full_steps=3", "net={name: mlp, hidden: [8]}"],
}
SMALL = ["data.train=100", "data.val=50", "data.test=60", "device=cpu"]


def run(*arguments: str) -> int:
    return main(["tune", *arguments])


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_stopped_run_goes_on_to_the_same_end(kind, tmp_path, capsys):
    config, folders = str(CONFIGS / f"{kind}.yaml"), [tmp_path / "whole", tmp_path / "parts"]
    settings = [*QUICK[kind], *SMALL]
    assert run(kind, config, *settings, f"run_dir={folders[0]}") == 0
    assert run(kind, config, *settings, f"run_dir={folders[1]}", "--until", "1") == 0
    assert run(kind, "--resume", str(folders[1])) == 0
    assert f"resuming {folders[1]}: at outer step 2" in capsys.readouterr().out
    whole, parts = (load_result(folder / "result.pt") for folder in folders)
    assert str(whole) == str(parts)
    newest = [sorted((folder / "checkpoints").glob("*.pt"))[-1].name for folder in folders]
    assert newest[0] == newest[1], "the name carries the content's checksum"
    for folder in folders:
        assert (folder / "metrics.csv").read_text().startswith("iteration,")
        assert json.loads((folder / "versions.json").read_text())["torch"]
        rows = json.loads((folder / "test.json").read_text())["rows"]
        assert len(rows) >= 2
        assert all(0 <= row["f1" if "suspected" in name else "accuracy"] <= 1 for name, row in rows.items())
        if kind == "clean":
            header = (folder / "suspects.csv").read_text().splitlines()[0]
            assert header == "index,label,weight,suggested_label"
        page = (folder / "report" / "report.md").read_text()
        assert "## Found" in page
        assert "## Config" in page
        for name in [line[line.index("(") + 1 : -1] for line in page.splitlines() if line.startswith("![")]:
            assert (folder / "report" / name).stat().st_size > 0
    assert run(kind, "--resume", str(tmp_path)) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_each_kind_has_a_config():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(SCHEMAS)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_shipped_config_of_a_kind_loads_and_round_trips(kind, tmp_path, capsys):
    config = load_config(CONFIGS / f"{kind}.yaml", schema=SCHEMAS[kind])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml", schema=SCHEMAS[kind]) == config
    assert run(kind, "--keys") == 0
    keys = capsys.readouterr().out
    for name in yaml.safe_load((CONFIGS / f"{kind}.yaml").read_text())["tune"]:
        assert f"tune.{name} " in keys
    assert "device: auto, cpu" in keys


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tune.step=3"], "unknown key 'tune.step'; did you mean 'steps'"),
        (["tune.lr=-1"], "tune.lr: should be greater than 0, found -1"),
        (["tune.tune=[lrr]"], "no hyperparameter 'lrr'; did you mean 'lr'"),
        (["tune.phases=9", "tune.steps=4"], "tune: phases: found 9, expected at most the 4 of steps\n"),
        (["data.train=9000"], "sizes of the data: found 9000 + 300 + 597"),
        (["data.source=digit"], "data.source: did you mean 'digits'?"),
        (["data={source: mnist, root: /nowhere}"], "data mnist"),
        (["data={source: test_cli_tune:no_data}"], "data.source: cannot import 'test_cli_tune'"),
        (["net=mlpp"], "net.name: did you mean 'mlp'?"),
        (["net={name: conv4, filters: 0}"], "net.filters: should be greater than or equal to 1, found 0"),
        (["device=tpu"], "device: 'tpu' is not a torch device"),
    ],
)
def test_bad_settings_give_a_line_each_before_any_work(arguments, expected, tmp_path, capsys):
    assert run("rates", str(CONFIGS / "rates.yaml"), *arguments, f"run_dir={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_with_other_settings_is_not_resumed(tmp_path, capsys):
    settings = [*QUICK["rates"], *SMALL, f"run_dir={tmp_path}"]
    assert run("rates", str(CONFIGS / "rates.yaml"), *settings, "--until", "1") == 0
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("steps: 4", "steps: 5"))
    assert run("rates", "--resume", str(tmp_path)) == 2
    assert "tune.steps: config.yaml says 5, but epoch-0001" in capsys.readouterr().err
    for command in ("report", "evaluate"):
        assert main([command, str(tmp_path)]) == 2
        assert "is the run of a tuning; metahpo tune KIND --resume" in capsys.readouterr().err
    assert run("rates", str(CONFIGS / "rates.yaml"), *settings) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_data_and_net_of_the_users_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine_for_tune.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def data(parts=('train', 'val', 'test')):\n"
        "    draw = lambda n: (torch.randn(n, 3), torch.arange(n) % 2)\n"
        "    return {name: draw(20) for name in parts}\n"
        "def net(out_features):\n    return nn.Linear(3, out_features)\n"
    )
    monkeypatch.chdir(tmp_path)
    config = str(CONFIGS / "rates.yaml")
    own = ["data={source: mine_for_tune:data}", "net={name: mine_for_tune:net}", "device=cpu"]
    settings = [*(s for s in QUICK["rates"] if not s.startswith("net")), *own]
    assert run("rates", config, *settings, f"run_dir={tmp_path / 'run'}") == 0
    assert set(load_result(tmp_path / "run" / "result.pt")["groups"]) == {"(net)"}
    capsys.readouterr()
    assert run("rates", config, *settings, "data.args={parts: [train, val]}") == 2
    assert "gave ['train', 'val'], expected a dict of train, val and test" in capsys.readouterr().err
