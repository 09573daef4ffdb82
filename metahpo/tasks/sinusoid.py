"""Sinusoid regression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from zlib import crc32

import numpy as np
import torch

from metahpo.checks import KnownKeywords, check_type, check_whole
from metahpo.errors import DataArgumentError
from metahpo.tasks.arguments import task_numbers
from metahpo.tasks.task import Task


class Sinusoid(KnownKeywords):
    """y = a sin(x - p), a uniform in [0.1, 5], p in [0, pi], x in [-5, 5] (Finn et al. 2017, section 5.1).

    Tasks are numbered, pure functions of (seed, split, number). support_x: [shots, 1]; support_y: [shots, 1]; query
    sets have ``queries`` points. dtype float32.
    """

    keyword_error = DataArgumentError

    def __init__(self, split: str = "train", *, shots: int = 10, queries: int = 10, seed: int = 0):
        self.split = check_type(self, "split", split, str, error=DataArgumentError)
        self.shots = check_whole(self, "shots", shots, at_least=1, error=DataArgumentError)
        self.queries = check_whole(self, "queries", queries, at_least=1, error=DataArgumentError)
        self.seed = check_whole(self, "seed", seed, at_least=0, error=DataArgumentError)

    def task(self, index: int) -> Task:
        return self.batch([index]).select(0)

    def batch(self, indices: Sequence[int]) -> Task:
        draws = [
            np.random.default_rng([self.seed, crc32(self.split.encode()), index]).random(2 + self.shots + self.queries)
            for index in task_numbers(self, indices)
        ]
        unit = torch.as_tensor(np.stack(draws), dtype=torch.float32)[..., None]
        amplitude, phase = 0.1 + 4.9 * unit[:, :1], math.pi * unit[:, 1:2]
        x = 10 * unit[:, 2:] - 5
        y = amplitude * torch.sin(x - phase)
        return Task(x[:, : self.shots], y[:, : self.shots], x[:, self.shots :], y[:, self.shots :])
