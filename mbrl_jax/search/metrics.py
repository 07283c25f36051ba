"""What a search did, in numbers for a log."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mbrl_jax.search.base import PolicyOutput
from mbrl_jax.search.qtransforms import mixed_value
from mbrl_jax.search.trees import node_depths


def search_metrics(output: PolicyOutput) -> dict[str, jax.Array]:
    """For each root, [B] float32 each.

    depth_mean, depth_max: edges between a root and its nodes. visit_entropy: of the shares of
    visits at the root, in nats. policy_improvement: the value that the action weights promise
    beyond the prior's, sum of (weight - prior) q, with the mixed value for actions not visited.
    """
    tree = output.search_tree
    has_parent = tree.parents >= 0
    depth = node_depths(tree)
    num = jnp.maximum(jnp.sum(has_parent, axis=1), 1)
    summary = tree.summary()
    shares = summary.visit_probs
    logits = tree.children_prior_logits[:, 0]
    prior = jax.nn.softmax(jnp.where(tree.root_invalid_actions > 0, -jnp.inf, logits))
    prior = jnp.nan_to_num(prior)  # a root without a valid action
    visits = tree.children_visits[:, 0]
    mixed = jax.vmap(mixed_value)(
        tree.raw_values[:, 0], prior, visits, summary.qvalues, jnp.sum(visits, axis=-1)
    )
    values = jnp.where(visits > 0, summary.qvalues, mixed[:, None])
    return {
        "depth_mean": jnp.sum(jnp.where(has_parent, depth, 0), axis=1) / num,
        "depth_max": jnp.max(jnp.where(has_parent, depth, 0), axis=1).astype(jnp.float32),
        "visit_entropy": -jnp.sum(jax.scipy.special.xlogy(shares, shares), axis=-1),
        "policy_improvement": jnp.sum((output.action_weights - prior) * values, axis=-1),
    }
