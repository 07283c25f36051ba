"""Action distributions, through distrax; this is the one file that imports it."""

from __future__ import annotations

import math

import distrax
import jax
import jax.numpy as jnp

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def categorical(logits: jax.Array) -> distrax.Categorical:
    """Over the last axis of `logits` [..., A]."""
    return distrax.Categorical(logits=logits)


def diagonal_normal(mean: jax.Array, std: jax.Array) -> distrax.MultivariateNormalDiag:
    """Independent normals over the last axis [..., D] as one event."""
    return distrax.MultivariateNormalDiag(mean, std)


class TanhNormal(distrax.Transformed):
    """tanh(u), u ~ N(mean, std) for each of the last axis [..., D]; an event in (-1, 1)^D.

    The density of a sample is computed from u and stays finite however far tanh saturates; the
    density of a given action has to invert tanh, and counts actions beyond 1 - 1e-6 as that.
    """

    def __init__(self, mean: jax.Array, log_std: jax.Array):
        self.mean_before, self.log_std = mean, log_std
        super().__init__(
            distrax.MultivariateNormalDiag(mean, jnp.exp(log_std)),
            distrax.Block(distrax.Tanh(), 1),
        )

    def from_noise(self, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(action [..., D], log-density [...]) of standard normal `noise` [..., D].

        log pi = sum log N(u) - 2 (log 2 - u - softplus(-2 u)), Haarnoja et al. (2018), Appendix C.
        """
        u = self.mean_before + jnp.exp(self.log_std) * noise
        normal = -0.5 * jnp.square(noise) - self.log_std - _HALF_LOG_2PI
        squash = 2.0 * (math.log(2.0) - u - jax.nn.softplus(-2.0 * u))
        return jnp.tanh(u), jnp.sum(normal - squash, axis=-1)

    def log_prob(self, value: jax.Array) -> jax.Array:
        return super().log_prob(jnp.clip(value, -1.0 + 1e-6, 1.0 - 1e-6))

    def mode(self) -> jax.Array:
        """tanh(mean), the action of a greedy policy; the mode before the squashing."""
        return jnp.tanh(self.mean_before)


def tanh_normal(mean: jax.Array, log_std: jax.Array) -> TanhNormal:
    """A TanhNormal from `mean` and `log_std`, both [..., D]."""
    return TanhNormal(mean, log_std)


def sample_categorical(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """An index into the last axis of `logits` [..., A] for each `uniform` [...] in [0, 1); int32.

    Inverts the cumulative distribution: one random number a sample where the Gumbel trick takes A.
    """
    weight = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    possible = weight > 0
    cumulative = jnp.cumsum(weight, axis=-1)
    # scaled by the last sum, so that rounding never leads beyond the last possible action
    total = jnp.max(jnp.where(possible, cumulative, 0.0), axis=-1)
    hit = possible & (cumulative > (uniform * total)[..., None])
    num_actions = logits.shape[-1]
    index = jnp.arange(num_actions).reshape((1,) * (logits.ndim - 1) + (-1,))
    first = jnp.min(jnp.where(hit, index, num_actions), axis=-1)
    return jnp.minimum(first, num_actions - 1).astype(jnp.int32)  # NaN logits hit nothing


def masked_logits(logits: jax.Array, legal: jax.Array) -> jax.Array:
    """`logits` [B, A] with no chance for what is not in `legal` [B, A] bool.

    Where nothing is legal, as in a final observation, all actions are equally likely.
    """
    # not infinity, which would make the entropy NaN
    return jnp.where(legal, logits, -1e9)
