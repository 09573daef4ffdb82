"""Torch modules as pure functions of their parameters."""

from metahpo.functional.batch_norm import PerStepBatchNorm as PerStepBatchNorm
from metahpo.functional.batch_norm import convert_batch_norm as convert_batch_norm
from metahpo.functional.module import FunctionalModule as FunctionalModule
from metahpo.functional.trees import Params as Params
