from __future__ import annotations

import gc
import os
import random
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from metahpo.errors import CheckpointError, ConfigError, NonFiniteError
from metahpo.learners import MAML, Adapted, MAMLPlusPlus, MetaLearner
from metahpo.nets import MLP
from metahpo.tasks import Sinusoid, Task
from metahpo.training import Interrupted, Trainer, TrainingSettings, evaluate_run
from metahpo.training.checkpoint import position
from metahpo.training.metrics import CsvLog, SumOfMetrics, best_epochs, summarise
from metahpo.training.schedules import cosine

QUICK = {"epochs": 3, "iterations": 4, "tasks": 3, "val_tasks": 5, "test_tasks": 5, "keep_best": 2, "engine": "vmap"}
QUICK["check_gradient"] = False  # test_check_gradient.py has it.


class Blobs:
    """Three-way classification of points around random means; task ``bad`` (if any) holds a NaN."""

    def __init__(self, split: int = 0, bad: int | None = None):
        self.split, self.bad = split, bad

    def task(self, index: int) -> Task:
        generator = torch.Generator().manual_seed(1000 * self.split + index)
        y = torch.arange(3).repeat(4)
        x = torch.randn(12, 4, generator=generator) + 2 * torch.randn(3, 4, generator=generator)[y]
        if index == self.bad:
            x[0, 0] = float("nan")
        return Task(x[:6], y[:6], x[6:], y[6:])

    def batch(self, indices) -> Task:
        return Task(*(torch.stack(parts) for parts in zip(*(self.task(i) for i in indices))))


def learner(dropout: float = 0.2, width: int = 8) -> MAMLPlusPlus:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 3)
        return MAMLPlusPlus(nn.Sequential(*layers), steps=2)


def trainer(run_dir: Path | None = None, train: Blobs | None = None, **settings) -> Trainer:
    return Trainer(learner(), train or Blobs(), Blobs(1), TrainingSettings(**{**QUICK, **settings}), run_dir)


def test_cosine_schedule_equals_torch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7, eta_min=0.001)
    for epoch in range(8):
        assert cosine(epoch, 7, 0.1, 0.001) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()


def test_training_improves_and_logs_every_epoch(tmp_path):
    run = trainer(tmp_path, epochs=4, iterations=15, lr=0.01, min_lr=1e-5)
    rows = run.fit()
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["val_loss"] < 0.8 * rows[0]["val_loss_before"]
    logged = CsvLog(tmp_path / "metrics.csv").read()
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in logged]
    assert rows[0]["lr"] == 0.01
    assert rows[3]["lr"] == pytest.approx(cosine(3, 4, 0.01, 1e-5))


def test_one_step_is_torch_optim_on_the_mean_gradient():
    run = trainer(optimizer="SGD", lr=0.5, min_lr=None, epochs=1, iterations=1, clip_value=0.01)
    before = {n: p.detach().clone() for n, p in run.learner.outer_params().items()}
    twin = learner(0.0)
    twin.load_state_dict(run.learner.state_dict())
    run.learner.module.net[3].p = 0.0
    params = list(twin.outer_params().values())
    loss = sum(twin.meta_loss(Blobs().task(i), twin.training_phase(0))[0] for i in range(3)) / 3
    for (name, start), grad in zip(before.items(), torch.autograd.grad(loss, params)):
        before[name] = start - 0.5 * grad.clamp(-0.01, 0.01)
    run.fit()
    torch.testing.assert_close({n: p.detach() for n, p in run.learner.outer_params().items()}, before)


class Turned(nn.Module):
    """Features turned by complex weights."""

    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.tensor([0.5 + 0.2j, -0.3 + 0.4j, 0.1 - 0.6j, 0.7 + 0.1j]))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head((x * self.turn).real + (x * self.turn).imag.square())


def test_complex_gradients_are_clamped_part_by_part():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MAML(Turned(), steps=1)
    settings = {**QUICK, "optimizer": "SGD", "lr": 0.5, "epochs": 1, "iterations": 1, "engine": "loop"}
    run = Trainer(model, Blobs(), Blobs(1), TrainingSettings(**settings, clip_value=0.01))
    start = run.learner.module.net.turn.detach().clone()
    losses = [run.learner.meta_loss(Blobs().task(i), run.learner.training_phase(0))[0] for i in range(3)]
    (grad,) = torch.autograd.grad(sum(losses) / 3, run.learner.module.net.turn)
    assert grad.real.abs().max() > 0.01
    clamped = torch.complex(grad.real.clamp(-0.01, 0.01), grad.imag.clamp(-0.01, 0.01))
    run.fit()
    torch.testing.assert_close(run.learner.module.net.turn.detach(), start - 0.5 * clamped)


def final(run: Trainer) -> str:
    """The name of the newest checkpoint, which holds the checksum of its bytes."""
    return run.store.list()[-1].name


class PythonNoise(nn.Linear):
    """Draws from the generators of Python and NumPy."""

    def forward(self, x):
        noise = random.random() + float(np.random.rand()) if self.training else 0.0
        return super().forward(x + noise)


def test_what_a_net_draws_from_python_and_numpy_is_drawn_again_after_a_stop(tmp_path):
    def run(run_dir, make=Trainer):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = MAML(PythonNoise(4, 3), steps=1)
        # Were they one generator, these would move the run.
        random.random(), np.random.rand()
        settings = TrainingSettings(**{**QUICK, "engine": "loop", "epochs": 2, "iterations": 2, "check": True})
        return make(net, Blobs(), Blobs(1), settings, run_dir)

    whole, parts = run(tmp_path / "whole"), run(tmp_path / "parts")
    before = random.getstate(), np.random.get_state()[1].tolist()
    whole.fit()
    assert before == (random.getstate(), np.random.get_state()[1].tolist())
    parts.fit(until_iteration=1)
    again = run(tmp_path / "parts", lambda net, a, b, settings, folder: Trainer.resume(folder, net, a, b, settings))
    again.fit()
    assert final(again) == final(whole)
    other = run(tmp_path / "other")
    other.settings = other.settings.model_copy(update={"seed": 1})
    other.fit()
    assert not torch.equal(other.learner.module.net.weight, whole.learner.module.net.weight)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, engine):
    whole = trainer(tmp_path / "whole", engine=engine)
    whole.fit()
    interrupted = trainer(tmp_path / "parts", Stopping(after=6), engine=engine)
    with pytest.raises(Interrupted) as stop:
        interrupted.fit()
    assert stop.value.signum == signal.SIGTERM
    assert interrupted.iteration > 0, "stopped inside an epoch"
    resumed = Trainer.resume(tmp_path / "parts", learner(), Blobs(), Blobs(1))
    assert (resumed.epoch, resumed.iteration) == (interrupted.epoch, interrupted.iteration)
    resumed.fit()
    assert final(resumed) == final(whole)


class Stopping(Blobs):
    """Sends this process SIGTERM when batch number ``after`` is drawn."""

    def __init__(self, after: int):
        super().__init__()
        self.left = after

    def batch(self, indices):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(indices)


def test_fit_until_an_epoch_then_on(tmp_path):
    parts, whole = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    assert len(parts.fit(until_epoch=0)) == 0
    assert len(parts.fit(until_epoch=2)) == 2
    assert len(parts.fit()) == 3
    whole.fit()
    assert final(parts) == final(whole)


def test_fit_until_an_iteration_stops_inside_an_epoch_and_goes_on_to_the_same_end(tmp_path):
    parts, whole = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    size, rows = parts.settings.iterations, []
    for until in (1, size, size, size + 1, 2 * size - 1, 3 * size):
        assert len(parts.fit(until_iteration=until, on_epoch=rows.append)) == until // size
        assert (parts.updates, parts.epoch, parts.iteration) == (until, until // size, until % size)
        assert position(parts.store.list()[-1]) == (parts.epoch, parts.iteration)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    whole.fit()
    assert final(parts) == final(whole)
    assert len(parts.fit(until_iteration=99 * size)) == 3


@pytest.mark.parametrize("until", [{"until_epoch": 1}, {"until_iteration": 4}, {}])
def test_an_epoch_that_was_stopped_while_it_validated_gets_its_row(tmp_path, monkeypatch, until):
    run = trainer(tmp_path, epochs=1, iterations=4)
    with monkeypatch.context() as patch:
        patch.setattr(run, "val_tasks", Stopping(after=1))
        with pytest.raises(Interrupted):
            run.fit()
    assert (run.epoch, run.iteration) == (0, 4)
    resumed = Trainer.resume(tmp_path, learner(), Blobs(), Blobs(1))
    assert len(resumed.fit(**until)) == 1


def test_threads_are_those_of_the_settings_inside_and_as_before_outside(monkeypatch):
    seen, before = [], torch.get_num_threads()

    class Counting(Blobs):
        def batch(self, indices):
            seen.append(torch.get_num_threads())
            return super().batch(indices)

    assert trainer(threads=before + 1, engine="threads").engine.workers == before + 1
    run = trainer(None, Counting(), epochs=1, iterations=1, threads=before + 1, engine="loop")
    monkeypatch.setattr(run, "val_tasks", Counting())
    run.fit()
    run.evaluate(Counting(), 2)
    assert set(seen) == {before + 1} and len(seen) >= 3
    assert torch.get_num_threads() == before


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(tmp_path, capsys):
    run = trainer(tmp_path)
    run.fit()
    newest = run.store.list()[-1]
    newest.write_bytes(newest.read_bytes()[:-7])
    resumed = Trainer.resume(tmp_path, learner(), Blobs(), Blobs(1))
    assert resumed.epoch == 2
    assert newest.name in capsys.readouterr().err
    resumed.fit()
    assert final(resumed) == newest.name


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    trainer(tmp_path).fit(until_epoch=1)
    with pytest.raises(CheckpointError, match="already holds a run"):
        trainer(tmp_path)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_nan_stops_before_the_update_and_names_step_and_task(tmp_path, engine):
    # Iteration 2 of epoch 2 sees tasks 15 to 17.
    run = trainer(tmp_path, Blobs(bad=16), engine=engine)
    with pytest.raises(NonFiniteError, match=r"epoch 2, iteration 2: the loss of task 16 is not finite.*epoch-0001"):
        run.fit()
    assert all(torch.isfinite(p).all() for p in run.learner.parameters())
    assert [path.name[:10] for path in run.store.list()] == ["epoch-0001"]


def test_keeps_the_two_newest_and_the_best(tmp_path):
    run = trainer(tmp_path, epochs=6, keep_best=1, lr=0.05)
    rows = run.fit()
    kept = {int(path.name[6:10]) for path in run.store.list()}
    assert kept == {5, 6, *best_epochs(rows, 1), *best_epochs(rows[:-1], 1)}


def test_ensemble_averages_the_outputs_of_the_best(tmp_path):
    run = trainer(tmp_path)
    rows = run.fit()
    results = evaluate_run(tmp_path, learner(), Blobs(2), 5, run.settings)
    assert set(results) == {"best", "ensemble of 2"}
    best = best_epochs(rows, 2)
    assert results["best"]["epoch"] == best[0]
    logits = []
    from metahpo.learners import Phase

    for epoch in best:
        model = learner()
        model.load_state_dict(torch.load(run.store.of_epoch(epoch), weights_only=True)["learner"])
        logits.append(model.outputs(Blobs(2).task(0), Phase())["after"])
    expected = nn.functional.cross_entropy((logits[0] + logits[1]) / 2, Blobs(2).task(0).query_y)
    one = evaluate_run(tmp_path, learner(), Blobs(2), 1, run.settings)["ensemble of 2"]["loss"]
    assert one == pytest.approx(expected.item(), rel=1e-5)


def test_confidence_interval_by_hand():
    row = summarise({"accuracy": torch.tensor([0.5, 0.7, 0.9])})
    assert row["accuracy"] == pytest.approx(0.7)
    assert row["accuracy_ci"] == pytest.approx(1.96 * 0.2 / 3**0.5)


def test_sums_of_metrics_survive_a_round_trip():
    whole, part = SumOfMetrics(), SumOfMetrics()
    for index, value in enumerate(torch.rand(10)):
        whole.add({"loss": value})
        part.add({"loss": value})
        if index == 4:
            part = SumOfMetrics(**part.state())
    assert whole.means() == part.means()


class Nearest(MetaLearner):
    """A learner without gradient steps: class means in an embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)

    def adapt(self, support_x, support_y, phase):
        hot = (support_y[:, None] == torch.arange(3)).to(support_x.dtype)
        return Adapted({"means": hot.T @ self.embed(support_x) / hot.sum(0)[:, None]}, phase)

    def predict(self, adapted, x):
        return -(self.embed(x)[:, None] - adapted.params["means"]).pow(2).sum(-1)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_any_learner_trains(tmp_path, engine):
    settings = TrainingSettings(**{**QUICK, "engine": engine, "iterations": 10})
    rows = Trainer(Nearest(), Blobs(), Blobs(1), settings, tmp_path).fit()
    assert rows[-1]["val_accuracy"] > 0.5
    assert rows[-1]["val_accuracy"] == rows[-1]["val_accuracy_inductive"]


def test_regression_is_ranked_by_loss(tmp_path):
    net = MLP([1], 1)
    run = Trainer(
        MAML(net, steps=1, inner_lr=0.01, loss=nn.functional.mse_loss),
        Sinusoid("train"),
        Sinusoid("val"),
        TrainingSettings(**QUICK),
        tmp_path,
    )
    rows = run.fit()
    assert best_epochs(rows, 1) == [min(rows, key=lambda row: row["val_loss"])["epoch"]]


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_memory_does_not_grow(engine):
    tensors, peaks = [], []
    settings = TrainingSettings(**{**QUICK, "epochs": 1, "iterations": 40, "tasks": 1, "engine": engine})
    run = Trainer(learner(width=2048), Blobs(), Blobs(1), settings)
    original = run._step

    def counting(*arguments):
        original(*arguments)
        if run.iteration in (10, 39):
            gc.collect()
            tensors.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    run._step = counting
    run.fit()
    assert tensors[1] <= tensors[0]
    # In KB; one graph of this net kept at each step would add some 40 MB.
    assert peaks[1] - peaks[0] < 16_000


def test_a_signal_after_the_last_step_is_not_lost(tmp_path):
    run = trainer(tmp_path, epochs=1)
    with pytest.raises(Interrupted):
        run.fit(on_epoch=lambda row: os.kill(os.getpid(), signal.SIGTERM))
    assert final(run).startswith("epoch-0001.")


def test_a_nan_in_validation_never_ranks_as_best():
    rows = [{"epoch": e, "val_loss": loss} for e, loss in [(1, float("nan")), (2, 2.0), (3, float("nan")), (4, 1.0)]]
    assert best_epochs(rows, 2) == [4, 2]


def test_a_damaged_best_checkpoint_is_left_out_of_the_test(tmp_path, capsys):
    run = trainer(tmp_path)
    best = best_epochs(run.fit(), 2)
    # Not the newest, for without that the run itself would be taken as one epoch shorter.
    damaged = run.store.of_epoch(min(best))
    damaged.write_bytes(b"x" * 9)
    results = evaluate_run(tmp_path, learner(), Blobs(2), 5, run.settings)
    assert list(results) == ["best"]
    assert results["best"]["epoch"] == max(best)
    assert damaged.name in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_cuda_gives_the_cpus_numbers(engine):
    rows = [trainer(device=device, engine=engine, epochs=1).fit()[0] for device in ("cpu", "cuda")]
    assert rows[1]["val_loss_before"] == pytest.approx(rows[0]["val_loss_before"], rel=1e-3)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trainer().fit(until_epoch=1)
    assert torch.equal(torch.rand(3), expected)


def test_a_rate_that_a_scheduler_of_the_users_sets_is_kept_also_after_a_stop(tmp_path):
    torch.manual_seed(0)
    own = trainer(tmp_path / "run", optimizer="SGD", lr=0.1)
    own.optimizer.param_groups[0]["lr"] = 0.2
    schedule = torch.optim.lr_scheduler.ExponentialLR(own.optimizer, 0.5)
    rows = own.fit(until_iteration=9, on_epoch=lambda row: schedule.step())
    assert [row["lr"] for row in rows] == [0.2, 0.1]
    again = Trainer.resume(tmp_path / "run", learner(), Blobs(), Blobs(1))
    assert again.fit()[-1]["lr"] == own.fit()[-1]["lr"] == 0.05
    for found, wanted in zip(again.learner.parameters(), own.learner.parameters()):
        assert torch.equal(found, wanted)


def test_the_settings_rate_is_annealed_beside_a_group_with_its_own_and_a_resumed_run_takes_a_new_one(tmp_path):
    both = trainer(tmp_path / "run", optimizer="SGD", lr=0.1, min_lr=0.01)
    params = list(both.learner.outer_params().values())
    both.optimizer = torch.optim.SGD([{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.03}])
    both.fit(2)
    assert [group["lr"] for group in both.optimizer.param_groups] == [cosine(1, 3, 0.1, 0.01), 0.03]
    trainer(tmp_path / "constant", lr=0.1).fit(1)
    settings = TrainingSettings(**{**QUICK, "lr": 0.25})
    again = Trainer.resume(tmp_path / "constant", learner(), Blobs(), Blobs(1), settings)
    assert [row["lr"] for row in again.fit(2)] == [0.1, 0.25]


def test_an_autocast_around_a_training_or_an_evaluation_is_refused():
    own = trainer()
    with torch.autocast("cpu", torch.bfloat16):
        for call in (own.fit, lambda: own.evaluate(Blobs(1), 3)):
            with pytest.raises(ConfigError, match=r"torch.autocast: found it on for cpu .* precision='bf16'"):
                call()
