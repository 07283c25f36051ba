"""Open-loop forecasts of an RSSM: what it expects to see, from the actions alone.

A few observations set the state; after them the model sees nothing and its prior goes on, as in
imagination, with the actions that were truly taken (Hafner et al. 2025, "Mastering diverse control
tasks through world models").
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.models import rssm, rssm_codec, rssm_latents
from mbrl_jax.models.rssm_codec import Part
from mbrl_jax.models.rssm_params import Sizes
from mbrl_jax.nn.precision import compute_dtype
from mbrl_jax.types import InputError, PyTree, Scalar


class Forecast(NamedTuple):
    """What a model makes of sequences: the first `context` steps seen, the others foretold."""

    deter: jax.Array  # [B, T, D]
    stoch: jax.Array  # [B, T, S, C]
    obs: dict[str, jax.Array]  # [B, T, *shape], in the units of the observations


class ForecastErrors(NamedTuple):
    """Of the steps after the context, depth 0 the first of them."""

    mse: jax.Array  # [T - context] float32 mean squared error over sequences and numbers
    accuracy: jax.Array  # [T - context] float32 share of numbers that are right when rounded
    num: jax.Array  # [T - context] int32 sequences that reach so far


def forecast(
    params: PyTree,
    obs: PyTree,
    actions: jax.Array,
    is_first: jax.Array,
    key: jax.Array,
    context: int,
    parts: tuple[Part, ...],
    sizes: Sizes,
    *,
    share: Scalar = rssm_latents.UNIMIX,
    gaussian: bool = False,
    dtype: Any = None,
) -> Forecast:
    """Sequences seen for `context` steps and foretold for the rest of them.

    Args:
      params: of the whole model, its decoder among them.
      obs: arrays [B, T, *shape], a dict by name or one array.
      actions: [B, T, A] float32 vectors of the actions BEFORE the observations.
      is_first: [B, T] bool; only the steps of the context may open an episode.
      key: of the latents that are sampled.
      context: steps that the model sees, from 1 to T - 1.
      parts: of the observations, from `rssm_codec.parts_of`.
      sizes: of the model.
      share, gaussian, dtype: as in `models.rssm`.

    Raises:
      InputError: a context that leaves nothing to see or to foretell.
    """
    batch, length = is_first.shape
    if not 0 < context < length:
        raise InputError(f"context = {context}: expected 1 to {length - 1} of {length} steps")
    options = {"share": share, "gaussian": gaussian, "dtype": compute_dtype(dtype)}
    seen = jax.tree.map(lambda x: x[:, :context], (obs, actions, is_first))
    tokens = rssm_codec.encode(params["enc"], seen[0], parts, options["dtype"])
    keys, shape = jax.random.split(key), (sizes.stoch, sizes.classes)
    noise = rssm_latents.draw_noise(keys[0], (batch, context, *shape), gaussian)
    past = rssm.observe(params, tokens, seen[1], seen[2], noise, **options)
    start = rssm.State(past.deter[:, -1], past.stoch[:, -1])
    horizon = length - context
    noise = rssm_latents.draw_noise(keys[1], (horizon, batch, *shape), gaussian)
    taken = jnp.moveaxis(actions[:, context:], 1, 0)
    taken = jnp.concatenate([taken, jnp.zeros_like(taken[:1])])  # the last one leads nowhere
    dreamt = rssm.imagine(
        params, start, lambda deter, stoch, action: action, (noise, taken), horizon, **options
    )
    later = jax.tree.map(lambda x: jnp.moveaxis(x[1:], 0, 1), (dreamt.deter, dreamt.stoch))
    deter = jnp.concatenate([past.deter, later[0]], 1)
    stoch = jnp.concatenate([past.stoch, later[1]], 1)
    decoded = rssm_codec.decode(params["dec"], deter, stoch, parts, sizes.depth, options["dtype"])
    return Forecast(deter, stoch, rssm_codec.predictions(decoded, parts))


def forecast_errors(
    foretold: jax.Array, true: jax.Array, valid: jax.Array, context: int
) -> ForecastErrors:
    """Errors of one array of a forecast, by depth.

    Args:
      foretold, true: [B, T, *shape].
      valid: [B, T] bool, the sequence goes on so far.
      context: steps that were seen.
    """
    axes = tuple(range(2, foretold.ndim))
    said, came = foretold.astype(jnp.float32), true.astype(jnp.float32)
    square = jnp.mean(jnp.square(said - came), axes)[:, context:]
    right = jnp.mean(jnp.round(said) == jnp.round(came), axes)[:, context:]
    reached = valid[:, context:]
    count = jnp.maximum(jnp.sum(reached, 0), 1)
    mse, accuracy = (jnp.sum(jnp.where(reached, x, 0.0), 0) / count for x in (square, right))
    return ForecastErrors(mse, accuracy, jnp.sum(reached, 0))
