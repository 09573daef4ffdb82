"""Configs of searches: the shipped ones, what they are made into, and what is said about wrong ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from metahpo import search_building
from metahpo.cli import main
from metahpo.config_file import dump_config
from metahpo.errors import MetaHPOError
from metahpo.search_building import build_search, make_executor, make_searcher
from metahpo.search_config import load_search
from metahpo.search_space import check_keys
from metahpo.searchers import TPE, Hyperband, Processes, Random, Ray, Space
from metahpo.searchers.executors.serial import Serial
from metahpo.searchers.registry import SEARCHERS

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = sorted(CONFIGS.glob("*/search/*.yaml"))

RUN = {
    "data": {"source": "sinusoid"},
    "net": {"name": "mlp", "hidden": [8]},
    "learner": {"name": "maml_pp", "steps": 1, "multi_step_epochs": 2},
    "training": {"epochs": 9, "iterations": 2, "lr": 1e-3, "min_lr": 1e-4, "device": "cpu"},
}
TREE = {
    "run": RUN,
    "space": {"learner.inner_lr": {"float": [0.01, 1.0], "log": True}},
    "objective": {"name": "training", "objectives": ["loss"]},
    "search": {"trials": 4},
}


@pytest.fixture
def write(tmp_path):
    """Writes a config and gives its path."""

    def write(tree: dict[str, Any], name: str = "search.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return write


@pytest.fixture
def untried(monkeypatch):
    """Leaves out the trial of the training itself, which needs the data."""
    monkeypatch.setattr(search_building, "_try", lambda training: None)


def wrong(path: Path, *overrides: str) -> list[str]:
    """The lines of the error that the config gives, without the file's name."""
    with pytest.raises(MetaHPOError) as caught:
        build_search(load_search(path, overrides), str(path))
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


# The shipped ones.


def test_every_searcher_has_a_quick_config_and_omniglot_has_two():
    names = {path.stem for path in SHIPPED if path.parts[-3] == "glyphs_5way_1shot"}
    assert names == set(SEARCHERS)
    assert {path.stem for path in SHIPPED if path.parts[-3] == "omniglot_20way_1shot"} == {"hyperband", "bayesian"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_a_shipped_config_is_what_its_name_says_and_is_read_as_the_same(path, tmp_path, untried):
    config = load_search(path)
    search = build_search(config, str(path))
    assert type(search.searcher) is SEARCHERS[path.stem]
    assert config.run["data"]["source"] == path.parts[-3].partition("_")[0]
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_search(tmp_path / "config.yaml") == config
    again = build_search(load_search(tmp_path / "config.yaml"), "again")
    assert (again.space, again.searcher, again.directions) == (search.space, search.searcher, search.directions)
    assert again.training.tree == search.training.tree


# What is read.


def test_the_run_may_be_a_path_from_the_file_or_from_here(write, tmp_path, monkeypatch):
    write(RUN, "beside.yaml")
    write({**RUN, "net": "resnet12"}, "here/elsewhere.yaml")
    monkeypatch.chdir(tmp_path / "here")
    assert load_search(write({**TREE, "run": "beside.yaml"})).run == RUN
    assert load_search(write({**TREE, "run": "elsewhere.yaml"})).run["net"] == {"name": "resnet12"}
    changed = {"config": "beside.yaml", "training.epochs": 3, "net": "conv4"}
    run = load_search(write({**TREE, "run": changed})).run
    assert (run["training"]["epochs"], run["training"]["iterations"], run["net"]) == (3, 2, {"name": "conv4"})


def test_overrides_reach_the_run_and_the_space(write, tmp_path):
    write(RUN, "beside.yaml")
    overrides = ["run.training.epochs=3", "space.net.hidden={choice: [[4], [8]]}", "searcher=tpe", "searcher.initial=3"]
    config = load_search(write({**TREE, "run": "beside.yaml"}), [*overrides, "search.workers=2"])
    assert config.run == {**RUN, "training": {**RUN["training"], "epochs": 3}}
    assert config.space == {**TREE["space"], "net.hidden": {"choice": [[4], [8]]}}
    assert config.searcher == {"name": "tpe", "initial": 3}
    assert (config.search.trials, config.search.workers) == (4, 2)


def test_searchers_are_made_from_their_options():
    assert make_searcher("random", "searcher") == Random()
    made = make_searcher({"name": "hyperband", "max_budget": 9, "base": {"name": "tpe", "initial": 3}}, "searcher")
    assert made == Hyperband(max_budget=9, base=TPE(initial=3))
    assert make_searcher({"name": "hyperband", "base": "tpe"}, "searcher") == Hyperband(base=TPE())


def test_the_largest_budget_is_the_full_training(write, untried):
    path = write({**TREE, "searcher": "hyperband"})
    for fidelity, full in (("epochs", 9), ("iterations", 18), ("tasks", 144)):
        search = build_search(load_search(path, [f"objective.fidelity={fidelity}"]), "search")
        assert search.searcher == Hyperband(max_budget=full)


@pytest.mark.parametrize(
    ("settings", "kind", "workers"),
    [
        ([], Serial, 1),
        (["search.workers=2"], Processes, 2),
        (["search.threads=1"], Processes, 1),
        (["search.executor=processes"], Processes, 1),
        (["search.executor=ray", "search.workers=3", "search.gpus=0.5"], Ray, 3),
    ],
)
def test_where_trials_run(write, settings, kind, workers):
    executor = make_executor(load_search(write(TREE), settings).search)
    assert (type(executor), executor.workers) == (kind, workers)


def test_keys_lists_every_key_and_searcher(capsys):
    assert main(["search", "--keys"]) == 0
    listed = capsys.readouterr().out
    found = set(re.findall(r"^  ([\w.]+)", listed, re.MULTILINE))
    assert set(SEARCHERS) <= found
    for path in SHIPPED:
        tree = yaml.safe_load(path.read_text())
        assert set(tree) <= set(re.findall(r"^(\w+):", listed, re.MULTILINE)) | {"searcher"}
        for section in ("search", "objective"):
            assert {f"{section}.{key}" for key in tree.get(section, {})} - {"objective.name"} <= found


# The space against the run.


def test_keys_of_any_section_and_of_ones_own_code_can_be_set():
    tree = {**RUN, "net": {"name": "own:net", "args": {}}}
    check_keys(
        Space.of(
            {
                "data.queries": {"int": [1, 9]},
                "net.args.width": {"int": [1, 9]},
                "learner": {"choice": ["maml", "maml_pp"]},
                "training.optimizer": {"choice": ["SGD", "Adam"]},
                "training.optimizer_args.weight_decay": {"float": [0, 1]},
                "training.clip_norm": {"choice": [None, 1.0]},
            }
        ),
        tree,
    )


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (
            {"learner.inner_rl": {"float": [0, 1]}},
            "space.learner.inner_rl: unknown config key; did you mean 'learner.inner_lr'?",
        ),
        (
            {"learner.learn_lr": {"choice": [True, False]}},
            "space.learner.learn_lr: unknown config key; did you mean 'learner.inner_lr'?",
        ),
        (
            {"training.epoch": {"int": [1, 2]}},
            "space.training.epoch: unknown config key; did you mean 'training.epochs'?",
        ),
        ({"inner_lr": {"float": [0, 1]}}, "space.inner_lr: unknown config key; did you mean 'learner.inner_lr'?"),
        ({"run_dir": {"choice": ["a", "b"]}}, "space.run_dir: unknown config key; "),
        ({"training": {"choice": [{}]}}, "space.training: unknown config key; "),
        ({"training.lr.x": {"float": [0, 1]}}, "space.training.lr.x: unknown config key; did you mean 'training.lr'?"),
        ({"net.filters": {"int": [1, 2]}}, "space.net.filters: unknown config key; known: net.name, net.hidden"),
        (
            {"training.lr": {"float": [0, 1e-3]}},
            "space.training.lr at 0.0: training.lr: should be greater than 0, found 0.0",
        ),
        (
            {"training.lr": {"float": [1e-5, 1e-3]}},
            "space.training.lr at 1e-05: training.min_lr: should be at most lr, 1e-05, found 0.0001",
        ),
        (
            {"learner.steps": {"float": [1, 3]}, "learner.inner_lr": {"float": [0.1, 1]}},
            None,
        ),
        (
            {"learner.steps": {"float": [1, 3.5]}},
            "space.learner.steps at 3.5: learner.steps: should be a valid integer, got a number with a fractional part",
        ),
        (
            {"training.optimizer": {"choice": ["Adam", "Adma"]}},
            "space.training.optimizer at 'Adma': training.optimizer: torch.optim has no optimizer 'Adma'",
        ),
        (
            {"learner.name": {"choice": ["maml", "mmaml"]}},
            "space.learner.name at 'mmaml': learner.name: did you mean 'maml'?",
        ),
        (
            {"learner.name": {"choice": ["maml", "meta_sgd"]}, "learner.learn_lr": {"choice": [True, False]}},
            "space.learner.learn_lr: learner meta_sgd has no 'learn_lr'; let it exist for the others alone: "
            "when: {learner.name: maml}",
        ),
        (
            {
                "learner": {"choice": ["proto_net", {"name": "maml_pp", "steps": 2}]},
                "learner.per_step_affine": {"choice": [True]},
            },
            "space.learner.per_step_affine: learner proto_net has no 'per_step_affine'; let it exist for the others "
            "alone: "
            "when: {learner: maml_pp}",
        ),
        (
            {
                "learner.name": {"choice": ["maml", "maml_pp"]},
                "learner.multi_step_epochs": {"int": [0, 2], "when": {"learner.name": "maml_pp"}},
                "learner.learn_lr": {"choice": [True, False], "when": {"learner.name": "maml"}},
                "learner.steps": {"int": [1, 2]},
            },
            None,
        ),
    ],
)
def test_each_key_is_checked_against_the_run(space, expected):
    if expected is None:
        return check_keys(Space.of(space), RUN)
    with pytest.raises(MetaHPOError) as caught:
        check_keys(Space.of(space), RUN)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(expected)


# Bad input: each in one line.


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"space": {}}, "space: "),
        ({"space": 3}, "space: should be a section of keys, found 3"),
        ({"space": None}, "space: should be a section of keys, found None"),
        (
            {"space": {"learner.inner_lr": {"float": [1, 0.1]}}},
            "space.learner.inner_lr: Float(1.0, 0.1): low should be below high",
        ),
        (
            {"space": {"learner.inner_lr": {"float": [0.1, 0.1]}}},
            "space.learner.inner_lr: Float(0.1, 0.1): low should be below high",
        ),
        (
            {"space": {"learner.inner_lr": {"float": [0, 1], "log": True}}},
            "space.learner.inner_lr: Float(0.0, 1.0, log=True): a log range should begin above 0, found 0.0",
        ),
        ({"space": {"learner.inner_lr": [0, 1]}}, "space.learner.inner_lr: should be {float: [LOW, HIGH]}"),
        ({"space": {"learner.inner_lr": {"choice": []}}}, "space.learner.inner_lr: Choice(): should have at least one"),
        (
            {"searcher": "grid"},
            "space.learner.inner_lr: Float(0.01, 1.0, log=True) is a continuous range; a grid needs",
        ),
        ({"searcher": "hyperbandd"}, "searcher.name: no searcher 'hyperbandd'; did you mean 'hyperband'?"),
        ({"searcher": {"max_budget": 3}}, "key 'searcher.name' is missing; known: grid, random, "),
        ({"searcher": 3}, "searcher: should be a section of keys, found 3"),
        ({"searcher": {"name": "tpe", "initia": 3}}, "unknown key 'searcher.initia'; did you mean 'initial'?"),
        ({"searcher": {"name": "grid", "step": 3}}, "unknown key 'searcher.step'; grid has no options"),
        (
            {"searcher": {"name": "hyperband", "base": "tpee"}},
            "searcher.base.name: no searcher 'tpee'; did you mean 'tpe'?",
        ),
        (
            {"searcher": {"name": "hyperband", "base": {"name": "tpe", "initia": 3}}},
            "unknown key 'searcher.base.initia'; did you mean 'initial'?",
        ),
        (
            {"searcher": {"name": "hyperband", "base": 3}},
            "searcher.base: should be a name, or a section with one, found 3",
        ),
        ({"searcher": {"name": "hyperband", "eta": 1}}, "searcher: Hyperband: eta should be above 1, found 1"),
        (
            {"searcher": {"name": "hyperband", "eta": "x"}},
            "searcher: Hyperband: eta should be a finite number, found 'x'",
        ),
        (
            {"searcher": {"name": "hyperband", "max_budget": 10}},
            "searcher.max_budget: 10 is more than the run's full training, 9 (epochs)",
        ),
        (
            {"searcher": "asha", "space": {"training.epochs": {"int": [1, 9]}}},
            "space.training.epochs: should not be there: the searcher says how far each trial is trained",
        ),
        ({"searcher": "gradient"}, "objective.gradients: should be true for the searcher gradient"),
        ({"searcher": "nowhere_search:S"}, "searcher.name: cannot import 'nowhere_search'"),
        ({"searcher": "json:dumps"}, "searcher.name: json:dumps is no Searcher"),
        ({"search": {}}, "search.trials: this search has no end of its own; give it search.trials or search.budget"),
        ({"search": {"trial": 3}}, "unknown key 'search.trial'; did you mean 'trials'?"),
        ({"search": {"trials": 0}}, "search.trials: should be greater than or equal to 1, found 0"),
        ({"search": {"trials": 1, "workers": 0}}, "search.workers: should be greater than or equal to 1, found 0"),
        ({"search": {"trials": 1, "executor": "slurm"}}, "search.executor: should be 'auto', 'serial', 'processes' or"),
        (
            {"search": {"trials": 1, "direction": "minimize"}},
            "search.direction: is for an objective of your own; that of a training is known",
        ),
        ({"objective": {"name": "trainin"}}, "objective.name: did you mean 'training'?"),
        (
            {"objective": {"name": "training", "fidelit": "epochs"}},
            "unknown key 'objective.fidelit'; did you mean 'fidelity'?",
        ),
        (
            {"objective": {"name": "training", "fidelity": "epoch"}},
            "objective.fidelity: should be 'epochs', 'iterations', 'tasks' or 'data', found 'epoch'",
        ),
        ({"objective": {"name": "training", "objectives": ["acc"]}}, "objective.objectives.0: should be 'accuracy', "),
        (
            {"objective": {"name": "training"}},
            "objective accuracy: the tasks are regression, which has none; choose loss",
        ),
        (
            {"objective": {"name": "training", "objectives": ["loss"], "folds": 2}},
            "folds: needs images with classes; data.source 'sinusoid' has none",
        ),
        ({"run": None}, "key 'run' is missing: the config of a training, or its path"),
        ({"run": "none.yaml"}, "cannot read config none.yaml: No such file or directory"),
        ({"run": 3}, "run: should be a section of keys, found 3"),
        (
            {"run": {**RUN, "net": {"name": "mlp", "hiden": [3]}}},
            "run: unknown key 'net.hiden'; did you mean 'hidden'?",
        ),
        ({"run": {**RUN, "net": {"name": "own_nets:none"}}}, "net.name: cannot import 'own_nets'"),
        ({"spac": 1}, "unknown key 'spac'; did you mean 'space'?"),
        ({"objective": {"name": "json:dumps"}}, "run: is not used by the objective json:dumps; take one of them out"),
        (
            {"run": None, "objective": {"name": "json:dumps"}},
            "key 'search.direction' is missing: minimize or maximize, or a list for several scores",
        ),
        ({"run": None, "objective": "json:dump_s"}, "objective.name: 'json' ("),
    ],
)
def test_bad_input_is_told_in_one_line(write, changes, expected):
    (line,) = wrong(write({**TREE, **changes}))
    assert line.startswith(expected)


def test_all_errors_of_a_kind_come_at_once(write):
    space = {"learner.inner_lr": {"float": [1, 0.1]}, "learner.steps": {"int": [1.5, 2]}}
    assert len(wrong(write({**TREE, "space": space}))) == 2
    space = {"learner.inner_rl": {"float": [0, 1]}, "learner.stepps": {"int": [1, 2]}}
    assert len(wrong(write({**TREE, "space": space}))) == 2
    assert len(wrong(write({**TREE, "search": {"trial": 1, "worker": 2}}))) == 2


@pytest.mark.parametrize("override", ["search.trials", "=3", "space=[", "run.net.name.x=3"])
def test_overrides_that_are_none_are_refused(write, override):
    (line,) = wrong(write(TREE), override)
    assert repr(override) in line


def test_a_serial_executor_is_one_worker(write):
    with pytest.raises(MetaHPOError, match=r"search.executor: serial is one worker with this process's threads"):
        make_executor(load_search(write(TREE), ["search.executor=serial", "search.workers=2"]).search)
