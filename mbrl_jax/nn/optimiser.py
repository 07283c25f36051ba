"""The agents' optimiser: Adam with optional clipping, decay and schedule, over optax.

It is built anew wherever it is used, from numbers that may be traced; only its state is kept.
"""

from __future__ import annotations

import optax

from mbrl_jax.types import Scalar


def adam(
    learning_rate: Scalar,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    max_grad_norm: Scalar | None = None,
    weight_decay: Scalar | None = None,
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015), or AdamW with `weight_decay` (Loshchilov and Hutter 2019).

    Args:
      learning_rate: may be a schedule's value at this step.
      b1, b2, eps: as in the paper.
      max_grad_norm: scales the gradient to this global norm where it is longer; None leaves it.
      weight_decay: decoupled, in units of the learning rate; None is plain Adam.
    """
    parts = [] if max_grad_norm is None else [optax.clip_by_global_norm(max_grad_norm)]
    parts.append(optax.scale_by_adam(b1=b1, b2=b2, eps=eps))
    if weight_decay is not None:
        parts.append(optax.add_decayed_weights(weight_decay))
    # one vector of all parameters: a small network has more leaves than work
    return optax.flatten(optax.chain(*parts, optax.scale_by_learning_rate(learning_rate)))
