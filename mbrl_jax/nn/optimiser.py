"""The agents' optimisers over optax: Adam with optional clipping and decay, and DreamerV3's LaProp.

They are built anew wherever it is used, from numbers that may be traced; only its state is kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.custom_batching import custom_vmap
from jax.flatten_util import ravel_pytree

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


def laprop(
    learning_rate: Scalar,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-20,
    clip: Scalar = 0.3,
    clip_floor: Scalar = 1e-3,
) -> optax.GradientTransformation:
    """The optimiser of DreamerV3: adaptive clipping, then RMS scaling, then momentum.

    LaProp (Ziyin, Wang and Ueda 2020, "LaProp: separating momentum and adaptivity in Adam") divides
    by the root of the second moment before the average of the gradients, where Adam does so after
    it; both moments are corrected for their start at zero. The settings are those of Hafner et al.
    (2025), "Mastering diverse control tasks through world models".

    Args:
      learning_rate: may be a schedule's value at this step.
      b1: decay of the average of the scaled gradients.
      b2: decay of the average of the squared gradients.
      eps: added to the root of the second moment.
      clip, clip_floor: as in `clip_by_tensor`, which comes first.
    """
    scaled = optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True)
    rest = optax.chain(scaled, optax.ema(b1), optax.scale_by_learning_rate(learning_rate))
    return optax.chain(clip_by_tensor(clip, clip_floor), flattened(rest))


def clip_by_tensor(clip: Scalar, floor: Scalar) -> optax.GradientTransformation:
    """Adaptive gradient clipping with the norms of whole tensors, as DreamerV3 has it.

    A gradient g of a tensor p becomes g / max(1, |g| / (clip max(floor, |p|))). Brock et al.
    (2021), "High-performance large-scale image recognition without normalization", and
    `optax.adaptive_grad_clip` take the norms of each unit instead.

    Args:
      clip: the longest gradient in units of the tensor's norm.
      floor: the least norm of a tensor that counts, so that a bias may leave zero.
    """

    def update(grads: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        def one(grad: jax.Array, param: jax.Array) -> jax.Array:
            longest = clip * jnp.maximum(floor, jnp.sqrt(jnp.sum(jnp.square(param))))
            return grad / jnp.maximum(1.0, jnp.sqrt(jnp.sum(jnp.square(grad))) / longest)

        return jax.tree.map(one, grads, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


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
    dtype = jnp.result_type(*leaves)
    return _joined([leaf.reshape(-1, 1).astype(dtype) for leaf in leaves])[:, 0]


# XLA simplifies a chain of slices one after another, and complains after 50
_CHAIN = 32


@custom_vmap
def _joined(parts: list[jax.Array]) -> jax.Array:
    """Columns [*lead, P, 1] below each other, written slice by slice."""
    if len(parts) > _CHAIN:
        groups = [parts[i : i + _CHAIN] for i in range(0, len(parts), _CHAIN)]
        return _joined.fun([_joined.fun(group) for group in groups])
    *lead, _, one = parts[0].shape
    column = jnp.zeros((*lead, sum(part.shape[-2] for part in parts), one), parts[0].dtype)
    start = 0
    for part in parts:
        column = jax.lax.dynamic_update_slice(column, part, (*(0,) * len(lead), start, 0))
        start += part.shape[-2]
    return column


@_joined.def_vmap
def _joined_of_a_batch(
    axis_size: int, batched: list[list[bool]], parts: list[jax.Array]
) -> tuple[jax.Array, bool]:
    # JAX's own rule makes a scatter of every slice
    whole = [
        part if is_batched else jnp.broadcast_to(part[None], (axis_size, *part.shape))
        for part, is_batched in zip(parts, batched[0], strict=True)
    ]
    return _joined(whole), True
