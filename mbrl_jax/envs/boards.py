"""Board games of two players in the gymnax interface, by the rules of pgx (Koyamada et al. 2023).

TicTacToe-pgx, ConnectFour-pgx, Othello-pgx and Go9x9-pgx. States, rules and observations are those
of the installed package pgx, with its default arguments. What differs here:

- A reward is that of the player who has just moved; pgx gives one to each player. It is 1 for a
  win, -1 for a loss and 0 otherwise, and the other player's is its negative.
- Nothing is legal in a position where the game is over; pgx allows everything there.
- pgx never truncates, and a game ends by its rules within `max_steps_in_episode` moves. A smaller
  limit truncates it, as a draw.

As in pgx an illegal move loses at once, and moves after the end change nothing and earn nothing.
Which of the players 0 and 1 begins is drawn at each start. In Go, a move that repeats a position is
among the legal ones and loses, and after 162 moves the board is counted.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from mbrl_jax.envs.bases import environment, spaces
from mbrl_jax.types import InputError


class Game(NamedTuple):
    """A game of pgx."""

    pgx_id: str
    most_moves: int  # that a game can last, passes included


GAMES = {
    "TicTacToe-pgx": Game("tic_tac_toe", 9),
    "ConnectFour-pgx": Game("connect_four", 42),
    # 60 discs, and at most one pass between two of them: the second in a row ends the game
    "Othello-pgx": Game("othello", 120),
    "Go9x9-pgx": Game("go_9x9", 162),
}


@struct.dataclass
class BoardParams(environment.EnvParams):
    max_steps_in_episode: int = 0


class Board(environment.Environment):
    """One of GAMES.

    An observation is a dict: `obs` [H, W, C] float32, planes of zeros and ones as the player to
    move sees them; `action_mask` [A] bool, the legal moves; `to_play` [] int32, the number (0 or 1)
    of the player to move.

    Raises:
      InputError: without pgx.
    """

    num_players = 2

    def __init__(self, env_id: str):
        super().__init__()
        require()
        import pgx

        self._id, self.game = env_id, GAMES[env_id]
        self.world = pgx.make(self.game.pgx_id)  # type: ignore[arg-type]
        with jax.numpy_rank_promotion("allow"):  # pgx relies on it
            self._shapes = jax.eval_shape(self.world.init, jax.random.key(0))

    @property
    def default_params(self) -> BoardParams:
        return BoardParams(max_steps_in_episode=self.game.most_moves)

    @property
    def name(self) -> str:
        return self._id

    @property
    def num_actions(self) -> int:
        return self._shapes.legal_action_mask.shape[0]

    def reset_env(self, key: jax.Array, params: BoardParams) -> tuple[dict[str, jax.Array], Any]:
        with jax.numpy_rank_promotion("allow"):
            state = self.world.init(key)
        return self.get_obs(state), state

    def step_env(
        self, key: jax.Array, state: Any, action: Any, params: BoardParams
    ) -> tuple[dict[str, jax.Array], Any, jax.Array, jax.Array, dict[Any, Any]]:
        mover = state.current_player
        with jax.numpy_rank_promotion("allow"):
            state = self.world.step(state, action)
        return self.get_obs(state), state, state.rewards[mover], state.terminated, {}

    def get_obs(self, state: Any, params: Any = None, key: Any = None) -> dict[str, jax.Array]:
        return {
            "obs": state.observation.astype(jnp.float32),
            "action_mask": state.legal_action_mask & ~state.terminated,
            "to_play": state.current_player,
        }

    def is_terminated(self, state: Any, params: Any = None) -> jax.Array:
        return state.terminated

    def is_truncated(self, state: Any, params: BoardParams) -> jax.Array:
        return state._step_count >= params.max_steps_in_episode

    def action_space(self, params: Any = None) -> spaces.Discrete:
        return spaces.Discrete(self.num_actions)

    def observation_space(self, params: Any = None) -> spaces.Dict:
        return spaces.Dict(
            {
                "obs": spaces.Box(0.0, 1.0, self._shapes.observation.shape),
                "action_mask": spaces.Box(0, 1, (self.num_actions,), jnp.bool_),
                "to_play": spaces.Discrete(2),
            }
        )


class TicTacToe(Board):
    """Noughts and crosses: 9 moves, cells in row-major order; obs [3, 3, 2], own and other's."""

    def __init__(self) -> None:
        super().__init__("TicTacToe-pgx")


class ConnectFour(Board):
    """Four in a row on 6 x 7 cells: 7 moves, the columns; obs [6, 7, 2], own and other's."""

    def __init__(self) -> None:
        super().__init__("ConnectFour-pgx")


class Othello(Board):
    """Othello on 8 x 8 cells: 65 moves, the last one passes, which is legal where no other is; obs
    [8, 8, 2], own and other's."""

    def __init__(self) -> None:
        super().__init__("Othello-pgx")


class Go9x9(Board):
    """Go on 9 x 9 points with a komi of 7.5: 82 moves, the last one passes.

    Obs [9, 9, 17]: own and other's stones now and after each of the 7 moves before, and the colour
    of the player to move, 0 for black. Area scoring, in which all stones count as alive.
    """

    def __init__(self) -> None:
        super().__init__("Go9x9-pgx")


def available() -> bool:
    """Whether pgx is installed."""
    return importlib.util.find_spec("pgx") is not None


def require() -> None:
    """Raises InputError where it is not."""
    if not available():
        raise InputError(
            f"{', '.join(GAMES)} need pgx, and it is not installed; install the extra: "
            "pip install 'mbrl-jax[envs]'"
        )
