"""What engines and the trainer count on in a learner, one function each; AssertionError says what was found."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from metahpo.errors import MetaHPOError
from metahpo.functional import FunctionalModule
from metahpo.functional.buffers import whole_state
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task
from metahpo.testing.learner_subject import LearnerSubject, distance
from metahpo.training.alone import inductive_gap
from metahpo.training.engines import ENGINES
from metahpo.training.environment import seeded
from metahpo.training.settings import TrainingSettings
from metahpo.training.trainer import Trainer

# Engines sum in other orders, which batch norm and a maximum amplify.
AGREE = 1e-6
# A run of two epochs; gradient_is_right looks at the gradient more closely than a run does.
SETTINGS = TrainingSettings(
    epochs=2,
    iterations=1,
    tasks=2,
    val_tasks=2,
    lr=1e-2,
    engine="loop",
    device="cpu",
    check=False,
    check_gradient=False,
)


def gives_a_loss(subject: LearnerSubject) -> None:
    """A finite scalar loss with a gradient for every parameter, scalar metrics, and outputs for every query."""
    learner, task = subject.fresh(), subject.batch.select(0)
    loss, metrics = learner.meta_loss(task, learner.training_phase(0))
    assert loss.shape == (), f"meta_loss gives {list(loss.shape)}, expected a scalar"
    assert bool(torch.isfinite(loss)), f"meta_loss gives {loss.item()}"
    for name, value in metrics.items():
        if name != "buffers":
            assert isinstance(value, Tensor) and value.shape == (), f"metric {name!r} should be a scalar tensor"
    params = learner.outer_params()
    assert params, "there is no parameter to learn; register those of the outer loop as nn.Parameter"
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    unused = [name for name, g in zip(params, grads) if g is None]
    assert not unused, f"no gradient reaches {', '.join(unused)}; freeze what is not learnt (requires_grad=False)"
    for kind, values in learner.outputs(task, Phase()).items():
        assert len(values) == len(task.query_y), f"outputs {kind!r} are {len(values)} for {len(task.query_y)} queries"


def engines_agree(subject: LearnerSubject) -> None:
    """The same loss, gradient, metrics and predictions from every engine that it claims."""
    learner, results = subject.fresh(), dict[str, Any]()
    phase = learner.training_phase(0)
    for name in dict.fromkeys(["loop", *subject.engines]):
        with seeded(0):
            trained = ENGINES[name]().meta_gradient(learner, subject.batch, phase)
        with seeded(0):
            metrics, outputs = ENGINES[name]().evaluate(learner, subject.batch, Phase())
        found = {
            "loss": trained.loss,
            "losses": trained.losses,
            **{f"gradient of {n}": g for n, g in trained.grads.items()},
        }
        found |= {f"metric {n}": value for n, value in trained.metrics.items() if n != "buffers"}
        found |= {f"buffer {n}": value for n, value in trained.metrics.get("buffers", {}).items()}
        found |= {f"{n} in evaluation": value for n, value in metrics.items()}
        found["unused"] = torch.tensor([n in trained.unused for n in trained.grads])
        results[name] = found | {f"outputs {n!r}": value for n, value in outputs.items()}
    norm = max(float(g.abs().max()) for n, g in results["loop"].items() if n.startswith("gradient"))
    for name, found in results.items():
        assert found.keys() == results["loop"].keys(), f"engine {name} gives {sorted(found)}, loop others"
        for what, value in found.items():
            gap = distance(value, results["loop"][what])
            if what.startswith("gradient") and math.isfinite(gap):  # One that is zero but for rounding.
                gap = float((value - results["loop"][what]).abs().max()) / max(norm, 1e-12)
            assert gap < AGREE, f"engine {name}: {what} differs from engine loop's by {gap:.1e}, relatively"


def gradient_is_right(subject: LearnerSubject) -> None:
    """The outer gradient equals central differences of the loss along a direction in each parameter (float64)."""
    if not subject.exact:
        return
    learner = subject.fresh(smooth=True)
    phase, task = learner.training_phase(1), subject.batch.select(0)

    def value() -> float:
        with seeded(0):
            return learner.meta_loss(task, phase)[0].item()

    with seeded(0):
        loss = learner.meta_loss(task, phase)[0]
    params = learner.outer_params()
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()), materialize_grads=True)))
    largest = max(float(g.norm()) for g in grads.values())
    for place, (name, param) in enumerate(params.items()):
        generator = torch.Generator().manual_seed(place)
        direction = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        direction, kept, ends = direction / direction.norm().clamp(min=1e-12), param.detach().clone(), []
        for shift in (1e-5, -1e-5):
            param.data.copy_(kept + shift * direction)
            ends.append(value())
        param.data.copy_(kept)
        slope, found = (ends[0] - ends[1]) / 2e-5, float((grads[name] * direction).sum())
        assert abs(slope - found) < 1e-6 * max(1.0, largest), (
            f"the gradient of {name} along a direction is {found:.8g}, the loss's slope {slope:.8g}; is something "
            "detached? (exact=False for a learner whose gradient is not its loss's, as first-order ones)"
        )


def order_does_not_matter(subject: LearnerSubject) -> None:
    """The order in which a net registers its layers, be the head the first, changes nothing, or is refused.

    What a learner keeps beside the net, such as rates, may be in that order.
    """
    results, first = [], Task(*(part[:1] for part in subject.batch))
    for backwards in (False, True):
        try:
            learner = subject.fresh(parts=True, backwards=backwards)
            with seeded(0):
                result = ENGINES["loop"]().meta_gradient(learner, first, learner.training_phase(0))
        except MetaHPOError:
            if backwards:
                return
            raise
        nets = tuple(f"{name}.net." for name, m in learner.named_modules() if isinstance(m, FunctionalModule))
        grads = {f"the gradient of {n}": g for n, g in result.grads.items() if n.startswith(nets)}
        results.append({"the loss": result.loss, **grads})
    wanted, found = results
    norm = max(float(g.abs().max()) for g in wanted.values() if g.numel())
    advice = "where the net registers its layers in the opposite order; find them by how they are called, or by name"
    for name in wanted.keys() | found.keys():
        assert name in wanted and name in found, f"{name} is there in one order alone, {advice}"
        gap = float((found[name] - wanted[name]).abs().sum())
        assert gap < AGREE * norm, f"{name} changes by {gap:.1e} {advice}"


def keeps_nothing(subject: LearnerSubject) -> None:
    """Tasks leave no trace: in the learner, in its parameters and buffers, in the tasks' tensors, in other tasks."""
    learner, phase = subject.fresh(), Phase()
    first, second = subject.batch.select(0), subject.batch.select(1)
    learner.look_at(first.support_x)  # What it keeps of that, it may.
    given = [t.clone() for t in (*first, *second)]
    attributes = {name: id(value) for name, value in vars(learner).items()}
    state = {name: value.clone() for name, value in whole_state(learner).items()}
    alone = learner.outputs(second, phase)
    training = learner.training_phase(0)
    learner.meta_loss(first, training)
    learner.outputs(first, phase)
    after = learner.outputs(second, phase)
    changed = [n for n, value in vars(learner).items() if attributes.get(n) != id(value)]
    assert not changed, f"adapt, predict or meta_loss sets self.{changed[0]}; return it, or pass it in Adapted"
    for name, value in whole_state(learner).items():
        assert torch.equal(value, state[name]), f"{name} is changed in place; hand new buffers out under 'buffers'"
    assert all(torch.equal(a, b) for a, b in zip((*first, *second), given)), "a task's tensors are changed in place"
    for kind, values in alone.items():
        gap = distance(after[kind], values)
        assert gap == 0, f"outputs {kind!r} of a task differ by {gap:.1e} after another task was run"


def predicts_each_query_alone(subject: LearnerSubject) -> None:
    """The outputs "inductive" of a query are the same whatever other queries there are, and in whatever order."""
    gap = inductive_gap(subject.fresh(), subject.batch.select(0))
    assert gap < AGREE, (
        f"outputs 'inductive' of some queries differ by {gap:.1e} without the others, expected those of each query "
        "alone; is the query set read as a whole, or are its places? (override outputs where it is meant to be)"
    )


def repeats(subject: LearnerSubject) -> None:
    """The same numbers in the same state from the same seed, in a copy too."""
    learner = subject.fresh()
    results = []
    for each in (learner, learner, copy.deepcopy(learner)):
        with seeded(0):
            results.append(ENGINES["loop"]().meta_gradient(each, subject.batch, each.training_phase(0)))
    for again in results[1:]:
        for name, grad in results[0].grads.items():
            assert torch.equal(again.grads[name], grad), f"the gradient of {name} is another the second time"


def holds_tensors_where_they_move(subject: LearnerSubject) -> None:
    """Every tensor it holds is a parameter or a buffer, so that ``.to(device)`` takes it along; it runs in float32."""
    learner = subject.fresh()
    known = {id(t) for t in [*learner.parameters(), *learner.buffers()]}
    for name, module in learner.named_modules():
        for where, tensor in _tensors_of(module):
            assert id(tensor) in known, (
                f"{name or 'self'}.{where} holds a tensor that is neither parameter nor buffer, so .to(device) leaves "
                "it behind; register_buffer it"
            )
    task = Task(*(t.float() if t.is_floating_point() else t for t in subject.batch.select(0)))
    loss, _ = learner.float().meta_loss(task, learner.training_phase(0))
    assert loss.dtype == torch.float32, f"in float32 the loss is {loss.dtype}; some tensor keeps its type"
    if torch.cuda.is_available():
        there = learner.cuda().meta_loss(task.to("cuda"), learner.training_phase(0))[0]
        assert distance(there.cpu(), loss) < 1e-2, (
            f"on CUDA the loss is {there.item():.6g}, on the CPU {loss.item():.6g}"
        )


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        yield from ((name, leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def saves_and_loads(subject: LearnerSubject) -> None:
    """Its state_dict, through a file that holds no code, is all that a run needs."""
    trained, fresh = subject.fresh(), subject.fresh()
    trainer = Trainer(trained, subject.source, subject.source, SETTINGS)
    trainer.fit()
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for kind, values in trained.outputs(subject.batch.select(0), Phase()).items():
        gap = distance(fresh.outputs(subject.batch.select(0), Phase())[kind], values)
        assert gap == 0, f"outputs {kind!r} after loading its state_dict differ by {gap:.1e}"


def resumes(subject: LearnerSubject) -> None:
    """A run that was stopped after its first epoch goes on to the same weights bit for bit, also where the net
    registers its layers in another order by then, unless that is refused."""
    source = subject.source
    whole = Trainer(subject.fresh(parts=True), source, source, SETTINGS)
    whole.fit()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(subject.fresh(parts=True), source, source, SETTINGS, folder).fit(until_epoch=1)
        for backwards in (True, False):
            try:
                rest = Trainer.resume(folder, subject.fresh(parts=True, backwards=backwards), source, source)
                rest.fit()
                break
            except MetaHPOError:
                if not backwards:
                    raise
    for name, value in whole_state(whole.learner).items():
        gap = distance(whole_state(rest.learner)[name], value)
        assert gap == 0, f"{name} of a run that was resumed differs by {gap:.1e} from that of one that was not"


LEARNER_CHECKS = (
    gives_a_loss,
    engines_agree,
    gradient_is_right,
    order_does_not_matter,
    keeps_nothing,
    predicts_each_query_alone,
    repeats,
    holds_tensors_where_they_move,
    saves_and_loads,
    resumes,
)
