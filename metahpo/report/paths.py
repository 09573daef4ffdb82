"""The paths of a policy in the plane, before and after adapting to several goals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from metahpo.learners.phase import Phase
from metahpo.learners.policy_maml import PolicyMAML
from metahpo.picture import Picture
from metahpo.rl import Rollout
from metahpo.tasks.task import Task

RADIUS, GOALS = 0.4, 6
SHOWN = 3
LIMIT = 0.75


@dataclass(frozen=True)
class PathsExample:
    """What a policy does with G goals [G, 2], before and after adapting to each.

    paths: by kind the positions [G, E, H, 2] before each step, NaN after an episode's end; returns: by kind their mean.
    """

    goals: np.ndarray
    paths: dict[str, np.ndarray]
    returns: dict[str, float]


@torch.no_grad()
def paths_example(learner: PolicyMAML, task: Task, goals: Tensor | None = None) -> PathsExample:
    """The paths with a navigation task's noise to ``goals`` [G, 2], by default evenly on a circle about the start."""
    if goals is None:
        angles = torch.arange(GOALS) * (2 * math.pi / GOALS)
        goals = RADIUS * torch.stack([angles.cos(), angles.sin()], -1)
    goals = goals.to(task.query_y)
    found: dict[str, list[Rollout]] = {"before": [], "after": []}
    for goal in goals:
        adapted = learner.adapt(task.support_x, goal.expand_as(task.support_y), Phase())
        for kind, learnt in (("before", learner.initial(Phase())), ("after", adapted)):
            found[kind].append(learner.roll_out(learnt.params, task.query_x, goal.expand_as(task.query_y)))
    return PathsExample(
        goals.cpu().numpy(),
        {kind: np.stack([_paths(rollout) for rollout in rollouts]) for kind, rollouts in found.items()},
        {kind: float(torch.stack([r.returns().mean() for r in rollouts]).mean()) for kind, rollouts in found.items()},
    )


def draw_paths(data: PathsExample) -> Figure:
    """All paths before adapting, which are the same for every goal, and a few to each goal after it."""
    figure = Picture(figsize=(11, 5.6), dpi=100, layout="constrained")
    before, after = figure.subplots(1, 2, sharex=True, sharey=True)
    colours = [f"C{index % 10}" for index in range(len(data.goals))]
    for path in data.paths["before"][0]:
        before.plot(*path.T, color="0.35", linewidth=0.7, alpha=0.5)
    for paths, colour in zip(data.paths["after"], colours):
        for path in paths[:SHOWN]:
            after.plot(*path.T, color=colour, linewidth=0.8, alpha=0.8)
    for axis, kind in ((before, "before"), (after, "after")):
        _frame(axis, data, colours)
        axis.set_title(f"{kind} adapting, mean return {data.returns[kind]:.1f}")
    return figure


def _paths(rollout: Rollout) -> np.ndarray:
    seen = torch.where(rollout.taken[..., None] > 0, rollout.observations, math.nan)
    return seen.cpu().numpy()


def _frame(axis: Axes, data: PathsExample, colours: list[str]) -> None:
    axis.scatter(*data.goals.T, marker="*", s=190, c=colours, edgecolors="black", linewidths=0.8, zorder=3)
    axis.scatter([0], [0], marker="o", s=30, color="black", zorder=3)
    axis.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal")
    axis.grid(alpha=0.25)
