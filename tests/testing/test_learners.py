"""Every learner through the conformance suite, and faulty ones that each of its checks tells."""

from __future__ import annotations

import warnings

import pytest
import torch

from metahpo.functional import FunctionalModule
from metahpo.inner import SGD
from metahpo.learners import (
    ANIL,
    BOIL,
    CAVIA,
    IMAML,
    MAML,
    Adapted,
    Improvements,
    LinearHead,
    MAMLPlusPlus,
    MetaCurvature,
    MetaLearner,
    MetaSGD,
    PolicyMAML,
    ProtoNet,
    Reptile,
    WarpMAML,
)
from metahpo.rl import Navigation
from metahpo.tasks import RolloutTasks, Task
from metahpo.testing import LEARNER_CHECKS, check_learner
from metahpo.testing.learner_checks import (
    engines_agree,
    gives_a_loss,
    gradient_is_right,
    holds_tensors_where_they_move,
    keeps_nothing,
    order_does_not_matter,
    predicts_each_query_alone,
    repeats,
    resumes,
    saves_and_loads,
)

ALL = Improvements(2, 0, True, True, True)
NOT_RATES = Improvements(2, 0, True, True, False)
CASES = {
    "MAML": (MAML, {"steps": 2}),
    "first order": (MAML, {"steps": 2, "first_order": True, "exact": False}),
    "one learnt rate": (MAML, {"steps": 2, "learn_lr": True, "adapt_norms": True}),
    "MAML++": (MAMLPlusPlus, {"steps": 2, "multi_step_epochs": 2}),
    "ANIL": (ANIL, {"steps": 2}),
    "ANIL++": (ANIL, {"steps": 2, "improvements": ALL}),
    "BOIL": (BOIL, {"steps": 2}),
    "BOIL++": (BOIL, {"steps": 2, "improvements": ALL}),
    "Meta-SGD": (MetaSGD, {"steps": 2}),
    "Meta-SGD++": (MetaSGD, {"steps": 2, "improvements": ALL}),
    "Meta-Curvature": (MetaCurvature, {"steps": 2}),
    "Meta-Curvature++": (MetaCurvature, {"steps": 2, "improvements": NOT_RATES}),
    "Warp-MAML": (WarpMAML, {"steps": 2}),
    "Warp-MAML++": (WarpMAML, {"steps": 2, "improvements": ALL}),
    "CAVIA": (CAVIA, {"steps": 2, "context": 3}),
    "CAVIA++": (CAVIA, {"steps": 2, "context": 3, "improvements": ALL}),
    # Its gradient is the minimum's; tests/learners/test_imaml.py compares that.
    "iMAML": (IMAML, {"steps": 2, "cg_steps": 1, "exact": False}),
    "Reptile": (Reptile, {"steps": 3, "exact": False}),
    "ProtoNet": (ProtoNet, {"ways": 3}),
    "linear head": (LinearHead, {"ways": 3, "classes": 3, "steps": 3}),
}


def checked(options):
    """The checks that say something of such a learner."""
    return [check for check in LEARNER_CHECKS if check is not gradient_is_right or options.get("exact", True)]


@pytest.fixture
def strict():
    """Any warning is an error, but a deprecation and that two steps do not bring iMAML to its minimum."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "iMAML: the inner gradient at the end")
        yield


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    ("name", "check"),
    [(name, check) for name, (_, options) in CASES.items() for check in checked(options)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_learner_conforms(name, check):
    kind, options = CASES[name]
    check_learner(kind, engines=("loop", "threads", "vmap"), checks=[check], **options)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", [name for name in CASES if f"{name}++" not in CASES])
def test_every_learner_can_be_recorded(name):
    """On a net of few operations: how long a record takes goes by their number; test_engines.py has larger nets."""
    kind, options = CASES[name]

    def net():
        layers = torch.nn.Linear(64, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh(), torch.nn.Linear(4, 3)
        return torch.nn.Sequential(torch.nn.Flatten(), *layers)

    check_learner(kind, net=net, engines=["trace"], checks=[engines_agree], **options)


class Episodes(RolloutTasks):
    """Of navigation, in float64."""

    def batch(self, indices):
        return Task(*(t.double() for t in super().batch(indices)))


@pytest.mark.parametrize("check", checked({"exact": False}), ids=lambda check: check.__name__)
@pytest.mark.parametrize("first_order", [False, True])
def test_policies_conform(check, first_order):
    check_learner(
        PolicyMAML,
        net=lambda: torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)),
        tasks=Episodes(Navigation(), "train", episodes=4, horizon=5),
        # Differences would see how the weights change what is rolled out; tests/learners/test_policy_maml.py compares.
        exact=False,
        checks=[check],
        environment=Navigation(),
        steps=2,
        first_order=first_order,
    )


class Good(MetaLearner):
    """Class means, like ProtoNet; what is wrong with it is added below."""

    def __init__(self, net):
        super().__init__()
        self.module = FunctionalModule(net)

    def embed(self, x, phase):
        return self.module.apply_with({}, self.module.buffers_by_name(), x, inductive=phase.inductive)[0]

    def adapt(self, support_x, support_y, phase):
        members = (support_y == torch.arange(3)[:, None]).double()
        return Adapted({"means": members @ self.embed(support_x, phase).double() / 2}, phase)

    def predict(self, adapted, x):
        embedded = self.embed(x, adapted.phase)
        return -(embedded[:, None] - adapted.params["means"].to(embedded)).square().sum(-1)


class VectorLoss(Good):
    def meta_loss(self, task, phase):
        loss, metrics = super().meta_loss(task, phase)
        return loss[None], metrics


class Unused(Good):
    def __init__(self, net):
        super().__init__(net)
        self.extra = torch.nn.Parameter(torch.ones(2))


class Branches(Good):
    def predict(self, adapted, x):
        # Python's max over a batch is not what vmap sees.
        return super().predict(adapted, x) * (2.0 if x.sum().item() > 0 else 1.0)


class Detached(Good):
    def adapt(self, support_x, support_y, phase):
        adapted = super().adapt(support_x, support_y, phase)
        return Adapted({"means": adapted.params["means"].detach()}, phase)


class Remembers(Good):
    def adapt(self, support_x, support_y, phase):
        self.last = super().adapt(support_x, support_y, phase)
        return self.last


class WritesInPlace(Good):
    def adapt(self, support_x, support_y, phase):
        support_x.mul_(0.5)
        return super().adapt(support_x, support_y, phase)


class CountsInPlace(Good):
    def __init__(self, net):
        super().__init__(net)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def predict(self, adapted, x):
        self.count += 1
        return super().predict(adapted, x)


class ReadsPlaces(Good):
    def predict(self, adapted, x):
        return super().predict(adapted, x) + torch.nn.functional.one_hot(torch.arange(len(x)) % 3, 3)


class ReadsTheWhole(Good):
    def predict(self, adapted, x):
        logits = super().predict(adapted, x)
        return logits - logits.mean(0)


class ByTheBatch(Good):
    def embed(self, x, phase):
        return self.module({}, x)


class ADraw(Good):
    def predict(self, adapted, x):
        return super().predict(adapted, x) * torch.rand((), generator=self.generator, dtype=x.dtype)

    def __init__(self, net):
        super().__init__(net)
        self.generator = torch.Generator()


class LeftBehind(Good):
    def __init__(self, net):
        super().__init__(net)
        self.scale = torch.ones(1)


class Hides(Good):
    """What it has learnt beside its parameters is in no state_dict."""

    def __init__(self, net):
        super().__init__(net)
        self.calls = {"count": 0}

    def training_phase(self, epoch):
        self.calls["count"] += 1
        return super().training_phase(epoch)

    def predict(self, adapted, x):
        return super().predict(adapted, x) * (1 + self.calls["count"])


class LastIsHead(Good):
    """Learns all but what the net registers last."""

    def outer_params(self):
        params = super().outer_params()
        return {name: params[name] for name in list(params)[:-1]}


class ByPlace(Good):
    """Weighs what it learns by its place among the net's tensors."""

    def meta_loss(self, task, phase):
        loss, metrics = super().meta_loss(task, phase)
        params = self.module.params().values()
        return loss + sum(place * p.square().sum() for place, p in enumerate(params)), metrics


FAULTS = [
    (VectorLoss, gives_a_loss, r"meta_loss gives \[1\], expected a scalar"),
    (Unused, gives_a_loss, "no gradient reaches extra"),
    (Branches, engines_agree, "engine vmap cannot run"),
    (Detached, gradient_is_right, "is something detached"),
    (LastIsHead, order_does_not_matter, "is there in one order alone, where the net registers"),
    (ByPlace, order_does_not_matter, "changes by .* where the net registers its layers in the opposite order"),
    (ByPlace, resumes, "of a run that was resumed differs"),
    (Remembers, keeps_nothing, "sets self.last"),
    (WritesInPlace, keeps_nothing, "tensors are changed in place"),
    (CountsInPlace, keeps_nothing, "count is changed in place"),
    (ReadsPlaces, predicts_each_query_alone, "expected those of each query alone"),
    (ReadsTheWhole, predicts_each_query_alone, "expected those of each query alone"),
    (ByTheBatch, predicts_each_query_alone, "expected those of each query alone"),
    (ADraw, repeats, "is another the second time"),
    (LeftBehind, holds_tensors_where_they_move, "self.scale holds a tensor"),
    (Hides, saves_and_loads, "after loading its state_dict differ"),
    (Hides, resumes, "of a run that was resumed differs"),
]


@pytest.mark.parametrize("kind, check, message", FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_each_check_tells_its_fault(kind, check, message):
    with pytest.raises(AssertionError, match=f"(?s){kind.__name__} does not conform:.*{check.__name__}: .*{message}"):
        check_learner(kind, checks=[check])


def test_the_learner_without_a_fault_has_none():
    check_learner(Good)


def test_own_nets_tasks_rules_and_engines():
    from metahpo.tasks import Sinusoid

    class Waves(Sinusoid):
        def batch(self, indices):
            return type(task := super().batch(indices))(*(t.double() for t in task))

    check_learner(
        MAML,
        net=lambda: torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)),
        tasks=Waves(shots=5, queries=5),
        engines=("loop", "vmap"),
        loss=torch.nn.functional.mse_loss,
        rule=SGD(0.01, momentum=0.9),
        steps=2,
    )
