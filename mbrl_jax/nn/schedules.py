"""Schedules as plain functions of a step, which is never batched over seeds."""

from __future__ import annotations

import jax.numpy as jnp

from mbrl_jax.types import Scalar
from mbrl_jax.x64 import in_32_bits


@in_32_bits
def linear(start: Scalar, final: Scalar, steps: Scalar, step: Scalar) -> Scalar:
    """Linear from `start` to `final` over `steps`; constant where `steps` is 0."""
    fraction = jnp.where(steps > 0, jnp.clip(step / jnp.maximum(steps, 1.0), 0.0, 1.0), 0.0)
    return start + fraction * (final - start)


@in_32_bits
def warm_up(value: Scalar, steps: Scalar, step: Scalar) -> Scalar:
    """`value` min(1, step / steps): 0 at step 0, from step `steps` on constant, as without steps.

    Args:
      value: the value after the warm-up.
      steps: the length of the warm-up; 0 for none.
      step: counted from 0, so that the first update of a learning rate changes nothing.
    """
    return value * jnp.where(steps > 0, jnp.minimum(step / jnp.maximum(steps, 1.0), 1.0), 1.0)
