"""Lower precision inside the nets, float32 everywhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metahpo.inner import Mixed, NoRemat, Reverse, Sqrt
from metahpo.inner.rules import SGD
from metahpo.learners import MAML, MAMLPlusPlus
from metahpo.tasks import Sinusoid, Task
from metahpo.training import Trainer, TrainingSettings
from metahpo.training.engines import Loop, VMap
from metahpo.training.evaluation import evaluate
from metahpo.training.precision import precision

QUICK = {"epochs": 1, "iterations": 2, "tasks": 2, "val_tasks": 2, "device": "cpu"}


def conv(**options) -> MAMLPlusPlus:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Smooth, and with many values a channel: the second derivatives of batch norm over few blow rounding up.
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))
        return MAMLPlusPlus(net, steps=3, **options)


def images(count: int = 2) -> Task:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(3).repeat(count, 4)
    x = torch.rand(count, 12, 1, 8, 8, generator=generator) + y[..., None, None, None] / 3
    return Task(x[:, :3], y[:, :3], x[:, 3:], y[:, 3:])


class Seen(SGD):
    """Notes the types that reach the update."""

    def __init__(self, lr: float):
        super().__init__(lr)
        self.types: set[torch.dtype] = set()

    def forward(self, params, grads, state, step):
        self.types |= {t.dtype for tree in (params, grads) for t in tree.values()}
        return super().forward(params, grads, state, step)


@pytest.mark.parametrize("engine", [Loop(), VMap()])
@pytest.mark.parametrize(("gradient", "remat"), [(Reverse(), NoRemat()), (Reverse(), Sqrt()), (Mixed(), Sqrt())])
def test_bf16_changes_the_numbers_a_little_and_no_type(engine, gradient, remat):
    learner, phase = conv(gradient=gradient, remat=remat), conv().training_phase(0)
    exact = engine.meta_gradient(learner, images(), phase)
    with precision(learner, TrainingSettings(precision="bf16", device="cpu")):
        found = engine.meta_gradient(learner, images(), phase)
        metrics, outputs = engine.evaluate(learner, images(), conv().training_phase(99))
    tensors = [found.loss, *found.grads.values(), *found.metrics["buffers"].values(), *outputs.values()]
    assert {t.dtype for t in [*tensors, *metrics.values()]} == {torch.float32}
    assert not torch.equal(found.loss, exact.loss)
    flat, expected = (torch.cat([g.flatten() for g in r.grads.values()]) for r in (found, exact))
    assert torch.cosine_similarity(flat, expected, dim=0) > 0.99


def test_bf16_reaches_the_layers_and_not_the_update():
    types = []
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    rule = Seen(0.1)
    learner = MAML(net, steps=2, rule=rule)
    learner.module.net[1].register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    with precision(learner, TrainingSettings(precision="bf16", device="cpu")):
        Loop().meta_gradient(learner, images(), learner.training_phase(0))
    assert set(types) == {torch.bfloat16}
    assert rule.types == {torch.float32}
    types.clear()
    Loop().meta_gradient(learner, images(), learner.training_phase(0))
    assert set(types) == {torch.float32}


def test_every_inner_step_sees_its_own_weights():
    # A cache of lowered weights would give step 2 those of step 1: with one weight and rate 1 the steps are known.
    learner = MAML(
        nn.Linear(1, 1, bias=False), steps=2, inner_lr=0.25, loss=lambda out, y: 0.5 * (out - y).square().mean()
    )
    nn.init.zeros_(learner.module.net.weight)
    x = torch.ones(1, 1)
    with precision(learner, TrainingSettings(precision="bf16", device="cpu")):
        adapted = learner.adapt(x, x, learner.training_phase(0))
    assert adapted.params["weight"].item() == 1 - 0.75**2


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_the_trainer_and_the_evaluation_use_the_setting(tmp_path, engine):
    def run(**options) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        learner = MAML(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), steps=1, loss=nn.functional.mse_loss)
        settings = TrainingSettings(engine=engine, **QUICK, **options)
        Trainer(learner, Sinusoid("train"), Sinusoid("val"), settings, tmp_path / str(options)).fit()
        return {"outputs": evaluate(learner, Sinusoid("test"), 2, settings)[1]["after"], **learner.state_dict()}

    default, named, tf32, lower = (
        run(**o) for o in ({}, {"precision": "float32"}, {"precision": "tf32"}, {"precision": "bf16"})
    )
    assert all(torch.equal(default[name], other[name]) for other in (named, tf32) for name in default)
    assert not any(torch.equal(default[name], lower[name]) for name in ("outputs", "module.net.0.weight"))
    # A resumed trainer takes it from the checkpoint.
    learner = MAML(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), steps=1, loss=nn.functional.mse_loss)
    again = Trainer.resume(tmp_path / "{'precision': 'bf16'}", learner, Sinusoid("train"), Sinusoid("val"))
    assert again.settings.precision == "bf16"


def test_tf32_is_set_for_the_run_alone():
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for name, allowed in (("tf32", True), ("float32", False), ("bf16", False)):
        with precision(conv(), TrainingSettings(precision=name, device="cuda")):
            assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
