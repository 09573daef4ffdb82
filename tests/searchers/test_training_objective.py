"""The training loop as an objective: against trainings by hand, bit for bit."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from metahpo.building import build
from metahpo.config_file import load_config, validate
from metahpo.errors import CheckpointError, ConfigError, SearchError
from metahpo.learners import Phase
from metahpo.searchers import Outcome, Space, Study, TrainingObjective, Trial
from metahpo.searchers.base import Proposal, Searcher
from metahpo.searchers.run_settings import trial_config, with_settings
from metahpo.searchers.settings import Float
from metahpo.searchers.trial import Job
from metahpo.tasks import Task
from metahpo.tasks.glyphs import load_glyphs
from metahpo.training import Trainer
from metahpo.training.checkpoint import CheckpointStore, load_checkpoint, position
from metahpo.training.engines import Loop

SINES = {
    "data": {"source": "sinusoid", "shots": 5, "queries": 5, "eval_queries": 5},
    "net": {"name": "mlp", "hidden": [8]},
    "learner": {"name": "maml", "steps": 1, "inner_lr": 0.01},
    "training": {
        "epochs": 3,
        "iterations": 4,
        "tasks": 2,
        "lr": 1e-2,
        "min_lr": 1e-3,
        "val_tasks": 3,
        "engine": "loop",
        "device": "cpu",
    },
}
GLYPHS = {
    "data": {"source": "glyphs", "ways": 3, "queries": 1},
    "net": {"name": "conv4", "filters": 2},
    "learner": {"name": "maml_pp", "steps": 1, "multi_step_epochs": 1},
    "training": {"epochs": 2, "iterations": 2, "tasks": 1, "val_tasks": 2, "engine": "loop", "device": "cpu"},
}


class Trials:
    """Runs trials in folders of their own; ``reports`` and ``updates`` are the last one's."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.reports, self.updates = folder, {}, 0
        inner = Loop.meta_gradient

        def counted(engine: Loop, *args: Any) -> Any:
            self.updates += 1
            return inner(engine, *args)

        monkeypatch.setattr(Loop, "meta_gradient", counted)
        # Building tries the learner, and a run's first step its gradient.
        monkeypatch.setattr("metahpo.building.check_learner", lambda *_: None)
        monkeypatch.setattr("metahpo.training.trainer.check_gradient", lambda *_: None)

    def __call__(
        self,
        objective: TrainingObjective,
        number: int = 0,
        budget: float | None = None,
        parent: int | None = None,
        dies_at: int | None = None,
        **settings: Any,
    ) -> Outcome:
        self.reports, self.updates = {}, 0

        def emit(step: int, score: float) -> None:
            self.reports[step] = score
            if step == dies_at:
                raise KeyboardInterrupt

        over = None if parent is None else self.folder / str(parent)
        named = {name.replace("__", "."): value for name, value in settings.items()}
        job = Job(number, named, 0, budget, self.folder / str(number), over, parent=parent)
        return objective(Trial(job, emit))

    def newest(self, number: int = 0, run: str = "run") -> str:
        """The name of the trial's newest checkpoint, which carries the checksum of its content."""
        return CheckpointStore(self.folder / str(number) / run / "checkpoints").list()[-1].name


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Trials(tmp_path, monkeypatch)


def by_hand(tree: dict[str, Any], run_dir: Path | None = None, **changes: Any) -> Trainer:
    """The finished training of a config."""
    config = validate(with_settings(tree, {k.replace("__", "."): v for k, v in changes.items()}), "config")
    tasks, learner = build(config)
    trainer = Trainer(learner, tasks["train"], tasks["val"], config.training, run_dir)
    trainer.fit()
    return trainer


def losses(objective: str = "loss", **rest: Any) -> TrainingObjective:
    return TrainingObjective(SINES, objectives=(objective,), **rest)


# The score.


def test_the_score_is_the_best_epochs_by_validation_and_reports_are_each_epochs(run):
    outcome = run(losses(), learner__inner_lr=0.05)
    rows = by_hand(SINES, learner__inner_lr=0.05).history
    assert run.reports == {row["epoch"]: row["val_loss"] for row in rows}
    assert outcome.score == min(row["val_loss"] for row in rows)
    assert outcome.notes["epochs"] == outcome.notes["epochs_trained"] == 3
    assert outcome.notes["resumed_from"] is None


def test_accuracy_of_classes(run):
    outcome = run(TrainingObjective(GLYPHS))
    assert outcome.score == max(row["val_accuracy"] for row in by_hand(GLYPHS).history)
    with pytest.raises(SearchError, match="objective accuracy: the tasks are regression, which has none; choose loss"):
        run(TrainingObjective(SINES), number=1)


def test_a_config_may_be_a_file_a_tree_or_an_object(run, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**SINES, "run_dir": "elsewhere"}))
    scores = [
        run(TrainingObjective(config, objectives=("loss",)), number).score
        for number, config in enumerate([SINES, tmp_path / "run.yaml", load_config(tmp_path / "run.yaml")])
    ]
    assert len(set(scores)) == 1
    assert not (tmp_path / "elsewhere").exists()


def test_several_objectives_and_their_directions(run):
    objective = TrainingObjective(GLYPHS, objectives=("accuracy", "loss", "seconds", "parameters"))
    assert objective.directions == ["maximize", "minimize", "minimize", "minimize"]
    accuracy, loss, seconds, parameters = run(objective).score
    trainer = by_hand(GLYPHS)
    best = max(trainer.history, key=lambda row: (row["val_accuracy"], -row["epoch"]))
    assert (accuracy, loss) == (best["val_accuracy"], best["val_loss"])
    assert parameters == sum(p.numel() for p in trainer.learner.parameters())
    assert seconds > 0


@pytest.mark.parametrize("train_engine", ["loop", "auto"])
def test_the_trials_run_is_a_whole_one_whose_config_repeats_it(run, tmp_path, train_engine):
    tree = {**SINES, "training": {**SINES["training"], "engine": train_engine}}
    outcome = run(TrainingObjective(tree, objectives=("loss",)), learner__inner_lr=0.02)
    config = load_config(tmp_path / "0" / "run" / "config.yaml")
    assert config.learner.inner_lr == 0.02
    assert config.training.engine != "auto" and config.training.threads == torch.get_num_threads()
    assert outcome.notes["engine"] == config.training.engine
    tasks, learner = build(config)
    trainer = Trainer(learner, tasks["train"], tasks["val"], config.training, tmp_path / "again")
    trainer.fit()
    assert CheckpointStore(tmp_path / "again" / "checkpoints").list()[-1].name == run.newest()


TRIAL = f"""
import torch
from pathlib import Path
from metahpo.searchers import Trial, TrainingObjective
from metahpo.searchers.trial import Job
torch.set_num_threads(1)
tree = {GLYPHS!r}
tree["net"]["filters"], tree["data"]["queries"] = 16, 5
for engine in ("threads", "vmap"):
    tree["training"]["engine"] = engine
    TrainingObjective(tree)(Trial(Job(0, {{}}, 0, None, Path(engine)), print))
"""


def test_the_config_repeats_the_trial_in_another_process_with_more_threads(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    child = start(TRIAL, OMP_NUM_THREADS="1")
    assert child.finished()[0] == 0, child.err.read_text()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for engine in ("threads", "vmap"):
            config = load_config(tmp_path / engine / "run" / "config.yaml")
            assert config.training.threads == 1
            tasks, learner = build(config)
            Trainer(learner, tasks["train"], tasks["val"], config.training, tmp_path / engine / "again").fit()
            names = [CheckpointStore(tmp_path / engine / r / "checkpoints").list()[-1].name for r in ("run", "again")]
            assert names[0] == names[1]
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# Settings in place of keys.


def test_settings_take_the_place_of_keys():
    config = trial_config(SINES, {"learner.steps": 2, "net.hidden": [3, 4], "training.lr": 0.5}, "trial")
    assert (config.learner.steps, config.net.hidden, config.training.lr) == (2, (3, 4), 0.5)
    assert config.learner.inner_lr == 0.01


def test_another_learner_keeps_the_keys_that_it_has():
    config = trial_config(GLYPHS, {"learner.inner_lr": 0.3, "learner.name": "maml"}, "trial")
    assert (config.learner.name, config.learner.steps, config.learner.inner_lr) == ("maml", 1, 0.3)
    # A whole section, with its defaults; and what is set besides.
    config = trial_config(GLYPHS, {"learner": "maml", "learner.inner_lr": 0.3}, "trial")
    assert (config.learner.name, config.learner.steps, config.learner.inner_lr) == ("maml", 5, 0.3)


def test_arguments_of_ones_own_code_are_keys_too():
    tree = {**SINES, "net": {"name": "own:net", "args": {"width": 3}}}
    config = trial_config(tree, {"net.args.depth": 2, "training.optimizer_args.weight_decay": 0.1}, "trial")
    assert config.net.args == {"width": 3, "depth": 2}
    assert config.training.optimizer_args == {"weight_decay": 0.1}


def test_a_key_that_the_learner_has_not_fails_the_trial(run):
    with pytest.raises(ConfigError, match=r"trial: unknown key 'learner.context'; known: name, steps"):
        run(losses(), learner__context=3)


# Budgets.


@pytest.mark.parametrize(
    ("fidelity", "budget", "updates"),
    [
        ("epochs", None, 12),
        ("epochs", 2, 8),
        ("epochs", 0.2, 4),
        ("epochs", 2.6, 12),
        ("iterations", 1, 1),
        ("iterations", 6, 6),
        ("iterations", 8, 8),
        ("tasks", 2, 1),
        ("tasks", 11, 6),
        ("tasks", 24, 12),
    ],
)
def test_a_budget_is_so_much_training(run, fidelity, budget, updates):
    outcome = run(losses(fidelity=fidelity), budget=budget)
    assert run.updates == updates
    assert outcome.notes["epochs"] == updates / 4
    assert list(run.reports) == list(range(1, updates // 4 + 1))


def test_a_budget_that_ends_within_an_epoch_is_judged_there(run, tmp_path):
    outcome = run(losses(fidelity="iterations"), budget=6)
    rows = by_hand(SINES).history
    path = CheckpointStore(tmp_path / "0" / "run" / "checkpoints").list()[-1]
    assert position(path) == (1, 2)
    tasks, learner = build(validate(SINES, "config"))
    learner.load_state_dict(load_checkpoint(path)["learner"])
    now = torch.stack([learner.evaluate(tasks["val"].task(i), Phase())[0]["loss"] for i in range(3)])
    assert outcome.score == pytest.approx(min(now.double().mean().item(), rows[0]["val_loss"]), rel=1e-6)


@pytest.mark.parametrize(
    ("fidelity", "budgets", "updates"),
    [
        ("epochs", (1, 3), (4, 8)),
        ("iterations", (6, 7, 12), (6, 1, 5)),
        ("tasks", (2, 9, 24), (1, 4, 7)),
    ],
)
def test_a_promoted_trial_goes_on_from_its_parents_checkpoint_to_the_same_result(run, fidelity, budgets, updates):
    objective = losses(fidelity=fidelity)
    outcomes = []
    for number, budget in enumerate(budgets):
        parent = number - 1 if number else None
        before = run.newest(parent) if number else None
        outcomes.append(run(objective, number, budget, parent))
        assert run.updates == updates[number]
        if number:
            start = outcomes[-1].notes["resumed_from"]
            assert start["checkpoint"] == f"{parent}/run/checkpoints/{before}"
            assert start["epoch"] * 4 + start["iteration"] == sum(updates[:number])
            assert outcomes[-1].notes["epochs_trained"] == updates[number] / 4
            assert run.newest(parent) == before
            assert min(run.reports, default=9) > start["epoch"]
    whole = run(objective, 9)
    assert run.newest(len(budgets) - 1) == run.newest(9)
    assert outcomes[-1].score == whole.score


def test_more_of_the_data_has_more_classes_and_those_before(run, monkeypatch):
    seen: list[set[int]] = []
    inner = Trainer.fit

    def fit(trainer: Trainer, *args: Any, **options: Any) -> Any:
        seen.append({int(c) for c in trainer.train_tasks._classes})
        return inner(trainer, *args, **options)

    monkeypatch.setattr(Trainer, "fit", fit)
    objective = TrainingObjective(GLYPHS, fidelity="data")
    assert objective.full_budget == 1
    updates = []
    for number, budget in enumerate((0.001, 0.25, 1.0)):
        run(objective, number, budget, number - 1 if number else None)
        updates.append(run.updates)
    train = set(load_glyphs().splits["train"])
    assert seen[0] < seen[1] < seen[2] == train
    assert [len(classes) for classes in seen] == [3, len(train) // 4, len(train)]
    assert updates == [1, 0, 3]


@pytest.mark.parametrize(
    ("fidelity", "budget", "expected"),
    [
        ("epochs", 4, r"a budget of 4 \(epochs\) is more than the config's full training, 3"),
        ("iterations", 13, r"a budget of 13 \(iterations\) is more than the config's full training, 12"),
        ("tasks", 25, r"a budget of 25 \(tasks\) is more than the config's full training, 24"),
    ],
)
def test_a_budget_beyond_the_configs_own_is_refused(run, fidelity, budget, expected):
    with pytest.raises(SearchError, match=expected):
        run(losses(fidelity=fidelity), budget=budget)
    assert losses(fidelity=fidelity).full_budget == budget - 1


# What can be gone on from, and what not.


@pytest.mark.parametrize("dies_at", [1, 2])
def test_a_trial_whose_worker_died_goes_on_to_the_same_result(run, dies_at):
    objective = losses()
    whole = run(objective, 1, learner__inner_lr=0.03)
    told = run.reports
    with pytest.raises(KeyboardInterrupt):
        run(objective, 0, dies_at=dies_at, learner__inner_lr=0.03)
    assert run.updates == 4 * dies_at
    outcome = run(objective, 0, learner__inner_lr=0.03)
    assert run.updates == 4 * (3 - dies_at)
    assert (outcome.score, run.reports, run.newest(0)) == (whole.score, told, run.newest(1))


def test_a_promoted_trial_whose_worker_died_goes_on_from_its_own_checkpoint(run):
    objective = losses()
    run(objective, 0, budget=1)
    with pytest.raises(KeyboardInterrupt):
        run(objective, 1, budget=3, parent=0, dies_at=2)
    outcome = run(objective, 1, budget=3, parent=0)
    assert run.updates == 4
    assert list(run.reports) == [2, 3]
    assert outcome.notes["epochs_trained"] == 2
    assert outcome.notes["resumed_from"]["epoch"] == 1


def test_a_promoted_trial_that_has_lost_where_it_went_on_from_stops_the_search(run, tmp_path):
    objective = losses()
    run(objective, 0, budget=1)
    with pytest.raises(KeyboardInterrupt):
        run(objective, 1, budget=3, parent=0, dies_at=2)
    (tmp_path / "1" / "run" / "trial.json").unlink()
    # Its reports would begin at the first epoch.
    with pytest.raises(CheckpointError, match=r"trial\.json is gone; remove the trial's folder"):
        run(objective, 1, budget=3, parent=0)


def test_seconds_are_kept_across_death_and_promotion(run, tmp_path):
    objective = TrainingObjective(SINES, objectives=("seconds",))
    first = run(objective, 0, budget=1).score
    kept = tmp_path / "0" / "run" / "trial.json"
    assert json.loads(kept.read_text())["seconds"] == first
    kept.write_text(json.dumps({"seconds": 1000.0}))
    with pytest.raises(KeyboardInterrupt):
        run(objective, 1, budget=3, parent=0, dies_at=2)
    assert 1000 < run(objective, 1, budget=3, parent=0).score < 1100


@pytest.mark.parametrize("left", ["nothing", "no checkpoint", "a damaged one"])
def test_a_parent_without_a_checkpoint_is_said(run, tmp_path, left):
    objective = losses()
    if left != "nothing":
        run(objective, 0, budget=1)
        for path in (tmp_path / "0" / "run" / "checkpoints").iterdir():
            path.write_bytes(b"damaged") if left == "a damaged one" else path.unlink()
    # Files that are gone or damaged stop a search, where a SearchError would be the trial's own failure.
    with pytest.raises(CheckpointError, match=f"go on from the trial in {tmp_path}/0: no (whole )?checkpoint in"):
        run(objective, 1, budget=3, parent=0)
    assert run.updates == 0
    assert not (tmp_path / "1" / "run").exists()


class Promotes(Searcher):
    def suggest(self, history, space, rng):
        if not history:
            return Proposal({"learner.inner_lr": 0.01}, 1)
        return Proposal(history[0].settings, 3, 0) if history[0].loss is not None else None


def test_a_study_in_memory_has_no_checkpoints_to_go_on_from(run):
    with Study(Space({"learner.inner_lr": Float(0.001, 1)}), Promotes()) as study:
        study.optimize(losses(), trials=2)
        assert [trial.state for trial in study.trials] == ["complete", "failed"]
        assert "trial 1 should go on from trial 0, but a study in memory keeps no checkpoints" in study.trials[1].error


def test_a_folder_with_another_run_is_left_alone(run, tmp_path):
    run(losses(), learner__inner_lr=0.1)
    newest = run.newest()
    with pytest.raises(CheckpointError, match=f"{tmp_path}/0/run holds a run with another config"):
        run(losses(), learner__inner_lr=0.2)
    assert run.newest() == newest


# Several trainings.


def test_the_mean_over_seeds(run, tmp_path):
    outcome = run(losses(seeds=3))
    scores = [min(r["val_loss"] for r in by_hand(SINES, training__seed=seed).history) for seed in range(3)]
    assert outcome.score == pytest.approx(sum(scores) / 3)
    assert outcome.notes["each"] == {f"run-seed-{seed}": [scores[seed]] for seed in range(3)}
    assert len(set(scores)) == 3
    rows = [by_hand(SINES, training__seed=seed).history for seed in range(3)]
    assert run.reports == {e: pytest.approx(sum(r[e - 1]["val_loss"] for r in rows) / 3) for e in (1, 2, 3)}


def test_each_seed_goes_on_from_its_own(run):
    objective = losses(seeds=2)
    run(objective, 0, budget=2)
    promoted = run(objective, 1, budget=3, parent=0)
    assert run.updates == 2 * 4
    assert promoted.score == run(objective, 2).score
    assert run.newest(1, "run-seed-1") == run.newest(2, "run-seed-1")


def test_a_death_in_the_second_seed_leaves_the_first_done(run):
    objective = losses(seeds=2)
    # Reports come with the last seed.
    with pytest.raises(KeyboardInterrupt):
        run(objective, dies_at=1)
    assert run.updates == 12 + 4
    run(objective)
    assert run.updates == 8


def test_folds_validate_each_class_of_train_and_val_once(run, monkeypatch):
    seen: list[tuple[set[int], set[int]]] = []
    inner = Trainer.fit

    def fit(trainer: Trainer, *args: Any, **options: Any) -> Any:
        seen.append(tuple({int(c) for c in tasks._classes} for tasks in (trainer.train_tasks, trainer.val_tasks)))
        return inner(trainer, *args, **options)

    monkeypatch.setattr(Trainer, "fit", fit)
    tree = {**GLYPHS, "training": {**GLYPHS["training"], "epochs": 1}}
    outcome = run(TrainingObjective(tree, folds=3, objectives=("loss",)))
    splits = load_glyphs().splits
    all_of_them = {*splits["train"], *splits["val"]}
    assert Counter(c for _, val in seen for c in val) == Counter(all_of_them)
    assert all(train | val == all_of_them and not train & val for train, val in seen)
    assert max(len(val) for _, val in seen) - min(len(val) for _, val in seen) <= 1
    assert outcome.score == pytest.approx(sum(s for (s,) in outcome.notes["each"].values()) / 3)


# Gradients.


@pytest.mark.parametrize(
    ("learner", "lr", "best"),
    [
        ({"name": "maml"}, 0.01, 3),
        ({"name": "maml"}, 0.2, 1),
        ({"name": "maml", "first_order": True}, 0.01, 3),
        ({"name": "maml_pp"}, 0.01, 3),
        ({"name": "maml_pp"}, 0.1, 1),
    ],
)
def test_the_gradient_is_that_of_the_score_when_all_inner_rates_move(run, tmp_path, learner, lr, best):
    tree = {**SINES, "learner": {"steps": 2, "inner_lr": 0.05, **learner}}
    tree["training"] = {**SINES["training"], "lr": lr, "min_lr": None}
    outcome = run(TrainingObjective(tree, objectives=("loss",), gradients=True), learner__inner_lr=0.05)
    assert outcome.notes["best_epoch"] == best
    path = CheckpointStore(tmp_path / "0" / "run" / "checkpoints").of_epoch(outcome.notes["best_epoch"])
    tasks, learner = build(validate(tree, "config"))
    learner.load_state_dict(load_checkpoint(path)["learner"])
    learner.double()
    rate = getattr(learner.rule, "rates", None) if tree["learner"]["name"] == "maml_pp" else learner.rule.lr

    def loss(shift: float) -> float:
        with torch.no_grad():
            rate.add_(shift)
            tasks_64 = [Task(*(t.double() for t in tasks["val"].task(i))) for i in range(3)]
            found = sum(float(learner.evaluate(task, Phase())[0]["loss"]) for task in tasks_64) / 3
            rate.sub_(shift)
            return found

    assert outcome.score == pytest.approx(loss(0.0), rel=1e-5)
    assert outcome.gradients["learner.inner_lr"] == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-3)


def test_no_gradient_unless_asked_and_searched(run):
    assert run(losses(), learner__inner_lr=0.05).gradients == {}
    assert run(losses(gradients=True), 1).gradients == {}


# Bad input.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fidelity": "epoch"}, "fidelity: did you mean 'epochs'?"),
        ({"objectives": ("acuracy",)}, "objectives: no objective 'acuracy'; did you mean 'accuracy'?"),
        ({"objectives": ()}, "objectives: should be different ones, at least one, found []"),
        ({"objectives": ("loss", "loss")}, "objectives: should be different ones"),
        ({"seeds": 0}, "seeds should be at least 1"),
        ({"folds": 1}, "folds at least 2"),
        ({"seeds": 2, "folds": 2}, "seeds and folds: one of them should be left out"),
        ({"gradients": True}, "gradients: are of the loss; the first of objectives is accuracy"),
    ],
)
def test_wrong_options_are_refused(options, expected):
    with pytest.raises(SearchError) as caught:
        TrainingObjective(SINES, **options)
    assert expected in str(caught.value)


@pytest.mark.parametrize(("options", "what"), [({"folds": 2}, "folds"), ({"fidelity": "data"}, "fidelity data")])
def test_classes_are_needed_to_divide(run, options, what):
    with pytest.raises(SearchError, match=f"{what}: needs images with classes; data.source 'sinusoid' has none"):
        run(losses(**options))
