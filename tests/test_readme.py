"""The README's Python runs, its config exists, and its learners train."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from metahpo.learners import Phase
from metahpo.nets import Conv4
from metahpo.search_building import build_search
from metahpo.search_config import load_search
from metahpo.searchers import Bayesian, Study
from metahpo.tasks import Episodes
from metahpo.tasks.glyphs import load_glyphs
from metahpo.testing import check_learner
from metahpo.training.engines import ENGINES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_training_ones_own_net_and_the_learners_of_ones_own():
    first, _, _, _, second, third = blocks()
    # One engine: those that auto would compare are compared below.
    settings = "epochs=2, iterations=3, val_tasks=8, engine='loop'"
    quick = first.replace("epochs=5, iterations=50", settings)
    quick = quick.replace("test, 600", "test, 8").replace("steps=3", "steps=1")
    assert settings in quick and "test, 8" in quick and "steps=1" in quick
    names: dict = {}
    exec(quick, names)
    assert names["classifier"](names["task"].query_x).shape == (25, 5)

    exec(second, names)
    exec(third.replace("(net, ", "(net, steps=1, "), names)
    assert names["learner"].steps == 1
    assert names["learner"].adapted_names() == ["0.weight", "0.bias", "4.weight", "4.bias"]
    check_learner(names["RidgeHead"], ways=3)
    # The learner that README calls one of twenty lines, without its imports.
    own = [line for line in second.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(own) <= 20
    tasks = Episodes(load_glyphs(), "train", ways=5, shots=1, queries=2).batch(range(2))
    tasks = tasks._replace(support_x=tasks.support_x.double(), query_x=tasks.query_x.double())
    for learner in (names["learner"], names["RidgeHead"](Conv4((1, 28, 28), 16, filters=4))):
        # Not graph, which takes minutes to compile, nor auto, which is one of the others.
        engines = [ENGINES[name]() for name in ("loop", "threads", "vmap", "trace")]
        results = [engine.meta_gradient(learner.double(), tasks, Phase(training=True)) for engine in engines]
        for result in results[1:]:
            torch.testing.assert_close(result.grads, results[0].grads, rtol=1e-10, atol=1e-10)
        assert results[0].loss.isfinite()
        assert results[0].metrics["buffers"], "running statistics are handed out"
        learner.update_buffers(results[0].metrics["buffers"])
        first, again = (learner.outputs(tasks.select(0), Phase()) for _ in range(2))
        torch.testing.assert_close(first, again, rtol=0, atol=0)
        assert not torch.allclose(first["after"], first["inductive"])


def test_rates_of_ones_own_net_and_hypergradients(capsys):
    _, rates, study, *_ = blocks()
    quick = rates.replace("steps=100, phases=4", "steps=8, phases=4, iterations=2")
    assert quick != rates
    names: dict = {}
    exec(quick, names)
    assert [group["name"] for group in names["optimizer"].param_groups] == ["1", "3"]
    assert names["rates"].values["momentum"].shape == (2, 4)
    names["scheduler"].step()
    exec(study, names)
    assert set(names["found"].grads) == {"log_decay", "rule.lr", "rule.momentum"}
    assert all(float(g) for g in names["found"].grads.values())
    assert "cosine 1.000000" in capsys.readouterr().out
    # The example that README calls ten lines long, without its imports.
    assert len([line for line in rates.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 10


def test_the_search_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    search = blocks()[3]
    quick = search.replace("trials=30, workers=2", "trials=13")
    assert quick != search
    for _ in range(2):
        exec(quick, {})
    first, again = capsys.readouterr().out.splitlines()
    assert first == again
    with Study.open("runs/mine/study.db") as study:
        assert len(study.trials) == 13


def test_the_config_of_the_search_is_one(tmp_path):
    text = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[0]
    path = tmp_path / "search.yaml"
    path.write_text(text.replace("../quick.yaml", str(ROOT / "configs/glyphs_5way_1shot/quick.yaml")))
    search = build_search(load_search(path), str(path))
    assert len(search.space) == 4 and search.searcher.base == Bayesian()


def test_the_learner_takes_twenty_lines():
    assert len([line for line in blocks()[4].splitlines() if line.strip()]) <= 20


def test_every_path_that_it_names_exists():
    for path in re.findall(r"(?:configs|scripts|notebooks)/[\w./-]+", README):
        assert (ROOT / path.rstrip(".")).exists(), path
