"""Classic control where gymnax lacks it or differs from Gymnasium, and the gymnax registration."""

from typing import Any

import jax
import jax.numpy as jnp

from mbrl_jax.envs.bases import CartPole, ContinuousMountainCar, gymnax, spaces
from mbrl_jax.envs.boards import ConnectFour, Go9x9, Othello, TicTacToe
from mbrl_jax.envs.craftax import PIXELS, SYMBOLIC, CraftaxPixels, CraftaxSymbolic
from mbrl_jax.envs.locomotion import HalfCheetah, Hopper, InvertedPendulum, Walker2d
from mbrl_jax.envs.sutton import BlockingMaze, DynaMaze, ShortcutMaze


class ContinuousCartPole(CartPole):
    """CartPole with a force of 10 N times an action in [-1, 1].

    Source: Gymnasium's CartPole-v1 (gymnasium/envs/classic_control/cartpole.py): the same
    constants, observation (4,) float32, reward of 1 per step, termination and limit of 500 steps.
    The action is (1,) float32 and is clipped to [-1, 1]; -1 and 1 are CartPole's own two actions.
    """

    def step_env(
        self, key: jax.Array, state: Any, action: int | float | jax.Array, params: Any
    ) -> tuple[jax.Array, Any, jax.Array, jax.Array, dict[Any, Any]]:
        """One step; the arguments and results of gymnax, action (1,) or () float32."""
        # CartPole's force is linear between its action 0 (full left) and 1 (full right).
        push = (jnp.clip(jnp.reshape(action, ()), -1.0, 1.0) + 1.0) / 2.0
        return super().step_env(key, state, push, params)

    @property
    def name(self) -> str:
        return "ContinuousCartPole-v0"

    @property
    def num_actions(self) -> int:
        return 1

    def action_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (1,))


class MountainCarContinuous(ContinuousMountainCar):
    """gymnax's MountainCarContinuous-v0 with the wall where Gymnasium has it.

    Source: gymnasium/envs/classic_control/continuous_mountain_car.py. A car that hits the left
    wall loses its velocity there; gymnax 1.0.1 takes it at the goal's side instead, so its car
    sticks to the wall. The reward charges 0.1 times the square of the action as given, not as
    clipped.
    """

    def step_env(
        self, key: jax.Array, state: Any, action: int | float | jax.Array, params: Any
    ) -> tuple[jax.Array, Any, jax.Array, jax.Array, dict[Any, Any]]:
        """One step; the arguments and results of gymnax, action (1,) or () float32."""
        action = jnp.reshape(action, ())
        force = jnp.clip(action, params.min_action, params.max_action)
        slope = jnp.cos(3 * state.position) * params.gravity
        velocity = state.velocity + force * params.power - slope
        velocity = jnp.clip(velocity, -params.max_speed, params.max_speed)
        position = state.position + velocity
        position = jnp.clip(position, params.min_position, params.max_position)
        at_wall = (position == params.min_position) & (velocity < 0)
        velocity = jnp.where(at_wall, 0.0, velocity)

        state = state.replace(position=position, velocity=velocity, time=state.time + 1)
        terminated = self.is_terminated(state, params)
        reward = 100.0 * terminated - 0.1 * action**2
        info = {"discount": self.discount(state, params)}
        obs, state = self._apply_transition_gradient_policy(self.get_obs(state), state)
        return obs, state, reward, terminated, info


OURS = {
    "DynaMaze-sutton": DynaMaze,
    "BlockingMaze-sutton": BlockingMaze,
    "ShortcutMaze-sutton": ShortcutMaze,
    "ContinuousCartPole-v0": ContinuousCartPole,
    "HalfCheetah-v5": HalfCheetah,
    "Hopper-v5": Hopper,
    "Walker2d-v5": Walker2d,
    "InvertedPendulum-v5": InvertedPendulum,
    SYMBOLIC: CraftaxSymbolic,
    PIXELS: CraftaxPixels,
    "TicTacToe-pgx": TicTacToe,
    "ConnectFour-pgx": ConnectFour,
    "Othello-pgx": Othello,
    "Go9x9-pgx": Go9x9,
}


def register_with_gymnax() -> None:
    """Makes our environments known to `gymnax.make`; calling it again does nothing."""
    for env_id, factory in OURS.items():
        if env_id not in gymnax.registered_envs:
            gymnax.register(env_id, factory)
