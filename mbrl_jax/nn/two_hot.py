"""Scalars as distributions over fixed bins: the two-hot code, and the symmetric logarithm.

A scalar between two neighbouring bins is given to both of them, with weights whose mean is the
scalar (Imani and White 2018, "Improving regression performance with distributional losses"). With
exponentially spaced bins one network predicts values of any magnitude: Hafner et al. (2025),
"Mastering diverse control tasks through world models". Everything here is float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mbrl_jax.x64 import in_32_bits


@in_32_bits
def symlog(x: jax.Array) -> jax.Array:
    """sign(x) ln(1 + |x|) of each element of `x` [...], a logarithm that keeps the sign."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


@in_32_bits
def symexp(x: jax.Array) -> jax.Array:
    """sign(x) (exp |x| - 1) of each element of `x` [...], the inverse of `symlog`."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


@in_32_bits
def symexp_bins(num: int = 255, limit: float = 20.0) -> jax.Array:
    """The `num` bins of DreamerV3, [num] float32, in ascending order and exactly symmetric.

    They are the symexp of an even grid over [-limit, limit]. With an odd number the middle one is
    exactly 0. The largest is symexp(20) = 4.85e8 by default.

    Args:
      num: how many, at least 2.
      limit: the symlog of the largest bin.
    """
    half = symexp(jnp.linspace(-limit, 0.0, num // 2 + 1, dtype=jnp.float32))
    if num % 2:
        return jnp.concatenate([half, -half[-2::-1]])
    half = symexp(jnp.linspace(-limit, limit, num, dtype=jnp.float32)[: num // 2])
    return jnp.concatenate([half, -half[::-1]])


@in_32_bits
def neighbours(target: jax.Array, bins: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bin below each target and the weight of the bin above it, both of the target's shape.

    A target that equals a bin gives all weight to it, and one beyond the first or the last bin all
    weight to that bin.

    Args:
      target: [...] float32.
      bins: [K] float32, in ascending order, K at least 2.

    Returns:
      (index int32 in [0, K - 2], weight float32 in [0, 1] of bin index + 1); the weight is NaN
      where the target is.
    """
    bins, flat = jnp.asarray(bins), jnp.asarray(target, jnp.float32).reshape(-1, 1)
    # on a CPU a sum over more than 32 entries is split, and its terms are written out before
    table = jnp.pad(bins, (0, -bins.shape[0] % 32), constant_values=jnp.inf).reshape(1, -1, 32)
    below = jnp.sum(table <= flat[..., None], axis=(1, 2), dtype=jnp.int32) - 1
    below = jnp.clip(below, 0, bins.shape[0] - 2).reshape(jnp.shape(target))
    low, high = bins[below], bins[below + 1]
    return below, jnp.clip((target - low) / (high - low), 0.0, 1.0)


@in_32_bits
def two_hot_loss(logits: jax.Array, target: jax.Array, bins: jax.Array) -> jax.Array:
    """The cross-entropy of the two-hot codes of `target` under softmax(logits), [...] float32.

    The log-probabilities of two bins are gathered, so that no array of K weights is made. No
    gradient goes to the target.

    Args:
      logits: [..., K] float32.
      target: [...] float32, in the units of the bins.
      bins: [K] float32, in ascending order.
    """
    return _cross_entropy(logits, *neighbours(jax.lax.stop_gradient(target), bins))


@jax.custom_jvp
def _cross_entropy(logits: jax.Array, below: jax.Array, weight: jax.Array) -> jax.Array:
    """`two_hot_loss` of targets given as `neighbours` gives them."""
    both = jnp.stack([below, below + 1], axis=-1)
    chosen = jnp.take_along_axis(logits, both, axis=-1)
    of_both = (1.0 - weight) * chosen[..., 0] + weight * chosen[..., 1]
    return jax.nn.logsumexp(logits, axis=-1) - of_both


@_cross_entropy.defjvp
def _cross_entropy_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """The slope is softmax minus code: one pass over the logits, where a gather leaves a scatter.

    No gradient goes to the target.
    """
    logits, below, weight = primals
    place = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) - below[..., None]
    weight = weight[..., None]
    code = jnp.where(place == 0, 1.0 - weight, jnp.where(place == 1, weight, 0.0))
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    slope = jnp.exp(logits - total) - code
    return _cross_entropy(*primals), jnp.sum(slope * tangents[0], axis=-1)


@in_32_bits
def two_hot_mean(logits: jax.Array, bins: jax.Array) -> jax.Array:
    """The expectation of `bins` under softmax(logits), [...] float32.

    Bins that mirror each other are added first, so that a uniform distribution over symmetric bins
    has the mean 0 exactly, where a sum from left to right would leave thousands.

    Args:
      logits: [..., K] float32.
      bins: [K] float32, in ascending order.
    """
    terms = jax.nn.softmax(logits, axis=-1) * bins.reshape((1,) * (logits.ndim - 1) + (-1,))
    half = bins.shape[0] // 2
    pairs = jnp.flip(terms[..., :half], axis=-1) + terms[..., -half:]
    total = jnp.sum(pairs, axis=-1)
    return total + terms[..., half] if bins.shape[0] % 2 else total
