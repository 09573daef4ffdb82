"""Errors, times, the GPU's idle share, and peak memory of a meta-step."""

from __future__ import annotations

import copy
import ctypes
import multiprocessing
import queue
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from inner_loop.contenders import Contender, make
from inner_loop.peers import Broken, LeftOut
from inner_loop.workloads import Workload, build
from metahpo.errors import one_line
from metahpo.tasks import Task


def in_float64(workload: Workload) -> Workload:
    """The workload in double precision; its problem, which peers read, stays as it is."""
    tasks = Task(*(t.double() if t.is_floating_point() else t for t in workload.tasks))
    return Workload(workload.name, copy.deepcopy(workload.learner).double(), workload.phase, tasks, workload.problem)


def relative_error(grads: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """||g - reference|| / ||reference|| over all parameters together."""
    pairs = [(grads[name].detach().double().cpu(), value.double().cpu()) for name, value in reference.items()]
    difference = sum(float((g - r).square().sum()) for g, r in pairs)
    return (difference / sum(float(r.square().sum()) for _, r in pairs)) ** 0.5


def in_turn(contenders: list[Contender], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step, A B C A B C, so that what else the machine does meets all alike."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    threads = torch.get_num_threads()
    for _ in range(rounds):
        for contender in contenders:
            # Another's step may have changed it.
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            seconds[contender.name].append(timed(contender, device))
    return seconds


def timed(contender: Contender, device: str) -> float:
    """Seconds of one step, from an idle device until it is idle again."""
    synchronize(device)
    started = time.perf_counter()
    contender.step()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def idle_share(contender: Contender, seconds: float) -> float | None:
    """The share of a step of ``seconds`` in which the GPU runs nothing: 1 - (union of its kernels' and copies' times) /
    seconds. The profiler slows the launches, so the kernels are timed under it and the step is not. None if it saw
    nothing."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        contender.step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
    return max(0.0, 1 - union(spans) * 1e-6 / seconds) if spans else None


def union(spans: list[tuple[float, float]]) -> float:
    """The length that sorted intervals cover."""
    covered, reached = 0.0, float("-inf")
    for start, end in spans:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def peak_memory(name: str, limit: float, workload: dict[str, Any]) -> int | None:
    """Bytes that one step of a contender needs beyond what lies there before it, measured in a process of its own.

    workload: the arguments of ``workloads.build``. None where the system does not tell. Raises LeftOut for a contender
    that refuses, breaks, or is not done with two steps (and what it compiles) after ``limit`` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    # The server computes nothing, so its copies start without threads and with all modules loaded.
    context.set_forkserver_preload(["inner_loop.measure"])
    answers = context.Queue()
    child = context.Process(target=measure_peak, args=(answers, name, workload), daemon=True)
    child.start()
    deadline = time.monotonic() + limit
    try:
        while True:
            try:
                answer = answers.get(timeout=0.2)
                break
            except queue.Empty:
                if not child.is_alive() and answers.empty():
                    raise Broken(f"its process ended with exit code {child.exitcode}") from None
                if time.monotonic() > deadline:
                    raise LeftOut(f"two steps take longer than {limit:.0f} s (--limit)") from None
    finally:
        child.kill()
        child.join()
    if isinstance(answer, LeftOut):
        raise answer
    return answer


def measure_peak(answers: Any, name: str, arguments: dict[str, Any]) -> None:
    """The child's part of ``peak_memory``."""
    try:
        workload = build(**arguments)
        answers.put((cuda_peak if arguments["device"] == "cuda" else host_peak)(name, workload))
    except LeftOut as error:
        answers.put(error)
    except Exception as error:
        answers.put(Broken(f"{type(error).__name__}: {one_line(error)}"))


def host_peak(name: str, workload: Workload) -> int | None:
    """By the resident set: its high-water mark over a second step, less its size before that step. The first step loads
    and compiles what is needed; the free memory that it leaves in the heap goes back to the system."""
    contender = make(name, workload)
    contender.step()
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    # 5: the high-water mark starts anew.
    clear.write_text("5")
    before = status("VmRSS")
    result = contender.step()
    peak = status("VmHWM") - before
    del result
    return max(peak, 0)


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def cuda_peak(name: str, workload: Workload) -> int | None:
    """By torch's allocator, over a second step; the memory that captured graphs keep for themselves counts too."""
    torch.backends.cudnn.benchmark = True
    if name == "jax":
        return jax_peak(workload)
    contender = make(name, workload)
    before = torch.cuda.memory_allocated()
    contender.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    contender.step()
    torch.cuda.synchronize()
    private = sum(s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0))
    return torch.cuda.max_memory_allocated() - before + private


def jax_peak(workload: Workload) -> int | None:
    """By XLA's allocator, whose high-water mark counts from the start of the process."""
    contender = make("jax", workload)
    import jax

    before = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use")
    contender.step()
    stats = jax.devices()[0].memory_stats() or {}
    return None if before is None else stats["peak_bytes_in_use"] - before
