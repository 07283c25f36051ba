"""Craftax-Classic against craftax's own environments, step by step."""

import dataclasses
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl_jax import InputError, make_env
from mbrl_jax.envs import craftax, list_envs
from mbrl_jax.envs.env import reset_batch, step_batch

needs_craftax = pytest.mark.skipif(
    not craftax.available(), reason="needs craftax 1.6 or newer, of the extra `envs`"
)
NUM_ENVS, STEPS, LIMIT = 12, 100, 40


@pytest.fixture(scope="module")
def world():
    """Craftax's own symbolic environment, which never resets, and its step and reset, compiled."""
    from craftax.craftax_env import make_craftax_env_from_name

    world = make_craftax_env_from_name(craftax.SYMBOLIC, auto_reset=False)
    params = world.default_params
    with jax.numpy_rank_promotion("allow"):
        reset = jax.jit(lambda key: world.reset_env(key, params))
        step = jax.jit(lambda *args: world.step_env(*args, params))
        yield world, reset, step


@pytest.fixture(scope="module")
def short():
    """Episodes of LIMIT steps."""
    return make_env(craftax.SYMBOLIC, max_steps_in_episode=LIMIT)


def run(env, delayed):
    """A first batch, and the steps of a run under random actions [STEPS, NUM_ENVS, ...]."""

    def one(batch, key):
        act_key, step_key = jax.random.split(key)
        actions = env.spec.random_actions(act_key, batch.obs)
        batch, step = step_batch(env, step_key, batch, actions)
        return batch, (step, batch.env)

    def whole(key):
        batch = reset_batch(env, key, NUM_ENVS, delayed)
        return batch.env, jax.lax.scan(one, batch, jax.random.split(key, STEPS))[1]

    return jax.tree.map(np.asarray, jax.jit(whole)(jax.random.key(1)))


def pick(tree, *index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def equal_states(ours, theirs):
    theirs = theirs.replace(state_rng=jax.random.key_data(theirs.state_rng))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


@needs_craftax
def test_steps_and_starts_equal_craftax_and_the_limit_truncates(short, world):
    """A batch with automatic resets, whose first and last environment craftax follows."""
    _, reset, own_step = world
    first, (steps, states) = run(short, delayed=False)
    key = jax.random.key(1)
    keys = jax.random.split(key, STEPS)
    deaths = 0
    for i in (0, NUM_ENVS - 1):
        obs, state = reset(jax.random.split(key, NUM_ENVS)[i])
        equal_states(pick(first, i), state)
        since = 0
        for t in range(STEPS):
            split = jax.random.split(jax.random.split(keys[t])[1], 2 * NUM_ENVS)
            step = pick(steps, t, i)
            np.testing.assert_allclose(step.obs, obs, rtol=1e-6)
            assert step.is_first == (since == 0)
            obs, state, reward, died, _ = own_step(split[i], state, step.action)
            since += 1
            np.testing.assert_allclose(step.next_obs, obs, rtol=1e-6)
            np.testing.assert_allclose(step.reward, reward, atol=1e-6)
            assert step.terminated == died
            assert step.truncated == (not died and since == LIMIT)
            if died or since == LIMIT:
                deaths += int(died)
                obs, state = reset(split[NUM_ENVS + i])
                since = 0
            equal_states(pick(states, t, i), state)
    ended = steps.terminated | steps.truncated
    assert ended.any(axis=0).all()
    assert steps.reward.max() == 1.0
    assert steps.reward.min() < 0.0


@needs_craftax
def test_every_start_is_a_world_of_its_own(short):
    _, (steps, states) = run(short, delayed=True)
    begun = np.roll(steps.is_last, 1, axis=0)
    begun[0] = True
    np.testing.assert_array_equal(steps.is_first, begun)
    # the limit ends all episodes at the same step; the next one begins in another world
    maps = states.map[steps.is_last]
    assert len(maps) >= 2 * NUM_ENVS
    for a in range(len(maps)):
        for b in range(a):
            assert np.mean(maps[a] != maps[b]) > 0.1
    # a final observation is a record without action and reward
    assert (steps.action[steps.is_last] == 0).all()
    assert (steps.reward[steps.is_last] == 0.0).all()
    over = steps.terminated | steps.truncated
    np.testing.assert_array_equal(steps.is_last[1:], over[:-1])
    np.testing.assert_array_equal(steps.obs[1:], steps.next_obs[:-1])


@needs_craftax
def test_the_specs_and_parameters_are_craftaxs_own(short, world):
    from craftax.craftax_classic.envs.craftax_state import EnvParams

    spec = make_env(craftax.SYMBOLIC).spec
    assert (spec.obs_shape, spec.obs_dtype, spec.num_actions) == ((1345,), "float32", 17)
    assert spec.episode_limit == 10_000
    assert short.spec.episode_limit == LIMIT
    assert set(craftax.ENVS) <= set(list_envs())
    theirs = dataclasses.asdict(EnvParams())
    ours = dataclasses.asdict(craftax.CraftaxParams())
    assert ours.pop("max_steps_in_episode") == theirs.pop("max_timesteps") == spec.episode_limit
    del theirs["fractal_noise_angles"]
    assert ours == theirs
    with pytest.raises(InputError, match="did you mean 'always_diamond'"):
        make_env(craftax.SYMBOLIC, always_diamonds=True)


@needs_craftax
def test_pictures_are_craftaxs_own_as_bytes(world):
    """At all hours, awake and asleep, from one state each."""
    env = make_env(craftax.PIXELS)
    assert (env.spec.obs_shape, env.spec.obs_dtype) == ((63, 63, 3), "uint8")
    assert env.spec.num_actions == 17
    hours = jnp.linspace(0.0, 1.0, 8)

    def seen(key):
        obs, state = env.base.world.reset_env(key, env.base.world.default_params)
        look = jax.vmap(
            lambda light, asleep: env.base.world.get_obs(
                state.replace(light_level=light, is_sleeping=asleep)
            )
        )
        return obs, look(hours, jnp.arange(8) % 2 == 0)

    key = jax.random.key(4)
    with jax.numpy_rank_promotion("allow"):
        first, theirs = jax.tree.map(np.asarray, jax.jit(seen)(key))
    assert 0.0 <= theirs.min() < theirs.max() <= 1.0
    ours = np.asarray(env.base._observed(theirs))
    assert ours.dtype == np.uint8
    half = 0.501 / 255.0
    np.testing.assert_allclose(ours / 255.0, theirs, atol=half)
    # by day and awake colours are whole numbers, and stay what they are
    noon = theirs[-1] * 255.0
    assert np.mean(np.abs(noon - np.round(noon)) < 1e-3) > 0.9
    state, obs = jax.jit(env.reset)(key)
    assert state.state_rng.dtype == np.uint32
    assert obs.dtype == np.uint8
    np.testing.assert_allclose(obs / 255.0, first, atol=half)


@pytest.mark.parametrize(
    ("have", "said"), [(None, "it is not installed"), ("1.5.2", "it has 1.5.2")]
)
def test_without_a_new_enough_craftax_the_error_says_what_to_install(monkeypatch, have, said):
    def version(name):
        assert name == "craftax"
        if have is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return have

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert not craftax.available()
    assert not set(craftax.ENVS) & set(list_envs())
    with pytest.raises(InputError) as caught:
        make_env(craftax.PIXELS, max_steps_in_episode=77)
    for part in (craftax.PIXELS, "craftax 1.6 or newer", said, "pip install --upgrade 'mbrl-jax"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("have", ["1.6.0", "1.6.1", "1.10", "2.0.0rc1"])
def test_newer_ones_will_do(monkeypatch, have):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: have)
    assert craftax.available()
    craftax.require()
