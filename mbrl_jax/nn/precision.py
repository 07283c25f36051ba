"""How exactly matrix products of float32 are computed on an accelerator.

By default a backend rounds the factors: an NVIDIA GPU to TF32 (10 bits of mantissa), a TPU to
bfloat16 (7 bits). The policy of this package:

- Hidden layers, dense or convolutional, take the default. They are nearly all of the arithmetic,
  their results pass an activation, and training sees the same rounding as acting.
- Every other product is full float32 (`precision=FULL`), forward and backward: the linear heads of
  networks (action values, logits, means and log-deviations, whose small differences decide an
  action and feed a target), a dynamics model's predictions, statistics and scalings, weighted means
  of plans, sums of priorities and of categorical values, and the orthogonalisation of first
  weights. They are narrow, and cost next to nothing.

A CPU computes both in full float32, with the same bits.

Networks that are large enough may compute in bfloat16, with parameters, statistics and losses in
float32: `compute_dtype` chooses.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

FULL = jax.lax.Precision.HIGHEST


def compute_dtype(dtype: Any = None) -> Any:
    """The dtype that hidden layers compute in: `dtype`, or the backend's own where it is None.

    That is bfloat16 on an accelerator and float32 on a CPU, where bfloat16 takes 1.7 times as long.
    """
    if dtype is not None:
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
