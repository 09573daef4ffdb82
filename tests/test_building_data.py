"""From the section ``data`` of a config to tasks, and to a net that fits them."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from metahpo.building import build, build_for
from metahpo.building_data import build_tasks
from metahpo.config_file import load_config, validate
from metahpo.errors import ConfigError, DataError

CONFIG = """
data: {source: glyphs, ways: 3, shots: 2, queries: 1}
net: {name: mlp, hidden: [4]}
learner: {name: maml, steps: 1}
training: {tasks: 3, engine: vmap, device: cpu}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "run.yaml").write_text(CONFIG)
    return lambda *overrides: load_config(tmp_path / "run.yaml", overrides)


def outputs(learner) -> int:
    return list(learner.module.params().values())[-1].shape[0]


def shape(task) -> tuple[int, int]:
    """(ways, support images) of a task."""
    return int(task.query_y.max()) + 1, len(task.support_y)


@pytest.mark.parametrize(
    ("overrides", "most", "evaluated"),
    [
        ((), 3, (3, 6)),
        (("data.ways=[2, 4]", "data.shots=[1, 3]"), 4, (4, 12)),
        (("data.ways=[2, 4]", "data.shots=[1, 3]", "data.eval_ways=2", "data.eval_shots=1"), 4, (2, 2)),
        (("data.eval_ways=5",), 5, (5, 10)),
    ],
)
def test_the_net_has_an_output_for_each_of_the_most_ways_of_any_task(config, overrides, most, evaluated):
    run = config(*overrides)
    tasks, learner = build(run)
    assert outputs(learner) == most
    for split in ("val", "test"):
        assert {shape(tasks[split].task(i)) for i in range(12)} == {evaluated}
        assert outputs(build_for(run, split)[1]) == most
    trained = {shape(tasks["train"].task(i)) for i in range(0, 180, 3)}
    ranges = (2, 3, 4), (1, 2, 3)
    assert trained == ({(w, w * s) for w, s in product(*ranges)} if "data.ways=[2, 4]" in overrides else {(3, 6)})
    batch = tasks["train"].batch(range(3, 6))
    assert len(batch.support_y) == 3, "a batch of training is one group"


def test_uneven_classes_by_a_config(config):
    tasks = build_tasks(config("data.shots=5", "data.imbalance={kind: linear, max: 9}"))
    for split in tasks:
        sizes = torch.bincount(tasks[split].task(0).support_y)
        assert sorted(sizes.tolist()) == [1, 5, 9]
        assert torch.bincount(tasks[split].task(0).query_y).tolist() == [1, 1, 1]
    with pytest.raises(DataError, match="imbalance: the mean from min 1 to max 9 is 5, not 2 shots"):
        build_tasks(config("data.imbalance={kind: linear, max: 9}"))


def test_the_digits_by_a_config(config):
    tasks, learner = build(config("data={source: digits_pixels, shots: 20, eval_queries: 30}"))
    assert tasks["train"].task(0).query_x.shape == (44, 2)
    assert tasks["test"].task(0).query_y.shape == (30, 1)
    assert outputs(learner) == 1
    with pytest.raises(DataError, match=r"an image has 64 pixels; a task needs 60 shots \+ 6 queries"):
        build_tasks(config("data={source: digits_pixels, shots: 60, queries: 6}"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.ways=[5]", "data.ways: should be a whole number, or a range [low, high] from 2 on, found [5]"),
        ("data.ways=[1, 5]", "data.ways: should be a whole number, or a range [low, high] from 2 on, found [1, 5]"),
        ("data.shots=[3, 2]", "data.shots: should be a whole number, or a range [low, high] from 1 on, found [3, 2]"),
        ("data.shots='2'", "data.shots: should be a whole number, or a range [low, high] from 1 on, found '2'"),
        ("data.shots=0", "data.shots: should be greater than or equal to 1, found 0"),
        ("data.eval_ways=[2, 3]", "data.eval_ways: should be a valid integer, found [2, 3]"),
        ("data.eval_shots=0", "data.eval_shots: should be greater than or equal to 1, found 0"),
        ("data.imbalance=step", "data.imbalance: should be a section of keys, found 'step'"),
        ("data.imbalance={kind: steps, max: 2}", "data.imbalance.kind: should be 'linear', 'step' or 'random', found"),
        ("data.imbalance={kind: step}", "key 'data.imbalance.max' is missing"),
        ("data.imbalance={kind: step, max: 2, mn: 1}", "unknown key 'data.imbalance.mn'; did you mean 'min'?"),
        ("data.imbalance={kind: step, max: 1}", "data.imbalance: max should be greater than min, 1, found 1"),
        ("data={source: digits_pixels, shots: 64}", "data.shots: should be less than or equal to 63, found 64"),
        ("data={source: digits_pixels, ways: 5}", "unknown key 'data.ways'; known: source, shots, queries, eval_q"),
        ("data={source: cifar_fs, size: 5}", "unknown key 'data.size'; known: ways,"),
        ("data={source: fc100, download: 3}", "data.download: should be a valid boolean"),
        ("data={source: dataset}", "key 'data.dataset' is missing"),
        ("data=cifarfs", "data.source: did you mean 'cifar_fs'?"),
    ],
)
def test_a_wrong_key_is_named_with_what_was_expected(config, override, expected):
    with pytest.raises(ConfigError) as caught:
        config(override)
    (line,) = str(caught.value).splitlines()
    assert line.split("run.yaml: ")[1].startswith(expected)


def test_ranges_are_the_same_after_a_round_by_json(config):
    run = config("data.ways=[2, 4]", "data.imbalance={kind: random, max: 3}")
    assert validate(run.model_dump(mode="json"), "again") == run
    assert type(run.data).model_validate_json(run.data.model_dump_json()) == run.data


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("data.ways=99999",), "data.ways: split 'train' has "),
        (("data.eval_ways=99999",), "data.eval_ways: split 'val' has "),
        (("data.shots=50",), "data.shots: class "),
        (("data.queries=19",), "data.queries: class "),
        (("data.eval_queries=19",), "data.eval_queries: class "),
        (("data.imbalance={kind: linear, max: 9}",), "data.imbalance: the mean "),
        (("data={source: folder, root: nowhere}",), "data.root: nowhere: no such folder"),
        (("data={source: omniglot, root: nowhere}",), "data.root: nowhere: no such folder"),
        (("data={source: cifar_fs, root: nowhere}",), "data.root: nowhere/cifar-100-python/meta: cannot be read"),
        (("data={source: digits_pixels, shots: 60, queries: 6}",), "data.shots: image completion: an image has"),
    ],
)
def test_data_that_cannot_serve_are_named_by_their_key(config, overrides, line):
    with pytest.raises(DataError) as caught:
        build_tasks(config(*overrides))
    assert str(caught.value).startswith(line)
