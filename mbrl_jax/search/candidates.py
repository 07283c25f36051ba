"""Which actions of a root a Gumbel search visits next: sequential halving, and its replay.

Danihelka et al. (2022), "Policy improvement by planning with Gumbel", algorithm 2 and its
implementation in mctx, which scores anew before each simulation.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.search import backup
from mbrl_jax.search import forest as forests
from mbrl_jax.search.base import Lanes, Tree
from mbrl_jax.search.forest import Forest
from mbrl_jax.search.node import Node, Values, best
from mbrl_jax.search.schedule import Rounds

LOW = -1e9  # a considered action is visited even if nothing speaks for it


def considered_score(
    considered: jax.Array, noisy: jax.Array, added: jax.Array, visits: jax.Array
) -> jax.Array:
    """The scores of a root's actions, [A, B]; -inf where not as often visited as asked.

    Args:
      considered: [1, B] int32 visits that the next action has.
      noisy: [A, B], see `noisy`.
      added: [A, B] transformed values.
      visits: [A, B] int32.
    """
    return jnp.where(visits == considered, jnp.maximum(LOW, noisy + added), -jnp.inf)


def noisy(gumbel: jax.Array, logits: jax.Array) -> jax.Array:
    """gumbel + logits, the greatest logit 0, of both [B, A] float32, as [A, B]."""
    return (gumbel + (logits - jnp.max(logits, axis=-1, keepdims=True))).T


class Halving(NamedTuple):
    """What the choice at the roots needs."""

    noisy: jax.Array  # [A, B], see `noisy`
    invalid: jax.Array  # [A, B] bool
    considered: jax.Array  # [B] int32 how many actions are
    values: Values  # the transform
    reads: frozenset[str]  # what it reads of a node, see `node.FIELDS`
    rounds: Rounds  # of all numbers of considered actions
    once: bool  # actions are dropped once in a phase


def final_action(lanes: Lanes, tree: Tree, added: jax.Array) -> jax.Array:
    """The best of the most visited actions of the roots, [B] int32.

    Args:
      lanes: what the roots brought.
      tree: of the search.
      added: [B, A] transformed values at the roots.
    """
    assert lanes.gumbel is not None
    visits = tree.children_visits[:, 0]
    top = jnp.max(visits, axis=-1)[None]
    score = considered_score(top, noisy(lanes.gumbel, lanes.prior_logits), added.T, visits.T)
    return jnp.argmax(jnp.where(lanes.invalid.T, -jnp.inf, score), axis=0).astype(jnp.int32)


def next_action(halving: Halving, node: Node, considered: jax.Array) -> jax.Array:
    """The best of the roots' actions that are as often visited as asked, [B] int32.

    Args:
      halving: what the choice at the roots needs.
      node: the roots.
      considered: [B] int32 visits.
    """
    score = considered_score(considered[None], halving.noisy, halving.values(node), node.visits)
    return best(jnp.where(halving.invalid, -jnp.inf, score))


def pick(x: jax.Array, action: jax.Array) -> jax.Array:
    """x [A, L] at actions [L], as [1, L]."""
    return jnp.take_along_axis(x, action[None], axis=0, mode="promise_in_bounds")


def ranked(forest: Forest, halving: Halving, actions: jax.Array) -> jax.Array:
    """The considered actions, the best to the front, [B, slots] int32.

    Args:
      forest: as it is now.
      halving: what the choice at the roots needs.
      actions: [B, slots]; those as often visited as the first are considered.
    """
    node = forests.roots(forest)
    considered = pick(node.visits, actions[:, 0])
    score = considered_score(considered, halving.noisy, halving.values(node), node.visits)
    score = jnp.where(halving.invalid, -jnp.inf, score).T
    best = jax.lax.top_k(score, min(actions.shape[1], score.shape[1]))[1]
    return actions.at[:, : best.shape[1]].set(best.astype(jnp.int32))


def replay(
    forest: Forest,
    halving: Halving,
    actions: jax.Array,
    first_row: jax.Array,
    among: jax.Array,
    commit: jax.Array,
) -> jax.Array:
    """The choice of some of the candidates as it is made one at a time, [B, slots] int32.

    Each is made with all the values that are known by then.

    Args:
      forest: with the new nodes of all candidates, none of them backed up.
      halving: what the choice at the roots needs.
      actions: [B, slots] int32, the candidates first.
      first_row: [] int32 of the new nodes.
      among: [B] int32 number of candidates.
      commit: [B] int32 how many of them to choose.
    """
    batch, slots = actions.shape
    node = forests.roots(forest)
    rows = first_row + jnp.arange(slots, dtype=jnp.int32)[:, None] * batch
    rows = rows + jnp.arange(batch, dtype=jnp.int32)[None]
    every = jnp.arange(halving.noisy.shape[0], dtype=jnp.int32)[:, None]
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    candidate = (actions[None] == every[..., None]) & (slot < among[:, None])[None]

    def at_actions(x: jax.Array) -> jax.Array:
        """x [slots * B] of the candidates, at their actions, [A, B]."""
        return jnp.sum(jnp.where(candidate, x.reshape(slots, batch).T[None], 0.0), axis=-1)

    after = after_visits(forest, rows.reshape(-1))
    qvalue = at_actions(after.qvalue)
    # what no transform reads is not made: a sum over all slots for every action
    returned = at_actions(after.returned) if "node_values" in halving.reads else None
    child = at_actions(after.value) if "children_values" in halving.reads else None
    outcome = None
    if node.outcomes is not None:
        outcome = jnp.stack([at_actions(after.reward), at_actions(after.discount)])
    considered = pick(node.visits, actions[:, 0])[0]

    def choose(i: jax.Array, loop: tuple[Node, jax.Array]) -> tuple[Node, jax.Array]:
        node, order = loop
        action = next_action(halving, node, considered)
        counts = i < commit
        taken = (action[None] == every) & counts[None]
        before, total = node.total, node.total + counts
        node = node._replace(
            visits=node.visits + taken, qvalues=jnp.where(taken, qvalue, node.qvalues), total=total
        )
        if returned is not None:
            value = (node.value * before + pick(returned, action)[0]) / total
            node = node._replace(value=jnp.where(counts, value, node.value))
        if child is not None:
            node = node._replace(values=jnp.where(taken, child, node.values))
        if outcome is not None and node.outcomes is not None:
            node = node._replace(outcomes=jnp.where(taken[None], outcome, node.outcomes))
        return node, jnp.where(slot == i, action[:, None], order)

    order = jax.lax.fori_loop(0, jnp.max(commit), choose, (node, actions))[1]
    # a root that takes all of its candidates may take more of them than `rearranged` moves
    return jnp.where((commit < among)[:, None], order, actions)


def rearranged(
    forest: Forest, actions: jax.Array, chosen: jax.Array, first_row: jax.Array, most: int
) -> Forest:
    """The forest with the new nodes of the chosen actions first.

    Args:
      forest: with the new nodes of all candidates, none of them backed up.
      actions: [B, slots] int32, in the order of the nodes.
      chosen: [B, slots] int32, the chosen ones first.
      first_row: [] int32 of the new nodes.
      most: how many to move.
    """
    batch = forest.batch
    found = jnp.argmax(chosen[:, :most, None] == actions[:, None, :], axis=-1).astype(jnp.int32)
    own = jnp.arange(batch, dtype=jnp.int32)[:, None]
    lane = first_row + (found * batch + own).T.reshape(-1)
    new = forest.records(lane)
    embedding = jax.tree.map(lambda x: forests.take(x, lane), forest.embedding)
    return forests.store(forest, new, embedding, first_row)


class After(NamedTuple):
    """The edges of root actions once a new node below them is backed up, [L] float32 each."""

    qvalue: jax.Array
    value: jax.Array  # of the child
    reward: jax.Array
    discount: jax.Array
    returned: jax.Array  # at the root


def after_visits(forest: Forest, row: jax.Array) -> After:
    """What backing up new nodes, one alone, would make of their root actions.

    Args:
      forest: in which they are stored.
      row: [L] int32 of the new nodes.
    """
    batch, width = forest.batch, forest.width

    def node_cell(row: jax.Array) -> jax.Array:
        # slots without a candidate may lie beyond the end
        return forest.cells.at[(row + 1) * width - 1].get(mode="clip")

    def parts(cell: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        reward, discount = cell[:, forests.REWARD], cell[:, forests.DISCOUNT]
        return cell[:, forests.PARENT], forests.number(reward), forests.number(discount)

    def inside(cell: jax.Array) -> jax.Array:
        return cell[:, forests.PARENT] >= batch * width

    def level(walk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        cell, returned = walk
        edge, reward, discount = parts(cell)
        going = inside(cell)
        returned = jnp.where(going, reward + discount * returned, returned)
        return jnp.where(going[:, None], node_cell(edge // width), cell), returned

    own = node_cell(row)
    walk = own, forests.number(own[:, forests.RAW])
    cell, returned = backup.walked(lambda walk: jnp.any(inside(walk[0])), level, walk)
    edge, reward, discount = parts(cell)
    above = forests.root_cells(forest, edge)
    visits = above[:, forests.VISITS]
    value = (forests.number(above[:, forests.VALUE]) * visits + returned) / (visits + 1)
    return After(reward + discount * value, value, reward, discount, reward + discount * returned)
