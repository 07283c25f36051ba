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


@in_32_bits
def lambda_returns(
    reward: jax.Array, discount: jax.Array, value: jax.Array, lam: Scalar | jax.Array
) -> jax.Array:
    """TD(lambda) returns: G_t = r_{t+1} + d_{t+1} ((1 - lam) v_{t+1} + lam G_{t+1}), [T, ...].

    The last of the T returns goes on with the value alone: G_{T-1} = r_T + d_T v_T. Sutton and
    Barto (2018), (12.18), with a discount that may differ by state.

    Args:
      reward: [T, ...] float32, r_1 to r_T, earned on the way into states 1 to T.
      discount: [T, ...] float32, d_1 to d_T, of what comes after states 1 to T; 0 where the task
        has ended there.
      value: [T, ...] float32, v_1 to v_T, the estimates of what comes after states 1 to T.
      lam: [], or [T, ...] where it differs by state: 0 where the next reward belongs to another
        episode.
    """

    def one(after: jax.Array, x: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        reward, discount, value, lam = x
        total = reward + discount * ((1.0 - lam) * value + lam * after)
        return total, total

    lam = jnp.broadcast_to(lam, reward.shape)
    return jax.lax.scan(one, value[-1], (reward, discount, value, lam), reverse=True)[1]
