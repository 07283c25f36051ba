"""Our classic control against Gymnasium, and the known functions against gymnax's steps."""

import gymnasium
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl_jax.envs.classic import ContinuousCartPole, MountainCarContinuous, register_with_gymnax
from mbrl_jax.envs.functions import KNOWN

MOUNTAIN_CAR_LOW = np.array([-1.2, -0.07], np.float32)
MOUNTAIN_CAR_HIGH = np.array([0.6, 0.07], np.float32)

# gymnax's names of the state, and the ranges that states and actions are drawn from; both wide
# enough for terminal states and actions out of bounds
STATES = {
    "CartPole-v1": (("x", "x_dot", "theta", "theta_dot"), (-2.6, -3, -0.25, -3), (2.6, 3, 0.25, 3)),
    "Pendulum-v1": (("theta", "theta_dot"), (-9, -8), (9, 8)),
    "Acrobot-v1": (
        ("joint_angle1", "joint_angle2", "velocity_1", "velocity_2"),
        (-np.pi, -np.pi, -12, -28),
        (np.pi, np.pi, 12, 28),
    ),
    "MountainCar-v0": (("position", "velocity"), MOUNTAIN_CAR_LOW, MOUNTAIN_CAR_HIGH),
}
STATES["ContinuousCartPole-v0"] = STATES["CartPole-v1"]
STATES["MountainCarContinuous-v0"] = STATES["MountainCar-v0"]


def make(env_id):
    register_with_gymnax()
    if env_id == "MountainCarContinuous-v0":
        return MountainCarContinuous()
    return gymnax.make(env_id)[0]


def random_transitions(env, env_id, count):
    """obs, action, next_obs, reward and terminated of `count` random states and actions."""
    names, low, high = STATES[env_id]
    params, rng = env.default_params, np.random.default_rng(0)
    values = rng.uniform(low, high, (count, len(names))).astype(np.float32)
    if env.num_actions > 1:
        actions = rng.integers(0, env.num_actions, count)
    else:
        actions = rng.uniform(-3, 3, (count, 1)).astype(np.float32)

    def step(key, values, action):
        reset_key, step_key = jax.random.split(key)
        _, first = env.reset_env(reset_key, params)
        state = first.replace(**dict(zip(names, values, strict=True)))
        next_obs, _, reward, terminated, _ = env.step_env(step_key, state, action, params)
        return env.get_obs(state), action, next_obs, reward, terminated

    keys = jax.random.split(jax.random.key(0), count)
    return jax.jit(jax.vmap(step))(keys, jnp.array(values), jnp.array(actions))


@pytest.mark.parametrize("env_id", KNOWN)
def test_known_functions_match_the_step(env_id):
    env = make(env_id)
    obs, action, next_obs, reward, terminated = random_transitions(env, env_id, 10_000)
    reward_fn, termination_fn = KNOWN[env_id]
    known = reward_fn(obs, action, next_obs)
    assert known.dtype == jnp.float32
    np.testing.assert_allclose(known, reward, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(termination_fn(obs, action, next_obs), terminated)
    assert terminated.any() == (env_id != "Pendulum-v1")
    assert not terminated.all()


@pytest.mark.parametrize("env_id", KNOWN)
def test_known_functions_take_any_leading_axes(env_id):
    obs, action, next_obs, *_ = random_transitions(make(env_id), env_id, 6)
    for function in KNOWN[env_id]:
        flat = function(obs, action, next_obs)
        grid = function(*(x.reshape(2, 3, *x.shape[1:]) for x in (obs, action, next_obs)))
        one = function(obs[0], action[0], next_obs[0])
        assert flat.shape == (6,)
        assert one.shape == ()
        np.testing.assert_array_equal(grid, flat.reshape(2, 3))
        np.testing.assert_allclose(one, flat[0], rtol=1e-6)


def test_continuous_cartpole_matches_gymnasium():
    env, theirs = ContinuousCartPole(), gymnasium.make("CartPole-v1").unwrapped
    theirs.reset(seed=0)
    rng = np.random.default_rng(1)
    step = jax.jit(env.step_env)
    ends = 0
    for _ in range(500):
        values = rng.uniform((-2.4, -3, -0.2, -3), (2.4, 3, 0.2, 3))
        action = rng.uniform(-1.5, 1.5, 1)
        theirs.state, theirs.steps_beyond_terminated = values, None
        theirs.force_mag = 10.0 * np.clip(action[0], -1, 1)
        want, want_reward, want_end, *_ = theirs.step(1)
        _, state = env.reset_env(jax.random.key(0), env.default_params)
        state = state.replace(
            **dict(zip(("x", "x_dot", "theta", "theta_dot"), values, strict=True))
        )
        obs, _, reward, end, _ = step(
            jax.random.key(1), state, jnp.float32(action), env.default_params
        )
        np.testing.assert_allclose(obs, want, atol=1e-5)
        assert reward == want_reward == 1.0
        assert end == want_end
        ends += want_end
    assert 0 < ends < 500


def test_the_ends_of_continuous_cartpole_are_cartpole():
    env, discrete = ContinuousCartPole(), gymnax.make("CartPole-v1")[0]
    _, state = discrete.reset_env(jax.random.key(0), discrete.default_params)
    for action in (0, 1):
        want, *_ = discrete.step_env(jax.random.key(1), state, action, discrete.default_params)
        push = jnp.array([2.0 * action - 1.0])
        got, *_ = env.step_env(jax.random.key(1), state, push, env.default_params)
        np.testing.assert_allclose(got, want, atol=1e-7)


def test_mountain_car_continuous_matches_gymnasium():
    env, theirs = MountainCarContinuous(), gymnasium.make("MountainCarContinuous-v0").unwrapped
    theirs.reset(seed=0)
    rng = np.random.default_rng(2)
    values = rng.uniform(MOUNTAIN_CAR_LOW, MOUNTAIN_CAR_HIGH, (600, 2)).astype(np.float32)
    values[:100, 0] = rng.uniform(-1.2, -1.1, 100)  # near the left wall
    values[:50, 0], values[50:100, 1] = -1.2, -0.07  # on it, and about to hit it
    step = jax.jit(env.step_env)
    hits = ends = 0
    for start in values:
        action = rng.uniform(-1.5, 1.5, 1).astype(np.float32)
        theirs.state = start.copy()
        want, want_reward, want_end, *_ = theirs.step(action)
        _, state = env.reset_env(jax.random.key(0), env.default_params)
        state = state.replace(position=jnp.array(start[0]), velocity=jnp.array(start[1]))
        obs, _, reward, end, _ = step(jax.random.key(1), state, action, env.default_params)
        np.testing.assert_allclose(obs, want, atol=1e-6)
        np.testing.assert_allclose(reward, want_reward, atol=1e-5)
        assert end == want_end
        hits += want[0] == np.float32(-1.2) and want[1] == 0
        ends += want_end
    assert hits > 50
    assert ends > 10


def test_mountain_car_bounces_off_the_wall_as_gymnasium_does():
    """Full throttle along the velocity reaches the goal in Gymnasium's number of steps."""
    env, theirs = MountainCarContinuous(), gymnasium.make("MountainCarContinuous-v0").unwrapped
    params = env.default_params
    starts = np.array([-0.58, -0.52, -0.47, -0.42], np.float32)

    def episode(position):
        _, state = env.reset_env(jax.random.key(0), params)

        def step(state):
            action = jnp.where(state.velocity > 0, 1.0, -1.0)
            key = jax.random.fold_in(jax.random.key(1), state.time)
            return env.step_env(key, state, action, params)[1]

        first = state.replace(position=position, time=jnp.int32(0))
        return jax.lax.while_loop(lambda s: ~env.is_terminated(s, params), step, first).time

    for start in starts:
        theirs.reset(seed=0)
        theirs.state, steps, end = np.array([start, 0], np.float32), 0, False
        while not end:
            action = np.array([1.0 if theirs.state[1] > 0 else -1.0], np.float32)
            _, _, end, *_ = theirs.step(action)
            steps += 1
        assert jax.jit(episode)(start) == steps < 140


@pytest.mark.parametrize("env", [ContinuousCartPole(), MountainCarContinuous()])
def test_gymnax_loop(env):
    """Automatic resets under jit, vmap and scan, with the declared shapes and types."""
    params = env.default_params.replace(max_steps_in_episode=30)
    space = env.action_space(params)
    assert space.shape == (1,)
    assert (float(np.min(space.low)), float(np.max(space.high))) == (-1.0, 1.0)
    assert env.num_actions == 1

    def run(key):
        key, reset_key = jax.random.split(key)
        _, state = env.reset(reset_key, params)

        def step(carry, _):
            key, step_key, action_key = jax.random.split(carry[0], 3)
            out = env.step(step_key, carry[1], space.sample(action_key), params)
            return (key, out[1]), (out[0], *out[2:5])

        return jax.lax.scan(step, (key, state), length=100)[1]

    keys = jax.random.split(jax.random.key(0), 4)
    obs, reward, terminated, truncated = jax.jit(jax.vmap(run))(keys)
    assert obs.dtype == reward.dtype == jnp.float32
    assert obs.shape[:2] == reward.shape == terminated.shape == (4, 100)
    assert jax.vmap(jax.vmap(env.observation_space(params).contains))(obs).all()
    assert (terminated | truncated).any()


def test_names_and_limits():
    assert ContinuousCartPole().name == "ContinuousCartPole-v0"
    assert ContinuousCartPole().default_params.max_steps_in_episode == 500
    assert MountainCarContinuous().name == "MountainCarContinuous-v0"
    assert MountainCarContinuous().default_params.max_steps_in_episode == 999


def test_mountain_car_offers_transition_gradients():
    env = MountainCarContinuous().with_transition_gradients()
    _, state = env.reset_env(jax.random.key(0), env.default_params)

    def velocity(action):
        return env.step_env(jax.random.key(1), state, action, env.default_params)[0][1]

    assert jax.grad(velocity)(0.5) == pytest.approx(env.default_params.power)
