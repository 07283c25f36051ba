"""Sums of rewards along a trajectory, as scans over time."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mbrl_jax.types import Scalar
from mbrl_jax.x64 import in_32_bits


@in_32_bits
def gae(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    gamma: Scalar,
    lam: Scalar,
) -> jax.Array:
    """Generalised advantage estimates (Schulman et al. 2016, (16)), all [T, ...].

    `next_value` is of the true successor: an episode that was truncated bootstraps from it, one
    that terminated does not, and neither takes anything from the episode after it.
    """
    delta = reward + gamma * next_value * (1.0 - terminated) - value
    decay = gamma * lam * (1.0 - (terminated | truncated))

    def one(after: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta, decay = x
        advantage = delta + decay * after
        return advantage, advantage

    return jax.lax.scan(one, jnp.zeros_like(delta[0]), (delta, decay), reverse=True, unroll=8)[1]


@in_32_bits
def discounted_returns(
    reward: jax.Array, done: jax.Array, start: jax.Array, gamma: Scalar
) -> tuple[jax.Array, jax.Array]:
    """Running returns G_t = r_t + gamma G_{t-1}, from zero after `done`: ([N] last, [T, N])."""

    def one(carry: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        reward, done = x
        total = reward + gamma * carry
        return jnp.where(done, 0.0, total), total

    return jax.lax.scan(one, start, (reward, done), unroll=8)
