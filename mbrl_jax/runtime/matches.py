"""Games of two players against each other, side by side in one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.envs.env import Env, select
from mbrl_jax.runtime.players import Player, of_agent, uniform
from mbrl_jax.types import Agent, InputError, Metrics, PyTree
from mbrl_jax.x64 import in_32_bits


class Games(NamedTuple):
    """How games ended for the first player, one entry a game; it begins those of even number."""

    results: jax.Array  # [num_games] float32: 1 won, 0 drawn, -1 lost; the sign of its return
    lengths: jax.Array  # [num_games] int32, moves of both


class Score(NamedTuple):
    """Numbers of games [2] int32 by side: those that the first player began, and the others."""

    wins: jax.Array
    draws: jax.Array
    losses: jax.Array


@in_32_bits
def play_games(
    env: Env,
    first: Player,
    second: Player,
    params: tuple[PyTree, PyTree],
    key: jax.Array,
    num_games: int,
    max_moves: int | None = None,
    origin: PyTree = None,
) -> Games:
    """Games between two players, each of whom begins every other game.

    A pure function, to be jitted by the caller. The games go on together until the last one has
    ended, and at every move both players are asked for all of them.

    Args:
      env: a world of two players, in which one wins what the other loses.
      first, second: the players.
      params: of the first and of the second one, None where a player has none.
      key: of all draws.
      num_games: how many, 1 or more; the first player begins one more if it is odd.
      max_moves: ends a game early, as a draw; None leaves it to the environment.
      origin: as in `runtime.loop.play_episodes`.

    Raises:
      InputError: a world of another number of players, or no game.
    """
    if env.spec.num_players != 2:
        raise InputError(
            f"{env.spec.id} has {env.spec.num_players} player(s): expected a world of two, such as "
            "TicTacToe-pgx"
        )
    if num_games < 1:
        raise InputError(f"num_games = {num_games}: expected 1 or more")
    reset_key, act_key, env_key = jax.random.split(key, 3)
    state, obs = jax.vmap(env.reset)(jax.random.split(reset_key, num_games))
    if origin is not None:
        state = jax.vmap(env.carry_over, in_axes=(None, 0))(origin, state)
    begins = jnp.arange(num_games) % 2 == 0
    # the number by which the world knows the first player, game by game
    number = jnp.where(begins, obs["to_play"], 1 - obs["to_play"])
    players = first, second

    def going(carry: tuple) -> jax.Array:
        count, over = carry[0], carry[1]
        unfinished = jnp.any(~over)
        return unfinished if max_moves is None else unfinished & (count < max_moves)

    def move(carry: tuple) -> tuple:
        count, over, state, obs, memories, moved, returns, lengths = carry
        ours = obs["to_play"] == number
        act_keys = jax.random.split(jax.random.fold_in(act_key, count))
        (action, own), (other_action, other) = (
            player.act(params[i], memories[i], act_keys[i], state, obs, ~moved[i])
            for i, player in enumerate(players)
        )
        action = jnp.where(ours, action, other_action)
        memories = select(ours, own, memories[0]), select(ours, memories[1], other)
        keys = jax.random.split(jax.random.fold_in(env_key, count), num_games)
        state, after = jax.vmap(env.step)(keys, state, action)
        gained = jnp.where(ours, after.reward, -after.reward)
        returns = returns + jnp.where(over, 0.0, gained)
        lengths = lengths + jnp.where(over, 0, 1)
        over = over | after.terminated | after.truncated
        moved = moved | jnp.stack([ours, ~ours])
        return count + 1, over, state, after.obs, memories, moved, returns, lengths

    start = (
        jnp.int32(0),
        jnp.zeros(num_games, bool),
        state,
        obs,
        tuple(player.init_memory(num_games) for player in players),
        jnp.zeros((2, num_games), bool),
        jnp.zeros(num_games),
        jnp.zeros(num_games, jnp.int32),
    )
    *_, returns, lengths = jax.lax.while_loop(going, move, start)
    return Games(jnp.sign(returns), lengths)


def score(games: Games) -> Score:
    """The games counted by result and by who began."""
    sides = jnp.arange(games.results.shape[0])[None] % 2 == jnp.arange(2)[:, None]

    def count(result: int) -> jax.Array:
        return jnp.sum((games.results == result)[None] & sides, axis=1, dtype=jnp.int32)

    return Score(count(1), count(0), count(-1))


def metrics(games: Games) -> Metrics:
    """Means over games: `eval_return` of the results, `eval_length`, `win_rate`, `loss_rate`."""
    return {
        "eval_return": jnp.mean(games.results),
        "eval_length": jnp.mean(games.lengths.astype(jnp.float32)),
        "win_rate": jnp.mean((games.results > 0).astype(jnp.float32)),
        "loss_rate": jnp.mean((games.results < 0).astype(jnp.float32)),
    }


def against(
    env: Env, opponent: Player, num_games: int, params: PyTree = None
) -> Callable[[Agent, PyTree, jax.Array, jax.Array], Metrics]:
    """An evaluation for `make_train(evaluate=...)`: games of the agent against `opponent`.

    Args:
      env: in which the agent is trained, a world of two players.
      opponent: such as `playouts.playout_mcts(env, 200)`.
      num_games: of an evaluation; the agent begins half of them.
      params: of the opponent; the state of an agent, None for the others.

    Returns:
      (agent, state, key, t) -> the metrics of `metrics`.
    """

    def evaluate(agent: Agent, state: PyTree, key: jax.Array, t: jax.Array) -> Metrics:
        player = of_agent(agent, t)
        return metrics(play_games(env, player, opponent, (state, params), key, num_games))

    return evaluate


def play_uniform(
    agent: Agent,
    env: Env,
    state: PyTree,
    key: jax.Array,
    t: jax.Array,
    num_games: int,
    max_moves: int | None = None,
    origin: PyTree = None,
) -> Games:
    """Games of an agent in mode "eval" against the uniform player.

    Args:
      agent, env, state, key, t: as in `runtime.loop.play_episodes`.
      num_games, max_moves, origin: as in `play_games`.
    """
    players = of_agent(agent, t), uniform(env)
    return play_games(env, *players, (state, None), key, num_games, max_moves, origin)
