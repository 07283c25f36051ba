"""A finished search as the `Tree` that its users inspect."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mbrl_jax.search import forest as forests
from mbrl_jax.search.base import Tree
from mbrl_jax.search.forest import Forest


def export(
    forest: Forest,
    num_simulations: int,
    prior_logits: jax.Array,
    invalid: jax.Array,
    extra_data: Any = None,
    made: jax.Array | None = None,
) -> Tree:
    """The trees, without the nodes that `made` [B, N] does not name (None: all are there).

    `prior_logits` [B, A] are those of the roots.
    """
    batch, num_actions, width = forest.batch, forest.num_actions, forest.width
    num_nodes = num_simulations + 1

    def by_root(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(-1, batch, *x.shape[1:]), 0, 1)
        if made is not None:
            x = jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
        return x[:, :num_nodes]

    if made is not None:
        order = jnp.argsort(~made, axis=1, stable=True)
    table = by_root(forest.table)
    edges = table[..., : 4 * num_actions].reshape(batch, num_nodes, num_actions, 4)
    prior = forests.number(table[..., 4 * num_actions : 5 * num_actions])
    cell = table[..., -4:]
    edge = cell[..., forests.PARENT]
    parent, action = edge // width // batch, edge % width
    if made is not None:
        parent = jnp.take_along_axis(jnp.argsort(order, axis=1), parent, axis=1)
    root = (jnp.arange(num_nodes) == 0)[None]
    known = ~root
    if made is not None:
        known = known & jnp.take_along_axis(made, order, axis=1)[:, :num_nodes]
    lane = jnp.arange(batch)[:, None]
    # one that is made anew, where depth is limited, takes the place of the older one
    child = jnp.full((batch, num_nodes, num_actions), Tree.UNVISITED, jnp.int32)
    own = jnp.broadcast_to(jnp.arange(num_nodes, dtype=jnp.int32)[None], known.shape)
    child = child.at[lane, jnp.where(known, parent, num_nodes), action].max(own, mode="drop")
    known = known & (child[lane, parent, action] == own)
    parent = jnp.where(known, parent, Tree.NO_PARENT)
    action = jnp.where(known, action, Tree.NO_PARENT)

    visits, values = edges[..., forests.VISITS], forests.number(edges[..., forests.VALUE])
    raw = forests.number(cell[..., forests.RAW])

    def of_child(x: jax.Array) -> jax.Array:
        """x [B, N] of the children, at their edges."""
        return jnp.where(child >= 0, x[lane[..., None], child], 0.0)

    def of_own_edge(x: jax.Array, root_value: jax.Array) -> jax.Array:
        """What the edge above each node holds, [B, N]."""
        above = x[lane, jnp.maximum(parent, 0), jnp.maximum(action, 0)]
        return jnp.where(root, root_value[:, None], jnp.where(known, above, 0))

    logits = forests.safe_log(prior).at[:, 0].set(prior_logits)
    return Tree(
        node_visits=of_own_edge(visits, 1 + jnp.sum(visits[:, 0], axis=-1)),
        raw_values=jnp.where(known | root, raw, 0.0),
        node_values=of_own_edge(values, forest.root_value),
        parents=parent,
        action_from_parent=action,
        children_index=child,
        children_prior_logits=jnp.where((known | root)[..., None], logits, 0.0),
        children_visits=visits,
        children_rewards=of_child(forests.number(cell[..., forests.REWARD])),
        children_discounts=of_child(forests.number(cell[..., forests.DISCOUNT])),
        children_values=values,
        embeddings=jax.tree.map(by_root, forest.embedding),
        root_invalid_actions=invalid,
        extra_data=extra_data,
    )
