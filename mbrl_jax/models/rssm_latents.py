"""The random part of a latent state: a vector of categorical variables, or of normal ones.

A latent `stoch` is [..., S, C]: S variables, each the one-hot vector of one of C classes, or S * C
real numbers. Networks give raw outputs: logits [..., S, C], or [..., S, 2 C] of which the first C
are means and the last C stand for deviations. The mixture with a uniform distribution (unimix) is
no part of them: it is applied wherever a distribution is formed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mbrl_jax.models.rssm_layers import widened
from mbrl_jax.types import Scalar

UNIMIX = 0.01
MIN_STD = 0.1  # of normal latents


def unimix(logits: jax.Array, share: Scalar = UNIMIX) -> jax.Array:
    """log((1 - share) softmax(logits) + share / C), over the last axis [..., C]; float32 at least.

    Args:
      logits: [..., C] raw.
      share: of the uniform distribution, in [0, 1]; 0 is the plain log-softmax.
    """
    log_prob = jax.nn.log_softmax(widened(logits))
    mixed = (1.0 - share) * jnp.exp(log_prob) + share / logits.shape[-1]
    # a chance of zero, which only a share of 0 allows, has no logarithm
    return jnp.where(share > 0, jnp.log(jnp.maximum(mixed, 1e-37)), log_prob)


def straight_through(logits: jax.Array, noise: jax.Array, share: Scalar = UNIMIX) -> jax.Array:
    """One-hot samples [..., C] with the gradient of the probabilities; float32 at least.

    The class is argmax(log p + noise), the gradient that of p = exp(unimix(logits)).

    Args:
      logits: [..., C] raw.
      noise: [..., C] of a standard Gumbel distribution.
      share: of the uniform distribution, as in `unimix`.
    """
    return one_hot_sample(unimix(logits, share), noise)


def one_hot_sample(log_prob: jax.Array, noise: jax.Array) -> jax.Array:
    """`straight_through` from log-probabilities [..., C] instead of logits."""
    prob = jnp.exp(log_prob)
    # the difference is exactly zero, so that the value stays one-hot
    return likeliest(log_prob + noise, prob.dtype) + (prob - jax.lax.stop_gradient(prob))


def likeliest(score: jax.Array, dtype: Any) -> jax.Array:
    """The one-hot vector [..., C] of the highest of `score` [..., C], the first one of ties."""
    return jax.nn.one_hot(jnp.argmax(score, -1), score.shape[-1], dtype=dtype)


def normal(raw: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean, std), [..., S, C] each, of normal latents with raw outputs [..., S, 2 C].

    std = softplus + 0.1, as in Hafner et al. (2020), "Dream to Control".
    """
    mean, spread = jnp.split(widened(raw), 2, -1)
    return mean, jax.nn.softplus(spread) + MIN_STD


def sample(
    raw: jax.Array, noise: jax.Array, share: Scalar = UNIMIX, gaussian: bool = False
) -> jax.Array:
    """A latent [..., S, C] with its gradient to the raw outputs; float32 at least.

    Args:
      raw: [..., S, C] logits, or [..., S, 2 C] of normal latents.
      noise: [..., S, C] from `draw_noise`.
      share: of the uniform distribution in categorical latents.
      gaussian: the latents are normal.
    """
    if not gaussian:
        return straight_through(raw, noise, share)
    mean, std = normal(raw)
    return mean + std * noise


def draw_noise(key: jax.Array, shape: tuple[int, ...], gaussian: bool = False) -> jax.Array:
    """All the noise that samples of `shape` [..., S, C] take, float32: Gumbel, or standard normal.

    Drawn before a scan it costs one kernel, drawn inside one at each step.
    """
    draw = jax.random.normal if gaussian else jax.random.gumbel
    return draw(key, shape, jnp.float32)


def kl(
    raw: jax.Array, other: jax.Array, share: Scalar = UNIMIX, gaussian: bool = False
) -> jax.Array:
    """KL(p, q) [...] in nats of latents with raw outputs `raw` (p) and `other` (q) [..., S, K].

    Summed over all variables; both are mixed with the uniform distribution.
    """
    if gaussian:
        (mean, std), (mean_q, std_q) = normal(raw), normal(other)
        ratio, distance = std / std_q, (mean - mean_q) / std_q
        terms = 0.5 * (ratio * ratio + distance * distance - 1.0) - jnp.log(ratio)
    else:
        log_p, log_q = unimix(raw, share), unimix(other, share)
        terms = jnp.exp(log_p) * (log_p - log_q)
    return jnp.sum(terms, (-2, -1))


def entropy(raw: jax.Array, share: Scalar = UNIMIX, gaussian: bool = False) -> jax.Array:
    """Entropy [...] in nats of latents with raw outputs [..., S, K], summed over all variables."""
    if gaussian:
        terms = jnp.log(normal(raw)[1]) + 0.5 * jnp.log(2.0 * jnp.pi * jnp.e)
    else:
        log_prob = unimix(raw, share)
        terms = -jnp.exp(log_prob) * log_prob
    return jnp.sum(terms, (-2, -1))
