"""The C kernels against torch's own operations: values, gradients, gradients of gradients."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from metahpo import native
from metahpo.errors import NetError
from metahpo.native import conv_taps
from metahpo.native.build import library

compiled = pytest.mark.skipif(library(torch.float64) is None, reason="no C kernels here")

# N, C, O, H, W, K
SHAPES = [
    (3, 16, 16, 6, 6, 3),  # Winograd, with any width of vectors.
    (2, 32, 48, 7, 9, 3),
    (9, 64, 64, 11, 6, 3),
    (2, 96, 80, 13, 7, 3),
    (30, 16, 16, 28, 28, 3),  # Several groups of images.
    (3, 1, 64, 14, 14, 3),  # Direct.
    (2, 16, 17, 8, 8, 3),
    (2, 5, 70, 5, 7, 3),
    (40, 3, 6, 28, 28, 3),
    (4, 130, 67, 3, 2, 3),
    (3, 64, 64, 3, 3, 3),
    (3, 6, 10, 5, 4, 1),
    (2, 20, 33, 9, 6, 5),
    (2, 2, 3, 1, 9, 5),
    (1, 1, 1, 1, 1, 3),
    (5, 1, 1, 1, 1, 1),
]


def contiguous(t):
    return t


def channels_last(t):
    return t.to(memory_format=torch.channels_last)


def sliced(t):
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


def leaves(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def compare(ours, theirs, inputs, tolerance=1e-10):
    """Values, gradients, and gradients of a function of the gradients."""
    found = []
    for function in (ours, theirs):
        torch.manual_seed(1)
        out = function(*inputs)
        first = torch.autograd.grad(
            (out * torch.randn(out.shape).double()).sum() + out.pow(3).sum(), inputs, create_graph=True
        )
        penalty = sum((g * torch.randn(g.shape).double()).sum() + g.pow(2).sum() for g in first)
        found.append([out, *first, *torch.autograd.grad(penalty, inputs, materialize_grads=True)])
    for mine, wanted in zip(*found, strict=True):
        assert mine.shape == wanted.shape
        scale = max(1.0, wanted.detach().abs().max().item())
        assert (mine - wanted).abs().max() <= tolerance * scale


@compiled
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv2d_is_torchs(shape):
    n, c, o, h, w, k = shape
    inputs = leaves((n, c, h, w), (o, c, k, k), (o,))
    compare(native.conv2d, lambda x, w, b: F.conv2d(x, w, b, padding=k // 2), inputs)


@compiled
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced])
@pytest.mark.parametrize("shape", [(2, 32, 16, 7, 6, 3), (3, 4, 9, 5, 6, 3), (3, 1, 4, 5, 6, 3)], ids=str)
def test_conv2d_takes_any_layout_of_images_and_weights_and_no_bias(shape, layout):
    n, c, o, h, w, k = shape
    inputs = leaves((n, c, h, w), (o, c, k, k))
    ours = lambda x, w: native.conv2d(layout(x), layout(w), None)  # noqa: E731
    taps = lambda x, w: native.conv2d(x, conv_taps(w), None)  # noqa: E731
    for function in (ours, taps):
        compare(function, lambda x, w: F.conv2d(x, w, padding=k // 2), inputs)


@compiled
@pytest.mark.parametrize("shape", [(2, 32, 16, 7, 6, 3), (3, 4, 9, 5, 6, 3)], ids=str)
def test_vectors_need_not_lie_in_a_row(shape):
    # A stride of two, and the stride of zero that the gradient of a sum has.
    n, c, o, h, w, k = shape
    x, weight, long = leaves((n, c, h, w), (o, c, k, k), (2 * o,))
    compare(
        lambda x, w, b: native.conv2d(x, w, b[::2]),
        lambda x, w, b: F.conv2d(x, w, b[::2], padding=1),
        [x, weight, long],
    )
    found = []
    for function in (lambda *a: native.conv2d(*a), lambda *a: F.conv2d(*a, padding=1)):
        out = function(x, weight, long[:o])
        grads = torch.autograd.grad(out.pow(2).sum(), [x, weight, long], create_graph=True)
        found.append(torch.autograd.grad(grads[2].sum() + grads[0].sum(), [x, weight, long]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)

    y, scales = leaves((4, o, 6, 6), (4 * o,))
    ours = lambda y, s: norm(y, s[: 2 * o : 2], s[2 * o :: 2], 0.1, 2)  # noqa: E731
    compare(ours, lambda y, s: reference(y, s[: 2 * o : 2], s[2 * o :: 2], 0.1, 2), [y, scales])


def norm(y, scale, shift, slope, pool):
    return native.norm_act_pool(y, scale, shift, eps=1e-5, slope=slope, pool=pool)[0]


def reference(y, scale, shift, slope, pool):
    out = F.leaky_relu(F.batch_norm(y, None, None, scale, shift, True, 0.0, 1e-5), slope)
    return F.max_pool2d(out, 2) if pool == 2 else out


@compiled
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("shape", [(3, 64, 6, 6), (2, 48, 7, 5), (4, 32, 4, 9), (5, 1, 3, 2), (2, 131, 5, 5)], ids=str)
def test_norm_act_pool_is_torchs(shape, slope, pool):
    y, scale, shift = leaves(shape, (shape[1],), (shape[1],))
    with torch.no_grad():
        scale[:1] = 0.7 if shape[1] == 1 else 0.0
    compare(lambda *a: norm(*a, slope, pool), lambda *a: reference(*a, slope, pool), [y, scale, shift], tolerance=1e-9)
    _, mean, rstd = native.norm_act_pool(y, scale, shift, eps=1e-5, slope=slope, pool=pool)
    var, expected = torch.var_mean(y, (0, 2, 3), correction=0)
    torch.testing.assert_close((mean, rstd), (expected, (var + 1e-5).rsqrt()), rtol=1e-10, atol=1e-10)
    assert not mean.requires_grad and not rstd.requires_grad


@compiled
@pytest.mark.parametrize("layout", [channels_last, sliced])
def test_norm_act_pool_takes_any_layout(layout):
    inputs = leaves((3, 6, 5, 4), (6,), (6,))
    compare(lambda y, *a: norm(layout(y), *a, 0.1, 2), lambda *a: reference(*a, 0.1, 2), inputs)


@compiled
@pytest.mark.parametrize("slope", [0.0, 0.01])
def test_ties_go_where_torch_sends_them(slope):
    # Images of a few values, and a scale of zero, which makes all of a channel equal.
    y = torch.randint(0, 2, (3, 5, 6, 6), dtype=torch.float64)
    y[:, 1] = 3.0
    scale = torch.tensor([1.0, 1.0, -1.0, 0.0, -0.5], dtype=torch.float64)
    shift = torch.tensor([0.1, 0.2, 0.3, 0.4, -0.5], dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (y, scale, shift)]
    compare(lambda *a: norm(*a, slope, 2), lambda *a: reference(*a, slope, 2), inputs)


@compiled
def test_gradients_pass_gradgradcheck():
    torch.autograd.gradgradcheck(native.conv2d, leaves((2, 3, 4, 3), (2, 3, 3, 3), (2,)))
    for pool in (1, 2):
        torch.autograd.gradgradcheck(
            lambda *a, pool=pool: norm(*a, 0.2, pool), leaves((2, 2, 4, 3), (2,), (2,)), atol=1e-4
        )


@compiled
@pytest.mark.parametrize("shape", [(3, 32, 64, 14, 13, 3), (5, 1, 64, 28, 28, 3), (5, 20, 30, 5, 5, 3)], ids=str)
def test_float32_is_within_rounding_of_float64(shape):
    n, c, o, h, w, k = shape
    x, weight, bias = leaves((n, c, h, w), (o, c, k, k), (o,), dtype=torch.float32)

    def run(dtype):
        a, b, d = (t.detach().to(dtype).requires_grad_() for t in (x, weight, bias))
        out = native.conv2d(a, b, d)
        return [out, *torch.autograd.grad(out.square().sum(), [a, b, d])]

    for single, double in zip(run(torch.float32), run(torch.float64)):
        assert single.dtype == torch.float32
        assert (single - double).norm() <= 2e-6 * double.norm()


@compiled
def test_a_third_derivative_is_refused():
    x, w, b, scale = leaves((2, 2, 4, 4), (2, 2, 3, 3), (2,), (2,))
    for function in (lambda: native.conv2d(x, w, b), lambda: norm(x, scale, b, 0.1, 2)):
        for power in (1, 3):
            (first,) = torch.autograd.grad(function().pow(4).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.pow(power).sum(), x, create_graph=True)
            with pytest.raises(NetError, match="no third derivative; choose engine vmap or loop"):
                torch.autograd.grad(second.sum(), x)


@compiled
def test_what_does_not_fit_is_refused():
    x, w = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3)
    for images, weight in ((x[:, :2], w), (x[0], w), (x[:0], w), (x, w[..., :2]), (x, w[..., :2, :2])):
        with pytest.raises(ValueError, match="conv2d does not fit: images"):
            native.conv2d(images, weight, None)
    with pytest.raises(TypeError, match=r"conv2d needs one type, got images torch\.float32 and weight torch\.float64"):
        native.conv2d(x, w.double(), None)
    for images, scale, pool in ((x, torch.ones(4), 1), (x[:0], torch.ones(3), 1), (x[:, :, :1], torch.ones(3), 2)):
        with pytest.raises(ValueError, match="norm_act_pool does not fit: images"):
            native.norm_act_pool(images, scale, scale, eps=1e-5, slope=0.0, pool=pool)
    with pytest.raises(TypeError, match="norm_act_pool needs one type"):
        native.norm_act_pool(x, torch.ones(3).double(), torch.ones(3).double(), eps=1e-5, slope=0.0, pool=2)


def gradients(seed):
    generator = torch.Generator().manual_seed(seed)
    size = 5 + seed % 4
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    x, w, b, scale = draw(4, 16, size, size), draw(32, 16, 3, 3), draw(32), draw(32)
    out = norm(native.conv2d(x, w, b), scale, b, 0.01, 2)
    grads = torch.autograd.grad(out.pow(2).sum(), [x, w, b, scale], create_graph=True)
    return [g.detach() for g in (*grads, *torch.autograd.grad(sum(g.pow(2).sum() for g in grads), [x, w, b, scale]))]


@compiled
def test_threads_at_once_give_what_one_gives():
    alone = [gradients(seed) for seed in range(12)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(gradients, [*range(12)] * 2))
    for mine, wanted in zip(together, alone * 2, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


@compiled
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_thread_that_ends_leaves_no_memory_behind():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def work():
        native.conv2d(x, w, None)

    # Scratch memory of some 3 MB.
    x, w = torch.randn(1, 128, 8, 8), torch.randn(128, 128, 3, 3)
    for count in (5, 60):
        before = resident()
        for _ in range(count):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert resident() - before < 40e6


# Where the kernels come from. Each is a process of its own, with a cache of its own.

PROGRAM = """
import torch, warnings
from torch import nn
from metahpo.learners import MAML
from metahpo.nets import Conv4
from metahpo.native.build import library
from metahpo.tasks import Task
from metahpo.training.engines import Loop, Threads

torch.set_num_threads(2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    learner = MAML(Conv4((1, 8, 8), 2, filters=4), steps=1)
    x, y = torch.randn(3, 4, 1, 8, 8), torch.arange(2).repeat(3, 2)
    tasks, phase = Task(x, y, x, y), learner.training_phase(0)
    threads, loop = (engine.meta_gradient(learner, tasks, phase) for engine in (Threads(), Loop()))
    torch.testing.assert_close(threads.grads, loop.grads, rtol=1e-3, atol=1e-3)
    found = [library(dtype) is not None for dtype in (torch.float32, torch.float64, torch.float16)]
print(found)
for warning in caught:
    print(warning.message)
"""


@pytest.fixture
def process(start):
    def process(cache, program=PROGRAM, **env):
        return start(program, **{"METAHPO_NATIVE": "", "XDG_CACHE_HOME": str(cache), **env})

    return process


def finished(child) -> list[str]:
    code, out, err = child.finished()
    assert code == 0, err
    return out.splitlines()


def test_without_kernels_there_is_one_warning_and_torch_does_the_work(tmp_path, process):
    (tmp_path / "none").mkdir()
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho 'no such\nprocessor' >&2; exit 1\n")
    failing.chmod(0o755)
    (tmp_path / "file").write_text("")
    cases = {
        "": process(tmp_path / "a", METAHPO_NATIVE="0"),
        "no C compiler was found": process(tmp_path / "b", PATH=str(tmp_path / "none"), CC=""),
        "failing failed: no such processor": process(tmp_path / "c", CC=str(failing)),
        "Not a directory": process(tmp_path / "file"),
    }
    for reason, child in cases.items():
        found, *warned = finished(child)
        assert found == "[False, False, False]"
        assert len(warned) == bool(reason), warned
        assert all(w.startswith("metahpo's CPU kernels are not used, torch's are: ") and reason in w for w in warned)


@compiled
def test_processes_that_compile_at_once_share_what_is_then_kept(tmp_path, process):
    once = "import torch; from metahpo.native.build import library; print(library(torch.float32) is not None)"
    # A compiler that notes each call and takes its time to hand out what has been compiled before.
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(
        f"#!/bin/sh\necho call >> {calls}; sleep 1\n"
        f'while [ "$1" != -o ]; do shift; done; cp {library(torch.float32)._name} "$2"\n'
    )
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    at_once = [process(cache, once, CC=str(compiler)) for _ in range(2)]
    assert [finished(child) for child in at_once] == [["True"], ["True"]]
    assert len(list((cache / "metahpo").iterdir())) == 1
    before = calls.read_text()
    assert finished(process(cache, once, CC=str(compiler))) == ["True"]
    assert calls.read_text() == before
