"""What candidate sequences of actions are worth under a dynamics model."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mbrl_jax.models.dynamics import DynamicsModel
from mbrl_jax.models.rollout import returns
from mbrl_jax.types import InputError, PyTree

Value = Callable[[jax.Array, jax.Array], jax.Array]
"""(actions [N, H, A] or [N, H] int32, key) -> what each candidate is worth, [N]."""


def model_value(model: DynamicsModel, params: PyTree, obs: jax.Array, particles: int = 1) -> Value:
    """The mean return over `particles` rollouts of each candidate from one state, obs [D].

    The rollouts lie in the batch as [particles, N]: with TSinf each particle keeps its member
    (Chua et al. 2018, section 5). A candidate with a number that is not finite is worth nan, which
    planners rank last.

    Raises:
      InputError: no particle.
    """
    if particles < 1:
        raise InputError(f"particles = {particles}: expected 1 or more")

    def value(actions: jax.Array, key: jax.Array) -> jax.Array:
        num = actions.shape[0]
        rows = jnp.broadcast_to(obs, (particles * num, *obs.shape))
        by_step = jnp.swapaxes(actions, 0, 1)
        wide = jnp.tile(by_step, (1, particles, *[1] * (actions.ndim - 2)))
        total = returns(model, params, rows, wide, key)
        return jnp.mean(total.reshape(particles, num), axis=0)

    return value
