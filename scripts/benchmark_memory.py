"""Peak memory and time of one meta-gradient by inner gradient, rematerialisation and number of inner steps.

python scripts/benchmark_memory.py [--quick] [--steps 1,4,16,64] [--device cpu|cuda] [--json FILE] [--plot FILE.png]

The learner is MAML on a transformer (2 layers, width 64) over sequences of 16 tokens, 25 support and 25 query
sequences, one task, engine loop. On the CPU the peak is that of torch's allocator as its profiler records every
allocation and release: exact and repeatable, where a process's resident size also holds libraries, and pages that the
C library keeps. On CUDA it is torch.cuda.max_memory_allocated. Both are above what was allocated before. Times are of
runs without the profiler, the fastest of two. Relative errors are against reverse mode in float64.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import profiler

from metahpo.inner import InnerGradient, Mixed, NoRemat, Remat, Reverse, Sqrt
from metahpo.learners import MAML, Phase
from metahpo.tasks import Task
from metahpo.training.engines import Loop

GRADIENTS: dict[str, InnerGradient] = {"reverse": Reverse(), "mixed": Mixed(), "mixed_dual": Mixed("dual")}
REMATS: dict[str, Remat] = {"none": NoRemat(), "sqrt": Sqrt()}
# Dual numbers keep the same tensors as torch.func; once is enough.
CASES = [(g, r) for g in GRADIENTS for r in REMATS if (g, r) != ("mixed_dual", "none")]


class Transformer(nn.Module):
    """Sequences [N, tokens, 16] to logits [N, 5]."""

    def __init__(self, width: int, layers: int = 2):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, activation="gelu")
        self.embed, self.head = nn.Linear(16, width), nn.Linear(width, 5)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small transformer and few steps, under a minute")
    parser.add_argument(
        "--steps", type=lambda text: [int(n) for n in text.split(",")], help="default: 1,2,4,8,16,32,64"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw peak memory over steps here")
    options = parser.parse_args()
    steps = options.steps or ([1, 16] if options.quick else [1, 2, 4, 8, 16, 32, 64])
    torch.manual_seed(0)
    net = Transformer(16, layers=1) if options.quick else Transformer(64)
    task = a_task(8 if options.quick else 25)
    rows = []
    for count in steps:
        exact = meta_gradient(net, task, "reverse", "none", count, options.device, torch.float64)()
        for gradient, remat in CASES:
            run = meta_gradient(net, task, gradient, remat, count, options.device)
            found, seconds = timed(run, options.device, 1 if options.quick else 2)
            row = {"gradient": gradient, "remat": remat, "steps": count, "seconds": seconds}
            row |= {"peak_bytes": peak(run, options.device), "relative_error": error(found, exact)}
            rows.append(row)
            print(
                f"{count:3} steps  {gradient:10} remat {remat:5} {row['peak_bytes'] / 1e6:8.1f} MB  "
                f"{seconds:7.3f} s  error {row['relative_error']:.0e}",
                flush=True,
            )
    ratio = peak_ratio(rows, max(steps))
    print(f"at {max(steps)} steps reverse mode takes {ratio:.1f} times the memory of mixed mode with sqrt")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(options.device), "rows": rows}, indent=2))
    if options.plot:
        plot(rows, options.plot)
    return 0


def a_task(size: int) -> Task:
    """One task in a batch of its own: support and query sets of ``size`` sequences."""
    x, y = torch.randn(1, 2 * size, 16, 16), torch.arange(2 * size).remainder(5)[None]
    return Task(x[:, :size], y[:, :size], x[:, size:], y[:, size:])


def meta_gradient(
    net: nn.Module, task: Task, gradient: str, remat: str, steps: int, device: str, dtype: torch.dtype = torch.float32
) -> Callable[[], dict[str, Tensor]]:
    """The outer gradient as a function without arguments."""
    learner = MAML(net, steps=steps, inner_lr=0.01, gradient=GRADIENTS[gradient], remat=REMATS[remat])
    learner.to(device, dtype)
    tasks = Task(*(t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in task))
    return lambda: Loop().meta_gradient(learner, tasks, Phase(training=True)).grads


def timed(run: Callable[[], dict[str, Tensor]], device: str, runs: int) -> tuple[dict[str, Tensor], float]:
    """The result and the seconds of the fastest run."""
    result, seconds = {}, []
    for _ in range(runs):
        started = time.perf_counter()
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return result, min(seconds)


def peak(run: Callable[[], object], device: str) -> int:
    """The most bytes of tensors that were alive at once, above those before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profiler.profile(profile_memory=True) as profile:
        run()
    assert profile.kineto_results is not None
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The norm of the difference over the norm, of all gradients together."""
    flat, expected = (torch.cat([g.double().flatten() for g in grads.values()]) for grads in (found, exact))
    return float((flat - expected).norm() / expected.norm())


def peak_ratio(rows: list[dict], steps: int) -> float:
    peaks = {(row["gradient"], row["remat"]): row["peak_bytes"] for row in rows if row["steps"] == steps}
    return peaks["reverse", "none"] / peaks["mixed", "sqrt"]


def machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "threads": str(torch.get_num_threads())}


def plot(rows: list[dict], path: Path) -> None:
    """Peak memory over inner steps, a line for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for gradient, remat in CASES:
        chosen = [row for row in rows if (row["gradient"], row["remat"]) == (gradient, remat)]
        megabytes = [row["peak_bytes"] / 1e6 for row in chosen]
        axes.plot([row["steps"] for row in chosen], megabytes, "o-", label=f"{gradient}, remat {remat}")
    axes.set(xscale="log", yscale="log", xlabel="inner steps", ylabel="peak memory, MB")
    axes.set_xticks(sorted({row["steps"] for row in rows}), sorted({row["steps"] for row in rows}))
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
