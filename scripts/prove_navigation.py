"""Meta-learnt policies for 2-D navigation: how far from the best possible return, before and after one step.

python scripts/prove_navigation.py [--quick] [--seeds 1] [--json FILE] [--plot FILE.png]

MAML and its first-order form with policy gradients (Finn et al. 2017, section 5.3): 20 episodes of at most 100 steps
for the one inner step. Each is tried on 200 goals that it was not trained on. "closer" is (best - before) / (best -
after), of mean returns, where best is that of going straight to each goal at full speed; its 95% interval is
bootstrapped over the goals. Exits with 1 if it is below 3, or with --quick below 1.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from inner_loop.command import Parser
from inner_loop.machine import machine
from metahpo.learners import PolicyMAML
from metahpo.nets import MLP
from metahpo.report.paths import draw_paths, paths_example
from metahpo.rl import Navigation, best_return
from metahpo.tasks import RolloutTasks
from metahpo.training import Trainer, TrainingSettings
from metahpo.training.environment import seeded
from metahpo.training.evaluation import evaluate

HORIZON = 100


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="little training, short episodes, few goals: some seconds")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw the paths of the first seed's MAML here")
    options = parser.parse_args()
    options.horizon = 30 if options.quick else HORIZON
    rows = []
    for seed in range(options.seeds):
        for first_order in (False, True):
            row, learner = one_training(seed, first_order, options.quick, options.horizon)
            rows.append(row)
            print(
                f"seed {seed}, {row['learner']}: return {row['before']:.2f} before, {row['after']:.2f} after one step, "
                f"best {row['best']:.2f}; {row['closer']:.2f} times closer "
                f"(95%: {row['low']:.2f} to {row['high']:.2f}); {row['cpu_seconds']:.0f} s of CPU",
                flush=True,
            )
            if options.plot and not (seed or first_order):
                draw_paths(paths_example(learner, tasks("test", seed, options.horizon).task(0))).savefig(options.plot)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine([]), "rows": rows}, indent=2))
    wanted = 1 if options.quick else 3
    return 0 if all(row["closer"] >= wanted for row in rows) else 1


def tasks(split: str, seed: int, horizon: int = HORIZON) -> RolloutTasks:
    return RolloutTasks(Navigation(), split, episodes=20, horizon=horizon, seed=seed)


def one_training(seed: int, first_order: bool, quick: bool, horizon: int) -> tuple[dict, PolicyMAML]:
    """The figures of one training and its learner."""
    started = time.process_time()
    with seeded(seed):
        net = MLP([2], 2, hidden=[64, 64])
        learner = PolicyMAML(net, Navigation(), steps=1, inner_lr=0.1, first_order=first_order)
    settings = TrainingSettings(
        epochs=1,
        iterations=8 if quick else 200,
        tasks=20,
        lr=3e-3,
        val_tasks=2,
        engine="vmap" if quick else "trace",  # Recording takes as long as twenty steps.
        seed=seed,
    )
    Trainer(learner, tasks("train", seed, horizon), tasks("val", seed, horizon), settings).fit()
    unseen, count = tasks("test", seed, horizon), 12 if quick else 200
    found, _ = evaluate(learner, unseen, count, settings)
    best = best_return(unseen.batch(range(count)).query_y[:, 0], horizon).double().numpy()
    before, after = (best - found[name].double().numpy() for name in ("return_before", "return"))
    drawn = np.random.default_rng(seed).integers(count, size=(2000, count))
    low, high = np.quantile(before[drawn].mean(1) / after[drawn].mean(1), [0.025, 0.975])
    return {
        "learner": "FOMAML" if first_order else "MAML",
        "seed": seed,
        "goals": count,
        "before": float(found["return_before"].mean()),
        "after": float(found["return"].mean()),
        "best": float(best.mean()),
        "closer": float(before.mean() / after.mean()),
        "low": float(low),
        "high": float(high),
        "cpu_seconds": time.process_time() - started,
    }, learner


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
