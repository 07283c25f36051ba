"""How values enter the scores of actions: completed, and brought to a common scale.

Each is a function (tree, node index, options) -> [A] float32. All but `qtransform_by_tree_min_max`
see nothing but the node itself, which is what allows a search to keep each node's choice instead of
making it anew (`forest.py`). A function of one's own, or mctx's, that keeps to that works as well;
`node.FIELDS` names what it may read, and anything else raises `InputError`. Options may be traced
and mapped by `vmap`.

Everywhere `tree` is what a search shows of one node (`node.NodeView`) or a finished tree of one
root, and `node_index` the [] int32 number of the node.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mbrl_jax.search.base import Number, over_actions


def qtransform_by_min_max(
    tree: Any, node_index: Any, *, min_value: Number, max_value: Number
) -> jax.Array:
    """Values from a known range brought to [0, 1], [A]; 0 for actions not visited.

    Args:
      tree, node_index: see the top of this file.
      min_value, max_value: [] the ends of the range; values beyond them leave [0, 1].
    """
    low = jnp.asarray(min_value, jnp.float32)
    qvalues = jnp.where(tree.children_visits[node_index] > 0, tree.qvalues(node_index), low)
    return (qvalues - low) / (max_value - low)


def qtransform_by_parent_and_siblings(
    tree: Any, node_index: Any, *, epsilon: Number = 1e-8
) -> jax.Array:
    """Values brought to [0, 1] by the least and greatest of the node's own and its children's, [A].

    Actions not visited get 0. Schrittwieser et al. (2020), appendix B, kept to one node.

    Args:
      tree, node_index: see the top of this file.
      epsilon: [] the least difference of least and greatest by which is divided.
    """
    visited, own = tree.children_visits[node_index] > 0, tree.node_values[node_index][None]
    qvalues = tree.qvalues(node_index)
    known = jnp.where(visited, qvalues, own)
    low = jnp.minimum(own, over_actions(jnp.minimum, known))
    high = jnp.maximum(own, over_actions(jnp.maximum, known))
    completed = jnp.where(visited, qvalues, low)
    return (completed - low) / jnp.maximum(high - low, epsilon)


def qtransform_by_tree_min_max(tree: Any, node_index: Any, *, epsilon: Number = 1e-8) -> jax.Array:
    """Values brought to [0, 1] by the least and greatest that its tree has seen so far, [A].

    Actions not visited get 0. Schrittwieser et al. (2020), equation 5. For PUCT alone, whose
    descent is then a loop, since any new value may change the choice of any node.

    Args:
      tree, node_index: see the top of this file; finished trees do not tell their range.
      epsilon: [] the least difference of least and greatest by which is divided.
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

    The values of all actions times (maxvisit_init + most visits of an action) * value_scale.

    Args:
      tree, node_index: see the top of this file.
      value_scale, maxvisit_init: [] c_scale and c_visit of the paper.
      rescale_values: brings the values to [0, 1] by the least and greatest of them.
      use_mixed_value: actions not visited get `mixed_value`, otherwise the value network's.
      epsilon: [] the least difference of least and greatest by which is divided.
    """
    visits, qvalues = tree.children_visits[node_index], tree.qvalues(node_index)
    value = tree.raw_values[node_index]
    if use_mixed_value:
        prior, total = tree_prior(tree, node_index), tree.node_visits[node_index] - 1
        value = mixed_value(value, prior, visits, qvalues, total)
    completed = jnp.where(visits > 0, qvalues, value[None])
    if rescale_values:
        low = over_actions(jnp.minimum, completed)
        high = over_actions(jnp.maximum, completed)
        completed = (completed - low) / jnp.maximum(high - low, epsilon)
    most = over_actions(jnp.maximum, visits).astype(jnp.float32)
    return (maxvisit_init + most) * value_scale * completed


def mixed_value(
    raw: jax.Array, prior: jax.Array, visits: jax.Array, qvalues: jax.Array, total: jax.Array
) -> jax.Array:
    """The value v_mix, []: the raw value, and for each visit the prior's mean of visited values.

    Danihelka et al. (2022), equation 33. Any axes may follow those given here.

    Args:
      raw: [] of the value network.
      prior: [A] probabilities.
      visits: [A] int32 of the actions.
      qvalues: [A], of any value where not visited.
      total: [] int32 the sum of the visits.
    """
    visited = visits > 0
    # a visited action may have a prior of zero
    prior = jnp.maximum(prior, jnp.finfo(prior.dtype).tiny)
    mass = over_actions(jnp.add, jnp.where(visited, prior, 0.0))[0]
    weighted = over_actions(jnp.add, jnp.where(visited, prior * qvalues, 0.0))[0]
    return (raw + total * (weighted / jnp.where(mass > 0, mass, 1.0))) / (total + 1)


def tree_prior(tree: Any, node_index: Any) -> jax.Array:
    """Probabilities [A]; a node inside a search holds them, a finished tree holds logits."""
    prior = getattr(tree, "children_prior_probs", None)
    if prior is None:
        return jax.nn.softmax(tree.children_prior_logits[node_index])
    return prior[node_index]
