"""Compiling the C kernels, once a machine."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

import torch

from metahpo.errors import one_line

_SOURCES = ("conv.c", "norm.c")
_HEADERS = ("common.h", "blocks.h", "winograd.h")
# Not -O3, which rearranges the blocked loops for the worse.
_FLAGS = (
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    "-march=native",
    "-fno-math-errno",
    "-shared",
    "-fPIC",
    "-w",
)
_CTYPES = {torch.float32: "float", torch.float64: "double"}
_one_at_a_time = threading.Lock()
_told: list[str] = []


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for ``dtype`` (float32 or float64), or None where they cannot be had, with one warning.

    They are compiled by the machine's C compiler ($CC, cc, gcc or clang) for its own processor at first use, which
    takes a few seconds, and kept in $XDG_CACHE_HOME/metahpo or ~/.cache/metahpo. $METAHPO_NATIVE=0 does without.
    """
    with _one_at_a_time:  # Threads that ask at once: the first compiles or warns, the others get what it got.
        return _loaded(dtype)


@functools.cache
def _loaded(dtype: torch.dtype) -> ctypes.CDLL | None:
    if dtype not in _CTYPES or os.environ.get("METAHPO_NATIVE") == "0":
        return None
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if compiler is None:
        _without("no C compiler was found (cc, gcc or clang)")
        return None
    try:
        return _declared(ctypes.CDLL(str(_compiled(compiler, _CTYPES[dtype]))))
    except subprocess.CalledProcessError as error:
        _without(f"{compiler} failed: {one_line(error.stderr or error)}")
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: no home folder is known.
        _without(one_line(error))
    return None


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """The library with its functions' arguments: pointers, then the number of images, then sizes."""
    pointer, count, size, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_double
    for name, pointers, rest in (
        ("conv", 4, [count, *[size] * 7]),
        ("conv_weight", 4, [count, *[size] * 5]),
        ("norm_forward", 8, [count, *[size] * 4, real, real]),
        ("norm_backward", 10, [count, *[size] * 4, real]),
        ("norm_double", 15, [count, *[size] * 4, real]),
    ):
        getattr(found, name).argtypes = [*[pointer] * pointers, *rest]
    return found


def _compiled(compiler: str, real: str) -> Path:
    here = Path(__file__).parent
    command = [compiler, *_FLAGS, f"-DREAL={real}"]
    if _has_avx512():
        command.append("-mprefer-vector-width=512")
    texts = [(here / name).read_bytes() for name in (*_HEADERS, *_SOURCES)]
    key = hashlib.sha256(b"\0".join([*texts, repr((command, _processor())).encode()])).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metahpo"
    target = cache / f"kernels-{real}-{key}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Several processes may compile at once: each makes its own file, and putting it in place is atomic.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / target.name
            sources = [str(here / name) for name in _SOURCES]
            subprocess.run(
                [*command, *sources, "-o", str(made)], check=True, capture_output=True, text=True, timeout=120
            )
            made.replace(target)
    return target


@functools.cache
def _processor() -> str:
    """What tells processors of one kind from others: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def _has_avx512() -> bool:
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def _without(reason: str) -> None:
    if not _told:
        _told.append(reason)
        warnings.warn(f"metahpo's CPU kernels are not used, torch's are: {reason}", stacklevel=5)
