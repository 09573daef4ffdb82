"""Every engine gives the numbers of ``loop``, or says that it cannot."""

from __future__ import annotations

import copy
import gc
import math
import multiprocessing
import random
import re
import threading
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.cli import main
from metahpo.errors import NetError, out_of_memory
from metahpo.inner import Mixed, Sqrt
from metahpo.learners import MAML, Adapted, MAMLPlusPlus, MetaLearner, Phase
from metahpo.native.build import library
from metahpo.nets import MLP, Conv4, ResNet12
from metahpo.tasks import Sinusoid, Task
from metahpo.training import Trainer, TrainingSettings
from metahpo.training.checkpoint import CheckpointStore
from metahpo.training.engines import Auto, Graph, Loop, Threads, Trace, VMap, auto, check_engine, graph, trial

WAYS = 3


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    """Engine threads takes three; the others one, as their intra-op threads would fight for few cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    yield
    torch.set_num_threads(before)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, WAYS)

    def forward(self, x):
        return self.head(self.lstm(x.squeeze(1))[0][:, -1])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, WAYS)

    def forward(self, x):
        return self.head(self.encoder(x.squeeze(1)).mean(1))


NETS = {
    "conv4": lambda: Conv4((1, 8, 8), WAYS, filters=5),
    "resnet12": lambda: ResNet12((1, 8, 8), WAYS, widths=(2, 3, 4, 5)),
    "mlp": lambda: MLP([1, 8, 8], WAYS, hidden=[6]),
    "lstm": Recurrent,
    "transformer": Transformer,
}


def build(name: str = "conv4", kind=MAMLPlusPlus, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(NETS[name](), **{"steps": 2, **options}).double()


def images(count: int = 5, seed: int = 1) -> Task:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(WAYS).repeat(count, 4)
    x = torch.randn(count, 4 * WAYS, 1, 8, 8, generator=generator, dtype=torch.float64) + y[..., None, None, None]
    return Task(x[:, : 2 * WAYS], y[:, : 2 * WAYS], x[:, 2 * WAYS :], y[:, 2 * WAYS :])


def copied(result):
    """On CUDA the next step overwrites a captured graph's results."""
    clone = lambda tree: {n: clone(t) if isinstance(t, dict) else t.clone() for n, t in tree.items()}  # noqa: E731
    return result.loss.clone(), clone(result.grads), clone(result.metrics), result.losses.clone()


def assert_equal(found, wanted, tolerance=1e-10):
    torch.testing.assert_close(tuple(found), tuple(wanted), rtol=tolerance, atol=tolerance)


class HeadOnly(MAML):
    """Adapts the last layer alone."""

    def adapted_names(self):
        return super().adapted_names()[-2:]


# Numbers.


@pytest.mark.parametrize("engine", [Threads, VMap, Trace])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("conv4", MAMLPlusPlus), ("conv4", MAML), ("resnet12", MAML), ("lstm", MAML), ("transformer", MAMLPlusPlus)],
)
def test_all_equal_loop_in_every_phase(engine, name, kind):
    if name == "lstm" and engine is not Threads:
        pytest.skip("torch's float64 LSTM has no rule for vmap")
    if engine is Trace and (name == "resnet12" or (name, kind) == ("conv4", MAML)):
        pytest.skip("recording it takes long, and shows no more than conv4 with MAML++")
    # A record's time goes by its operations; those of several steps are in the tests of nets that are quick.
    learner, tasks, engine = build(name, kind, steps=1 if engine is Trace else 2), images(3), engine()
    phases = [learner.training_phase(0), replace(learner.training_phase(99), first_order=True), Phase(training=True)]
    # Each kind of phase is a record of its own; test_a_record_sees_what_changes has them all on a net that is quick.
    for phase in phases[:1] if isinstance(engine, Trace) else phases:
        assert_equal(engine.meta_gradient(learner, tasks, phase), Loop().meta_gradient(learner, tasks, phase), 1e-9)
    torch.testing.assert_close(
        engine.evaluate(learner, tasks, Phase()), Loop().evaluate(learner, tasks, Phase()), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("gradient", [Mixed(), Mixed("dual")])
@pytest.mark.parametrize("kind", [MAMLPlusPlus, HeadOnly])
def test_threads_run_forward_mode(gradient, kind):
    learner, tasks = build(kind=kind, gradient=gradient, remat=Sqrt()), images(3)
    plain = build(kind=kind)
    found = [Threads().meta_gradient(learner, tasks, Phase(training=True)) for _ in range(2)]
    assert_equal(found[0], Loop().meta_gradient(plain, tasks, Phase(training=True)), 1e-9)
    assert_equal(*found, tolerance=0)


# threads.


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_threads_run_any_number_of_tasks_the_same_twice(count):
    learner, tasks, engine = build(), images(count), Threads()
    phase = learner.training_phase(0)
    found = [engine.meta_gradient(learner, tasks, phase) for _ in range(2)]
    assert_equal(*found, tolerance=0)
    assert_equal(found[0], Loop().meta_gradient(learner, tasks, phase))
    assert engine.workers == torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("net", "module"),
    [
        (nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, WAYS)), r"module '1' \(Dropout\)"),
        (nn.TransformerEncoderLayer(8, 2, 16), r"module 'self_attn' \(MultiheadAttention\)"),
    ],
)
def test_threads_refuse_dropout_by_name_in_training_alone(net, module):
    learner = MAML(net, steps=1, loss=lambda out, y: out.square().mean()).double()
    tasks = images()
    if not isinstance(net, nn.Sequential):
        support, query = tasks.support_x.squeeze(2), tasks.query_x.squeeze(2)
        tasks = Task(support, support, query, query)
    with pytest.raises(NetError, match=f"engine threads cannot run {module}: it draws random numbers"):
        Threads().meta_gradient(learner, tasks, Phase(training=True))
    Threads().evaluate(learner, tasks, Phase())


class Odd(MAML):
    """Fails at one task."""

    def meta_loss(self, task, phase):
        if task.query_x.mean() > 50:
            raise KeyError("a user's own mistake")
        return super().meta_loss(task, phase)


def test_an_error_in_one_task_surfaces_and_the_engine_goes_on():
    learner, engine = Odd(NETS["mlp"](), steps=1).double(), Threads()
    tasks = images(7)
    bad = tasks._replace(query_x=tasks.query_x + 100 * (torch.arange(7) == 3)[:, None, None, None, None])
    with pytest.raises(KeyError, match="own mistake"):
        engine.meta_gradient(learner, bad, Phase(training=True))
    assert gc.isenabled()
    assert_equal(
        engine.meta_gradient(learner, tasks, Phase(training=True)),
        Loop().meta_gradient(learner, tasks, Phase(training=True)),
    )


def test_threads_leave_the_learner_as_it_is_and_see_its_changes():
    learner, twin, tasks, engine = build(), build(), images(), Threads()
    tensors = {n: t for n, t in [*learner.named_parameters(), *learner.named_buffers()]}
    kinds = [type(m) for m in learner.modules()]
    phase = learner.training_phase(0)
    for step in range(3):
        found = engine.meta_gradient(learner, tasks, phase)
        assert [type(m) for m in learner.modules()] == kinds
        assert all(tensors[n] is t for n, t in [*learner.named_parameters(), *learner.named_buffers()])
        assert all(m.training for m in learner.module.modules())
        assert all(p.grad is None for p in learner.parameters())
        torch.testing.assert_close(learner.state_dict(), twin.state_dict(), rtol=0, atol=0)
        assert_equal(found, Loop().meta_gradient(twin, tasks, phase))
        for each in (learner, twin):
            each.module.net.blocks[0].activation.negative_slope = 0.1 * (step + 1)
            each.loss = lambda out, y, step=step: (step + 2) * F.cross_entropy(out, y)
            with torch.no_grad():
                next(each.parameters()).add_(0.1)
            each.update_buffers(found.metrics["buffers"])


def test_threads_refuse_what_cannot_be_copied():
    learner = build("mlp", MAML)
    learner.held = threading.Lock()
    with pytest.raises(NetError, match=r"engine threads cannot run this MAML \(cannot pickle.*choose vmap or loop"):
        Threads().meta_gradient(learner, images(), Phase(training=True))


def kernels() -> bool:
    return library(torch.float32) is not None


def test_threads_refuse_third_derivatives():
    class Sharp(MAML):
        def meta_loss(self, task, phase):
            loss, metrics = super().meta_loss(task, phase)
            grads = torch.autograd.grad(loss, list(self.module.params().values()), create_graph=True)
            return loss + sum(g.square().sum() for g in grads), metrics

    # Without the kernels it is torch that has none, of batch norms.
    line = "no third derivative; choose engine vmap or loop" if kernels() else "has no second derivative"
    with pytest.raises(NetError, match=line):
        Threads().meta_gradient(build(kind=Sharp), images(), Phase(training=True))


# trace.


class Reading(MAML):
    """Reads the value of a tensor, in one of two ways."""

    by_item = True

    def meta_loss(self, task, phase):
        loss, metrics = super().meta_loss(task, phase)
        large = loss.detach().item() > 1e9 if self.by_item else bool(task.query_x.sum() > 1e9)
        return (2 * loss if large else loss), metrics


class ReadsBatch(nn.Module):
    """Looks at a buffer of its own, which vmap shares among tasks: that can be run as vmap and not be recorded."""

    def __init__(self):
        super().__init__()
        self.net = NETS["mlp"]()
        self.limit = nn.Buffer(torch.ones(()))

    def forward(self, x):
        return self.net(x) if self.limit.item() > 0 else -self.net(x)


def test_what_cannot_be_recorded_runs_as_vmap_with_one_warning():
    torch.manual_seed(0)
    learner, tasks, engine = MAML(ReadsBatch(), steps=1).double(), images(), Trace()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            found = engine.meta_gradient(learner, tasks, Phase(training=True))
    messages = [str(w.message) for w in caught if "engine" in str(w.message)]
    assert len(messages) == 1, messages
    assert re.match(r"engine trace cannot record .*ReadsBatch.*; running as vmap", messages[0])
    assert_equal(found, Loop().meta_gradient(learner, tasks, Phase(training=True)))


@pytest.mark.parametrize("by_item", [True, False])
@pytest.mark.parametrize("engine", [VMap, Trace])
@pytest.mark.filterwarnings("ignore:engine trace cannot record")
def test_values_of_a_tasks_tensors_are_refused(engine, by_item):
    learner = build("mlp", Reading)
    learner.by_item = by_item
    with pytest.raises(NetError, match=r"cannot run this Reading \(.*\); choose engine threads or loop"):
        engine().meta_gradient(learner, images(), Phase(training=True))
    found, wanted = (each.meta_gradient(learner, images(), Phase(training=True)) for each in (Threads(), Loop()))
    assert_equal(found, wanted)


def test_other_shapes_run_as_vmap_with_one_warning():
    learner, engine = build("mlp"), Trace()
    phase = learner.training_phase(0)
    engine.meta_gradient(learner, images(4), phase)
    with pytest.warns(UserWarning, match="engine trace: batches of other shapes than the first run as vmap") as caught:
        for count in (2, 3, 2):
            found = engine.meta_gradient(learner, images(count), phase)
    assert len(caught) == 1
    assert_equal(found, Loop().meta_gradient(learner, images(2), phase))


def test_a_record_sees_what_changes_and_takes_no_other_learner_for_its_own():
    learner, engine = build("mlp"), Trace()
    optimizer = torch.optim.SGD(learner.outer_params().values(), lr=0.01)
    for epoch in (0, 1, 5, 99):
        for seed in (1, 2):
            phase, tasks = learner.training_phase(epoch), images(seed=seed)
            found = engine.meta_gradient(learner, tasks, phase)
            assert_equal(found, Loop().meta_gradient(learner, tasks, phase))
            for name, param in learner.outer_params().items():
                param.grad = found.grads[name]
            optimizer.step()
    records = engine._records
    other = build("mlp", inner_lr=0.7)
    assert_equal(
        engine.meta_gradient(other, images(), other.training_phase(0)),
        Loop().meta_gradient(other, images(), other.training_phase(0)),
    )
    assert engine._records is not records
    # Frozen: one of the learned tensors is now one of the others, of the same shape.
    other.module.net.layers[1].bias.requires_grad_(False)
    with pytest.warns(UserWarning, match="other shapes"):
        found = engine.meta_gradient(other, images(), other.training_phase(0))
    assert_equal(found, Loop().meta_gradient(other, images(), other.training_phase(0)))


def test_a_record_is_of_one_precision():
    learner, engine = build("mlp", MAML, steps=1).float(), Trace()
    tasks = Task(*(t.float() if t.is_floating_point() else t for t in images()))
    exact = engine.meta_gradient(learner, tasks, Phase(training=True)).loss
    learner.module.autocast = torch.bfloat16
    assert engine.meta_gradient(learner, tasks, Phase(training=True)).loss != exact


# graph.


def sines(count: int = 2) -> Task:
    task = Sinusoid("train", shots=3, queries=3).batch(range(count))
    return Task(*(t.double() for t in task))


def small() -> MAML:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
        return MAML(net, steps=1, inner_lr=0.1, loss=F.mse_loss).double()


def test_a_compiled_record_equals_loop():
    from torch._inductor import config

    # One weight, which is one kernel: a C++ compiler takes seconds for each, and for trial programs and headers.
    learner, engine = MAML(nn.Linear(1, 1, bias=False), steps=1, loss=F.mse_loss).double(), Graph()
    options = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False, "compile_threads": 1}
    with config.patch(options), warnings.catch_warnings():
        warnings.filterwarnings("error", message="engine")
        for _ in range(2):
            found = engine.meta_gradient(learner, sines(), Phase(training=True))
            assert_equal(found, Loop().meta_gradient(learner, sines(), Phase(training=True)))
            with torch.no_grad():
                next(learner.parameters()).add_(0.1)


def test_a_compile_that_fails_warns_once_and_the_record_is_used(monkeypatch):
    def broken(*inputs):
        raise ValueError("no\ncompiler")

    monkeypatch.setattr(graph.torch, "compile", lambda *args, **kwargs: broken)
    learner, engine = small(), Graph()
    with pytest.warns(UserWarning, match=r"cannot compile this learner \(ValueError: no compiler\); running") as caught:
        found = [engine.meta_gradient(learner, sines(), Phase(training=True)) for _ in range(2)]
    assert len(caught) == 1
    for each in found:
        assert_equal(each, Loop().meta_gradient(learner, sines(), Phase(training=True)))


# CUDA.


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_step_equals_loop_and_never_waits_for_the_device():
    learner, engine = build().cuda(), Trace()
    for epoch in (0, 1, 99):
        for seed in (1, 2):
            tasks, phase = images(seed=seed).to(torch.device("cuda")), learner.training_phase(epoch)
            if phase.step_weights is not None:
                phase = replace(phase, step_weights=phase.step_weights.cuda())
            engine.meta_gradient(learner, tasks, phase)
            torch.cuda.set_sync_debug_mode("error")
            try:
                found = engine.meta_gradient(learner, tasks, phase)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert_equal(copied(found), Loop().meta_gradient(learner, tasks, phase), 1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_threads_refuse_cuda():
    with pytest.raises(NetError, match="engine threads runs on the CPU only; choose vmap, trace or graph"):
        Threads().meta_gradient(build().cuda(), images().to(torch.device("cuda")), Phase(training=True))


# auto.


@pytest.fixture
def seconds(monkeypatch):
    """The seconds that each engine seems to take."""
    times = {"threads": 0.3, "vmap": 0.2, "trace": 0.1}

    def timed(call, device, most):
        call()
        (engine,) = {c.cell_contents.__self__.name for c in call.__closure__ if hasattr(c.cell_contents, "__self__")}
        return times[engine] / (2 if engine == "threads" else 1)

    monkeypatch.setattr(auto, "_time", timed)
    return times


@pytest.mark.parametrize("fastest", ["threads", "vmap", "trace"])
def test_auto_takes_the_fastest_and_says_so(seconds, capsys, fastest):
    seconds[fastest] = 0.01
    learner, tasks, engine = build("mlp"), images(), Auto()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for _ in range(2):
        found = engine.meta_gradient(learner, tasks, learner.training_phase(0))
    assert torch.equal(before, torch.get_rng_state())
    assert_equal(found, Loop().meta_gradient(learner, tasks, learner.training_phase(0)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"engine auto: {fastest} for training, 0.01 s a batch (")
    assert engine.chosen == {"training on cpu": fastest}
    engine.evaluate(learner, tasks, Phase())
    assert engine.chosen["evaluation on cpu"] == ("vmap" if fastest == "trace" else fastest)
    assert "for evaluation" in capsys.readouterr().err


def test_auto_takes_loop_where_all_refuse(capsys):
    class Stubborn(Reading):
        by_item = True

    learner, engine = build("mlp", Stubborn), Auto()
    learner.held = threading.Lock()
    found = engine.meta_gradient(learner, images(), Phase(training=True))
    assert_equal(found, Loop().meta_gradient(learner, images(), Phase(training=True)), 0)
    assert capsys.readouterr().err == "engine auto: loop for training (threads cannot, vmap cannot)\n"


class Heavy(nn.Linear):
    """On the main thread, where vmap runs, it does ``what`` first."""

    what = staticmethod(lambda: None)

    def forward(self, x):
        if threading.current_thread() is threading.main_thread():
            self.what()
        return super().forward(x)


@pytest.mark.parametrize(
    ("what", "note"),
    [
        (lambda: time.sleep(0.3), r"vmap: more than 0\.\d+ s"),
        (lambda: torch.empty(1 << 60, dtype=torch.uint8), "vmap: no memory"),
    ],
)
def test_auto_gives_an_engine_up_that_is_slower_than_the_best_or_out_of_memory(monkeypatch, capsys, what, note):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learner = MAML(nn.Sequential(nn.Flatten(), Heavy(64, WAYS)), steps=2).double()
    wanted = Loop().meta_gradient(learner, images(), Phase(training=True))
    with monkeypatch.context() as patch:
        patch.setattr(Heavy, "what", staticmethod(what))
        engine = Auto()
        engine.settle("training", learner, images(), Phase(training=True))
    assert re.search(f"threads for training, .*{note}", capsys.readouterr().err)
    assert_equal(Loop().meta_gradient(learner, images(), Phase(training=True)), wanted)


def test_memory_that_runs_out_on_the_cpu_is_no_fault_of_a_module(monkeypatch):
    monkeypatch.setattr(Heavy, "what", staticmethod(lambda: torch.empty(1 << 60, dtype=torch.uint8)))
    learner = MAML(nn.Sequential(nn.Flatten(), Heavy(64, WAYS)), steps=1).double()
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        VMap().meta_gradient(learner, images(), Phase(training=True))
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("another"))


def test_a_trial_ends_with_its_time_and_before_memory_runs_out(monkeypatch):
    held = []

    def grow(size: int) -> None:
        for _ in range(400):
            held.append(torch.ones(size))
            time.sleep(0.002)

    with pytest.raises(trial.GivenUp, match=r"more than 0\.05 s"):
        trial.seconds_of(lambda: grow(1), 0.05)
    assert len(held) < 400
    monkeypatch.setattr(trial, "available_bytes", lambda: 20e6)
    with pytest.raises(trial.GivenUp, match="too much memory"):
        trial.seconds_of(lambda: grow(1 << 17), math.inf)


QUICK = {"epochs": 2, "iterations": 2, "tasks": 2, "val_tasks": 2, "device": "cpu", "check_gradient": False}


def trainer(run_dir=None, learner=None, **settings):
    made = Trainer(
        learner or small().float(),
        Sinusoid("train"),
        Sinusoid("val"),
        TrainingSettings(**{**QUICK, **settings}),
        run_dir,
    )
    return made


@pytest.mark.parametrize("fastest", ["threads", "vmap", "trace"])
def test_a_resumed_run_goes_on_with_the_engines_chosen_and_ends_the_same(tmp_path, seconds, fastest):
    seconds[fastest] = 0.01
    trainer(tmp_path / "whole").fit()
    trainer(tmp_path / "parts").fit(until_epoch=1)
    for name in seconds:
        seconds[name] = 0.001 if name != fastest else 1.0
    resumed = Trainer.resume(tmp_path / "parts", small().float(), Sinusoid("train"), Sinusoid("val"))
    assert resumed.engine.chosen["training on cpu"] == fastest
    resumed.fit()
    ends = [CheckpointStore(tmp_path / name / "checkpoints").list()[-1].name for name in ("whole", "parts")]
    assert ends[0] == ends[1]


# check.


class Wrong(Loop):
    """Doubles the gradient of one parameter."""

    name = "wrong"

    def meta_gradient(self, learner, tasks, phase):
        result = super().meta_gradient(learner, tasks, phase)
        result.grads["module.net.2.bias"] *= 2
        return result


class Nowhere(MetaLearner):
    """Has a gradient of zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def adapt(self, support_x, support_y, phase):
        return Adapted({}, phase)

    def predict(self, adapted, x):
        return x.flatten(1)[:, :WAYS] + 0 * self.weight


@pytest.mark.parametrize("engine", [Loop, Threads, VMap, Trace, Auto])
def test_ours_pass_the_check(engine):
    learner = build("conv4" if engine is Threads else "mlp").float()
    tasks = Task(*(t.float() if t.is_floating_point() else t for t in images()))
    learner.module.autocast = torch.bfloat16
    before = torch.get_rng_state()
    check_engine(engine(), learner, tasks, learner.training_phase(0))
    check_engine(engine(), Nowhere(), tasks, Phase(training=True))
    assert torch.equal(before, torch.get_rng_state())
    assert learner.module.autocast is torch.bfloat16


@pytest.mark.parametrize("engine", [VMap, Trace])
def test_dropout_passes_the_check(engine):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, WAYS))
    check_engine(engine(), MAML(net, steps=2).double(), images(), Phase(training=True))


def test_a_wrong_engine_is_told_by_parameter_before_anything_is_updated():
    run = trainer(check=True)
    run.engine = Wrong()
    before = copy.deepcopy(run.learner.state_dict())
    with pytest.raises(
        NetError, match=r"^engine wrong gives another outer gradient .*: module\.net\.2\.bias differs"
    ) as e:
        run.fit()
    assert "\n" not in str(e.value)
    torch.testing.assert_close(run.learner.state_dict(), before, rtol=0, atol=0)


def test_the_check_lets_auto_choose_by_the_runs_own_batch(seconds, capsys):
    run = trainer(check=True, tasks=4)
    sizes = []
    original = VMap.meta_gradient

    def noted(self, learner, tasks, phase):
        sizes.append((tasks.query_x.shape[0], tasks.query_x.dtype))
        return original(self, learner, tasks, phase)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VMap, "meta_gradient", noted)
        run.fit(until_epoch=1)
    assert sizes[0] == (4, torch.float32)
    assert capsys.readouterr().err.count("for training") == 1


def test_the_command_line_checks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sines.yaml").write_text(
        "data: {source: sinusoid, shots: 5, queries: 5, eval_queries: 5}\n"
        "net: {name: mlp, hidden: [4]}\nlearner: {name: maml, steps: 1, inner_lr: 0.01}\n"
        "training: {epochs: 1, iterations: 2, tasks: 2, val_tasks: 2, test_tasks: 2, engine: threads, device: cpu}\n"
    )
    assert main(["train", "sines.yaml", "training.check=true", "run_dir=right"]) == 0
    monkeypatch.setattr(Threads, "meta_gradient", lambda self, *args: _scaled(Loop().meta_gradient(*args)))
    capsys.readouterr()
    assert main(["train", "sines.yaml", "training.check=true", "run_dir=wrong"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("metahpo: engine threads gives another outer gradient than engine loop: ")
    assert len(err.splitlines()) == 1


def _scaled(result):
    return result._replace(grads={name: 1.001 * g for name, g in result.grads.items()})


# What Python decides.


class Decides(nn.Module):
    """Scales by what Python decides at each call."""

    def __init__(self, scale):
        super().__init__()
        self.calls, self.layer, self.scale = 0, nn.Linear(1, 1), scale

    def forward(self, x):
        return self.layer(x) * self.scale(self)


def counted(module):
    module.calls += 1
    return module.calls


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (lambda module: 1 + random.random(), "draws from random or numpy.random"),
        (lambda module: 1 + np.random.rand(), "draws from random or numpy.random"),
        (counted, "'calls' of the net changes from step to step"),
        (lambda module, own=random.Random(0): 1 + own.random(), "Python decides what a step computes"),
    ],
)
def test_what_python_decides_is_not_recorded(scale, reason):
    learner, engine = MAML(Decides(scale), steps=1, loss=F.mse_loss).double(), Trace()
    with pytest.warns(UserWarning, match=f"engine trace: .*{reason}.*; running as vmap") as caught:
        losses = {float(engine.meta_gradient(learner, sines(), Phase(training=True)).loss) for _ in range(4)}
    assert len(losses) == 4, "a record would repeat the first"
    assert len([w for w in caught if "engine trace" in str(w.message)]) == 1


def test_a_record_is_left_when_an_attribute_changes():
    learner, engine = MAML(Decides(lambda module: 1 + module.calls), steps=1, loss=F.mse_loss).double(), Trace()
    for _ in range(2):
        engine.meta_gradient(learner, sines(), Phase(training=True))
    learner.module.net.calls = 5
    with pytest.warns(UserWarning, match="engine trace: 'calls' of the net changed, which a record does not see"):
        found = engine.meta_gradient(learner, sines(), Phase(training=True))
    assert_equal(found, Loop().meta_gradient(learner, sines(), Phase(training=True)))


@pytest.mark.filterwarnings("ignore:engine trace. Mixed, remat and iMAML repeat")
def test_random_numbers_that_are_drawn_again_are_not_recorded():
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1))
    found = []
    for options in ({}, {"remat": Sqrt()}):
        torch.manual_seed(0)
        learner, engine = MAML(net, steps=2, loss=F.mse_loss, **options).double(), VMap() if not options else Trace()
        found.append(engine.meta_gradient(learner, sines(), Phase(training=True)))
    assert_equal(*found)


@pytest.mark.parametrize("scale", [lambda module: 1 + random.random(), counted])
def test_threads_refuse_what_python_decides(scale):
    learner = MAML(Decides(scale), steps=1, loss=F.mse_loss).double()
    with pytest.raises(
        NetError, match=r"engine threads cannot keep in order what Python keeps: .*choose vmap"
    ):
        Threads().meta_gradient(learner, sines(), Phase(training=True))


def test_an_engines_raw_error_does_not_end_what_loop_can_run(monkeypatch, capsys):
    def broken(*_):
        raise IndexError("a mistake of the engine")

    for kind in (Threads, VMap):
        monkeypatch.setattr(kind, "meta_gradient", broken)
    learner = small()
    found = Auto().meta_gradient(learner, sines(), Phase(training=True))
    assert_equal(found, Loop().meta_gradient(learner, sines(), Phase(training=True)))
    assert "engine auto: loop for training (threads cannot, vmap cannot)" in capsys.readouterr().err


def test_threads_begin_anew_in_a_fork():
    engine, tasks, own = Threads(), images(2), build("mlp")
    wanted = engine.evaluate(own, tasks, Phase())[0]["loss"]
    answers = multiprocessing.get_context("fork").SimpleQueue()

    def run() -> None:
        answers.put(engine.evaluate(own, tasks, Phase())[0]["loss"].tolist())

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0
    assert answers.get() == wanted.tolist()
