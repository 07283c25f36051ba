"""The targets of MuZero's unrolled loss: which records count, returns, and what stands past an end.

A window [B, L, ...] follows one environment from the record that is unrolled. Its records run on
into the next episode; what belongs to the first episode is told by `Status`. Arrays here are
[B, T]: column k belongs to the state after k steps, or to the step out of it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.nn.returns import lambda_returns
from mbrl_jax.types import PyTree, Scalar


class Record(NamedTuple):
    """One observation, what was done on it, and what the search said that did so."""

    obs: PyTree  # [*lead, *obs_shape]
    action: jax.Array  # [*lead] int32; [*lead, D] float32 in [-1, 1] of continuous actions
    reward: jax.Array  # [*lead] float32, of that action, in the eyes of the player who took it
    terminated: jax.Array  # [*lead] bool, the task ended with that action
    truncated: jax.Array  # [*lead] bool, the time limit struck with it
    is_last: jax.Array  # [*lead] bool, a final observation, whose action is idle
    weights: jax.Array  # [*lead, A], or [*lead, K] of the candidates
    candidates: PyTree  # [*lead, K, D] float32 of continuous actions, before the squashing; or ()
    value: jax.Array  # [*lead] float32, of the root


class Status(NamedTuple):
    """Where the states and steps of a window stand; [B, T] bool each."""

    running: jax.Array  # the state is acted on in the first record's episode
    ended: jax.Array  # the task had ended before the step, or with the step that led to the state


def status_of(terminated: jax.Array, truncated: jax.Array, is_last: jax.Array) -> Status:
    """The status of each state of a window, the last of which may have no step.

    A state past a time limit is neither running nor ended: nothing is known of it. So is the whole
    of a window that opens with a final observation.

    Args:
      terminated, truncated: [B, T] bool, of the steps.
      is_last: [B, T] bool, of the records.
    """

    def before(x: jax.Array) -> jax.Array:
        some = jnp.cumsum(x.astype(jnp.int32), axis=1) > 0
        return jnp.concatenate([jnp.zeros_like(some[:, :1]), some[:, :-1]], axis=1)

    valid = ~is_last[:, :1]
    over = before(terminated | truncated)
    # a later episode of the window may end too; the first end is that of this one
    first_end = (terminated | truncated) & ~over
    ended = before(first_end & terminated)
    return Status(valid & ~over, valid & ended)


def discounts(
    terminated: jax.Array, to_play: jax.Array | None, gamma: Scalar
) -> jax.Array:  # fmt: skip
    """The discount of what comes after each of the steps, [B, T]: 0 at an end of the task.

    Where another player is to move next it is negative: his gain is a loss. Players are compared,
    not moves counted, so that one may move twice.

    Args:
      terminated: [B, T] bool, of the steps.
      to_play: [B, T + 1] int32, who is to move in each state; None of one player.
      gamma: [] discount factor.
    """
    discount = gamma * (1.0 - terminated.astype(jnp.float32))
    if to_play is None:
        return discount
    return jnp.where(to_play[:, 1:] == to_play[:, :-1], discount, -discount)


def n_step_returns(
    reward: jax.Array, discount: jax.Array, value: jax.Array, stop: jax.Array, n: int
) -> jax.Array:
    """Sums of n rewards and the value after them, [B, T - n + 1]; fewer rewards at a time limit.

    G_k = r_k + d_k (r_{k+1} + d_{k+1} (... + d v)), Schrittwieser et al. (2020), z of section 3.

    Args:
      reward: [B, T] of the steps.
      discount: [B, T] as from `discounts`.
      value: [B, T], of the states after the steps.
      stop: [B, T] bool, steps after which the value is taken at once, such as those that the time
        limit cut off.
      n: steps, at most T.
    """
    ends = reward + discount * value

    def longer(shorter: jax.Array, _: None) -> tuple[jax.Array, None]:
        after = jnp.concatenate([shorter[:, 1:], value[:, -1:]], axis=1)
        return jnp.where(stop, ends, reward + discount * after), None

    returns, _ = jax.lax.scan(longer, ends, None, length=n - 1)
    return returns[:, : reward.shape[1] - n + 1]


def mean_returns(
    reward: jax.Array, discount: jax.Array, value: jax.Array, stop: jax.Array, lam: Scalar
) -> jax.Array:
    """TD(lambda) returns [B, T], which reach to the end of the window at most.

    Args:
      reward, discount, value, stop: as in `n_step_returns`.
      lam: [] 0 takes each next value, 1 all rewards.
    """
    given = (reward.T, discount.T, value.T, jnp.where(stop, 0.0, lam).T)
    return lambda_returns(*given).T


class Targets(NamedTuple):
    """What an unroll of K steps is trained towards; masks are float32."""

    policy: jax.Array  # [B, K + 1, A], or [B, K + 1, candidates]
    candidates: PyTree  # [B, K + 1, candidates, D]; or ()
    value: jax.Array  # [B, K + 1]
    reward: jax.Array  # [B, K]; sums since the prefix began, if there is one
    continues: jax.Array  # [B, K], 1 where the task goes on
    policy_mask: jax.Array  # [B, K + 1]
    value_mask: jax.Array  # [B, K + 1]
    step_mask: jax.Array  # [B, K], of rewards and continuations
    likeness_mask: jax.Array  # [B, K], of the states after the steps, whose observations are known


def targets_of(
    window: Record, status: Status, policy: jax.Array, candidates: PyTree, value: jax.Array,
    prefix_period: int,
) -> Targets:  # fmt: skip
    """The targets of an unroll, with absorbing states after the end of the task.

    There rewards and values are 0 and the policy does not matter. Nothing is asked of states beyond
    a time limit, since it is none of the task.

    Args:
      window: [B, L, ...], of which the first K + 1 records are unrolled.
      status: [B, K + 1] of its states.
      policy, candidates: as in `Targets`.
      value: [B, K + 1], returns.
      prefix_period: steps after which sums of rewards start anew; 0 for each reward.
    """
    num = policy.shape[1] - 1
    running, ended = (x.astype(jnp.float32) for x in status)
    reward = window.reward[:, :num] * running[:, :num]
    goes_on = running[:, :num] * (1.0 - window.terminated[:, :num])
    if prefix_period:
        starts = [k - k % prefix_period for k in range(num)]
        sums = [jnp.sum(reward[:, starts[k] : k + 1], axis=1) for k in range(num)]
        reward = jnp.stack(sums, axis=1)
    known = running + ended
    return Targets(
        policy, candidates, value * running, reward, goes_on,
        policy_mask=running, value_mask=known, step_mask=known[:, :num],
        likeness_mask=running[:, :num],
    )  # fmt: skip
