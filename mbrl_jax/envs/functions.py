"""Known reward and termination functions of classic control, exact from the observations.

Each takes (obs, action, next_obs), alone or with any leading batch axes: obs [..., obs_dim]
float32, action [...] int32 or [..., 1] float32 in the environment's native units, such as a
torque in [-2, 2], and gives [...] float32 or bool. They hold for the default parameters.

Source: Gymnasium 1.3, gymnasium/envs/classic_control, with which gymnax agrees except in
MountainCarContinuous-v0, where they hold for `mbrl_jax.envs.classic.MountainCarContinuous`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Known = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def cartpole_reward(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
    """1 per step, the terminating one included; 0 for acting on after the end."""
    return 1.0 - _has_fallen(obs)


def cartpole_termination(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
    """The cart is more than 2.4 from the centre or the pole more than 12 degrees from upright."""
    return _has_fallen(next_obs)


def pendulum_reward(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
    """Minus the cost of the angle and velocity before the step and of the clipped torque."""
    angle = jnp.arctan2(obs[..., 1], obs[..., 0])
    torque = jnp.clip(action[..., 0], -2.0, 2.0)
    return -(angle**2 + 0.1 * obs[..., 2] ** 2 + 0.001 * torque**2)


def never(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
    """The task does not terminate."""
    return jnp.zeros(next_obs.shape[:-1], bool)


def acrobot_reward(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
    """-1 per step and 0 on the one that reaches the height."""
    return acrobot_termination(obs, action, next_obs) - 1.0


def acrobot_termination(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
    """The tip is higher than one link above the joint: -cos a - cos(a + b) > 1."""
    cos_a, sin_a, cos_b, sin_b = (next_obs[..., i] for i in range(4))
    return -cos_a - (cos_a * cos_b - sin_a * sin_b) > 1.0


def mountain_car_reward(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
    """-1 per step."""
    return jnp.full(next_obs.shape[:-1], -1.0)


def mountain_car_termination(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
    """The car is at 0.5 or beyond and does not roll back."""
    return (next_obs[..., 0] >= 0.5) & (next_obs[..., 1] >= 0.0)


def continuous_mountain_car_reward(
    obs: jax.Array, action: jax.Array, next_obs: jax.Array
) -> jax.Array:
    """100 at the goal, minus 0.1 times the square of the action, which is not clipped here."""
    at_goal = continuous_mountain_car_termination(obs, action, next_obs)
    return 100.0 * at_goal - 0.1 * action[..., 0] ** 2


def continuous_mountain_car_termination(
    obs: jax.Array, action: jax.Array, next_obs: jax.Array
) -> jax.Array:
    """The car is at 0.45 or beyond and does not roll back."""
    return (next_obs[..., 0] >= 0.45) & (next_obs[..., 1] >= 0.0)


def hopper_termination(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
    """A coordinate beyond 100, a torso below 0.7, or tilted by 0.2 rad; or no number."""
    inside = jnp.all(jnp.abs(next_obs[..., 1:]) < 100.0, axis=-1)
    return ~(inside & (next_obs[..., 0] > 0.7) & (jnp.abs(next_obs[..., 1]) < 0.2))


def walker_termination(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
    """A torso outside 0.8 to 2.0, or tilted by 1 rad; or no number."""
    height = next_obs[..., 0]
    upright = (height > 0.8) & (height < 2.0) & (jnp.abs(next_obs[..., 1]) < 1.0)
    return ~(upright & jnp.isfinite(next_obs).all(axis=-1))


def inverted_pendulum_termination(
    obs: jax.Array, action: jax.Array, next_obs: jax.Array
) -> jax.Array:
    """A pole tilted by more than 0.2 rad; or no number."""
    up = jnp.abs(next_obs[..., 1]) <= 0.2
    return ~(up & jnp.isfinite(next_obs).all(axis=-1))


def _has_fallen(obs: jax.Array) -> jax.Array:
    return (jnp.abs(obs[..., 0]) > 2.4) | (jnp.abs(obs[..., 2]) > 12 * 2 * math.pi / 360)


KNOWN: dict[str, tuple[Known, Known]] = {
    "CartPole-v1": (cartpole_reward, cartpole_termination),
    "ContinuousCartPole-v0": (cartpole_reward, cartpole_termination),
    "Pendulum-v1": (pendulum_reward, never),
    "Acrobot-v1": (acrobot_reward, acrobot_termination),
    "MountainCar-v0": (mountain_car_reward, mountain_car_termination),
    "MountainCarContinuous-v0": (
        continuous_mountain_car_reward,
        continuous_mountain_car_termination,
    ),
}
"""Reward and termination function by environment id."""

TERMINATIONS: dict[str, Known] = {
    "HalfCheetah-v5": never,
    "Hopper-v5": hopper_termination,
    "Walker2d-v5": walker_termination,
    "InvertedPendulum-v5": inverted_pendulum_termination,
}
"""Termination functions of environments whose observations do not tell the reward."""


def cartpole_state(obs: jax.Array) -> dict[str, jax.Array]:
    """The fields of gymnax's state; `obs` is of one environment, here and below."""
    return dict(zip(("x", "x_dot", "theta", "theta_dot"), obs, strict=True))


def pendulum_state(obs: jax.Array) -> dict[str, jax.Array]:
    return {"theta": jnp.arctan2(obs[1], obs[0]), "theta_dot": obs[2]}


def acrobot_state(obs: jax.Array) -> dict[str, jax.Array]:
    angles = {f"joint_angle{i + 1}": jnp.arctan2(obs[2 * i + 1], obs[2 * i]) for i in range(2)}
    return angles | {"velocity_1": obs[4], "velocity_2": obs[5]}


def mountain_car_state(obs: jax.Array) -> dict[str, jax.Array]:
    return {"position": obs[0], "velocity": obs[1]}


STATES: dict[str, Callable[[jax.Array], dict[str, jax.Array]]] = {
    "CartPole-v1": cartpole_state,
    "ContinuousCartPole-v0": cartpole_state,
    "Pendulum-v1": pendulum_state,
    "Acrobot-v1": acrobot_state,
    "MountainCar-v0": mountain_car_state,
    "MountainCarContinuous-v0": mountain_car_state,
}
"""The state that an observation stands for, by environment id."""
