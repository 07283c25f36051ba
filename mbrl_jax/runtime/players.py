"""Players of games: agents, the uniform player, and a perfect one of tic-tac-toe.

They meet in `runtime.matches`. Each acts for a batch of B games at once, from the view of the
player to move. Monte-Carlo tree search is in `runtime.playouts`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.envs import tic_tac_toe
from mbrl_jax.envs.env import Env
from mbrl_jax.types import Agent, InputError, PyTree, num_rows
from mbrl_jax.x64 import in_32_bits


class Player(NamedTuple):
    """A way to act, as pure functions over batches of B games."""

    init_memory: Callable[[int], PyTree]  # (B) -> memory [B, ...], () for most
    act: Callable[..., tuple[jax.Array, PyTree]]
    """(params, memory, key, state, obs, is_first) -> (action [B] int32, memory): `state` and `obs`
    are those of `Env.reset` and `Env.step` [B, ...], `is_first` [B] bool says that the player has
    not yet moved in the game, and `params` are the player's own, None for all but agents."""


def without_memory(act: Callable[[jax.Array, PyTree, PyTree], jax.Array]) -> Player:
    """A player of a function (key, state, obs) -> action alone."""

    def player_act(
        params: None, memory: PyTree, key: jax.Array, state: PyTree, obs: PyTree, is_first: Any
    ) -> tuple[jax.Array, PyTree]:
        return act(key, state, obs), memory

    return Player(lambda num: (), in_32_bits(player_act))


def of_agent(agent: Agent, t: jax.Array | int) -> Player:
    """An agent in mode "eval" as a player, whose params are the agent's state.

    Its memory and `is_first` follow its own moves alone.

    Args:
      agent: built from its config.
      t: [] int32, the batched steps of training behind the state.
    """

    def act(
        params: PyTree, memory: PyTree, key: jax.Array, state: PyTree, obs: PyTree, first: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        return agent.act(params, memory, obs, first, key, jnp.int32(t), "eval")[:2]

    return Player(agent.init_memory, act)


def uniform(env: Env) -> Player:
    """Any legal action, each with the same probability."""
    return without_memory(lambda key, state, obs: env.spec.random_actions(key, obs))


def perfect_tic_tac_toe(env: Env) -> Player:
    """Perfect play in tic-tac-toe; among the best moves each has the same probability.

    A move is best if it keeps the value under perfect play, as `envs.tic_tac_toe.solve` has it, so
    this player never loses, but does not hurry to win.

    Args:
      env: TicTacToe-pgx.

    Raises:
      InputError: another environment.
    """
    if env.spec.id != "TicTacToe-pgx":
        raise InputError(f"{env.spec.id}: expected TicTacToe-pgx, the game that is solved here")
    best = tic_tac_toe.solve().best

    def act(key: jax.Array, state: PyTree, obs: PyTree) -> jax.Array:
        keys = jax.random.split(key, num_rows(obs))
        legal = jnp.asarray(best)[tic_tac_toe.position(obs["obs"])]
        return jax.vmap(env.spec.random_action)(keys, legal)

    return without_memory(act)
