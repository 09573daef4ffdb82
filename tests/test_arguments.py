"""What the Python API says of arguments that cannot be meant: one line, as a MetaHPOError and a ValueError."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from metahpo.errors import MetaHPOError
from metahpo.learners import (
    ANIL,
    BOIL,
    CAVIA,
    IMAML,
    MAML,
    Improvements,
    LinearHead,
    MAMLPlusPlus,
    MetaCurvature,
    MetaSGD,
    ProtoNet,
    Reptile,
    WarpMAML,
)
from metahpo.nets import MLP, Conv4, ResidualMLP, ResNet12, SmallResNet
from metahpo.rl import Gym
from metahpo.tasks import Episodes, ImageCompletion, Imbalance, LabelledImages, Sinusoid, Task
from metahpo.tasks.cifar import load_cifar_fs, load_fc100
from metahpo.tasks.datasets import labelled
from metahpo.tasks.images import load_image_folder
from metahpo.tasks.omniglot import load_omniglot
from metahpo.training import Trainer, TrainingSettings
from metahpo.training.evaluation import evaluate

QUICK = {"epochs": 1, "iterations": 1, "tasks": 2, "val_tasks": 2, "engine": "loop", "device": "cpu"}
NOT_WHOLE = (0, -1, 1.5, math.nan, math.inf, True, "2", None, [1], torch.ones(2))
NOT_RATE = (-0.1, math.nan, math.inf, True, "0.1", None, [0.1])
NOT_FLAG = (1, 0, "no", [])


def images(**changes):
    pixels = torch.randint(0, 256, (12, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    fields = {
        "images": pixels,
        "labels": torch.arange(3).repeat_interleave(4),
        "class_names": ("a", "b", "c"),
        "splits": {"train": (0, 1, 2)},
    }
    return LabelledImages(**{**fields, **changes})


def episodes(**changes):
    return Episodes(**{"data": images(), "split": "train", "ways": 2, "shots": 1, "queries": 1, **changes})


def net():
    return MLP([1], 2, [3])


class Waves(Sinusoid):
    """Sine waves, with one part of each batch changed."""

    def __init__(self, **changed):
        super().__init__(shots=3, queries=4)
        self.changed = changed

    def batch(self, indices):
        return super().batch(indices)._replace(**self.changed)


def trainer(train=None, learner=None, **changes):
    made = learner or MAML(MLP([1], 1, [3]), steps=1, loss=F.mse_loss)
    parts = {"learner": made, "train_tasks": train or Waves(), "val_tasks": Waves()}
    return Trainer(**{**parts, "settings": TrainingSettings(**QUICK), **changes})


PARTS = {"tasks": Waves(), "learner": trainer().learner, "settings": TrainingSettings()}
LEARNERS = (MAML, ANIL, BOIL, MetaSGD, MetaCurvature, WarpMAML, CAVIA, IMAML, Reptile, MAMLPlusPlus)
ABUSES = [
    *[(kind, {"steps": v}, "steps") for kind in LEARNERS for v in NOT_WHOLE],
    *[(kind, {"inner_lr": v}, "inner_lr") for kind in LEARNERS for v in NOT_RATE],
    *[(kind, {"loss": v}, "loss") for kind in LEARNERS for v in (None, "mse", 3)],
    *[(kind, {"net": v}, "net") for kind in LEARNERS for v in (None, "mlp", MLP)],
    *[(kind, {"stepz": 1}, "'stepz'; did you mean 'steps'") for kind in LEARNERS],
    *[(MAML, {n: v}, n) for n in ("first_order", "learn_lr", "adapt_norms") for v in NOT_FLAG],
    *[(MAML, {n: v}, n) for n in ("rule", "gradient", "remat", "improvements") for v in (3, "sgd", [])],
    *[(IMAML, {n: v}, n) for n in ("strength", "cg_steps") for v in (-1, math.nan, "1", True)],
    *[(Reptile, {n: v}, n) for n in ("minibatches", "eval_steps") for v in NOT_WHOLE],
    *[(CAVIA, {"context": v}, "context") for v in NOT_WHOLE],
    *[(MAMLPlusPlus, {"multi_step_epochs": v}, "multi_step_epochs") for v in (-1, 1.5, True, "1")],
    *[(Improvements, {"layer_step_rates": v}, "layer_step_rates") for v in NOT_FLAG],
    *[(ProtoNet, {"ways": v}, "ways") for v in NOT_WHOLE],
    *[(LinearHead, {"ways": 2, "classes": 2, n: v}, n) for n in ("ways", "classes", "steps") for v in NOT_WHOLE],
    *[(LinearHead, {"ways": 2, "classes": 2, "inner_lr": v}, "inner_lr") for v in NOT_RATE],
    *[(episodes, {n: v}, n) for n in ("ways", "shots", "queries", "group") for v in NOT_WHOLE],
    *[(episodes, {n: v}, n) for n in ("ways", "shots") for v in ((2, 1), (0, 1), (1, 2, 3), ("1", 2), (1, True))],
    *[(episodes, {"seed": v}, "seed") for v in (-1, 1.5, "0", None, True)],
    *[(episodes, {"rotate": v}, "rotate") for v in NOT_FLAG],
    (episodes, {"ways": 4}, "ways: split 'train' has 3 classes"),
    (episodes, {"labels": "klass"}, "labels"),
    (episodes, {"imbalance": "linear"}, "imbalance"),
    (episodes, {"data": [1]}, "data"),
    (episodes, {"split": "trian"}, "no split 'trian'"),
    (episodes, {"device": "gpu9"}, "device"),
    (episodes, {"shotz": 1}, "'shotz'; did you mean 'shots'"),
    (images, {"labels": torch.tensor([-1] + [0] * 11)}, "labels should be 0 to 2"),
    (images, {"labels": torch.full((12,), 3)}, "labels should be 0 to 2"),
    (images, {"labels": torch.zeros(12)}, "labels"),
    (images, {"labels": torch.zeros(5, dtype=torch.int64)}, "labels"),
    (images, {"images": torch.zeros(12, 4, 4)}, "images"),
    (images, {"images": "x.png"}, "images"),
    (images, {"class_names": "abc"}, "class_names"),
    (images, {"splits": {"train": (-1,)}}, "splits"),
    (images, {"splits": [0, 1]}, "splits"),
    *[(Sinusoid, {n: v}, n) for n in ("shots", "queries") for v in NOT_WHOLE],
    *[(Sinusoid, {"seed": v}, "seed") for v in (-1, 1.5, "0", True)],
    (Sinusoid, {"shot": 1}, "'shot'; did you mean 'shots'"),
    *[(ImageCompletion, {"images": v, "split": "a"}, "image") for v in (None, torch.zeros(2, 2), torch.zeros(0, 2, 2))],
    *[(Imbalance, {"kind": "step", "min": 1, "max": v}, "imbalance") for v in (0, 1.5, "3", math.nan)],
    *[(labelled, {"dataset": v}, "dataset") for v in (3, None, iter([]))],
    (labelled, {"dataset": [(torch.zeros(1, 2, 2), 0)], "fractions": (0.5, 0.5)}, "fractions"),
    (labelled, {"dataset": [(torch.zeros(1, 2, 2), 0)], "classes": {"train": ["x"]}}, "no class 'x'"),
    *[(load_image_folder, {"root": ".", "size": v}, "size") for v in NOT_WHOLE],
    *[(kind, {"root": v}, "root") for kind in (load_omniglot, load_cifar_fs, load_fc100) for v in (None, True, 3, [1])],
    *[(kind, {"root": ".", "download": v}, "download") for kind in (load_omniglot, load_fc100) for v in NOT_FLAG],
    *[(load_omniglot, {"root": ".", "split": v}, "split") for v in (None, "alphabets", 3)],
    *[(Gym, {"id": v}, "id") for v in (None, 3, [])],
    *[(Gym, {"id": "Pendulum-v1", "vary": v}, "vary") for v in (True, 0, "g", [1], {"g": 1}, {"g": (1, "2")})],
    *[(Gym, {"id": "Pendulum-v1", "vary": {"g": v}}, "vary['g']") for v in ((2, 1), (1, math.nan), (1, 2, 3))],
    *[(kind, {n: v}, n) for kind in (Conv4, ResNet12, SmallResNet) for n, v in (("in_shape", (1, 8)), ("slop", 0))],
    *[(kind, {"out_features": v}, "out_features") for kind in (MLP, Conv4, ResidualMLP) for v in NOT_WHOLE],
    (SmallResNet, {"norm": "layer"}, "norm"),
    *[(TrainingSettings, {n: v}, n) for n in ("epochs", "iterations", "tasks") for v in NOT_WHOLE],
    *[(TrainingSettings, {"lr": v}, "lr") for v in (0, *NOT_RATE)],
    (TrainingSettings, {"engine": "vamp"}, "engine"),
    (TrainingSettings, {"epoch": 1}, "no setting 'epoch'; did you mean 'epochs'"),
    *[(trainer, {n: v}, n) for n in ("learner", "train_tasks", "val_tasks", "settings", "run_dir") for v in (3, [0])],
    (trainer, {"settings": TrainingSettings(**QUICK, optimizer_args={"betaz": 1})}, "optimizer_args"),
    *[(trainer().fit, {"until_epoch": v}, "until_epoch") for v in (-1, 1.5, "1", True)],
    (trainer().fit, {"on_epoch": 3}, "on_epoch"),
    (trainer(Waves(support_y=torch.zeros(2, 2, 1))).fit, {}, "support_x is [2, 3, 1] and support_y [2, 2, 1]"),
    (trainer(Waves(query_x=torch.zeros(3, 4, 1))).fit, {}, "query_x is [3, 4, 1], expected [2, N, ...]"),
    (trainer(Waves(query_x=torch.zeros(2, 4, 7))).fit, {}, "fails on its first batch of tasks"),
    (trainer(Waves(query_y=None)).fit, {}, "expected a Task of tensors"),
    (trainer(episodes(), MAML(MLP([1, 4, 4], 1), steps=1)).fit, {}, "Target"),
    *[(evaluate, {**PARTS, "count": v}, "count") for v in NOT_WHOLE],
    *[(Sinusoid().batch, {"indices": v}, "ind") for v in ([], 3, ["0"], [-1], [True], None, "01")],
]
SHAPES = {Conv4: (1, 8, 8), ResNet12: (1, 8, 8), SmallResNet: (1, 8, 8), MLP: (2,), ResidualMLP: (2,)}


def test_every_abuse_is_answered_in_a_line_that_names_the_argument():
    wrong = []
    for function, arguments, expected in ABUSES:
        given = dict(arguments)
        if function in (*LEARNERS, ProtoNet, LinearHead):
            given.setdefault("net", net())
        if function in SHAPES:
            given = {"in_shape": SHAPES[function], "out_features": 2, **given}
        name = getattr(function, "__name__", str(function))
        try:
            function(**given)
            wrong.append(f"{name} {arguments}: taken")
        except Exception as error:
            line = str(error)
            kinds = isinstance(error, MetaHPOError) and isinstance(error, ValueError)
            if not kinds or expected not in line or len(line.splitlines()) != 1 or len(line) > 700:
                wrong.append(f"{name} {arguments}: {type(error).__name__}: {line}")
    assert not wrong, f"{len(wrong)} of {len(ABUSES)}:\n" + "\n".join(wrong)


def test_numpys_and_torchs_numbers_are_taken_wherever_a_number_is():
    source = episodes(ways=np.int64(2), shots=(np.int32(1), np.uint8(2)), queries=torch.tensor(1), seed=np.int64(3))
    plain = episodes(ways=2, shots=(1, 2), queries=1, seed=3)
    for found, expected in zip(source.batch(np.arange(1)), plain.batch([0])):
        assert torch.equal(found, expected)
    learner = MAML(MLP(np.array([1]), np.int64(1), np.array([3])), steps=np.int64(1), inner_lr=np.float32(0.5))
    assert type(learner.steps) is int
    assert learner.rule.lr.item() == 0.5
    settings = TrainingSettings(epochs=np.int64(2), lr=np.float64(0.1), seed=np.uint8(1), clip_norm=np.float32(2))
    assert (settings.epochs, settings.lr, settings.seed, settings.clip_norm) == (2, 0.1, 1, 2.0)
    assert Sinusoid(shots=np.int64(2)).task(np.int64(0)).support_x.shape == (2, 1)
    task = Sinusoid(shots=2).task(0)
    assert isinstance(task, Task)


def test_options_that_a_learner_of_ones_own_takes_are_its_own_business():
    class Mine(MAML):
        def __init__(self, net, **options):
            super().__init__(net, steps=options["updates"])

    assert Mine(net(), updates=2).steps == 2
