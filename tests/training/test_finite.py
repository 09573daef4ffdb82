from __future__ import annotations

import pytest
import torch

from metahpo.errors import NonFiniteError
from metahpo.learners import MAML
from metahpo.nets import MLP
from metahpo.tasks import Sinusoid
from metahpo.training import Interrupted, Trainer, TrainingSettings
from metahpo.training.engines import MetaGradient
from metahpo.training.finite import FiniteCheck


def step(*losses: float, grad: float = 1.0) -> MetaGradient:
    values = torch.tensor(losses, dtype=torch.float32)
    return MetaGradient(values.mean(), {"w": torch.tensor([0.0, grad]), "b": torch.zeros(())}, {}, values)


def test_the_first_bad_step_of_several_is_named_with_its_task():
    check = FiniteCheck(3)
    assert check.add(1, 4, range(6, 8), step(1, 2)) is None
    assert check.add(1, 5, range(8, 10), step(1, float("inf"))) is None, "looked at too early"
    problem = check.add(1, 6, range(10, 12), step(float("nan"), 1))
    assert (
        problem == "epoch 1, iteration 5: the loss of task 9 is not finite (parameters have been updated with it since)"
    )


def test_a_look_comes_before_the_update_of_the_step_that_fills_it():
    check = FiniteCheck(2)
    check.add(2, 1, range(2), step(1, 2))
    assert check.loss is None
    problem = check.add(2, 2, range(2, 4), step(1, 4, grad=float("nan")))
    expected = "the gradient of tasks 2 to 3 is not finite (parameters are as before this step)"
    assert problem == f"epoch 2, iteration 2: {expected}"
    assert check.loss == 2.5


def test_what_is_left_is_looked_at_when_asked():
    check = FiniteCheck(10)
    assert check.look() is None
    check.add(1, 1, range(1), step(float("-inf")))
    assert "iteration 1: the loss of task 0 is not finite (parameters have been updated" in check.look()
    assert check.look() is None, "told once"


def test_a_step_handed_out_in_memory_used_again_is_kept():
    # As a captured graph does.
    result = step(float("nan"), 1)
    check = FiniteCheck(2)
    check.add(1, 1, range(2), result)
    result.losses.fill_(1)
    result.loss.fill_(1)
    assert "iteration 1: the loss of task 0" in check.add(1, 2, range(2, 4), step(1, 1))


class Sines(Sinusoid):
    """Sines of which task 7 is not finite; ``seen`` holds the numbers of the training tasks drawn."""

    def __init__(self, split: str = "train"):
        super().__init__(split)
        self.seen: list[int] = []

    def batch(self, indices):
        self.seen += indices
        task = super().batch(indices)
        scale = torch.tensor([float("inf") if i == 7 and self.split == "train" else 1.0 for i in indices])
        return task._replace(query_y=task.query_y * scale[:, None, None])


def late(tmp_path, every: int, **settings) -> tuple[Trainer, Sines]:
    small = {"epochs": 3, "iterations": 4, "tasks": 1, "val_tasks": 2, "device": "cpu", "engine": "loop", **settings}
    tasks = Sines()
    trainer = Trainer(
        MAML(MLP([1], 1, [8]), steps=1, inner_lr=0.01, loss=torch.nn.functional.mse_loss),
        tasks,
        Sines("val"),
        TrainingSettings(**small),
        tmp_path,
    )
    trainer._finite = FiniteCheck(every)
    return trainer, tasks


@pytest.mark.parametrize(("every", "iterations", "last"), [(3, 20, 8), (10, 10, 9), (100, 10, 9), (1, 20, 7)])
def test_training_that_looks_seldom_stops_before_anything_bad_is_saved(tmp_path, every, iterations, last):
    trainer, tasks = late(tmp_path, every, iterations=iterations)
    place = "epoch 1, iteration 8: the loss of task 7 is not finite"
    with pytest.raises(NonFiniteError, match=place):
        trainer.fit()
    # Before them the source is looked at, whether it gives the same again.
    assert tasks.seen[-last - 1 :] == list(range(last + 1))
    assert not trainer.store.list()


def test_a_checkpoint_is_named_and_a_stop_does_not_save_what_was_not_looked_at(tmp_path, monkeypatch):
    trainer, _ = late(tmp_path, 50, iterations=5)
    trainer.fit(until_epoch=1)
    good = trainer.store.list()[-1]

    original = trainer._stop_if
    monkeypatch.setattr(trainer, "_stop_if", lambda signum: original(15 if trainer.iteration == 4 else signum))
    with pytest.raises(
        NonFiniteError, match=r"epoch 2, iteration 3: .* updated with it since.*is .*epoch-0001"
    ) as error:
        trainer.fit()
    assert str(error.value).endswith(str(good))
    assert trainer.store.list() == [good]


def test_looking_seldom_changes_no_number(tmp_path):
    names = []
    for every in (1, 3):
        with torch.random.fork_rng():
            trainer, _ = late(tmp_path / str(every), every, iterations=3, epochs=2)
        trainer.fit()
        names.append(trainer.store.list()[-1].name)
    assert names[0] == names[1]


def test_a_stop_among_good_steps_saves(tmp_path, monkeypatch):
    trainer, _ = late(tmp_path, 50, iterations=6)
    original = trainer._stop_if
    monkeypatch.setattr(trainer, "_stop_if", lambda signum: original(2 if trainer.iteration == 2 else signum))
    with pytest.raises(Interrupted):
        trainer.fit()
    assert trainer.store.list()[-1].name.startswith("epoch-0000-step-00002")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_step_does_not_wait_for_the_device(tmp_path, monkeypatch):
    trainer, _ = late(tmp_path, 1000, iterations=6, epochs=1, device="cuda", clip_value=1.0, clip_norm=1.0)
    original = trainer._step

    def watched(*arguments):
        # The first steps may: they make the optimizer's state and look for checkpointing nets.
        torch.cuda.set_sync_debug_mode("error" if trainer.iteration > 1 else "default")
        try:
            original(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer, "_step", watched)
    trainer.fit()
    assert trainer._finite.loss is not None
