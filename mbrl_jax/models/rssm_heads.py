"""Heads of the world model on a latent state: reward, continue, critic and actor.

Each takes the parameters of that head and gives raw outputs, float32: logits of bins for rewards
and values, one logit for the chance to go on, logits or means and deviations for actions.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mbrl_jax.models import rssm_layers as layers
from mbrl_jax.types import PyTree


def head(params: PyTree, deter: jax.Array, stoch: jax.Array, dtype: Any) -> jax.Array:
    """The outputs [*lead, K] of a head with one last layer, such as `reward` or `critic`.

    Args:
      params: of this head: hidden layers "0", "1", ... and `out`.
      deter: [*lead, D].
      stoch: [*lead, S, C].
      dtype: computed in.
    """
    return layers.output(params["out"], _hidden(params, deter, stoch, dtype), dtype)


def continues(params: PyTree, deter: jax.Array, stoch: jax.Array, dtype: Any) -> jax.Array:
    """The logit [*lead] of going on, from the parameters `cont`; arguments as of `head`."""
    return head(params, deter, stoch, dtype)[..., 0]


def actor(params: PyTree, deter: jax.Array, stoch: jax.Array, dtype: Any) -> PyTree:
    """Outputs {name: {"logits"} or {"mean", "std"}} [*lead, size] from the parameters `actor`.

    They are raw: `rssm_actions.policy` makes the distribution of them. Arguments as of `head`.
    """
    x = _hidden(params, deter, stoch, dtype)
    return {
        name: {kind: layers.output(last, x, dtype) for kind, last in kinds.items()}
        for name, kinds in params["out"].items()
    }


def _hidden(params: PyTree, deter: jax.Array, stoch: jax.Array, dtype: Any) -> jax.Array:
    flat = stoch.reshape(*stoch.shape[:-2], -1)
    return layers.mlp(params, jnp.concatenate([deter.astype(dtype), flat.astype(dtype)], -1), dtype)
