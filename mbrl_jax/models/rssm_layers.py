"""Layers of the world model as functions of their parameters, and how parameters are drawn.

A layer's parameters are a dict of `kernel`, `bias` and, where it is normalised, `norm_scale`; they
are float32 and cast to the dtype that is computed in. After Hafner et al. (2025), "Mastering
diverse control tasks through world models" (DreamerV3).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from mbrl_jax.nn.precision import FULL
from mbrl_jax.types import PyTree

NORM_EPSILON = 1e-4
# the standard deviation of a unit normal that is cut at two is 1 / 1.1368
_TRUNCATED = 1.1368


def dense(params: PyTree, x: jax.Array, dtype: Any) -> jax.Array:
    """x K + b of a hidden layer: [..., in] -> [..., out] in `dtype`."""
    x = x.astype(dtype) @ params["kernel"].astype(dtype)
    return add_last(x, params["bias"])


def output(params: PyTree, x: jax.Array, dtype: Any) -> jax.Array:
    """x K + b of a last layer, computed in `dtype` and given as float32 at least."""
    x = jnp.matmul(x.astype(dtype), params["kernel"].astype(dtype), precision=FULL)
    return widened(add_last(x, params["bias"]))


def block_dense(params: PyTree, x: jax.Array, dtype: Any) -> jax.Array:
    """A dense layer with a block-diagonal kernel [G, in/G, out/G]: [..., in] -> [..., out]."""
    kernel = params["kernel"].astype(dtype)
    blocks = x.astype(dtype).reshape(*x.shape[:-1], kernel.shape[0], kernel.shape[1])
    y = jnp.einsum("...gi,gio->...go", blocks, kernel)
    return add_last(y.reshape(*x.shape[:-1], -1), params["bias"])


def conv(params: PyTree, x: jax.Array, dtype: Any, precision: Any = None) -> jax.Array:
    """A convolution of stride 1 with zeros around: [..., h, w, in] -> [..., h, w, out].

    With a 3 x 3 kernel it is one matrix product over the nine shifted images: on a CPU the gradient
    of XLA's convolution of a small grid takes many times as long.
    """
    kernel, x = params["kernel"].astype(dtype), x.astype(dtype)
    height, width = x.shape[-3:-1]
    if kernel.shape[0] == 3:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(1, 1), (1, 1), (0, 0)])
        shifts = [(i, j) for i in range(3) for j in range(3)]
        patches = [x[..., i : i + height, j : j + width, :] for i, j in shifts]
        flat = kernel.reshape(-1, kernel.shape[-1])
        y = jnp.matmul(jnp.concatenate(patches, -1), flat, precision=precision)
    else:
        y = jax.lax.conv_general_dilated(
            x.reshape(-1, *x.shape[-3:]),
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision,
        )
    return add_last(y.reshape(*x.shape[:-3], height, width, -1), params["bias"])


def norm(scale: jax.Array, x: jax.Array) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32 at least; [..., n] of the dtype of x.

    RMSNorm (Zhang and Sennrich 2019) with 1e-4 under the root.
    """
    wide = widened(x)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + NORM_EPSILON)
    return times_last(wide, scale).astype(x.dtype)


def activate(params: PyTree, x: jax.Array) -> jax.Array:
    """What follows each hidden layer: RMSNorm and SiLU, [..., n] -> [..., n]."""
    return jax.nn.silu(norm(params["norm_scale"], x))


def layer(params: PyTree, x: jax.Array, dtype: Any) -> jax.Array:
    """A hidden layer: dense, RMSNorm, SiLU; [..., in] -> [..., out] in `dtype`."""
    return activate(params, dense(params, x, dtype))


def mlp(params: PyTree, x: jax.Array, dtype: Any) -> jax.Array:
    """The hidden layers `params["0"]`, `params["1"]`, ... one after another."""
    for number in range(sum(name.isdigit() for name in params)):
        x = layer(params[str(number)], x, dtype)
    return x


def cast_kernels(params: PyTree, dtype: Any) -> PyTree:
    """The same parameters with all kernels in `dtype`, so that a loop does not cast them.

    Biases and scales of norms stay as they are: products alone are computed in `dtype`.
    """

    def cast(path: tuple, x: jax.Array) -> jax.Array:
        return x.astype(dtype) if path[-1].key == "kernel" else x

    return jax.tree_util.tree_map_with_path(cast, params)


def widened(x: jax.Array) -> jax.Array:
    """`x` as float32, or as float64 where it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def add_last(x: jax.Array, vector: jax.Array) -> jax.Array:
    """x [..., n] + vector [n], of the dtype of `x`."""
    return x + vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def times_last(x: jax.Array, vector: jax.Array) -> jax.Array:
    """x [..., n] * vector [n], of the dtype of `x`."""
    return x * vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def init_kernel(key: jax.Array, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    """A kernel whose entries have standard deviation scale / sqrt(fan_in), cut at two of a normal.

    Args:
      key: consumed.
      shape: [in, out], [G, in/G, out/G] or [height, width, in, out]. All axes but the last count as
        inputs, all blocks of a block kernel too.
      scale: 0 gives zeros.
    """
    fan_in = math.prod(shape[:-1])
    values = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
    return values * (scale * _TRUNCATED / math.sqrt(fan_in))
