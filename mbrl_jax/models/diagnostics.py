"""How good a dynamics model is: errors over many steps, calibration, and what doubt is worth.

All functions are pure and may be jitted; `analysis.plots` draws what they return.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.models.dynamics import DynamicsModel, Gaussian
from mbrl_jax.models.rollout import Act, unroll
from mbrl_jax.types import InputError, PyTree
from mbrl_jax.x64 import in_32_bits

LEVELS = (0.5, 0.9, 0.95)  # of the central intervals whose coverage is measured


class KStepErrors(NamedTuple):
    """Depth k - 1 holds the errors after k steps."""

    per_dim: jax.Array  # [T, D] mean squared error
    total: jax.Array  # [T] mean over dimensions
    disagreement: jax.Array  # [T] mean
    num: jax.Array  # [T] windows that reach so far


class Calibration(NamedTuple):
    """Of predictive distributions [N, K] against what came."""

    pit: (
        jax.Array
    )  # [bins] share of probability integral transforms in each bin; flat is calibrated
    coverage: jax.Array  # [3] share of outcomes within the central intervals of LEVELS
    nll: jax.Array  # [] mean negative log-likelihood of an outcome, in nats a dimension
    mse: jax.Array  # [] mean squared error of the mean


@in_32_bits
def k_step_errors(
    model: DynamicsModel,
    params: PyTree,
    obs: jax.Array,
    actions: jax.Array,
    next_obs: jax.Array,
    valid: jax.Array,
    key: jax.Array,
) -> KStepErrors:
    """Open-loop errors against real trajectories: the model sees its own predictions.

    Args:
      model, params: the dynamics model.
      obs: [N, D] where each window of a trajectory starts.
      actions: [T, N] int32 or [T, N, A], what was done there.
      next_obs: [T, N, D] what truly followed.
      valid: [T, N] bool, the window reaches so far, without a break before.
      key: consumed.

    A prediction that is not finite makes the errors of its depth infinite.
    """

    def step(now: jax.Array, x: Any) -> tuple[jax.Array, KStepErrors]:
        action, true, mask, t = x
        said = model.predict(params, now, action, jax.random.fold_in(key, t))
        error = jnp.nan_to_num(jnp.square(said.next_obs - true), nan=jnp.inf)
        count = jnp.sum(mask)
        share = jnp.where(mask, 1.0, 0.0) / jnp.maximum(count, 1)
        per_dim = jnp.sum(jnp.where(mask[:, None], error, 0.0) * share[:, None], axis=0)
        doubt = jnp.sum(jnp.where(mask, said.disagreement, 0.0) * share)
        return said.next_obs, KStepErrors(per_dim, jnp.mean(per_dim), doubt, count)

    depths = jnp.arange(actions.shape[0])
    return jax.lax.scan(step, obs, (actions, next_obs, valid, depths))[1]


@in_32_bits
def windows(
    obs: jax.Array,
    action: jax.Array,
    next_obs: jax.Array,
    ends: jax.Array,
    length: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Every window of `length` consecutive rows of one stream, for `k_step_errors`.

    Args:
      obs, action, next_obs: [N, ...] the rows of one environment in order.
      ends: [N] bool, the episode ends with this row.
      length: T, rows of a window.

    Returns:
      obs [M, D], actions [T, M, ...], next_obs [T, M, D] and valid [T, M] for M = N - T + 1.

    Raises:
      InputError: a length below 1 or above the rows.
    """
    rows = obs.shape[0]
    if not 1 <= length <= rows:
        raise InputError(f"length = {length}: expected 1 to {rows}, the rows of the stream")
    index = jnp.arange(length)[:, None] + jnp.arange(rows - length + 1)[None]
    before = jnp.cumsum(ends[index], axis=0) - ends[index]
    return obs[index[0]], action[index], next_obs[index], before == 0


@in_32_bits
def growth_rate(errors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a, b) of the exponential a exp(b k) that fits errors [T] at k = 1 to T best in its logs.

    Raises:
      InputError: fewer than two errors.
    """
    if errors.shape[0] < 2:
        raise InputError(f"{errors.shape[0]} errors: expected 2 or more to fit their growth")
    k = jnp.arange(1, errors.shape[0] + 1, dtype=jnp.float32)
    log = jnp.log(jnp.maximum(errors, 1e-30))
    centred = k - jnp.mean(k)
    slope = jnp.sum(centred * log) / jnp.sum(jnp.square(centred))
    return jnp.exp(jnp.mean(log) - slope * jnp.mean(k)), slope


@in_32_bits
def calibration(members: Gaussian, outcome: jax.Array, bins: int = 20) -> Calibration:
    """Of the uniform mixture of `members` [E, N, K] against outcomes [N, K].

    The probability integral transform is the mixture's distribution function at the outcome (Dawid
    1984); it is uniform where the predictions are calibrated. Members need a variance.
    """
    std = jnp.sqrt(members.var)
    scaled = (outcome[None] - members.mean) / std
    pit = jnp.mean(jax.scipy.stats.norm.cdf(scaled), axis=0)
    logs = jax.scipy.stats.norm.logpdf(scaled) - jnp.log(std)
    nll = -jax.scipy.special.logsumexp(logs, axis=0) + jnp.log(members.mean.shape[0])
    mse = jnp.mean(jnp.square(outcome - jnp.mean(members.mean, axis=0)))
    inside = [jnp.mean(jnp.abs(pit - 0.5) <= level / 2.0) for level in LEVELS]
    place = jnp.clip(jnp.int32(pit.ravel() * bins), 0, bins - 1)
    share = jnp.zeros(bins).at[place].add(1.0 / pit.size)
    return Calibration(share, jnp.stack(inside), jnp.mean(nll), mse)


@in_32_bits
def rank_correlation(first: jax.Array, second: jax.Array) -> jax.Array:
    """Spearman's correlation of two arrays [N], ties at their mean rank; nan of a constant."""
    a, b = (ranks - jnp.mean(ranks) for ranks in (_ranks(first), _ranks(second)))
    return jnp.sum(a * b) / jnp.sqrt(jnp.sum(a * a) * jnp.sum(b * b))


@in_32_bits
def imagined_returns(
    model: DynamicsModel,
    params: PyTree,
    obs: jax.Array,
    act: Act,
    key: jax.Array,
    length: int | jax.Array,
) -> jax.Array:
    """Sum of rewards that the model promises a policy from obs [B, D], to the task's end; [B].

    Beside the real returns from the same states they show a model that is exploited.
    """

    def write(total: jax.Array, depth: jax.Array, row: Any, score: jax.Array, mask: jax.Array):
        return total + jnp.where(mask, row.reward, 0.0)

    total, _ = unroll(model, params, obs, act, key, length, write, jnp.zeros(obs.shape[0]))
    return total


def _ranks(x: jax.Array) -> jax.Array:
    ordered = jnp.sort(x)
    low = jnp.searchsorted(ordered, x, side="left")
    return (low + jnp.searchsorted(ordered, x, side="right") - 1) / 2.0
