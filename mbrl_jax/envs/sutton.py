"""The mazes of Sutton and Barto as gymnax environments.

Source: Sutton and Barto, Reinforcement Learning: An Introduction, 2nd edition (2018), chapter 8,
Examples 8.1 (`DynaMaze`), 8.2 (`BlockingMaze`) and 8.3 (`ShortcutMaze`); the grids are drawn in
Figures 8.2, 8.4 and 8.5.

The observation is the agent's cell, a scalar int32 in row-major order. Actions 0 to 3 move up,
down, left and right; a move into a wall or over the edge stays. The reward is 1 on entering the
goal, which terminates, and 0 otherwise. The reset ignores its key.

The book has no time limit. Here `max_steps_in_episode` is 2000, and a uniform random walk in the
Dyna maze takes 869 steps on average: pass a larger limit to reproduce the book's figures.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mbrl_jax.envs.bases import environment, spaces
from mbrl_jax.types import InputError

MOVES = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])  # up, down, left, right

DYNA_MAP = (
    ".......#G",
    "..#....#.",
    "S.#....#.",
    "..#......",
    ".....#...",
    ".........",
)


def _with_barrier(barrier: str) -> tuple[str, ...]:
    return ("........G", ".........", ".........", barrier, ".........", "...S.....")


# The maps before and after the walls move.
BLOCKING_MAPS = (_with_barrier("########."), _with_barrier(".########"))
SHORTCUT_MAPS = (_with_barrier(".########"), _with_barrier(".#######."))


@struct.dataclass
class MazeState(environment.EnvState):
    position: jax.Array  # () int32, the cell in row-major order


@struct.dataclass
class MovingMazeState(MazeState):
    clock: jax.Array  # () int32, environment steps since the run began, over all episodes


@struct.dataclass
class MazeParams(environment.EnvParams):
    max_steps_in_episode: int = 2000


@struct.dataclass
class MovingMazeParams(MazeParams):
    switch_step: int = 1000  # this many steps of the run use the first walls


class Maze(environment.Environment[Any, Any]):
    """What the mazes share: maps of equal size with one start and one goal.

    Args:
      maps: One or more maps, each a sequence of rows; `#` wall, `S` start, `G` goal.
      resolution: Every cell of the maps becomes `resolution` x `resolution` cells. The start is
        the top-left cell of its block, the goal is its whole block.

    Raises:
      InputError: If `resolution` is not a whole number of at least 1.
    """

    def __init__(self, maps: Sequence[Sequence[str]], resolution: int = 1):
        super().__init__()
        if not isinstance(resolution, int) or resolution < 1:
            raise InputError(f"resolution = {resolution!r}: expected a whole number >= 1")
        tiles = np.array([[list(row) for row in tile_map] for tile_map in maps])
        tiles = tiles.repeat(resolution, axis=1).repeat(resolution, axis=2)
        self.walls = tiles == "#"  # [maps, rows, cols]
        self.goal = tiles[0].ravel() == "G"  # [cells]
        self.start = int(np.argmax(tiles[0] == "S"))
        self.next_cell = np.stack([_next_cells(walls) for walls in self.walls])

    @property
    def default_params(self) -> MazeParams:
        return MazeParams()

    @property
    def name(self) -> str:
        return f"{type(self).__name__}-sutton"

    @property
    def num_actions(self) -> int:
        return len(MOVES)

    def step_env(
        self, key: jax.Array, state: Any, action: int | float | jax.Array, params: Any
    ) -> tuple[jax.Array, Any, jax.Array, jax.Array, dict[Any, Any]]:
        """One move; the arguments and results of gymnax, reward () float32."""
        table = jnp.asarray(self.next_cell)
        position = table[self._map_index(state, params), state.position, action]
        state = state.replace(position=position, time=state.time + 1)
        terminated = self.is_terminated(state, params)
        info = {"discount": self.discount(state, params)}
        obs = self.observe(key, state, action, params)
        return obs, state, terminated.astype(jnp.float32), terminated, info

    def reset_env(self, key: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        """The start cell; the same for every key."""
        state = MazeState(time=jnp.int32(0), position=jnp.int32(self.start))
        return self.observe(key, state, None, params), state

    def observe(self, key: jax.Array, state: Any, action: Any, params: Any) -> jax.Array:
        """The agent's cell, () int32."""
        return state.position

    def is_terminated(self, state: Any, params: Any) -> jax.Array:
        """Whether the agent is at the goal, () bool."""
        return jnp.asarray(self.goal)[state.position]

    def action_space(self, params: Any = None) -> spaces.Discrete:
        return spaces.Discrete(self.num_actions)

    def observation_space(self, params: Any) -> spaces.Discrete:
        return spaces.Discrete(self.goal.size)

    def state_space(self, params: Any) -> spaces.Dict:
        return spaces.Dict(
            {
                "position": spaces.Discrete(self.goal.size),
                "time": spaces.Discrete(params.max_steps_in_episode + 1),
            }
        )

    def _map_index(self, state: Any, params: Any) -> Any:
        return 0


class DynaMaze(Maze):
    """The Dyna maze of Example 8.1, 6 x 9 cells; the shortest path takes 14 steps.

    Args:
      resolution: Every cell becomes `resolution` x `resolution` cells, as in the comparison of
        prioritized sweeping with Dyna-Q in Example 8.4.

    Raises:
      InputError: If `resolution` is not a whole number of at least 1.
    """

    def __init__(self, resolution: int = 1):
        super().__init__([DYNA_MAP], resolution)


class MovingMaze(Maze):
    """A maze whose walls move once, after `params.switch_step` steps of the whole run.

    The first `switch_step` steps use the first map and all later ones the second, whatever the
    episode: `state.clock` counts on through resets. A wall that closes on the agent's cell does
    not hold it, since only the cell that a move leads to is tested.
    """

    @partial(jax.jit, static_argnames=("self",))
    def step(self, key: jax.Array, state: Any, action: Any, params: Any = None) -> Any:
        """gymnax's step, except that its automatic reset keeps the clock running."""
        obs, next_state, *rest = super().step(key, state, action, params)
        return obs, next_state.replace(clock=state.clock + 1), *rest

    def step_env(
        self, key: jax.Array, state: Any, action: int | float | jax.Array, params: Any
    ) -> tuple[jax.Array, Any, jax.Array, jax.Array, dict[Any, Any]]:
        """One move and one tick of the clock, without reset."""
        obs, state, *rest = super().step_env(key, state, action, params)
        return obs, state.replace(clock=state.clock + 1), *rest

    def reset_env(self, key: jax.Array, params: Any) -> tuple[jax.Array, MovingMazeState]:
        """The start cell and a clock of 0: the beginning of a run."""
        obs, state = super().reset_env(key, params)
        return obs, MovingMazeState(time=state.time, position=state.position, clock=jnp.int32(0))

    def carry_over(self, state: MovingMazeState, reset_state: MovingMazeState) -> MovingMazeState:
        """`reset_state` with what survives the end of the episode that ended in `state`."""
        return reset_state.replace(clock=state.clock)

    def state_space(self, params: Any) -> spaces.Dict:
        clock = spaces.Discrete(np.iinfo(np.int32).max)
        return spaces.Dict({**super().state_space(params).spaces, "clock": clock})

    def _map_index(self, state: Any, params: Any) -> Any:
        return jnp.asarray(state.clock >= params.switch_step, jnp.int32)


class BlockingMaze(MovingMaze):
    """The blocking maze of Example 8.2: after 1000 steps the way of 10 steps turns into 16."""

    def __init__(self) -> None:
        super().__init__(BLOCKING_MAPS)

    @property
    def default_params(self) -> MovingMazeParams:
        return MovingMazeParams(switch_step=1000)


class ShortcutMaze(MovingMaze):
    """The shortcut maze of Example 8.3: after 3000 steps a way of 10 steps joins that of 16."""

    def __init__(self) -> None:
        super().__init__(SHORTCUT_MAPS)

    @property
    def default_params(self) -> MovingMazeParams:
        return MovingMazeParams(switch_step=3000)


def _next_cells(walls: np.ndarray) -> np.ndarray:
    """The cell that each action leads to from each cell: [rows, cols] bool to [cells, 4] int32."""
    rows, cols = walls.shape
    here = np.indices(walls.shape).reshape(2, -1).T[:, None]
    there = np.clip(here + MOVES, 0, (rows - 1, cols - 1))
    blocked = walls[there[..., 0], there[..., 1]]
    row, col = np.moveaxis(np.where(blocked[..., None], here, there), -1, 0)
    return (row * cols + col).astype(np.int32)
