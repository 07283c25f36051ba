"""The true environment as a model, so that planners, rollouts and search meet no model error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.envs.env import Env, select
from mbrl_jax.envs.functions import STATES
from mbrl_jax.models.dynamics import DynamicsModel, Prediction
from mbrl_jax.models.latent import LatentModel
from mbrl_jax.types import InputError, PyTree, num_rows
from mbrl_jax.x64 import in_32_bits


def oracle(env: Env) -> DynamicsModel:
    """`predict(env.params, obs, action, key)` takes the environment's own step from each state.

    The state is told from the observation, which classic control allows; its clock stands at zero,
    so the time limit never strikes.

    Raises:
      InputError: an environment whose state its observations do not tell.
    """
    if env.spec.id not in STATES:
        raise InputError(
            f"{env.spec.id} has no oracle: its state does not follow from an observation; known: "
            f"{', '.join(STATES)}"
        )
    fields = STATES[env.spec.id]

    @in_32_bits
    def predict(params: PyTree, obs: jax.Array, action: jax.Array, key: jax.Array) -> Prediction:
        world = dataclasses.replace(env, params=params)
        reset_key, key = jax.random.split(key)
        blank, _ = world.reset(reset_key)

        def one(obs: jax.Array, action: jax.Array, key: jax.Array):
            state = blank.replace(**fields(obs))
            return world.step(key, state, action)[1]

        step = jax.vmap(one)(obs, action, jax.random.split(key, obs.shape[0]))
        return Prediction(step.obs, step.reward, step.terminated, jnp.zeros(obs.shape[0]))

    return DynamicsModel(predict)


MASKED = -1e9  # the logit of an illegal action, as a search expects it below the root


class OracleLatent(NamedTuple):
    """States of B environments."""

    state: PyTree  # [B, ...] of gymnax
    obs: PyTree  # [B, *obs_shape], or a dict of such
    over: jax.Array  # [B] bool, the episode has ended


class OracleParams(NamedTuple):
    env: PyTree  # `env.params`
    evaluate: PyTree = None  # whatever the evaluation needs


def latent_oracle(
    env: Env,
    evaluate: Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]],
    discount: float,
) -> LatentModel:
    """Any gymnax environment as a latent model, which makes a search AlphaZero's.

    Parameters are `OracleParams`. `represent(params, (state [B, ...], obs [B, *obs_shape]))` takes
    what `Env.reset` and `Env.step` give. A state that ends the episode is absorbing: it stays,
    earns nothing and is worth nothing. The time limit, which is none of the task, ends nothing.

    Of two players what one wins the other loses: rewards are those of the player who moves, values
    those of the player to move, and a discount is negative where `to_play` has changed. Logits are
    `MASKED` where the observation's `action_mask` is false.

    Args:
      env: discrete actions, or continuous ones for `sampled_policy`; one or two players.
      evaluate: (params.evaluate, obs [B, *obs_shape]) -> policy logits [B, A], value [B].
      discount: of each step, [0, 1].

    Raises:
      InputError: more than two players.
    """
    if env.spec.num_players > 2:
        raise InputError(
            f"{env.spec.id} has {env.spec.num_players} players: expected one or two for a search"
        )

    @in_32_bits
    def represent(params: OracleParams, seen: tuple[PyTree, jax.Array]) -> OracleLatent:
        state, obs = seen
        return OracleLatent(state, obs, jnp.zeros(num_rows(obs), bool))

    @in_32_bits
    def transition(params: OracleParams, latent: OracleLatent, action: jax.Array, key: jax.Array):
        world = dataclasses.replace(env, params=params.env)
        keys = jax.random.split(key, action.shape[0])
        state, step = jax.vmap(world.step)(keys, latent.state, action)
        before, live = latent, ~latent.over
        over = latent.over | step.terminated
        after = OracleLatent(state, step.obs, over)
        after = select(live, after, before)
        reward = jnp.where(live, step.reward, 0.0)
        kept = jnp.float32(discount)
        if env.spec.num_players == 2:
            # not by the number of moves: a player may move twice
            kept = jnp.where(after.obs["to_play"] == before.obs["to_play"], kept, -kept)
        return after, reward, jnp.where(over, 0.0, kept)

    def judged(params: OracleParams, latent: OracleLatent) -> tuple[jax.Array, jax.Array]:
        logits, value = evaluate(params.evaluate, latent.obs)
        legal = env.spec.legal(latent.obs)
        return logits if legal is None else jnp.where(legal, logits, MASKED), value

    return LatentModel(represent, transition, judged)
