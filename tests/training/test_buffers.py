"""What training leaves in a net's buffers: that of a plain PyTorch loop, with every engine."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from metahpo.errors import NetError
from metahpo.functional.buffers import is_running_average, whole_state
from metahpo.learners import MAML, Adapted, MetaLearner, Phase, ProtoNet
from metahpo.tasks import Task
from metahpo.training import Trainer, TrainingSettings
from metahpo.training.checkpoint import load_learner
from metahpo.training.distributed import Ranks
from metahpo.training.engines import Loop, MetaGradient, Threads, Trace, VMap
from metahpo.training.evaluation import evaluate

STEPS, RATE, COUNT = 2, 0.125, 3
ENGINES = {"loop": Loop, "threads": Threads, "vmap": VMap}


class Stateful(nn.Module):
    """Buffers of every type, replaced, and a codebook that follows what it sees."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("seen", torch.tensor(False))
        self.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("codes", torch.eye(4))
        self.register_buffer("running_mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.count = self.count + 1
            self.seen = torch.ones_like(self.seen)
            self.phase = self.phase * 1j
            self.codes = self.codes + 0.1 * (x.detach().mean(0) - self.codes)
            self.running_mean = 0.9 * self.running_mean + 0.1 * x.detach().mean(0)
        return self.linear(x) @ self.codes


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("largest", torch.tensor(0.0))

    def forward(self, x):
        self.count += 1
        self.largest.copy_(torch.maximum(self.largest, x.detach().max()))
        return self.linear(x) / self.count.to(x)


class OwnForward(nn.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


class Subclass(nn.BatchNorm1d):
    pass


class KeptInEvaluation(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self


def flat(*layers: nn.Module, kind=nn.Sequential) -> nn.Module:
    return kind(nn.Linear(4, 4), *layers, nn.Tanh(), nn.Linear(4, 3))


def norm(kind=nn.BatchNorm1d, **options) -> nn.Module:
    made = kind(4, **options)
    if made.running_mean is not None:
        made.running_mean.uniform_(-1, 1)
        made.running_var.uniform_(0.5, 2)
    return made


def frozen(*layers: nn.Module) -> nn.Module:
    net = flat(*layers)
    for module in net[1:-2].modules():
        module.eval()
    net.training = True
    return net


def untracked() -> nn.Module:
    made = norm()
    made.track_running_stats = False
    return made


TASKWISE, BATCHED = ("loop", "threads"), ("loop", "threads", "vmap")
NETS = {
    "batch norm": (lambda: flat(norm()), BATCHED),
    "subclass": (lambda: flat(norm(Subclass)), BATCHED),
    "cumulative": (lambda: flat(norm(momentum=None)), BATCHED),
    "frozen": (lambda: frozen(norm()), BATCHED),
    "frozen with dropout": (lambda: frozen(nn.Dropout(0.5), norm(momentum=None)), BATCHED),
    "frozen without statistics": (lambda: frozen(norm(track_running_stats=False)), BATCHED),
    "kept in evaluation": (lambda: flat(norm(), kind=KeptInEvaluation), BATCHED),
    "not tracked any more": (lambda: flat(untracked()), BATCHED),
    "stateful": (lambda: flat(Stateful(), norm(momentum=None)), BATCHED),
    "own forward": (lambda: flat(norm(OwnForward)), BATCHED),
    "in place": (lambda: flat(InPlace()), TASKWISE),
    "spectral": (lambda: flat(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))), TASKWISE),
}


def squares(out, y):
    return (out - y).square().mean()


def tasks(width: int = 4) -> Task:
    generator = torch.Generator().manual_seed(1)
    sizes = (width, 3, width, 3)
    return Task(*(torch.randn(COUNT, 5, size, generator=generator, dtype=torch.float64) for size in sizes))


def plain_loop(net: nn.Module, batch: Task):
    """The outer gradient, and the buffers that each task leaves, by autograd and the net itself."""
    params = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    losses, buffers = [], []
    for index in range(COUNT):
        twin, (x, y, query_x, query_y) = copy.deepcopy(net), batch.select(index)
        fast = params
        for _ in range(STEPS):
            value = squares(functional_call(twin, fast, x), y)
            grads = torch.autograd.grad(value, list(fast.values()), create_graph=True)
            fast = {n: p - RATE * g for (n, p), g in zip(fast.items(), grads)}
        losses.append(squares(functional_call(twin, fast, query_x), query_y))
        buffers.append({n: b.clone() for n, b in twin.named_buffers()})
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(params.values()))
    return dict(zip(params, grads)), buffers


@pytest.mark.parametrize("name", NETS)
def test_engines_give_the_gradient_and_the_buffers_of_a_plain_loop(name):
    make, engines = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().double()
    plain = copy.deepcopy(net)
    # As a training loop begins; what was put into evaluation mode after that stays there.
    modes = {n: m.training for n, m in plain.named_modules()}
    plain.train()
    for n, module in plain.named_modules():
        module.training = module.training and modes[n]
    grads, left = plain_loop(plain, tasks())
    learner = MAML(net, steps=STEPS, inner_lr=RATE, loss=squares, adapt_norms=True).double()
    before = {n: t.clone() for n, t in learner.state_dict().items()}
    for engine in engines:
        result = ENGINES[engine]().meta_gradient(learner, tasks(), Phase(training=True))
        for n, grad in grads.items():
            found = result.grads[f"module.net.{n}"].view_as(grad)
            torch.testing.assert_close(found, grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(learner.state_dict(), before, rtol=0, atol=0)
        after = copy.deepcopy(learner)
        after.update_buffers(result.metrics["buffers"])
        own = {n.removeprefix("module.net."): b for n, b in after.named_buffers()}
        for n in own.keys() & left[0].keys():
            last = left[-1][n]
            averaged = is_running_average(n, last)
            wanted = torch.stack([each[n] for each in left]).mean(0) if averaged else last
            torch.testing.assert_close(own[n].view_as(wanted), wanted, rtol=1e-10, atol=1e-12)
        ENGINES[engine]().evaluate(learner, tasks(), Phase())
        torch.testing.assert_close(learner.state_dict(), before, rtol=0, atol=0)
        assert set(left[0]) - set(own) <= {"1.num_batches_tracked"}


def labelled() -> Task:
    labels = torch.arange(5).repeat(COUNT, 1) % 3
    return tasks()._replace(support_y=labels, query_y=labels)


def test_a_record_hands_on_what_the_batches_before_left():
    net = flat(Stateful(), norm(momentum=None)).double()
    learners = [ProtoNet(net, 3) for _ in range(2)]
    for engine, learner in zip((Loop(), Trace()), learners):
        for _ in range(2):
            result = engine.meta_gradient(learner, labelled(), Phase(training=True))
            learner.update_buffers(result.metrics["buffers"])
    states = [learner.state_dict() for learner in learners]
    torch.testing.assert_close(*states, rtol=1e-10, atol=1e-12)
    # Twice the support and the query set of the last task.
    assert states[0]["module.net.1.count"] == states[0]["module.net.2.num_batches_tracked"] == 4


def test_a_frozen_norm_predicts_each_query_alone_and_stays_in_other_learners():
    net = frozen(norm()).double()
    statistics = net[1].running_mean.clone()
    learner = ProtoNet(net, 3)
    assert not learner.batch_dependent
    batch = labelled()
    for engine in (Loop(), VMap(), Threads()):
        result = engine.meta_gradient(learner, batch, Phase(training=True))
        assert not result.metrics["buffers"]
    adapted = learner.adapt(batch.support_x[0], batch.support_y[0], Phase())
    alone = torch.cat([learner.predict(adapted, x[None]) for x in batch.query_x[0]])
    torch.testing.assert_close(learner.predict(adapted, batch.query_x[0]), alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(learner.module.net[1].running_mean[0], statistics, rtol=0, atol=0)


def test_the_ranks_of_a_run_agree_on_the_last_tasks_state(monkeypatch):
    values = [
        {
            "a.running_mean": torch.full((2,), 1.0 + rank),
            "a.on": torch.tensor(rank == 1),
            "b": torch.full((3,), rank * 1j),
        }
        for rank in range(2)
    ]
    sent: list[list[torch.Tensor]] = []
    total = None
    monkeypatch.setattr(Ranks, "_sums", lambda self, tensors: sent.append(tensors) or total or tensors)

    def merged(rank: int):
        result = MetaGradient(torch.tensor(1.0), {}, {"buffers": dict(values[rank])}, torch.ones(1 + rank))
        return Ranks(rank, 2).mean(result, range(3), None)[0].metrics["buffers"]

    for rank in range(2):
        merged(rank)
    total = [sum(parts) for parts in zip(*sent)]
    for rank in range(2):
        found = merged(rank)
        torch.testing.assert_close(found["a.running_mean"], torch.full((2,), 5 / 3))
        assert found["a.on"].item() is True
        torch.testing.assert_close(found["b"], values[1]["b"])


class Counting(nn.BatchNorm1d):
    def __init__(self):
        super().__init__(4)
        self.calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x) / self.calls


def test_a_batch_norm_whose_forward_counts_is_refused_where_the_order_is_not_kept():
    learner = MAML(flat(Counting()).double(), steps=1, loss=squares).double()
    with pytest.raises(NetError, match="'calls' of module '1' changes from call to call"):
        Threads().meta_gradient(learner, tasks(), Phase(training=True))


class Growing(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)
        self.register_buffer("kept", torch.zeros(1))

    def forward(self, x):
        self.kept = torch.cat([self.kept, torch.ones(1)])
        return super().forward(x)


def test_a_buffer_that_changes_its_shape_is_named():
    learner = MAML(Growing().double(), steps=1, loss=squares).double()
    result = Loop().meta_gradient(learner, tasks(), Phase(training=True))
    with pytest.raises(NetError, match=r"'module\.net\.kept' became \[3\] in training, expected \[1\]"):
        learner.update_buffers(result.metrics["buffers"])


class Moving(nn.Linear):
    """Two buffers that no state dict holds, one in a part of it."""

    def __init__(self):
        super().__init__(4, 3)
        self.register_buffer("mean", torch.zeros(4), persistent=False)
        self.norm = nn.BatchNorm1d(4)
        self.norm.register_buffer("running_mean", torch.zeros(4), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean = 0.5 * self.mean + x.detach().mean(0)
        return super().forward(self.norm(x) - self.mean)


class Source:
    """Tasks that are all the same, but for those from ``bad`` on, which cannot be had."""

    def __init__(self, bad: int = 99):
        self.bad = bad

    def batch(self, indices):
        if max(indices) >= self.bad:
            raise OSError("the disk is gone")
        chosen = [index % COUNT for index in indices]
        return Task(*(part[chosen] for part in tasks()))

    def task(self, index):
        return self.batch([index]).select(0)


SETTINGS = TrainingSettings(
    epochs=2, iterations=2, tasks=2, val_tasks=2, engine="loop", device="cpu", check=False, check_gradient=False
)


def moving() -> MAML:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MAML(Moving().double(), steps=1, loss=squares).double()


def test_a_run_goes_on_with_the_buffers_that_a_state_dict_leaves_out(tmp_path):
    whole = Trainer(moving(), Source(), Source(), SETTINGS)
    whole.fit()
    Trainer(moving(), Source(), Source(), SETTINGS, tmp_path).fit(until_iteration=3)
    rest = Trainer.resume(tmp_path, moving(), Source(), Source())
    rest.fit()
    wanted, found = (dict(run.learner.named_buffers()) for run in (whole, rest))
    assert wanted["module.net.mean"].abs().min() > 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    # An older checkpoint does not have them.
    learner = moving()
    load_learner(learner, whole.learner.state_dict(), "it")
    assert not learner.module.net.mean.any()


def test_ranks_begin_with_the_buffers_that_a_state_dict_leaves_out(monkeypatch):
    first, second = moving(), moving()
    first.module.net.mean += 1
    monkeypatch.setattr(Ranks, "on_first", lambda self, function: whole_state(first))
    monkeypatch.setattr(Ranks, "_gather", lambda self, value: [value, value])
    Ranks(1, 2).share_state(second)
    torch.testing.assert_close(dict(second.named_buffers()), dict(first.named_buffers()), rtol=0, atol=0)


class WritesWhenItPredicts(MetaLearner):
    """A net called by itself, which writes into its buffers in evaluation too."""

    def __init__(self):
        super().__init__(squares)
        self.net = flat(InPlace()).double()

    def adapt(self, support_x, support_y, phase):
        return Adapted({}, phase)

    def predict(self, adapted, x):
        return self.net(x)


def test_evaluation_leaves_no_trace_and_no_task_sees_another():
    learner = WritesWhenItPredicts()
    wanted = [copy.deepcopy(learner).evaluate(tasks().select(index), Phase())[0]["loss"] for index in range(COUNT)]
    for engine in (Loop(), Threads(), Loop()):
        found = engine.evaluate(learner, tasks(), Phase())[0]["loss"]
        torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=0)
    assert learner.net[1].count == 0


def test_whatever_validation_raises_the_epoch_is_kept(tmp_path):
    run = Trainer(moving(), Source(), Source(bad=1), SETTINGS, tmp_path)
    with pytest.raises(OSError, match="the disk is gone"):
        run.fit()
    rest = Trainer.resume(tmp_path, moving(), Source(), Source())
    assert rest.updates == SETTINGS.iterations
    whole = Trainer(moving(), Source(), Source(), SETTINGS)
    assert rest.fit() == whole.fit()


class ReadsPlaces(WritesWhenItPredicts):
    def predict(self, adapted, x):
        return super().predict(adapted, x) + torch.eye(len(x), 3).to(x)


def test_inductive_figures_that_depend_on_the_query_set_are_left_out_with_a_warning():
    learner = ReadsPlaces()
    with pytest.warns(UserWarning, match="ReadsPlaces: outputs 'inductive' .* are left out"):
        metrics, outputs = evaluate(learner, Source(), 4, SETTINGS)
    assert set(metrics) == {"loss"} and set(outputs) == {"after"}
    # It is said once, and left out each time.
    assert set(evaluate(learner, Source(), 2, SETTINGS)[1]) == {"after"}
    metrics, outputs = evaluate(moving(), Source(), 2, SETTINGS)
    assert "loss_inductive" in metrics and "inductive" in outputs
