"""A finished search as the `Tree` that its users inspect, measure, and go on from."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mbrl_jax.search import forest as forests
from mbrl_jax.search.base import PolicyOutput, Tree
from mbrl_jax.search.forest import Forest
from mbrl_jax.search.node import Node, Rule, safe_log
from mbrl_jax.search.qtransforms import mixed_value
from mbrl_jax.types import InputError


def export(
    forest: Forest,
    num_simulations: int,
    prior_logits: jax.Array,
    invalid: jax.Array,
    extra_data: Any = None,
    made: jax.Array | None = None,
) -> Tree:
    """A forest as trees.

    Args:
      forest: with room for at least `num_simulations` + 1 nodes.
      num_simulations: N - 1 of the trees.
      prior_logits: [B, A] of the roots.
      invalid: [B, A] bool, actions that the roots could not take.
      extra_data: [B, ...] for the field of that name.
      made: [B, rows of a root] bool, which rows hold a node that stays; None: all.
    """
    batch, num_actions, width = forest.batch, forest.num_actions, forest.width
    num_nodes = num_simulations + 1

    def by_root(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(-1, batch, *x.shape[1:]), 0, 1)
        if made is not None:
            x = jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
        return x[:, :num_nodes]

    if made is not None:
        order = jnp.argsort(~made, axis=1, stable=True).astype(jnp.int32)
    table = by_root(forest.table)
    edges = table[..., : 4 * num_actions].reshape(batch, num_nodes, num_actions, 4)
    prior = forests.number(table[..., 4 * num_actions : 5 * num_actions])
    cell = table[..., -4:]
    edge = cell[..., forests.PARENT]
    parent, action = edge // width // batch, edge % width
    if made is not None:
        rank = jnp.argsort(order, axis=1).astype(jnp.int32)
        parent = jnp.take_along_axis(rank, parent, axis=1)
    root = (jnp.arange(num_nodes, dtype=jnp.int32) == 0)[None]
    known = ~root & (edge >= 0)
    if made is not None:
        known = known & jnp.take_along_axis(made, order, axis=1)[:, :num_nodes]
    lane = jnp.arange(batch, dtype=jnp.int32)[:, None]
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

    logits = safe_log(prior).at[:, 0].set(prior_logits)
    return Tree(
        node_visits=of_own_edge(visits, forest.root_visits),
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


def node_depths(tree: Tree) -> jax.Array:
    """Edges between each node and its root, [B, N] int32."""

    def twice(_: int, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        depth, above = found
        of_above = jnp.take_along_axis(depth, jnp.maximum(above, 0), axis=1)
        further = jnp.take_along_axis(above, jnp.maximum(above, 0), axis=1)
        return depth + jnp.where(above >= 0, of_above, 0), jnp.where(above >= 0, further, -1)

    start = (tree.parents >= 0).astype(jnp.int32), tree.parents
    return jax.lax.fori_loop(0, _doublings(tree), twice, start)[0]


def advance(tree: Tree, action: jax.Array) -> Tree:
    """The trees below an action of their roots, to go on from (`muzero_policy(search_tree=...)`).

    All that was learnt below the action stays: nodes, visits and values, under new numbers. Right
    for a model that is known; with a learned one the nodes below were imagined from the old root.

    Args:
      tree: of a finished search.
      action: [B] int32 taken at the roots. A negative one gives an empty tree, for an episode that
        begins anew; so does one that was never visited.

    Returns:
      Trees with room for as many nodes, whose root is the action's child.

    Raises:
      InputError: actions whose shape does not agree.
    """
    batch, num_nodes = tree.parents.shape
    if jnp.shape(action) != (batch,):
        raise InputError(f"action of shape {jnp.shape(action)}: expected {(batch,)}, as the tree")
    number = jnp.arange(num_nodes, dtype=jnp.int32)[None]

    def twice(_: int, top: jax.Array) -> jax.Array:
        return jnp.take_along_axis(top, top, axis=1)

    # the child of the root above each node
    top = jnp.where(tree.parents > 0, tree.parents, number)
    top = jax.lax.fori_loop(0, _doublings(tree), twice, top)
    chosen = jnp.maximum(action, 0)[:, None]
    child = jnp.take_along_axis(tree.children_index[:, 0], chosen, axis=1)
    child = jnp.where(action[:, None] >= 0, child, Tree.UNVISITED)
    inside = (top == child) & (tree.parents >= 0)
    order = jnp.argsort(~inside, axis=1, stable=True).astype(jnp.int32)
    rank = jnp.argsort(order, axis=1).astype(jnp.int32)
    here = jnp.take_along_axis(inside, order, axis=1)

    def moved(x: jax.Array, empty: float = 0) -> jax.Array:
        """x [B, N, ...] of the nodes that stay, at their new numbers."""
        wide = (batch, num_nodes, *[1] * (x.ndim - 2))
        x = jnp.take_along_axis(x, order.reshape(wide), axis=1)
        return jnp.where(here.reshape(wide), x, jnp.asarray(empty, x.dtype))

    def renumbered(x: jax.Array) -> jax.Array:
        flat = jnp.maximum(x, 0).reshape(batch, -1)
        return jnp.where(x >= 0, jnp.take_along_axis(rank, flat, axis=1).reshape(x.shape), x)

    root = (number == 0) & here
    return Tree(
        node_visits=moved(tree.node_visits),
        raw_values=moved(tree.raw_values),
        node_values=moved(tree.node_values),
        parents=jnp.where(root, Tree.NO_PARENT, moved(renumbered(tree.parents), Tree.NO_PARENT)),
        action_from_parent=jnp.where(
            root, Tree.NO_PARENT, moved(tree.action_from_parent, Tree.NO_PARENT)
        ),
        children_index=moved(renumbered(tree.children_index), Tree.UNVISITED),
        children_prior_logits=moved(tree.children_prior_logits),
        children_visits=moved(tree.children_visits),
        children_rewards=moved(tree.children_rewards),
        children_discounts=moved(tree.children_discounts),
        children_values=moved(tree.children_values),
        embeddings=jax.tree.map(moved, tree.embeddings),
        root_invalid_actions=jnp.zeros_like(tree.root_invalid_actions),
        extra_data=None,
    )


def restore(empty: Forest, tree: Tree, rule: Rule, max_depth: int) -> Forest:
    """A forest of new roots with the nodes that a tree has below its own.

    Args:
      empty: the new roots, without visits.
      tree: with room for as many nodes.
      rule: chooses the edges' targets.
      max_depth: of a node; looked at in a forest that keeps depths.
    """
    batch, num_nodes, num_actions = tree.children_index.shape
    width = empty.width
    child = jnp.moveaxis(tree.children_index, 0, 1)  # [N, B, A]
    visits, rewards, discounts, values = (
        jnp.moveaxis(x, 0, 1)
        for x in (tree.children_visits, tree.children_rewards, tree.children_discounts,
                  tree.children_values)
    )  # fmt: skip
    qvalues = jnp.where(visits > 0, rewards + discounts * values, 0.0)
    below = (tree.parents >= 0).T  # [N, B]
    parent, action = jnp.maximum(tree.parents.T, 0), jnp.maximum(tree.action_from_parent.T, 0)
    lane = jnp.arange(batch, dtype=jnp.int32)[None]
    number = jnp.arange(num_nodes, dtype=jnp.int32)[:, None]
    above = (parent * batch + lane) * width + action
    total = 1 + jnp.sum(visits[0], axis=-1, dtype=jnp.int32)
    root_value = (empty.root_value + jnp.sum(visits[0] * qvalues[0], axis=-1)) / total
    prior = jnp.exp(jnp.moveaxis(tree.children_prior_logits, 0, 1))
    outcomes = None
    if empty.outcomes is not None:
        known = (visits > 0)[..., None]
        outcomes = jnp.where(known, jnp.stack([rewards, discounts], axis=-1), 0.0)  # [N, B, A, 2]
    node = Node(
        prior.mT, visits.mT, qvalues.mT, values.mT, tree.raw_values.T, tree.node_values.T,
        tree.node_visits.T, jnp.broadcast_to(lane, parent.shape),
        jnp.broadcast_to(number, parent.shape),
        None if outcomes is None else outcomes.transpose(0, 3, 2, 1),
    )  # fmt: skip

    span, depth = None, node_depths(tree).T
    if empty.span is not None:
        seen = jnp.where(visits > 0, qvalues, jnp.inf), jnp.where(visits > 0, qvalues, -jnp.inf)
        span = jnp.stack([seen[0].min(axis=(0, 2)), seen[1].max(axis=(0, 2))])
        target = child * batch + lane[..., None]
    else:
        best = jax.vmap(rule)(node)
        further = jnp.take_along_axis(child, best[..., None], axis=-1)[..., 0]
        ends = (number * batch + lane) * width + best
        if empty.depth is not None:
            ends = jnp.where(depth >= max_depth, above, ends)
            further = jnp.where(depth >= max_depth, -1, further)

        def twice(_: int, found: jax.Array) -> jax.Array:
            return found[found, lane]

        last = jnp.where(further >= 0, further, number)
        last = jax.lax.fori_loop(0, _doublings(tree), twice, last)
        target = ends[last, lane][jnp.maximum(child, 0), lane[..., None]]

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    def under_roots(x: jax.Array, own: jax.Array) -> jax.Array:
        return jnp.concatenate([own[:batch], rows(x)[batch:]])

    records = forests.record(
        rows(prior), rows(tree.raw_values.T), rows(rewards[parent, lane, action]),
        rows(discounts[parent, lane, action]), rows(jnp.where(below, above, -1)),
    )  # fmt: skip
    records = jnp.concatenate([empty.records(lane[0]), records[batch:]])
    target = jnp.where(visits > 0, target, 0)
    edges = jnp.stack([visits, forests.bits(qvalues), forests.bits(values), target], axis=-1)
    edges = edges.reshape(-1, 4 * num_actions)
    embeddings = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), tree.embeddings)
    return dataclasses.replace(
        empty,
        table=jnp.concatenate([edges, records], axis=-1),
        embedding=jax.tree.map(under_roots, embeddings, empty.embedding),
        root_value=root_value,
        root_visits=total,
        depth=None if empty.depth is None else rows(depth),
        span=span,
        outcomes=None if outcomes is None else rows(outcomes),
    )


def search_metrics(output: PolicyOutput) -> dict[str, jax.Array]:
    """What a search did, in numbers for a log.

    Args:
      output: of any policy.

    Returns:
      For each root [B] float32: `depth_mean` and `depth_max`, edges between a root and its nodes;
      `visit_entropy` of the shares of visits at the root, in nats; `policy_improvement`, the value
      that the action weights promise beyond the prior's, sum of (weight - prior) q with the mixed
      value for actions not visited.
    """
    tree = output.search_tree
    has_parent = tree.parents >= 0
    depth = node_depths(tree)
    num = jnp.maximum(jnp.sum(has_parent, axis=1, dtype=jnp.int32), 1)
    summary = tree.summary()
    shares = summary.visit_probs
    logits = tree.children_prior_logits[:, 0]
    prior = jax.nn.softmax(jnp.where(tree.root_invalid_actions > 0, -jnp.inf, logits))
    prior = jnp.nan_to_num(prior)  # a root without a valid action
    visits = tree.children_visits[:, 0]
    mixed = jax.vmap(mixed_value)(
        tree.raw_values[:, 0], prior, visits, summary.qvalues, tree.node_visits[:, 0] - 1
    )
    values = jnp.where(visits > 0, summary.qvalues, mixed[:, None])
    below = jnp.where(has_parent, depth, 0)
    return {
        "depth_mean": jnp.sum(below, axis=1).astype(jnp.float32) / num.astype(jnp.float32),
        "depth_max": jnp.max(below, axis=1).astype(jnp.float32),
        "visit_entropy": -jnp.sum(jax.scipy.special.xlogy(shares, shares), axis=-1),
        "policy_improvement": jnp.sum((output.action_weights - prior) * values, axis=-1),
    }


def _doublings(tree: Tree) -> int:
    """Steps in which pointers that double reach from any node to its root."""
    return max(tree.num_simulations, 1).bit_length()
