"""The invertible transform that MuZero's rewards and values are learned in.

Pohlen et al. (2018), "Observe and look further: achieving consistent performance on Atari", and
Schrittwieser et al. (2020), appendix F: it compresses like a square root, with a small linear part
that keeps the inverse Lipschitz. Everything here is float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mbrl_jax.x64 import in_32_bits


@in_32_bits
def signed_hyperbolic(x: jax.Array, eps: float = 1e-3) -> jax.Array:
    """h(x) = sign(x) (sqrt(|x| + 1) - 1) + eps x of each element of `x` [...].

    Args:
      x: float32.
      eps: the slope of the linear part, above 0.
    """
    # the root less 1, without the difference of two near numbers, and smooth at 0
    return x / (jnp.sqrt(jnp.abs(x) + 1.0) + 1.0) + eps * x


@in_32_bits
def signed_parabolic(x: jax.Array, eps: float = 1e-3) -> jax.Array:
    """The inverse of `signed_hyperbolic`, of each element of `x` [...].

    The closed form of Pohlen et al. (2018), proposition A.2, with z the root of |x| + 1 that the
    transform took: z = (sqrt(1 + 4 eps (|x| + 1 + eps)) - 1) / (2 eps), and then z^2 - 1.

    Args:
      x: float32.
      eps: as there.
    """
    # z - 1 with the sign of x, likewise: the root's square less that of 1 + 2 eps is 4 eps |x|
    root = jnp.sqrt(1.0 + 4.0 * eps * (jnp.abs(x) + 1.0 + eps))
    above = 2.0 * x / (root + 1.0 + 2.0 * eps)
    return above * (jnp.abs(above) + 2.0)
