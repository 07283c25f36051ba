"""Gymnasium's robots under MJX against its own C simulation, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl_jax import InputError, make_env
from mbrl_jax.envs import locomotion
from mbrl_jax.envs.functions import TERMINATIONS

needs_mujoco = pytest.mark.skipif(not locomotion.available(), reason="needs the extra `envs`")
STEPS = 200


@pytest.mark.slow
@needs_mujoco
@pytest.mark.parametrize("env_id", locomotion.ROBOTS)
def test_a_step_equals_that_of_the_c_simulation(env_id):
    """From each state of its trajectory under random actions, the solver started as there."""
    import gymnasium

    theirs = gymnasium.make(env_id).unwrapped
    env = make_env(env_id)
    obs, _ = theirs.reset(seed=0)
    assert env.spec.obs_shape == obs.shape
    assert env.spec.episode_limit == gymnasium.spec(env_id).max_episode_steps
    np.testing.assert_allclose(env.native_low, theirs.action_space.low)
    np.testing.assert_allclose(env.native_high, theirs.action_space.high)
    step, rng = jax.jit(env.step), np.random.default_rng(0)
    ends, errors = 0, []
    for _ in range(STEPS):
        state = locomotion.RobotState(
            jnp.int32(0), *map(jnp.float32, (
                theirs.data.qpos, theirs.data.qvel, theirs.data.qacc_warmstart
            ))
        )  # fmt: skip
        unit = np.float32(rng.uniform(-1, 1, env.spec.action_shape))
        low, high = theirs.action_space.low, theirs.action_space.high
        expected, reward, terminated, *_ = theirs.step(low + (unit + 1) / 2 * (high - low))
        with jax.numpy_rank_promotion("allow"):  # MJX relies on it
            _, got = step(jax.random.key(0), state, unit)
        errors.append(np.abs(got.obs - expected).max() / (1 + np.abs(expected).max()))
        np.testing.assert_allclose(got.reward, reward, atol=2e-3)
        assert bool(got.terminated) == terminated
        known = TERMINATIONS[env_id](jnp.float32(obs), jnp.float32(unit), jnp.float32(expected))
        assert bool(known) == terminated
        ends += terminated
        obs = expected
        if terminated:
            obs, _ = theirs.reset()
    # float32 against float64; single steps with a contact that just begins differ by more
    assert np.median(errors) < 1e-5, np.median(errors)
    assert np.quantile(errors, 0.95) < 1e-3, np.quantile(errors, 0.95)
    assert (ends > 0) == (env_id != "HalfCheetah-v5")


@needs_mujoco
@pytest.mark.parametrize("env_id", locomotion.ROBOTS)
def test_starts_are_drawn_as_gymnasium_draws_them(env_id):
    env, robot = make_env(env_id), locomotion.ROBOTS[env_id]
    states, obs = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 2_000))
    moved = np.asarray(states.qpos - env.base._start[None])
    assert np.abs(moved).max() <= robot.position_noise
    np.testing.assert_allclose(moved.std(), robot.position_noise / np.sqrt(3), rtol=0.03)
    scale = 1.0 if robot.normal_velocity else 1 / np.sqrt(3)
    np.testing.assert_allclose(states.qvel.std(), robot.velocity_noise * scale, rtol=0.03)
    assert obs.shape == (2_000, *env.spec.obs_shape)
    assert env.spec.termination_fn is not None


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(locomotion, "available", lambda: False)
    with pytest.raises(InputError, match=r"HalfCheetah-v5.*pip install 'mbrl-jax\[envs\]'"):
        locomotion.require()
