"""How values enter the scores of actions: completed, and brought to a common scale.

Each has the form (tree, node index, options) -> [A]. All but `qtransform_by_tree_min_max` see
nothing but the node itself, which is what allows a search to keep each node's choice instead of
making it anew (`forest.py`). A function of one's own, or mctx's, that keeps to that works as well.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

Number = jax.Array | float


def qtransform_by_min_max(
    tree: Any, node_index: Any, *, min_value: Number, max_value: Number
) -> jax.Array:
    """Values from a known range brought to [0, 1], [A]; 0 for actions not visited."""
    low = jnp.asarray(min_value, jnp.float32)
    qvalues = jnp.where(tree.children_visits[node_index] > 0, tree.qvalues(node_index), low)
    return (qvalues - low) / (max_value - low)


def qtransform_by_parent_and_siblings(
    tree: Any, node_index: Any, *, epsilon: Number = 1e-8
) -> jax.Array:
    """Values brought to [0, 1] by the least and greatest of the node's own and its children's, [A].

    Actions not visited get 0. Schrittwieser et al. (2020), appendix B, kept to one node.
    """
    visited, own = tree.children_visits[node_index] > 0, tree.node_values[node_index][None]
    qvalues = tree.qvalues(node_index)
    known = jnp.where(visited, qvalues, own)
    low = jnp.minimum(own, jnp.min(known, axis=0, keepdims=True))
    high = jnp.maximum(own, jnp.max(known, axis=0, keepdims=True))
    completed = jnp.where(visited, qvalues, low)
    return (completed - low) / jnp.maximum(high - low, epsilon)


def qtransform_by_tree_min_max(tree: Any, node_index: Any, *, epsilon: Number = 1e-8) -> jax.Array:
    """Values brought to [0, 1] by the least and greatest that its tree has seen so far, [A].

    Actions not visited get 0. Schrittwieser et al. (2020), equation 5. For PUCT alone, whose
    descent is then a loop, since any new value may change the choice of any node.
    """
    low, high = tree.value_range[node_index][:, None]
    scaled = (tree.qvalues(node_index) - low) / jnp.maximum(high - low, epsilon)
    return jnp.where(tree.children_visits[node_index] > 0, scaled, 0.0)


def qtransform_completed_by_mix_value(
    tree: Any,
    node_index: Any,
    *,
    value_scale: Number = 0.1,
    maxvisit_init: Number = 50.0,
    rescale_values: bool = True,
    use_mixed_value: bool = True,
    epsilon: Number = 1e-8,
) -> jax.Array:
    """sigma(completed Q), [A], of Danihelka et al. (2022), section 4 and appendix D.

    Actions not visited get the mixed value (the raw one without `use_mixed_value`);
    `rescale_values` brings all to [0, 1]; the scale is
    (maxvisit_init + most visits of an action) * value_scale.
    """
    visits, qvalues = tree.children_visits[node_index], tree.qvalues(node_index)
    value = tree.raw_values[node_index]
    if use_mixed_value:
        prior, total = tree_prior(tree, node_index), tree.node_visits[node_index] - 1
        value = mixed_value(value, prior, visits, qvalues, total)
    completed = jnp.where(visits > 0, qvalues, value[None])
    if rescale_values:
        low = jnp.min(completed, axis=0, keepdims=True)
        high = jnp.max(completed, axis=0, keepdims=True)
        completed = (completed - low) / jnp.maximum(high - low, epsilon)
    most = jnp.max(visits, axis=0, keepdims=True)
    return (maxvisit_init + most) * value_scale * completed


def mixed_value(
    raw: jax.Array, prior: jax.Array, visits: jax.Array, qvalues: jax.Array, total: jax.Array
) -> jax.Array:
    """v_mix, []: the raw value, and the prior's mean of the visited values once for each visit.

    Danihelka et al. (2022), equation 33; prior, visits, qvalues: [A], total: [] the sum of the
    visits. Any axes may follow that of the actions.
    """
    visited = visits > 0
    # a visited action may have a prior of zero
    prior = jnp.maximum(prior, jnp.finfo(prior.dtype).tiny)
    mass = jnp.sum(jnp.where(visited, prior, 0.0), axis=0)
    weighted = jnp.sum(jnp.where(visited, prior * qvalues, 0.0), axis=0)
    return (raw + total * (weighted / jnp.where(mass > 0, mass, 1.0))) / (total + 1)


def tree_prior(tree: Any, node_index: Any) -> jax.Array:
    """Probabilities [A]; a node inside a search holds them, a finished tree holds logits."""
    prior = getattr(tree, "children_prior_probs", None)
    if prior is None:
        return jax.nn.softmax(tree.children_prior_logits[node_index])
    return prior[node_index]


def is_local(qtransform: Any) -> bool:
    """Whether a node's values depend on the node alone."""
    return _plain(qtransform) is not qtransform_by_tree_min_max


def takes_lanes(qtransform: Any) -> bool:
    """Whether the actions may be followed by an axis of nodes, as all of this file allow."""
    return getattr(_plain(qtransform), "__module__", None) == __name__


def _plain(qtransform: Any) -> Any:
    while isinstance(qtransform, functools.partial):
        qtransform = qtransform.func
    return qtransform
