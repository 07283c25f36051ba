"""The exact values of all positions of tic-tac-toe, by numpy.

A position is a number to base 3, whose digit i says what is in cell i (row-major, cell 0 the
lowest): 0 nothing, 1 a mark of the player to move, 2 one of the other player.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LINES = np.array(
    [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]]
)
POWERS = 3 ** np.arange(9, dtype=np.int32)


class Solution(NamedTuple):
    """What perfect play brings, for the 3**9 numbers of positions; those that cannot occur too."""

    values: np.ndarray  # [3**9] int8 for the player to move: 1 a win, 0 a draw, -1 a loss
    best: np.ndarray  # [3**9, 9] bool, the moves that keep the value; none where the game is over


@functools.cache
def solve() -> Solution:
    """Minimax over all positions, from full boards back to the empty one."""
    board = np.arange(3**9)[:, None] // POWERS % 3
    own, other = board == 1, board == 2
    lost = other[:, LINES].all(axis=-1).any(axis=-1)
    open_ = ~lost[:, None] & (board == 0)
    # the other player moves next, so the marks change their names
    swapped = np.where(own, 2, np.where(other, 1, 0)) @ POWERS
    successor = swapped[:, None] + 2 * POWERS
    values, best = np.where(lost, -1, 0).astype(np.int8), np.zeros((3**9, 9), bool)
    marks = (board > 0).sum(axis=1)
    for count in range(8, -1, -1):
        rows = np.flatnonzero((marks == count) & ~lost)
        moves = open_[rows]
        after = np.where(moves, -values[np.where(moves, successor[rows], 0)], -2)
        values[rows] = after.max(axis=1)
        best[rows] = after == values[rows, None]
    return Solution(values, best)


def position(obs: jax.Array) -> jax.Array:
    """The numbers of positions, [...] int32.

    Args:
      obs: [..., 3, 3, 2] planes of the marks of the player to move and of the other player, as
        TicTacToe-pgx has them in `obs`.
    """
    planes = obs.reshape(*obs.shape[:-3], 9, 2).astype(jnp.int32)
    digits = planes[..., 0] + 2 * planes[..., 1]
    return jnp.sum(digits * POWERS.reshape((1,) * (digits.ndim - 1) + (9,)), axis=-1)
