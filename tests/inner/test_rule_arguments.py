"""What the update rules and the strategies of a hypergradient say of arguments that cannot be meant."""

from __future__ import annotations

import math

import pytest
import torch

from metahpo.errors import ArgumentError, HypergradientError, NetError
from metahpo.hypergrad import PES, Unroll
from metahpo.inner import (
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    AdamW,
    ByLayer,
    GaussNewton,
    LayerStepRates,
    LevenbergMarquardt,
    Mixed,
    Newton,
    NoRemat,
    RMSprop,
    Scheduled,
    WeightRates,
)
from metahpo.inner import MetaCurvature as Curvature

NOT_FLAG = ("no", 1, 0, None, [], torch.ones(2))
NOT_NUMBER = (None, "0.1", True, math.nan, math.inf, [0.1], torch.ones(2), 10**400)
NOT_WHOLE = (0, -1, 1.5, "2", True, [1])
NEEDED = {
    SGD: {"lr": 0.1},
    ByLayer: {"rule": SGD(0.1), "names": ["w"]},
    Scheduled: {"rule": SGD(0.1), "factors": [1.0]},
    LayerStepRates: {"names": ["w"], "steps": 2, "lr": 0.1},
    WeightRates: {"params": {"w": torch.ones(2)}, "lr": 0.1},
    Curvature: {"params": {"w": torch.ones(2)}, "lr": 0.1},
    PES: {"particles": 2, "sigma": 0.1},
    **{kind: {"outputs": print, "criterion": print} for kind in (GaussNewton, LevenbergMarquardt)},
}
ABUSES = [
    *[(kind, {"lr": v}) for kind in (SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, LBFGS, Newton) for v in NOT_NUMBER],
    *[(kind, {"lr": v}) for kind in (LayerStepRates, WeightRates, Curvature) for v in NOT_NUMBER],
    *[(kind, {"learnable": v}) for kind in (SGD, LBFGS, ByLayer, Scheduled, WeightRates) for v in NOT_FLAG],
    *[(kind, {n: v}) for kind in (Adam, AdamW) for n in ("beta1", "beta2") for v in (-0.1, 1, 1.5, *NOT_NUMBER)],
    *[(RMSprop, {"alpha": v}) for v in (-0.1, 1.5, *NOT_NUMBER)],
    *[(Adadelta, {"rho": v}) for v in (-0.1, 1.5, *NOT_NUMBER)],
    *[(Adagrad, {"initial_accumulator_value": v}) for v in (-1, *NOT_NUMBER)],
    *[(kind, {"eps": v}) for kind in (Adam, RMSprop, Adagrad, Adadelta) for v in (-1, *NOT_NUMBER)],
    *[(SGD, {"momentum": 0.9, "nesterov": v}) for v in NOT_FLAG],
    *[(kind, {n: v}) for kind, n in ((Adam, "amsgrad"), (AdamW, "amsgrad"), (RMSprop, "centered")) for v in NOT_FLAG],
    (SGD, {"nesterov": True}),
    (SGD, {"dampening": 0.1}),
    (SGD, {"momentum": 0.9, "dampening": 0.1, "nesterov": True}),
    *[(LBFGS, {"history": v}) for v in (None, *NOT_WHOLE)],
    *[(kind, {"solver": v}) for kind in (Newton, GaussNewton, LevenbergMarquardt) for v in (None, "cg", 3)],
    *[(kind, {"outputs": v}) for kind in (GaussNewton, LevenbergMarquardt) for v in (None, 3)],
    *[(kind, {"criterion": v}) for kind in (GaussNewton, LevenbergMarquardt) for v in (None, 3)],
    *[(kind, {"damping": v}) for kind in (Newton, GaussNewton, LevenbergMarquardt) for v in (-1, *NOT_NUMBER)],
    *[(LevenbergMarquardt, {"up": v}) for v in (0.5, *NOT_NUMBER)],
    *[(LevenbergMarquardt, {"down": v}) for v in (0, 1.5, *NOT_NUMBER)],
    *[(kind, {"rule": v}) for kind in (ByLayer, Scheduled) for v in (None, "sgd", SGD, LBFGS())],
    *[(kind, {"names": v}) for kind in (ByLayer, LayerStepRates) for v in (None, "w", [], [1], ["w", "w"], 3)],
    *[(ByLayer, {n: v}) for n in ("phases", "steps") for v in NOT_WHOLE],
    (ByLayer, {"phases": 2}),
    (ByLayer, {"steps": 2, "phases": 3}),
    *[(Scheduled, {"factors": v}) for v in (None, [], "12", ["a"], [None], [math.nan], 3, torch.ones(2, 2))],
    *[(Scheduled, {"every": v}) for v in (None, *NOT_WHOLE)],
    *[(LayerStepRates, {"steps": v}) for v in (None, *NOT_WHOLE)],
    *[(WeightRates, {"steps": v}) for v in NOT_WHOLE],
    *[(kind, {"params": v}) for kind in (WeightRates, Curvature) for v in (None, {}, [torch.ones(2)], {"w": 1})],
    *[(Mixed, {"form": v}) for v in (None, "x", 1)],
    *[(PES, {"particles": v}) for v in (None, 3, *NOT_WHOLE)],
    *[(PES, {n: v}) for n in ("persistent", "telescoping") for v in NOT_FLAG],
    (PES, {"persistent": False, "telescoping": True}),
    *[(PES, {"sigma": v}) for v in (0, -1, *NOT_NUMBER)],
    *[(Unroll, {"truncate": v}) for v in NOT_WHOLE],
    *[(Unroll, {n: v}) for n in ("gradient", "remat") for v in (None, "sqrt", 3)],
    (Unroll, {"remat": NoRemat}),
]


def test_every_abuse_is_answered_in_a_line_that_names_the_argument():
    wrong = []
    for kind, arguments in ABUSES:
        name = list(arguments)[-1]
        try:
            kind(**{**NEEDED.get(kind, {}), **arguments})
            wrong.append(f"{kind.__name__} {arguments}: taken")
        except Exception as error:
            line = str(error)
            fits = isinstance(error, ArgumentError) and isinstance(error, (NetError, HypergradientError))
            if not fits or name not in line or not line.startswith(kind.__name__) or len(line.splitlines()) != 1:
                wrong.append(f"{kind.__name__} {arguments}: {type(error).__name__}: {line}")
    assert not wrong, f"{len(wrong)} of {len(ABUSES)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("one", [1, 1.0])
def test_bounds_that_torch_takes_are_taken(one):
    RMSprop(alpha=one)
    Adadelta(rho=one)
    Adam(beta1=0, beta2=0)
    LevenbergMarquardt(print, print, up=one, down=one)
    assert PES(torch.tensor(4), 0.1).particles == 4
