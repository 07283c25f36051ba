"""One step of the recurrent state, for many rows at once, with weights cut out before.

Every step of the posterior pass, of an imagination and of a policy's memory is this one. Rows are
those of one step, or of all steps of a sequence where a gradient computes them again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.models.rssm_layers import NORM_EPSILON
from mbrl_jax.nn.precision import FULL, compute_dtype
from mbrl_jax.types import PyTree


class How(NamedTuple):
    """Static settings of a pass.

    `deter` is cut into the G pieces of the core's blocks. On a CPU a block product is fast only if
    each block lies in one piece, so blocks come first, [G, R, D/G]. On an accelerator that costs
    transpositions, so rows come first, [R, G, D/G]; what a loop carries or gives is one array
    there, and the layers in front are one product, since each further array is a kernel.
    """

    dtype: Any  # computed in
    gaussian: bool  # latents are normal
    rows_first: bool

    @property
    def wide(self) -> Any:
        """The dtype of sums and statistics."""
        return jnp.promote_types(self.dtype, jnp.float32)


def settings(dtype: Any, gaussian: bool) -> How:
    """The settings for this backend."""
    return How(compute_dtype(dtype), gaussian, jax.default_backend() != "cpu")


class Weights(NamedTuple):
    """What a step of the core multiplies with; h is the width of a hidden layer.

    The L hidden layers in front are those on `deter` and `stoch` and, where nothing of it is
    computed before, that on the action.
    """

    front: jax.Array | tuple[jax.Array, ...]
    """Kernels of those, [D, h], [Z, h], [A, h]; or they and `blocks` as one matrix of
    [D + Z + A, L h + D], zero elsewhere."""
    bias_in: jax.Array  # [L, h]
    scale_in: jax.Array  # [L, h]
    mix: jax.Array  # [L h, D] of the next layer, its inputs from those
    blocks: jax.Array  # [G, D/G, D/G] of that layer, its inputs from `deter`
    scale: jax.Array  # [D]
    gates: jax.Array  # [G, D/G, 3 D/G]
    gates_bias: jax.Array  # [3 D]


class Normed(NamedTuple):
    """RMSNorm and SiLU of some values, and what their derivative needs."""

    y: jax.Array  # silu(unit * scale)
    unit: jax.Array  # the values over their root mean square
    slope: jax.Array  # of the SiLU at unit * scale
    root: jax.Array  # 1 over the root mean square


class Trace(NamedTuple):
    """All that a step of the core computes; [blocks] is as `How` says."""

    inner: Normed  # [R, L, h]
    hidden: Normed  # [R, D]
    gates: jax.Array  # [blocks] of 3 D/G
    deter: jax.Array  # [blocks] of D/G, the next one


Packed = Any  # a state as a loop carries it, from `packed`
_JOINED = 512  # width of `deter` up to which all that a state is multiplied with is one product


def cut(params: PyTree, with_action: bool) -> tuple[Weights, jax.Array, PyTree | None]:
    """The weights of a step from the parameters `core`.

    Args:
      params: of the core.
      with_action: the action is part of the step.

    Returns:
      The weights, the bias [D] that the step is driven by, and without the action the kernel [h, D]
      through which the layer on it drives the step too.
    """
    blocks, _, size = params["hid"]["kernel"].shape
    width = params["x0"]["bias"].shape[0]
    # rows of a block's kernel: its piece of `deter`, then the outputs of the three layers
    own, mixed = jnp.split(params["hid"]["kernel"], [size], 1)
    mixed = jnp.moveaxis(mixed, 0, 1).reshape(3 * width, blocks * size)
    front = [params[name] for name in ("x0", "x1", "x2")[: 3 if with_action else 2]]
    mix, rest = jnp.split(mixed, [len(front) * width])
    weights = Weights(
        front=tuple(layer["kernel"] for layer in front),
        bias_in=jnp.stack([layer["bias"] for layer in front]),
        scale_in=jnp.stack([layer["norm_scale"] for layer in front]),
        mix=mix,
        blocks=own,
        scale=params["hid"]["norm_scale"],
        gates=params["gates"]["kernel"],
        gates_bias=params["gates"]["bias"],
    )
    return weights, params["hid"]["bias"], None if with_action else rest


def prepared(how: How, w: Weights) -> Weights:
    """The weights as a loop takes them: kernels in the dtype that is computed in."""
    kernels = {name: getattr(w, name).astype(how.dtype) for name in ("mix", "blocks", "gates")}
    front: Any = tuple(kernel.astype(how.dtype) for kernel in w.front)
    if how.rows_first and w.scale.shape[0] <= _JOINED:
        front, own = diagonal(front), diagonal(tuple(kernels["blocks"]))
        own = jnp.pad(own, ((0, front.shape[0] - own.shape[0]), (0, 0)))
        front = jnp.concatenate([front, own], -1)
    return w._replace(front=front, **kernels)


def diagonal(kernels: tuple[jax.Array, ...]) -> jax.Array:
    """The block-diagonal matrix [sum of n, sum of m] of matrices [n, m]."""
    width = sum(kernel.shape[1] for kernel in kernels)
    rows, before = [], 0
    for kernel in kernels:
        after = width - before - kernel.shape[1]
        rows.append(jnp.pad(kernel, ((0, 0), (before, after))))
        before += kernel.shape[1]
    return jnp.concatenate(rows)


def packed(how: How, deter: jax.Array, stoch: jax.Array) -> Packed:
    """A state as a loop carries it: deter [blocks], stoch [R, S, C]."""
    deter, stoch = deter.astype(how.dtype), stoch.astype(how.dtype).reshape(stoch.shape[0], -1)
    if how.rows_first:
        return jnp.concatenate([from_blocks(how, deter), stoch], -1)
    return deter, stoch


def unpacked(how: How, state: Packed, blocks: int, width: int) -> tuple[jax.Array, jax.Array]:
    """(deter [blocks], stoch [R, Z]) of a state, with G blocks of `width` numbers."""
    if not how.rows_first:
        return state
    return to_blocks(how, state[:, : blocks * width], blocks), state[:, blocks * width :]


def features(how: How, state: Packed) -> jax.Array:
    """[R, D + Z] of a packed state: `deter` and `stoch` side by side, as heads take them."""
    if how.rows_first:
        return state
    return jnp.concatenate([from_blocks(how, state[0]), state[1]], -1)


def masked(how: How, state: Packed, keep: jax.Array) -> Packed:
    """A packed state, zero where `keep` [R] is 0."""
    keep = keep.astype(how.dtype)
    if how.rows_first:
        return keep[:, None] * state
    return keep[None, :, None] * state[0], keep[:, None] * state[1]


def core(
    how: How, w: Weights, state: Packed, drive: jax.Array, action: jax.Array | None = None
) -> Trace:
    """A step of R rows.

    Args:
      how: static.
      w: from `prepared`.
      state: from `packed`, the state before.
      drive: [R, D], or [1, D], added to the hidden layer: its bias, and what the action adds.
      action: [R, A] limited action vectors, where `w` takes one.
    """
    blocks, size = w.blocks.shape[:2]
    deter, stoch = unpacked(how, state, blocks, size)
    inputs = [from_blocks(how, deter), stoch]
    inputs += [] if action is None else [action.astype(how.dtype)]
    if isinstance(w.front, tuple):
        inner = jnp.concatenate([dot(how, x, y) for x, y in zip(inputs, w.front, strict=True)], -1)
        own = from_blocks(how, block_dot(how, deter, w.blocks))
    else:
        made = dot(how, state if action is None else jnp.concatenate(inputs, -1), w.front)
        inner, own = jnp.split(made, [w.scale_in.size], -1)
    inner = inner.reshape(-1, *w.scale_in.shape)
    first = normed(how, inner + w.bias_in[None], w.scale_in[None])
    mixed = dot(how, first.y.reshape(first.y.shape[0], -1), w.mix)
    hidden = normed(how, own + mixed + drive, w.scale[None])
    gates = block_dot(how, to_blocks(how, hidden.y, blocks), w.gates)
    gates = gates + per_unit(how, w.gates_bias, blocks)
    _, _, candidate, update = gate(gates)
    return Trace(first, hidden, gates, update * candidate + (1.0 - update) * deter)


def core_back(how: How, w: Weights, inner: jax.Array, hidden: jax.Array) -> jax.Array:
    """From cotangents before the norms, [R, 2, h] and [R, D], to those of the state, [R, D + Z].

    Without what leads around the hidden layer.
    """
    if not isinstance(w.front, tuple):
        flat = inner.reshape(inner.shape[0], -1)
        return dot(how, jnp.concatenate([flat, hidden], -1), w.front, (1, 1))
    deter, stoch = (dot(how, inner[:, i], kernel, (1, 1)) for i, kernel in enumerate(w.front))
    own = block_dot(how, to_blocks(how, hidden, w.blocks.shape[0]), w.blocks, (2, 2))
    return jnp.concatenate([deter + from_blocks(how, own), stoch], -1)


def gate(gates: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(reset, the candidate as it comes, the candidate, update) of gates [blocks] of 3 D/G.

    With r, c, u the thirds of each block: s(r), c, tanh(s(r) c), s(u - 1), s the logistic function.
    The next state is update * candidate + (1 - update) * deter.
    """
    reset, raw, update = jnp.split(gates, 3, -1)
    reset = jax.nn.sigmoid(reset)
    return reset, raw, jnp.tanh(reset * raw), jax.nn.sigmoid(update - 1.0)


def normed(how: How, x: jax.Array, scale: jax.Array) -> Normed:
    """SiLU(RMSNorm(x)) over the last axis, with `scale` of as many axes as `x`."""
    root = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + NORM_EPSILON)
    unit = x * root
    scaled = unit * scale
    chance = jax.nn.sigmoid(scaled)
    slope = chance * (1.0 + scaled * (1.0 - chance))
    return Normed((scaled * chance).astype(how.dtype), unit, slope, root)


def limited(actions: jax.Array) -> jax.Array:
    """Action vectors [..., A] as the core takes them: entries beyond 1 in magnitude become 1."""
    return actions / jax.lax.stop_gradient(jnp.maximum(1.0, jnp.abs(actions)))


def to_blocks(how: How, x: jax.Array, blocks: int) -> jax.Array:
    """[R, D] as [blocks] of D/G."""
    x = x.reshape(x.shape[0], blocks, -1)
    return x if how.rows_first else jnp.swapaxes(x, 0, 1)


def from_blocks(how: How, x: jax.Array) -> jax.Array:
    """[blocks] of D/G as [R, D]."""
    x = x if how.rows_first else jnp.swapaxes(x, 0, 1)
    return x.reshape(x.shape[0], -1)


def per_unit(how: How, x: jax.Array, blocks: int) -> jax.Array:
    """[D] as a summand of [blocks] of D/G."""
    return to_blocks(how, x[None], blocks)


def dot(how: How, x: jax.Array, y: jax.Array, contract: tuple = (1, 0), full: bool = False):
    """The product of two matrices in the dtype that is computed in, summed and given in float32.

    Args:
      how: static.
      x, y: matrices.
      contract: the axis of each that is summed over.
      full: at full precision (see `nn.precision`).
    """
    axes = ((contract[:1], contract[1:]), ((), ()))
    return _product(how, x, y, axes, FULL if full else None)


def block_dot(how: How, x: jax.Array, y: jax.Array, contract: tuple = (2, 1)) -> jax.Array:
    """The product of each block: [blocks] of n with [G, n, m] is [blocks] of m.

    With `contract` (2, 2) it is the transposed product, [blocks] of m with [G, n, m].
    """
    axis = 1 if how.rows_first else 0
    made = _product(how, x, y, ((contract[:1], contract[1:]), ((axis,), (0,))))
    return jnp.swapaxes(made, 0, 1) if how.rows_first else made


def block_outer(how: How, x: jax.Array, y: jax.Array) -> jax.Array:
    """The gradient of each block's kernel: [blocks] of n and [blocks] of m to [G, n, m]."""
    axis = 1 if how.rows_first else 0
    return _product(how, x, y, (((1 - axis,), (1 - axis,)), ((axis,), (axis,))))


def _product(how: How, x: jax.Array, y: jax.Array, axes: tuple, precision: Any = None):
    x, y = x.astype(how.dtype), y.astype(how.dtype)
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=how.wide)
