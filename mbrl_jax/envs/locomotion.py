"""Gymnasium's MuJoCo robots in the gymnax interface, simulated by MJX.

HalfCheetah-v5, Hopper-v5, Walker2d-v5 and InvertedPendulum-v5: the XML files are those of the
installed gymnasium package, and observation, reward, termination, start states and time limit are
those of its environments (gymnasium/envs/mujoco/*_v5.py) with their default arguments. MJX takes 4
solver iterations of 8 line-search steps in place of MuJoCo's 100 of 50; an environment step then
differs from the C simulation in float64 by rounding of float32, which the tests bound.

A start state is a draw of positions and velocities and needs no simulation.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mbrl_jax.envs.bases import environment, spaces
from mbrl_jax.types import InputError

ITERATIONS, LINE_SEARCH = 4, 8


class Robot(NamedTuple):
    """How an environment of Gymnasium uses its simulation."""

    xml: str
    frame_skip: int  # simulation steps of an environment step
    position_noise: float  # half the width of the uniform noise of a start position
    velocity_noise: float  # of a start velocity; see `normal_velocity`
    normal_velocity: bool  # whether that noise is normal, with this deviation
    hide_first: bool  # the robot's place is no part of the observation
    velocity_limit: float  # to which observed velocities are clipped
    healthy: Callable[[jax.Array, jax.Array], jax.Array]  # (qpos, qvel) -> bool
    reward: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    """(velocity of the first coordinate, action, healthy) -> reward."""


def _hopper_is_healthy(qpos: jax.Array, qvel: jax.Array) -> jax.Array:
    state = jnp.concatenate([qpos[2:], qvel])
    return jnp.all(jnp.abs(state) < 100.0) & (qpos[1] > 0.7) & (jnp.abs(qpos[2]) < 0.2)


def _walker_is_healthy(qpos: jax.Array, qvel: jax.Array) -> jax.Array:
    return (qpos[1] > 0.8) & (qpos[1] < 2.0) & (jnp.abs(qpos[2]) < 1.0)


def _pole_is_up(qpos: jax.Array, qvel: jax.Array) -> jax.Array:
    finite = jnp.isfinite(jnp.concatenate([qpos, qvel])).all()
    return finite & (jnp.abs(qpos[1]) <= 0.2)


def _hopping(velocity: jax.Array, action: jax.Array, healthy: jax.Array) -> jax.Array:
    return velocity + healthy - 1e-3 * jnp.sum(jnp.square(action))


ROBOTS = {
    "HalfCheetah-v5": Robot(
        "half_cheetah.xml", 5, 0.1, 0.1, True, True, math.inf,
        lambda qpos, qvel: jnp.bool_(True),
        lambda velocity, action, healthy: velocity - 0.1 * jnp.sum(jnp.square(action)),
    ),
    "Hopper-v5": Robot(
        "hopper.xml", 4, 5e-3, 5e-3, False, True, 10.0, _hopper_is_healthy, _hopping
    ),
    "Walker2d-v5": Robot(
        "walker2d_v5.xml", 4, 5e-3, 5e-3, False, True, 10.0, _walker_is_healthy, _hopping
    ),
    "InvertedPendulum-v5": Robot(
        "inverted_pendulum.xml", 2, 0.01, 0.01, False, False, math.inf, _pole_is_up,
        lambda velocity, action, healthy: jnp.float32(healthy),
    ),
}  # fmt: skip


@struct.dataclass
class RobotState(environment.EnvState):
    qpos: jax.Array  # [nq] positions
    qvel: jax.Array  # [nv] velocities
    warmstart: jax.Array  # [nv] the solver's last accelerations


@struct.dataclass
class RobotParams(environment.EnvParams):
    max_steps_in_episode: int = 1000


class Locomotion(environment.Environment):
    """One of ROBOTS.

    The action is float32 within the actuators' range, the observation float32: positions (all, or
    without the first one) and velocities.

    Raises:
      InputError: without the extra `envs`.
    """

    def __init__(self, env_id: str):
        super().__init__()
        self._id, self.robot = env_id, ROBOTS[env_id]
        self.model, self._compiled, self._data = _load(self.robot.xml)
        self._start = jnp.float32(self.model.qpos0)

    @property
    def default_params(self) -> RobotParams:
        return RobotParams()

    @property
    def name(self) -> str:
        return self._id

    @property
    def num_actions(self) -> int:
        return int(self.model.nu)

    def reset_env(self, key: jax.Array, params: RobotParams) -> tuple[jax.Array, RobotState]:
        position_key, velocity_key = jax.random.split(key)
        low, scale = self.robot.position_noise, self.robot.velocity_noise
        noise = jax.random.uniform(position_key, self._start.shape, minval=-low, maxval=low)
        shape = (self.model.nv,)
        if self.robot.normal_velocity:
            velocity = scale * jax.random.normal(velocity_key, shape)
        else:
            velocity = jax.random.uniform(velocity_key, shape, minval=-scale, maxval=scale)
        state = RobotState(jnp.int32(0), self._start + noise, velocity, jnp.zeros(shape))
        return self.get_obs(state), state

    def step_env(
        self, key: jax.Array, state: RobotState, action: Any, params: RobotParams
    ) -> tuple[jax.Array, RobotState, jax.Array, jax.Array, dict[Any, Any]]:
        from mujoco import mjx

        action = jnp.asarray(action, jnp.float32).reshape(self.model.nu)
        data = self._data.replace(
            qpos=state.qpos, qvel=state.qvel, qacc_warmstart=state.warmstart, ctrl=action
        )
        data = jax.lax.fori_loop(
            0, self.robot.frame_skip, lambda i, data: mjx.step(self._compiled, data), data
        )
        seconds = self.robot.frame_skip * self.model.opt.timestep
        velocity = (data.qpos[0] - state.qpos[0]) / seconds
        healthy = self.robot.healthy(data.qpos, data.qvel)
        reward = self.robot.reward(velocity, action, healthy)
        state = RobotState(state.time + 1, data.qpos, data.qvel, data.qacc_warmstart)
        return self.get_obs(state), state, reward, ~healthy, {}

    def get_obs(self, state: RobotState, params: Any = None, key: Any = None) -> jax.Array:
        limit = self.robot.velocity_limit
        velocity = jnp.clip(state.qvel, -limit, limit)
        return jnp.concatenate([state.qpos[int(self.robot.hide_first) :], velocity])

    def is_terminated(self, state: RobotState, params: Any = None) -> jax.Array:
        return ~self.robot.healthy(state.qpos, state.qvel)

    def action_space(self, params: Any = None) -> spaces.Box:
        ends = np.asarray(self.model.actuator_ctrlrange, np.float32)  # [nu, 2]
        return spaces.Box(ends[:, 0], ends[:, 1], (self.model.nu,))

    def observation_space(self, params: Any = None) -> spaces.Box:
        size = self.model.nq - int(self.robot.hide_first) + self.model.nv
        return spaces.Box(-np.inf, np.inf, (size,))


class HalfCheetah(Locomotion):
    """Gymnasium's HalfCheetah-v5: 17 observations, 6 torques, no termination."""

    def __init__(self) -> None:
        super().__init__("HalfCheetah-v5")


class Hopper(Locomotion):
    """Gymnasium's Hopper-v5: 11 observations, 3 torques; it ends when the hopper falls."""

    def __init__(self) -> None:
        super().__init__("Hopper-v5")


class Walker2d(Locomotion):
    """Gymnasium's Walker2d-v5: 17 observations, 6 torques; it ends when the walker falls."""

    def __init__(self) -> None:
        super().__init__("Walker2d-v5")


class InvertedPendulum(Locomotion):
    """Gymnasium's InvertedPendulum-v5: 4 observations, 1 force; it ends when the pole falls."""

    def __init__(self) -> None:
        super().__init__("InvertedPendulum-v5")


def available() -> bool:
    """Whether MuJoCo, MJX and Gymnasium's files are installed."""
    return all(importlib.util.find_spec(name) for name in ("mujoco", "gymnasium")) and bool(
        importlib.util.find_spec("mujoco.mjx")
    )


def require() -> None:
    """Raises InputError where they are not."""
    if not available():
        raise InputError(
            f"{', '.join(ROBOTS)} need MuJoCo, MJX and Gymnasium, and not all of them are "
            "installed; install the extra: pip install 'mbrl-jax[envs]'"
        )


@functools.cache
def _load(xml: str) -> tuple[Any, Any, Any]:
    """MuJoCo's model of Gymnasium's file, and MJX's model and data of it."""
    require()
    import gymnasium
    import mujoco
    from mujoco import mjx

    folder = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
    model = mujoco.MjModel.from_xml_path(str(folder / xml))
    model.opt.iterations, model.opt.ls_iterations = ITERATIONS, LINE_SEARCH
    compiled = mjx.put_model(model)
    return model, compiled, mjx.make_data(compiled)
