"""The agents' optimiser: Adam with optional clipping, decay and schedule, over optax.

It is built anew wherever it is used, from numbers that may be traced; only its state is kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from mbrl_jax.data.rows import write_slice
from mbrl_jax.types import PyTree, Scalar


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
    return flattened(optax.chain(*parts, optax.scale_by_learning_rate(learning_rate)))


def flattened(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The rule `inner` applied to one vector of all parameters: few kernels, however many tensors.

    A small network has more tensors than work: compiled for an H100, a clipped step of two critics
    is 31 kernels, 26 of them for the gradient, where tensor by tensor it is 46. `inner` sees no
    tensors, so it is to treat all elements alike, as moments and decay do, or the whole gradient,
    as clipping by the global norm does. What looks at each tensor, such as clipping by its own
    norm, stands before it: `optax.chain(per_tensor, flattened(optax.scale_by_adam()))`.

    Args:
      inner: a transformation whose `update` takes gradients and parameters as [P] vectors, P the
        number of all parameters.

    Returns:
      A transformation of trees. Its state is that of `inner`, vectors [P] in the order of the
      tree's leaves, on every backend.
    """

    def init(params: PyTree) -> PyTree:
        return inner.init(flat(params))

    def update(grads: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        _, unflat = ravel_pytree(grads)
        moves, state = inner.update(flat(grads), state, None if params is None else flat(params))
        return unflat(moves), state

    return optax.GradientTransformation(init, update)


def flat(tree: PyTree) -> jax.Array:
    """All leaves of `tree` as one vector [P], in order, of the dtype that holds them all.

    An accelerator concatenates them, which is one kernel. On a CPU they are written slice by slice:
    there XLA fuses the sums of a gradient into a concatenation and computes each of them for every
    element, which made SAC 3.4 times slower.
    """
    if jax.default_backend() != "cpu":
        return ravel_pytree(tree)[0]
    leaves = jax.tree.leaves(tree)
    vector = jnp.zeros((sum(leaf.size for leaf in leaves), 1), jnp.result_type(*leaves))
    start = 0
    for leaf in leaves:
        vector = write_slice(vector, leaf.reshape(-1, 1).astype(vector.dtype), start)
        start += leaf.size
    return vector[:, 0]
