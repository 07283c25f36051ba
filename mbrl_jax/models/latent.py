"""The contract of models that search and imagination meet: represent, transition, evaluate."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.search import RecurrentFn, RecurrentFnOutput, RootFnOutput
from mbrl_jax.types import PyTree


class LatentModel(NamedTuple):
    """Pure functions over batches of B; a latent is a tree of arrays [B, ...]."""

    represent: Callable[[PyTree, PyTree], PyTree]  # (params, obs [B, ...]) -> latent
    transition: Callable[
        [PyTree, PyTree, jax.Array, jax.Array], tuple[PyTree, jax.Array, jax.Array]
    ]
    """(params, latent, action [B, ...], key) -> latent, reward [B], discount [B]; the discount is 0
    past an end."""
    evaluate: Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]]
    """(params, latent) -> policy logits [B, A], value [B]."""


def search_root(model: LatentModel, params: PyTree, obs: PyTree) -> RootFnOutput:
    """What a search of the states behind `obs` starts from."""
    latent = model.represent(params, obs)
    logits, value = model.evaluate(params, latent)
    return RootFnOutput(prior_logits=logits, value=value, embedding=latent)


def recurrent_fn(model: LatentModel) -> RecurrentFn:
    """The model as a search calls it, with latents as embeddings."""

    def step(params: PyTree, key: jax.Array, action: jax.Array, latent: PyTree):
        latent, reward, discount = model.transition(params, latent, action, key)
        logits, value = model.evaluate(params, latent)
        # whatever an evaluation says of a state past the end
        value = jnp.where(discount == 0, 0.0, value)
        return RecurrentFnOutput(
            reward=reward, discount=discount, prior_logits=logits, value=value
        ), latent

    return step
