"""Batches of an environment whose resets are costly: only those are made that an episode needs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from gymnax.environments import environment, spaces
from jaxprs import equations, loops

from mbrl_jax.envs.env import Env, reset_batch, step_batch
from mbrl_jax.types import EnvSpec


@struct.dataclass
class Walk:
    time: jax.Array
    length: jax.Array
    world: jax.Array


class Worlds(environment.Environment):
    """Episodes of 1 to 6 steps, each in a world of its own, which only a reset draws (by erf)."""

    def __init__(self, costly_reset):
        super().__init__()
        self.costly_reset = costly_reset

    def reset_env(self, key, params):
        length_key, world_key = jax.random.split(key)
        length = jax.random.randint(length_key, (), 1, 7)
        world = jax.lax.erf(jax.random.uniform(world_key, (3,)))
        return world, Walk(jnp.int32(0), length, world)

    def step_env(self, key, state, action, params):
        state = state.replace(time=state.time + 1)
        obs = state.world + state.time.astype(jnp.float32)
        return obs, state, jnp.float32(1), state.time >= state.length, {}

    def action_space(self, params=None):
        return spaces.Discrete(2)


@functools.cache
def env(costly_reset, cached_resets=0):
    spec = EnvSpec("Worlds", (3,), "float32", 1_000, num_actions=2)
    params = environment.EnvParams(max_steps_in_episode=1_000)
    return Env(Worlds(costly_reset), params, spec, cached_resets=cached_resets)


def steps(env, key, num_envs, delayed, num_steps=25):
    """All steps of a batch, [num_steps, N, ...], and its last state."""
    reset_key, step_key = jax.random.split(key)

    def one(batch, key):
        return step_batch(env, key, batch, jnp.zeros(num_envs, jnp.int32))

    batch = reset_batch(env, reset_key, num_envs, delayed)
    return jax.lax.scan(one, batch, jax.random.split(step_key, num_steps))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("num_envs", [1, 5, 64, 130])
def test_starts_have_the_bits_of_resets_everywhere(num_envs, delayed):
    plain, few = (
        jax.jit(functools.partial(steps, env(costly), num_envs=num_envs, delayed=delayed))(
            jax.random.key(2)
        )
        for costly in (False, True)
    )
    equal(plain, few)
    ended = np.asarray(few[1].terminated)
    assert ended.sum() > 3 * num_envs
    # episodes that end together start in worlds of their own
    worlds = np.asarray(few[1].obs)[np.asarray(few[1].is_first)]
    assert len(np.unique(worlds, axis=0)) == len(worlds)


def test_seeds_in_one_batch_are_those_of_runs_alone():
    keys = jax.random.split(jax.random.key(3), 3)
    run = functools.partial(steps, env(True), num_envs=5, delayed=False)
    together = jax.jit(jax.vmap(run))(keys)
    alone = [jax.jit(run)(key) for key in keys]
    equal(together, jax.tree.map(lambda *x: np.stack(x), *alone))


@pytest.mark.parametrize(("num_envs", "at_once"), [(1, 1), (64, 1), (65, 2), (256, 4)])
def test_a_step_makes_few_starts_at_a_time_and_none_outside_the_loop(num_envs, at_once):
    key = jax.random.key(0)
    batch = reset_batch(env(True), key, num_envs)
    action = jnp.zeros(num_envs, jnp.int32)
    jaxpr = jax.make_jaxpr(functools.partial(step_batch, env(True)))(key, batch, action).jaxpr
    assert not [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "erf"]
    made = [
        eqn.outvars[0].aval.shape
        for loop, body in loops(jaxpr)
        for eqn in equations(body)
        if loop.primitive.name == "while" and eqn.primitive.name == "erf"
    ]
    assert made == [(at_once, 3)]


def test_cached_starts_need_no_loop():
    pooled = env(True, cached_resets=2)
    _, taken = jax.jit(functools.partial(steps, pooled, num_envs=4, delayed=False))(
        jax.random.key(0)
    )
    worlds = np.asarray(taken.obs)[np.asarray(taken.is_first)]
    # the first ones are drawn from the pool too
    assert len(np.unique(worlds, axis=0)) == 2
    batch = reset_batch(pooled, jax.random.key(0), 4)
    jaxpr = jax.make_jaxpr(functools.partial(step_batch, pooled))(
        jax.random.key(0), batch, jnp.zeros(4, jnp.int32)
    ).jaxpr
    assert "erf" not in str(jaxpr)
