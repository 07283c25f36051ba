"""A player without any network: Monte-Carlo tree search with the true rules and random games."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mbrl_jax import search
from mbrl_jax.envs.env import Env
from mbrl_jax.models import latent
from mbrl_jax.models.oracle import OracleLatent, OracleParams, latent_oracle
from mbrl_jax.runtime.players import Player, without_memory
from mbrl_jax.types import InputError, PyTree, num_rows
from mbrl_jax.x64 import in_32_bits


def playout_mcts(env: Env, num_playouts: int, exploration: float = 2.5) -> Player:
    """Plain Monte-Carlo tree search with the true rules, without any network.

    PUCT with uniform priors over the legal actions, where a new position is worth the result of
    one uniformly random game from it (Coulom 2006; Kocsis and Szepesvari 2006; PUCT as in Silver
    et al. 2017); the most visited action is taken. An action that is not visited counts as its
    node's mean, so that the best one so far does not hide it.

    Args:
      env: discrete actions, one or two players; returns of games lie in [-1, 1] and are not
        discounted.
      num_playouts: simulations, and so random games, of each move.
      exploration: c1 of PUCT.

    Raises:
      InputError: continuous actions, more than two players, or no playout.
    """
    count = env.spec.num_actions
    if count is None:
        raise InputError(f"{env.spec.id}: expected discrete actions for a tree search of playouts")
    if num_playouts < 1:
        raise InputError(f"num_playouts = {num_playouts}: expected 1 or more")

    def ignorant(_: None, obs: PyTree) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((num_rows(obs), count)), jnp.zeros(num_rows(obs))

    model = latent_oracle(env, ignorant, 1.0)
    expand = latent.recurrent_fn(model)

    def step(params: OracleParams, key: jax.Array, action: jax.Array, before: OracleLatent):
        step_key, game_key = jax.random.split(key)
        out, after = expand(params, step_key, action, before)
        value = playout(env, game_key, after.state, after.obs, after.over)
        return dataclasses.replace(out, value=value), after

    def act(key: jax.Array, state: PyTree, obs: PyTree) -> jax.Array:
        params, legal = OracleParams(env.params), env.spec.legal(obs)
        game_key, key = jax.random.split(key)
        root = latent.search_root(model, params, (state, obs))
        value = playout(env, game_key, state, obs, root.embedding.over)
        return search.muzero_policy(
            params, key, dataclasses.replace(root, value=value), step, num_playouts,
            None if legal is None else ~legal, qtransform=by_results, dirichlet_fraction=0.0,
            pb_c_init=exploration, temperature=0.0,
        ).action  # fmt: skip

    return without_memory(act)


def by_results(tree: Any, node_index: Any) -> jax.Array:
    """Values from [-1, 1] brought to [0, 1], [A]; the node's mean for actions not visited.

    A transform of values for `search.muzero_policy`, whose arguments `search.qtransforms` explains.
    """
    visited = tree.children_visits[node_index] > 0
    own = tree.node_values[node_index][None]
    return 0.5 + 0.5 * jnp.where(visited, tree.qvalues(node_index), own)


@in_32_bits
def playout(
    env: Env, key: jax.Array, state: PyTree, obs: PyTree, over: jax.Array | None = None
) -> jax.Array:
    """Results of uniformly random games, from the view of the player to move: [B] float32.

    The sum of rewards until a game ends or is truncated; those of the other player count negative.

    Args:
      env: one or two players.
      key: of all draws.
      state, obs: [B, ...] as `Env.reset` and `Env.step` give them.
      over: [B] bool, games that have ended and bring 0; None for none.
    """
    num = num_rows(obs)
    two = env.spec.num_players == 2

    def going(carry: tuple) -> jax.Array:
        return jnp.any(~carry[1])

    def move(carry: tuple) -> tuple:
        count, over, state, obs, result, sign = carry
        act_key, step_key = jax.random.split(jax.random.fold_in(key, count))
        action = env.spec.random_actions(act_key, obs)
        state, after = jax.vmap(env.step)(jax.random.split(step_key, num), state, action)
        result = result + jnp.where(over, 0.0, sign * after.reward)
        if two:
            sign = jnp.where(after.obs["to_play"] == obs["to_play"], sign, -sign)
        over = over | after.terminated | after.truncated
        return count + 1, over, state, after.obs, result, sign

    over = jnp.zeros(num, bool) if over is None else over
    start = jnp.int32(0), over, state, obs, jnp.zeros(num), jnp.ones(num)
    return jax.lax.while_loop(going, move, start)[4]
