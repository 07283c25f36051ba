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
