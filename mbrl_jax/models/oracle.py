"""The true environment as a dynamics model, so that planners and rollouts meet no model error."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mbrl_jax.envs.env import Env
from mbrl_jax.envs.functions import STATES
from mbrl_jax.models.dynamics import DynamicsModel, Prediction
from mbrl_jax.types import InputError, PyTree


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

    def predict(params: PyTree, obs: jax.Array, action: jax.Array, key: jax.Array) -> Prediction:
        world = Env(env.base, params, env.spec, env.native_low, env.native_high)
        reset_key, key = jax.random.split(key)
        blank, _ = world.reset(reset_key)

        def one(obs: jax.Array, action: jax.Array, key: jax.Array):
            state = blank.replace(**fields(obs))
            return world.step(key, state, action)[1]

        step = jax.vmap(one)(obs, action, jax.random.split(key, obs.shape[0]))
        return Prediction(step.obs, step.reward, step.terminated, jnp.zeros(obs.shape[0]))

    return DynamicsModel(predict)
