"""One face for every environment: an `Env` is a pytree of a gymnax environment and its parameters.

`Env.step` never resets. `reset_batch` and `step_batch` run N environments side by side and start
the next episode themselves, so that the true successor of every step stays visible.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax import loops, prng
from mbrl_jax.types import EnvSpec, PyTree, Step
from mbrl_jax.x64 import in_32_bits


class TimeStep(NamedTuple):
    """What one step of one environment gives; `obs` is the successor, before any reset."""

    obs: PyTree  # [*obs_shape], or a dict of arrays
    reward: jax.Array  # [] float32
    terminated: jax.Array  # [] bool
    truncated: jax.Array  # [] bool, False where `terminated`


@dataclasses.dataclass(frozen=True)
class Env:
    """A gymnax environment with its parameters, as a pytree whose leaves are the parameters.

    The parameters are traced: they may be vmapped (gravity, the step at which a wall moves).
    Continuous actions lie within `spec.action_low` and `spec.action_high`, are clipped to them,
    and are rescaled from there to the native bounds, where both of those are finite.
    """

    base: Any  # gymnax Environment; hashed by identity, so `make_env` builds each one once
    params: Any  # gymnax EnvParams
    spec: EnvSpec
    native_low: tuple[float, ...] | None = None
    native_high: tuple[float, ...] | None = None
    cached_resets: int = 0  # start states drawn once per run and reused; 0 draws each afresh
    arguments: tuple[tuple[str, Any], ...] = ()  # what `make_env` was called with, for the record
    native_shape: tuple[int, ...] | None = None  # of a continuous action; [action_dim] if None

    @in_32_bits
    def reset(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """A first state and its observation `[*obs_shape]`."""
        obs, state = self.base.reset_env(key, self.params)
        return _strong(state), self._cast(obs)

    @in_32_bits
    def step(self, key: jax.Array, state: PyTree, action: jax.Array) -> tuple[PyTree, TimeStep]:
        """One step without reset; `action` is [] int32 or [action_dim] float32."""
        action = self.native_action(action)
        if self.native_shape is not None:
            action = action.reshape(self.native_shape)
        obs, state, reward, terminated, _ = self.base.step_env(key, state, action, self.params)
        terminated = jnp.asarray(terminated, bool)
        truncated = jnp.asarray(self.base.is_truncated(state, self.params), bool) & ~terminated
        reward = jnp.asarray(reward, jnp.float32).reshape(())
        return _strong(state), TimeStep(self._cast(obs), reward, terminated, truncated)

    def native_action(self, action: jax.Array) -> jax.Array:
        """The action, alone or with any leading axes, in the environment's own units.

        Args:
          action: [] int32 or [..., action_dim] float32.

        Returns:
          The same shape. A dimension with an infinite bound is clipped and not rescaled.
        """
        if self.spec.discrete:
            return action
        native = dataclasses.replace(
            self.spec, action_low=self.native_low, action_high=self.native_high
        )
        low, high = self.spec.bounds(action.ndim)
        native_low, native_high = native.bounds(action.ndim)
        action = jnp.clip(action, low, high)
        # elsewhere the map from [0, 1] to [0, 1] leaves the action as it is
        scaled = np.isfinite(low) & np.isfinite(high) & (low < high)
        low, native_low = np.where(scaled, low, 0), np.where(scaled, native_low, 0)
        high, native_high = np.where(scaled, high, 1), np.where(scaled, native_high, 1)
        unit = (action - low) / (high - low)
        return native_low + unit * (native_high - native_low)

    @property
    def costly_reset(self) -> bool:
        """Whether a batch makes only those resets that an ended episode needs, a few at a time.

        An environment whose reset costs more than a step says so: `costly_reset = True` in its
        class. The starts are the same either way.
        """
        return getattr(self.base, "costly_reset", False)

    def carry_over(self, state: PyTree, reset_state: PyTree) -> PyTree:
        """`reset_state` with whatever of `state` survives an episode's end (a run-long clock)."""
        keep = getattr(self.base, "carry_over", None)
        return reset_state if keep is None else _strong(keep(state, reset_state))

    def _cast(self, obs: PyTree) -> PyTree:
        if not self.spec.obs_parts:
            return jnp.asarray(obs, self.spec.obs_dtype)
        return {name: jnp.asarray(obs[name], part.dtype) for name, part in self.spec.obs_parts}


jax.tree_util.register_dataclass(
    Env,
    data_fields=["params"],
    meta_fields=[
        "base",
        "spec",
        "native_low",
        "native_high",
        "cached_resets",
        "arguments",
        "native_shape",
    ],
)


class BatchState(NamedTuple):
    """N environments side by side."""

    env: PyTree  # [N, ...] gymnax states
    obs: PyTree  # [N, *obs_shape] what the next action answers
    is_first: jax.Array  # [N] bool, `obs` opens an episode
    ended: jax.Array | None  # [N] bool, `obs` is final; only with delayed resets
    pool: PyTree  # ([K, ...] states, [K, *obs_shape]) cached resets, or None


@in_32_bits
def reset_batch(env: Env, key: jax.Array, num_envs: int, delayed: bool = False) -> BatchState:
    """The first observations of `num_envs` environments."""
    pool = None
    if env.cached_resets:
        key, pool_key = jax.random.split(key)
        pool = jax.vmap(env.reset)(jax.random.split(pool_key, env.cached_resets))
    state, obs = _fresh(env, pool, jax.random.split(key, num_envs))
    ended = jnp.zeros(num_envs, bool) if delayed else None
    return BatchState(state, obs, jnp.ones(num_envs, bool), ended, pool)


@in_32_bits
def step_batch(
    env: Env, key: jax.Array, batch: BatchState, action: jax.Array
) -> tuple[BatchState, Step]:
    """One step of every environment, and the next episode's start where one has ended.

    With delayed resets an observation that ends an episode is a record of its own: the action
    taken there is recorded as zero, earns nothing, and leads to the next episode's first one.
    """
    num_envs = batch.is_first.shape[0]
    keys, impl = prng.split(key, 2 * num_envs), jax.random.key_impl(key)
    state, after = jax.vmap(env.step)(keys[:num_envs], batch.env, action)
    done = after.terminated | after.truncated
    over = done if batch.ended is None else batch.ended
    running = (batch.env, batch.obs)
    # the keys go in as words: no key may be selected
    words = jax.random.key_data(keys[num_envs:])

    def fresh(words: jax.Array) -> tuple[PyTree, PyTree]:
        return _fresh(env, batch.pool, jax.random.wrap_key_data(words, impl=impl))

    if env.costly_reset and batch.pool is None:
        fresh_state, fresh_obs = _fill_where(over, fresh, words, running)
    else:
        # most steps end no episode, and a reset costs more than many a step; vmapped over seeds,
        # where the predicate is batched, and on an accelerator both sides run
        fresh_state, fresh_obs = loops.cond(jnp.any(over), fresh, lambda words: running, words)
    fresh_state = jax.vmap(env.carry_over)(state, fresh_state)
    if batch.ended is None:
        never = jnp.zeros(num_envs, bool)
        step = Step(batch.obs, action, after.reward, after.obs, *after[2:], batch.is_first, never)
        next_obs = select(done, fresh_obs, after.obs)
        state = select(done, fresh_state, state)
        return BatchState(state, next_obs, done, None, batch.pool), step
    ended = batch.ended
    next_obs = select(ended, fresh_obs, after.obs)
    step = Step(
        obs=batch.obs,
        action=select(ended, jnp.zeros_like(action), action),
        reward=jnp.where(ended, 0.0, after.reward),
        next_obs=next_obs,
        terminated=after.terminated & ~ended,
        truncated=after.truncated & ~ended,
        is_first=batch.is_first,
        is_last=ended,
    )
    state = select(ended, jax.vmap(env.carry_over)(batch.env, fresh_state), state)
    return BatchState(state, next_obs, ended, done & ~ended, batch.pool), step


def _fresh(env: Env, pool: PyTree, keys: jax.Array) -> tuple[PyTree, PyTree]:
    if pool is None:
        return jax.vmap(env.reset)(keys)
    index = jax.vmap(lambda key: jax.random.randint(key, (), 0, env.cached_resets))(keys)
    return jax.tree.map(lambda leaf: leaf[index], pool)


def _fill_where(
    mask: jax.Array, make: Callable[[jax.Array], PyTree], args: jax.Array, rows: PyTree
) -> PyTree:
    """`rows` [N, ...] with those where `mask` [N] holds as `make(args)` makes them; others may be.

    `make` gets some rows of `args` [N, ...] at a time, in as many turns as it takes: none where no
    row is to be made, and under `vmap` as many as the fullest mask needs.
    """
    num = mask.shape[0]
    # one turn does where episodes last 64 steps or more
    at_once = -(-num // 64)
    order = jnp.argsort(~mask)

    def turn(carry: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
        made, rows = carry
        index = order[(made + jnp.arange(at_once, dtype=jnp.int32)) % num]
        new = make(args[index])
        return made + at_once, jax.tree.map(lambda row, x: row.at[index].set(x), rows, new)

    wanted = jnp.sum(mask, dtype=jnp.int32)
    return jax.lax.while_loop(lambda carry: carry[0] < wanted, turn, (jnp.int32(0), rows))[1]


def select(mask: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
    """The rows of `yes` [N, ...] where `mask` [N] holds, those of `no` elsewhere."""

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(leaf, yes, no)


def _strong(tree: PyTree) -> PyTree:
    # gymnax states mix weak and strong types; a change between chunks would retrace
    def leaf(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.astype(x.dtype)

    return jax.tree.map(leaf, tree)
