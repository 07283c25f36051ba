"""MuZero's functions for worlds with chance: actions lead to afterstates, codes to the next states.

Antonoglou et al. (2022), "Planning in stochastic environments with a learned model". The world's
answer to an action is one of C codes, which an encoder reads off the observation that came. They
are learned with everything else, through a straight-through gradient; no code has a meaning of its
own beforehand.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.models.muzero_layers import MODULES, Chance, Net
from mbrl_jax.types import PyTree


class Code(NamedTuple):
    """What an encoder makes of observations."""

    chosen: jax.Array  # [B, C] float32, one-hot; its gradient goes to `shares`
    shares: jax.Array  # [B, C] float32, probabilities


def afterstate(
    net: Net, params: PyTree, features: jax.Array, action: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The afterstates' features [B, ...], in [0, 1], and [B, F] what `chance` reads of them.

    Args:
      net, params: of the functions, with codes.
      features: [B, ...] of latent states.
      action: [B, V] float32, as `muzero_net.action_vector` makes it.
    """
    return MODULES["afterstate"](net).apply(params["afterstate"], features, action)


def chance(net: Net, params: PyTree, seen: jax.Array) -> Chance:
    """Which codes will come, and the value of the afterstates.

    Args:
      net, params: of the functions, with codes.
      seen: [B, F] from `afterstate`.
    """
    return MODULES["chance"](net).apply(params["chance"], seen)


def encode(net: Net, params: PyTree, obs: PyTree) -> Code:
    """The codes of the observations [B, ...] that answered an action."""
    shares = jax.nn.softmax(MODULES["encoder"](net).apply(params["encoder"], obs))
    hard = jax.nn.one_hot(jnp.argmax(shares, axis=-1), net.chance, dtype=jnp.float32)
    return Code(hard + shares - jax.lax.stop_gradient(shares), shares)
