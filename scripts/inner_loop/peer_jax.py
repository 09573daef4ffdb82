"""The nets and the meta-step in JAX, float32."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch import nn

from inner_loop.peers import LeftOut, Step
from inner_loop.transformer import Transformer
from inner_loop.workloads import Problem
from metahpo.nets import MLP, Conv4, ResNet12
from metahpo.tasks import Task

Params = dict[str, jax.Array]

# The convolutions of a GPU would otherwise round to TF32.
jax.config.update("jax_default_matmul_precision", "highest")


def linear(p: Params, name: str, x: jax.Array) -> jax.Array:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def conv(p: Params, name: str, x: jax.Array, padding: int) -> jax.Array:
    pads = [(padding, padding)] * 2
    x = lax.conv_general_dilated(x, p[f"{name}.weight"], (1, 1), pads, dimension_numbers=("NCHW", "OIHW", "NCHW"))
    return x + p[f"{name}.bias"][:, None, None] if f"{name}.bias" in p else x


def batch_norm(p: Params, name: str, x: jax.Array) -> jax.Array:
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    x = (x - mean) * lax.rsqrt(var + 1e-5)
    return x * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]


def layer_norm(p: Params, name: str, x: jax.Array) -> jax.Array:
    x = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def max_pool(x: jax.Array) -> jax.Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


def conv4(net: Conv4, p: Params, x: jax.Array) -> jax.Array:
    for i, block in enumerate(net.blocks):
        x = batch_norm(p, f"blocks.{i}.bn", conv(p, f"blocks.{i}.conv", x, 1))
        x = jax.nn.leaky_relu(x, block.activation.negative_slope)
        x = max_pool(x) if isinstance(block.pool, nn.MaxPool2d) else x
    return linear(p, "linear", x.reshape(len(x), -1))


def resnet12(net: ResNet12, p: Params, x: jax.Array) -> jax.Array:
    for i, block in enumerate(net.blocks):
        slope, inner = block.activation.negative_slope, x
        for j in (0, 3, 6):
            inner = conv(p, f"blocks.{i}.layers.{j}", inner, 1)
            inner = batch_norm(p, f"blocks.{i}.layers.{j + 1}", inner)
            inner = jax.nn.leaky_relu(inner, slope) if j < 6 else inner
        around = batch_norm(p, f"blocks.{i}.shortcut.1", conv(p, f"blocks.{i}.shortcut.0", x, 0))
        x = jax.nn.leaky_relu(inner + around, slope)
        x = max_pool(x) if isinstance(block.pool, nn.MaxPool2d) else x
    return linear(p, "linear", x.mean((2, 3)))


def mlp(net: MLP, p: Params, x: jax.Array) -> jax.Array:
    last = len(net.layers) - 1
    for i in range(1, last, 2):
        x = jax.nn.relu(linear(p, f"layers.{i}", x))
    return linear(p, f"layers.{last}", x)


def transformer(net: Transformer, p: Params, x: jax.Array) -> jax.Array:
    x = linear(p, "embed", x) + p["positions.weight"]
    for i, block in enumerate(net.blocks):
        name = f"blocks.{i}"
        qkv = linear(p, f"{name}.qkv", layer_norm(p, f"{name}.norm1", x))
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, block.heads, -1), (2, 3), (0, 2))
        scores = jax.nn.softmax(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5)
        x = x + linear(p, f"{name}.out", (scores @ v).swapaxes(1, 2).reshape(x.shape))
        up = linear(p, f"{name}.up", layer_norm(p, f"{name}.norm2", x))
        x = x + linear(p, f"{name}.down", jax.nn.gelu(up, approximate=False))
    return linear(p, "head", layer_norm(p, "norm", x.mean(1)))


NETS: dict[type[nn.Module], Callable] = {Conv4: conv4, ResNet12: resnet12, MLP: mlp, Transformer: transformer}


def cross_entropy(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], 1).mean()


def squared_error(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return ((outputs - y) ** 2).mean()


def make(problem: Problem, tasks: Task) -> Step:
    """The compiled meta-step."""
    cuda = tasks.query_x.is_cuda
    if cuda and jax.default_backend() != "gpu":
        raise LeftOut("JAX is installed without a GPU")
    device = jax.devices("gpu" if cuda else "cpu")[0]
    net, apply = problem.net, NETS[type(problem.net)]
    loss = squared_error if tasks.query_y.is_floating_point() else cross_entropy

    def meta_loss(outer: Params, sx, sy, qx, qy) -> jax.Array:
        fast, total = {name: outer[name] for name in problem.fast}, 0.0
        for step, weight in enumerate(problem.step_weights):
            slow = problem.slow(outer, step)
            grads = jax.grad(lambda p, slow=slow: loss(apply(net, {**p, **slow}, sx), sy))(fast)
            rates = outer["rates"][:, step] if problem.rows else [problem.lr] * len(fast)
            fast = {name: p - rate * grads[name] for (name, p), rate in zip(fast.items(), rates)}
            if weight:
                total += weight * loss(apply(net, {**fast, **slow}, qx), qy)
        return total

    @jax.jit
    def step(outer: Params, *tasks: jax.Array) -> Params:
        grads = jax.vmap(jax.grad(meta_loss), (None, 0, 0, 0, 0))(outer, *tasks)
        return jax.tree.map(lambda g: g.mean(0), grads)

    outer = {name: put(leaf, device) for name, leaf in problem.outer.items()}
    batch = [put(tensor, device) for tensor in tasks]
    return lambda: jax.block_until_ready(step(outer, *batch))


def put(tensor: torch.Tensor, device: jax.Device) -> jax.Array:
    array = tensor.detach().cpu().numpy()
    return jax.device_put(array.astype(np.int32) if array.dtype == np.int64 else array, device)
