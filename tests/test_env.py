"""Env, make_env and batches of environments against gymnax's own step."""

import dataclasses
import itertools

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl_jax import make_env
from mbrl_jax.envs import list_envs
from mbrl_jax.envs.env import reset_batch, step_batch
from mbrl_jax.types import InputError


def batches(env, num_envs, **kwargs):
    """A first batch, and (key, batch, action) -> the next one and the step; both compiled."""
    start = jax.jit(lambda key: reset_batch(env, key, num_envs, **kwargs))(jax.random.key(0))
    return start, jax.jit(lambda key, batch, action: step_batch(env, key, batch, action))


@pytest.mark.parametrize("id", list_envs())
def test_every_environment_runs_and_keeps_its_spec(id):
    env = make_env(id)
    num_envs = 3
    # Swimmer adds arrays of unequal rank inside gymnax
    jax.config.update("jax_numpy_rank_promotion", "allow" if id == "Swimmer-misc" else "raise")

    def one(batch, key):
        act, step_key = jax.random.split(key)
        action = env.spec.random_actions(act, batch.obs)
        return step_batch(env, step_key, batch, action)

    batch, _ = batches(env, num_envs)
    steps = []
    run = jax.jit(one)
    for i in range(12):
        batch, step = run(batch, jax.random.key(i + 1))
        steps.append(step)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    steps = jax.tree.map(lambda *x: np.stack(x), *steps)
    spec = env.spec
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), spec.example_obs(12, num_envs))
    for obs in (steps.obs, steps.next_obs):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), obs) == expected
    assert steps.reward.dtype == np.float32
    assert steps.terminated.dtype == steps.truncated.dtype == steps.is_first.dtype == bool
    assert not (steps.terminated & steps.truncated).any()
    assert steps.is_first[0].all()
    if spec.num_obs is not None:
        assert 0 <= steps.obs.min() <= steps.obs.max() < spec.num_obs
    if spec.discrete:
        assert steps.action.max() < spec.num_actions
    else:
        assert steps.action.shape == (12, num_envs, *spec.action_shape)
    # an observation follows the successor unless the episode ended, and then a first one
    ended = (steps.terminated | steps.truncated)[:-1]
    np.testing.assert_array_equal(steps.is_first[1:], ended)
    jax.tree.map(
        lambda obs, next_obs: np.testing.assert_array_equal(obs[1:][~ended], next_obs[:-1][~ended]),
        steps.obs,
        steps.next_obs,
    )
    assert run._cache_size() == 1, "the state's types changed between steps"


def test_a_batch_equals_gymnax_with_its_automatic_reset():
    env = make_env("CartPole-v1")
    base, params = gymnax.make("CartPole-v1")
    batch, advance = batches(env, 1)
    state = batch.env
    # both as batches in one program each, whose roundings are the same
    base_step = jax.jit(jax.vmap(lambda *x: base.step_env(*x, params), (None, 0, 0)))
    base_reset = jax.jit(jax.vmap(lambda key: base.reset_env(key, params)))
    ended = 0
    for i in range(60):
        action = np.int32([i // 3 % 2])
        step_key, reset_key = jax.random.split(jax.random.key(i), 2)
        obs, after, reward, terminated, _ = base_step(step_key, state, action)
        batch, step = advance(jax.random.key(i), batch, action)
        np.testing.assert_allclose(step.next_obs, obs, rtol=1e-6)
        assert step.reward == reward
        assert step.terminated == terminated
        if terminated:
            ended += 1
            obs, after = base_reset(reset_key[None])
        np.testing.assert_allclose(batch.obs, obs, rtol=1e-6)
        state = after
    assert ended > 1


def test_truncation_is_told_from_termination_and_the_successor_is_true():
    env = make_env("Pendulum-v1", max_steps_in_episode=5)
    batch, advance = batches(env, 2)
    truncated = []
    for i in range(11):
        batch, step = advance(jax.random.key(i), batch, np.zeros((2, 1), np.float32))
        truncated.append(bool(np.asarray(step.truncated)[0]))
        assert not step.terminated.any()
        if truncated[-1]:
            assert not np.allclose(step.next_obs, batch.obs)
            assert batch.is_first.all()
    assert [i for i, cut in enumerate(truncated) if cut] == [4, 9]


def test_termination_wins_where_gymnax_reports_both():
    env = make_env("DeepSea-bsuite")
    batch, advance = batches(env, 1)
    for i in range(8):
        batch, step = advance(jax.random.key(i), batch, np.array([1], np.int32))
    assert np.asarray(step.terminated)[0]
    assert not np.asarray(step.truncated)[0]


def test_delayed_resets_record_the_final_observation():
    """A 3-step episode gives 4 records, the last with no action, no reward and no end."""
    env = make_env("Pendulum-v1", max_steps_in_episode=3)
    batch, advance = batches(env, 1, delayed=True)
    steps = []
    for i in range(9):
        batch, step = advance(jax.random.key(i), batch, np.full((1, 1), 0.5, np.float32))
        steps.append(jax.tree.map(lambda x: np.asarray(x)[0], step))
    assert [bool(s.is_first) for s in steps] == [True, False, False, False] * 2 + [True]
    assert [bool(s.truncated) for s in steps] == [False, False, True, False] * 2 + [False]
    assert [float(s.action[0]) for s in steps[:4]] == [0.5, 0.5, 0.5, 0.0]
    assert steps[3].reward == 0.0
    for before, after in itertools.pairwise(steps):
        np.testing.assert_array_equal(before.next_obs, after.obs)


def test_delayed_resets_tell_termination_from_truncation():
    env = make_env("FrozenLake-misc", is_slippery=False)
    batch, advance = batches(env, 1, delayed=True)
    record = []
    for i, action in enumerate([2, 1, 0, 0]):  # right, down into the hole at 5, ignored, left
        batch, step = advance(jax.random.key(i), batch, np.array([action], np.int32))
        record.append(
            (
                int(np.asarray(step.obs)[0]),
                int(np.asarray(step.next_obs)[0]),
                bool(np.asarray(step.terminated)[0]),
            )
        )
    assert record == [(0, 1, False), (1, 5, True), (5, 0, False), (0, 0, False)]


def test_actions_are_rescaled_to_the_bounds_and_clipped():
    env = make_env("Pendulum-v1")
    assert env.spec.action_low == (-1.0,)
    np.testing.assert_allclose(env.native_action(jnp.array([0.5])), [1.0])
    np.testing.assert_allclose(env.native_action(jnp.array([7.0])), [2.0])
    native = make_env("Pendulum-v1", rescale_actions=False)
    assert native.spec.action_high == (2.0,)
    np.testing.assert_allclose(native.native_action(jnp.array([0.5])), [0.5])
    np.testing.assert_allclose(native.native_action(jnp.array([-7.0])), [-2.0])
    # gymnax's PointRobot does not clip by itself
    robot = make_env("PointRobot-misc")
    state, _ = robot.reset(jax.random.key(0))
    far, near = (robot.step(jax.random.key(1), state, jnp.full(2, a))[1].obs for a in (9.0, 1.0))
    np.testing.assert_array_equal(far, near)


def test_integer_rewards_and_observations_are_cast():
    assert make_env("FourRooms-misc").spec.obs_dtype == "float32"
    assert make_env("FourRooms-misc").spec.num_obs is None
    assert make_env("FrozenLake-misc", map_name="8x8").spec.num_obs == 64
    env = make_env("UmbrellaChain-bsuite")
    state, _ = env.reset(jax.random.key(0))
    assert env.step(jax.random.key(1), state, jnp.int32(0))[1].reward.dtype == jnp.float32


def test_the_same_arguments_give_the_same_object():
    assert make_env("CartPole-v1") is make_env("CartPole-v1")
    desc = ["SFF", "FHF", "FFG"]
    env = make_env("FrozenLake-misc", desc=desc, is_slippery=False)
    assert env is make_env("FrozenLake-misc", is_slippery=False, desc=desc)
    assert env.spec.num_obs == 9
    assert make_env("Pendulum-v1", max_steps_in_episode=7).spec.episode_limit == 7


def test_parameters_may_be_vmapped():
    env = make_env("CartPole-v1")
    gravity = jnp.array([0.0, 9.8, 50.0])
    envs = dataclasses.replace(env, params=dataclasses.replace(env.params, gravity=gravity))
    axes = jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, envs)
    state, _ = env.reset(jax.random.key(0))
    state = dataclasses.replace(state, theta=jnp.float32(0.1))

    def swing(env):
        return env.step(jax.random.key(1), state, jnp.int32(0))[1].obs[3]

    speeds = jax.jit(jax.vmap(swing, in_axes=(axes,)))(envs)
    one = jax.jit(swing)
    alone = [one(make_env("CartPole-v1", gravity=g)) for g in gravity.tolist()]
    np.testing.assert_allclose(speeds, jnp.array(alone), rtol=1e-6)
    assert len(set(np.asarray(speeds).tolist())) == 3


def test_cached_resets_start_from_the_pool():
    env = make_env("CartPole-v1", cached_resets=2, max_steps_in_episode=1)
    batch, advance = batches(env, 4)
    pool = {tuple(row) for row in np.asarray(batch.pool[1]).tolist()}
    assert len(pool) == 2
    starts = set()
    for i in range(8):
        starts |= {tuple(row) for row in np.asarray(batch.obs).tolist()}
        batch, _ = advance(jax.random.key(i), batch, np.zeros(4, np.int32))
    assert starts == pool


@pytest.mark.parametrize(
    ("id", "arguments", "said"),
    [
        ("CartPole", {}, "unknown environment 'CartPole'; did you mean 'CartPole-v1'"),
        ("MNISTBandit-bsuite", {}, "downloads its data"),
        ("FrozenLake-misc", {"is_slipery": True}, "did you mean 'is_slippery'"),
        ("FrozenLake-misc", {"map_name": "5x5"}, "map_name must be"),
        ("FrozenLake-misc", {"is_slippery": "banana"}, "expected true or false"),
        ("FrozenLake-misc", {"success_rate": "high"}, "expected a number"),
        ("FrozenLake-misc", {"success_rate": 1.5}, "between 0 and 1"),
        ("CartPole-v1", {"rescale_actions": 7}, "expected true or false"),
        ("CartPole-v1", {"gravity": "x"}, "gravity = 'x', expected a number"),
        ("CartPole-v1", {"max_steps_in_episode": 0}, "expected at least 1"),
        ("CartPole-v1", {"max_steps_in_episode": 1.5}, "expected a whole number"),
        ("CartPole-v1", {"cached_resets": -1}, "cached_resets = -1"),
        ("DynaMaze-sutton", {"resolution": 0}, "resolution"),
    ],
)
def test_bad_arguments_are_named(id, arguments, said):
    with pytest.raises(InputError) as caught:
        make_env(id, **arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_known_functions_take_the_actions_that_the_agent_takes():
    env = make_env("Pendulum-v1")
    state, obs = env.reset(jax.random.key(0))
    _, after = env.step(jax.random.key(1), state, jnp.array([0.7]))
    reward = env.spec.reward_fn(obs, jnp.array([0.7]), after.obs)
    np.testing.assert_allclose(reward, after.reward, rtol=1e-4)
    assert not env.spec.termination_fn(obs, jnp.array([0.7]), after.obs)
