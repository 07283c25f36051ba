"""Rollouts of a dynamics model: many states at once, under a policy or a sequence of actions.

A row of the batch ends where the task does, where the model is too uncertain, or where a number is
not finite; it is never taken up again. `unroll` hands each depth's transitions to a function that
writes them (into a replay, say); `rollout` keeps them all; `returns` keeps only sums of rewards.

`Rules` say when a row ends for doubt and which transitions count; `rollout_rules` makes them after
MACURA, M2AC or a fixed threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.models.dynamics import DynamicsModel
from mbrl_jax.types import InputError, PyTree, Scalar, Transition
from mbrl_jax.x64 import in_32_bits

Act = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(obs [B, D], key, depth int32) -> actions [B] int32 or [B, A]."""


class Rules(NamedTuple):
    """What ends a row and which transitions count; None leaves a rule out, all may be traced."""

    threshold: Scalar | Callable[[jax.Array], jax.Array] | None = None
    """A row ends, without this transition, once its disagreement is at the threshold or above; a
    function gets the disagreements [B] of depth 0 and gives the threshold of the whole rollout."""
    keep: Callable[[jax.Array], Scalar] | None = None
    """depth -> the share of the going rows, those of least disagreement, whose transitions count;
    the others go on all the same."""
    penalty: Scalar | None = None
    """Times the disagreement, subtracted from the reward."""


NO_RULES = Rules()


class Rollout(NamedTuple):
    """T depths of B rows; where `mask` is False the numbers mean nothing."""

    transition: Transition  # [T, B, ...]
    disagreement: jax.Array  # [T, B] float32
    mask: jax.Array  # [T, B] bool, the transition counts


class Ending(NamedTuple):
    """How an `unroll` came out."""

    obs: jax.Array  # [B, D] where each row is now
    going: jax.Array  # [B] bool, neither terminated nor cut off
    threshold: jax.Array  # [] float32 that was used, inf without one
    faults: jax.Array  # [] int32, rows that ended because a number was not finite


@in_32_bits
def unroll(
    model: DynamicsModel,
    params: PyTree,
    obs: jax.Array,
    act: Act,
    key: jax.Array,
    length: int | jax.Array,
    write: Callable[..., PyTree],
    carry: PyTree,
    rules: Rules = NO_RULES,
) -> tuple[PyTree, Ending]:
    """Rolls every row out for `length` steps and hands each depth to `write`.

    Args:
      model, params: the dynamics model and its parameters.
      obs: [B, D] where the rows start.
      act: the policy.
      key: consumed.
      length: of the rollout; may be traced, and is the same for all rows.
      write: (carry, depth, Transition [B, ...], disagreement [B], mask [B]) -> carry.
      carry: what `write` is given first.
      rules: when a row ends.

    Raises:
      InputError: a length below 1 that is known when this is traced.
    """
    if isinstance(length, int) and length < 1:
        raise InputError(f"length = {length}: expected 1 or more")

    def step(depth: jax.Array, loop: Any) -> Any:
        carry, obs, going, threshold, faults = loop
        act_key, step_key = jax.random.split(jax.random.fold_in(key, depth))
        action = act(obs, act_key, depth)
        next_obs, reward, terminated, score = model.predict(params, obs, action, step_key)
        finite = jnp.isfinite(next_obs).all(axis=-1) & jnp.isfinite(reward) & jnp.isfinite(score)
        next_obs = jnp.where(finite[:, None], next_obs, obs)
        faults += jnp.sum(going & ~finite)
        alive = going & finite
        if callable(rules.threshold):
            of_first = jax.lax.cond(depth == 0, rules.threshold, lambda score: threshold, score)
            threshold = jnp.asarray(of_first, jnp.float32)
        if rules.threshold is not None:
            alive = alive & (score < threshold)
        mask = alive
        if rules.keep is not None:
            order = jnp.argsort(jnp.where(alive, score, jnp.inf))
            rank = jnp.zeros(len(order), jnp.int32).at[order].set(jnp.arange(len(order)))
            mask = alive & (rank < rules.keep(depth) * jnp.sum(alive))
        if rules.penalty is not None:
            reward = reward - rules.penalty * score
        cut = jnp.zeros_like(terminated)
        row = Transition(obs, action, reward, next_obs, terminated, cut)
        carry = write(carry, depth, row, score, mask)
        obs = jnp.where(alive[:, None], next_obs, obs)
        return carry, obs, alive & ~terminated, threshold, faults

    threshold = rules.threshold
    unset = jnp.float32(jnp.inf if threshold is None or callable(threshold) else threshold)
    start = (carry, obs, jnp.ones(obs.shape[0], bool), unset, jnp.int32(0))
    carry, *ending = jax.lax.fori_loop(0, length, step, start)
    return carry, Ending(*ending)


@in_32_bits
def rollout(
    model: DynamicsModel,
    params: PyTree,
    obs: jax.Array,
    act: Act | jax.Array,
    key: jax.Array,
    max_length: int | None = None,
    length: int | jax.Array | None = None,
    rules: Rules = NO_RULES,
) -> Rollout:
    """Every transition of a rollout from obs [B, D].

    `act` is a policy, or actions [T, B, ...] one for each depth, which then set `max_length`.
    `length` (at most `max_length`, may be traced) is how deep it goes; later depths are masked.

    Memory: T * B * (8 D + 4 A + 11) bytes, linear in both.

    Raises:
      InputError: a length below 1, or above `max_length` where both are known.
    """
    if not callable(act):
        actions, max_length = (
            jnp.asarray(act),
            act.shape[0],
        )  # numpy's cannot be indexed by a tracer

        def act(obs: jax.Array, key: jax.Array, depth: jax.Array) -> jax.Array:
            return actions[depth]

    if max_length is None or max_length < 1:
        raise InputError(f"max_length = {max_length}: expected 1 or more")
    if isinstance(length, int) and length > max_length:
        raise InputError(f"length = {length}: expected at most max_length = {max_length}")

    def one(obs: jax.Array) -> tuple[Transition, jax.Array, jax.Array]:
        action = act(obs, jax.random.fold_in(key, 0), jnp.int32(0))
        step = model.predict(params, obs, action, jax.random.fold_in(key, 1))
        flag = step.terminated
        row = Transition(obs, action, step.reward, step.next_obs, flag, flag)
        return row, step.disagreement, flag

    shapes = jax.eval_shape(one, obs)
    empty = jax.tree.map(lambda x: jnp.zeros((max_length, *x.shape), x.dtype), shapes)

    def write(kept: PyTree, depth: jax.Array, *rows: PyTree) -> PyTree:
        return jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, depth, 0), kept, rows
        )

    depths = max_length if length is None else length
    kept, _ = unroll(model, params, obs, act, key, depths, write, empty, rules)
    return Rollout(*kept)


@in_32_bits
def returns(
    model: DynamicsModel, params: PyTree, obs: jax.Array, actions: jax.Array, key: jax.Array
) -> jax.Array:
    """Sum of rewards up to the task's end for actions [T, B, ...] from obs [B, D]; [B].

    The reward of the step that ends the task counts. A row with a number that is not finite is nan.
    """

    def step(carry: tuple[jax.Array, ...], x: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        obs, going, total = carry
        action, t = x
        now = jax.random.fold_in(key, t)
        next_obs, reward, terminated, _ = model.predict(params, obs, action, now)
        finite = jnp.isfinite(next_obs).all(axis=-1)
        reward = jnp.where(finite, reward, jnp.nan)
        total = jnp.where(going, total + reward, total)
        obs = jnp.where((going & finite)[:, None], next_obs, obs)
        return (obs, going & ~terminated, total), None

    num = obs.shape[0]
    start = (obs, jnp.ones(num, bool), jnp.zeros(num))
    depths = jnp.arange(actions.shape[0])
    (_, _, total), _ = jax.lax.scan(step, start, (actions, depths))
    return total
