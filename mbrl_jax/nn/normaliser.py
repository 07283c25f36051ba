"""Running mean and variance of observations or returns, and their running range, as pytrees."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.types import Scalar
from mbrl_jax.x64 import in_32_bits


class Stats(NamedTuple):
    """float32, 8 bytes for each number of the shape and 4 more."""

    mean: jax.Array  # [*shape]
    var: jax.Array  # [*shape] population variance
    seen: jax.Array  # [] float32, how many rows were seen


@in_32_bits
def init(shape: tuple[int, ...]) -> Stats:
    """Mean 0 and variance 1, which `normalise` leaves as they are until data comes."""
    return Stats(jnp.zeros(shape), jnp.ones(shape), jnp.float32(0))


@in_32_bits
def update(stats: Stats, batch: jax.Array) -> Stats:
    """Adds the rows of `batch` [..., *shape], exactly (Chan, Golub and LeVeque 1979).

    The count stops at 2**24, where float32 would; from there on old rows fade.
    """
    shape = stats.mean.shape
    # a kernel of its own, whose rounding no neighbour changes: chunks give the uncut run's bits
    stats, batch = jax.lax.optimization_barrier((stats, batch))
    rows = batch.astype(jnp.float32).reshape(-1, *shape)
    size = rows.shape[0]
    mean, var = jnp.mean(rows, axis=0), jnp.var(rows, axis=0)
    total = stats.seen + size
    share = size / total
    shift = mean - stats.mean
    new_var = (1 - share) * stats.var + share * var + share * (1 - share) * jnp.square(shift)
    new = Stats(stats.mean + share * shift, new_var, jnp.minimum(total, 2.0**24))
    return jax.lax.optimization_barrier(new)


@in_32_bits
def normalise(stats: Stats, x: jax.Array, clip: Scalar = 10.0) -> jax.Array:
    """(x - mean) / std of `x` [..., *shape], clipped to [-clip, clip]; constants become 0."""
    ndim = x.ndim - stats.mean.ndim
    mean = stats.mean.reshape((1,) * ndim + stats.mean.shape)
    std = jnp.sqrt(stats.var + 1e-8).reshape(mean.shape)
    return jnp.clip((x.astype(jnp.float32) - mean) / std, -clip, clip)


class Range(NamedTuple):
    """Running averages of a low and a high percentile; 8 bytes."""

    low: jax.Array  # [] float32
    high: jax.Array  # [] float32


def init_range() -> Range:
    """Both ends 0: early ranges are too small, as the averages are not corrected for it."""
    return Range(jnp.float32(0), jnp.float32(0))


@in_32_bits
def update_range(
    range_: Range, values: jax.Array, rate: Scalar = 0.01, low: Scalar = 5.0, high: Scalar = 95.0
) -> Range:
    """Moves the ends towards the percentiles of `values` (Hafner et al. 2025, (7)).

    Args:
      range_: before.
      values: [...] float32; percentiles are interpolated linearly between order statistics.
      rate: the share of the new percentiles.
      low, high: the percentiles, in percent.
    """
    ends = jnp.percentile(values, jnp.asarray([low, high], jnp.float32))
    return Range(*((1.0 - rate) * old + rate * new for old, new in zip(range_, ends, strict=True)))


def width(range_: Range, least: Scalar = 1.0) -> jax.Array:
    """high - low, and at least `least`, so that small returns are not blown up: [] float32."""
    return jnp.maximum(range_.high - range_.low, least)
