"""Gumbel MuZero: sequential halving at the root, the improved policy below, in exact batches.

Danihelka et al. (2022), "Policy improvement by planning with Gumbel".
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.search import forest as forests
from mbrl_jax.search import halving, walks
from mbrl_jax.search.base import LoopFn, QTransform
from mbrl_jax.search.forest import Forest, Node, Rule
from mbrl_jax.search.seeds import Model

LOW = -1e9  # a considered action is visited even if nothing speaks for it


def improved_policy(qtransform: QTransform) -> Rule:
    """pi'(a) - n(a) / (1 + sum of n), [A, L], with pi' = softmax(log prior + completed values).

    Section 5 of the paper.
    """

    def rule(node: Node) -> jax.Array:
        added = forests.transformed(qtransform, node)
        weights = node.prior * jnp.exp(added - jnp.max(added, axis=0, keepdims=True))
        policy = weights / jnp.sum(weights, axis=0, keepdims=True)
        return policy - node.visits / node.total[None]

    return rule


def considered_score(
    considered: jax.Array, noisy: jax.Array, added: jax.Array, visits: jax.Array
) -> jax.Array:
    """noisy + values [A, B] of the actions with `considered` [1, B] visits, else -inf."""
    return jnp.where(visits == considered, jnp.maximum(LOW, noisy + added), -jnp.inf)


def noisy(gumbel: jax.Array, logits: jax.Array) -> jax.Array:
    """gumbel + logits, the greatest logit 0, of both [B, A], as [A, B]."""
    return (gumbel + (logits - jnp.max(logits, axis=-1, keepdims=True))).T


class Root(NamedTuple):
    """What the root's choice needs."""

    noisy: jax.Array  # [A, B], see `noisy`
    invalid: jax.Array  # [A, B] bool
    considered: jax.Array  # [B] int32 how many actions are


class Wave(NamedTuple):
    forest: Forest
    actions: jax.Array  # [B, slots] int32, the considered ones first
    first_row: jax.Array  # [] int32


def in_sequence(
    forest: Forest,
    model: Model,
    root: Root,
    qtransform: QTransform,
    rounds: halving.Rounds,
    max_depth: int,
    loop_fn: LoopFn,
) -> Forest:
    """All simulations, one of every root after the other."""
    batch = forest.batch
    rule, counts = improved_policy(qtransform), jnp.asarray(halving.counts(rounds))
    num_simulations = counts.shape[1]
    every = jnp.ones(batch, bool)

    def select(i: jax.Array | int, forest: Forest) -> jax.Array:
        action = next_action(root, qtransform, forests.roots(forest), counts[root.considered, i])
        edge = forests.first_edges(forest) + action
        return forests.end_of(edge, forests.root_cells(forest, edge))

    def simulation(i: jax.Array, loop: tuple[Forest, jax.Array]) -> tuple[Forest, jax.Array]:
        forest, edge = loop
        new, embedding = forests.expand(forest, model, i, edge)
        first_row = (i + 1) * batch
        forest = forests.store(forest, new, embedding, first_row)
        forest, returned = walks.backup(forest, first_row, every, rule, max_depth)
        forest = dataclasses.replace(forest, root_value=forest.root_value + returned)
        return forest, select(jnp.minimum(i + 1, num_simulations - 1), forest)

    return averaged(loop_fn(0, num_simulations, simulation, (forest, select(0, forest)))[0])


def in_rounds(
    forest: Forest,
    model: Model,
    root: Root,
    qtransform: QTransform,
    rounds: halving.Rounds,
    groups: list[halving.Group],
    halve_once: bool,
    max_depth: int,
    loop_fn: LoopFn,
) -> Forest:
    """All simulations, those of a round in batches."""
    batch = forest.batch
    # nothing descends after the only round
    rule = improved_policy(qtransform) if groups[-1].end > 1 else None
    candidates, visits = jnp.asarray(rounds.candidates), jnp.asarray(rounds.visits)
    zero = jnp.zeros(root.noisy.shape)
    start = considered_score(zero[:1], root.noisy, zero, zero)
    most = int(rounds.candidates.max())
    actions = jax.lax.top_k(jnp.where(root.invalid, -jnp.inf, start).T, most)[1]
    # dead lanes fill up the last batch of a round
    slots = max(-(-most // group.width) * group.width for group in groups)
    actions = jnp.pad(actions, ((0, 0), (0, slots - most)))
    last = jnp.max(jnp.asarray(rounds.total)[root.considered])

    def in_batches(number: jax.Array, width: int, body: Any, carry: Any) -> Any:
        # on an accelerator XLA turns the table's axes around for what is not in a loop
        if most <= width and jax.default_backend() == "cpu":
            return body(jnp.int32(0), carry)
        return loop_fn(0, -(-number // width), lambda n, x: body(n * width, x), carry)

    def one_round(i: jax.Array, wave: Wave, group: halving.Group) -> Wave:
        forest, actions, first_row = wave
        width = group.width
        among, commit = candidates[root.considered, i], visits[root.considered, i]
        if halve_once:
            before = visits[root.considered, jnp.maximum(i - 1, 0)]
            actions = jax.lax.cond(
                jnp.any(commit < before),
                lambda: ranked(forest, root, qtransform, actions),
                lambda: actions,
            )

        def evaluate(slot: jax.Array, forest: Forest) -> Forest:
            some = jax.lax.dynamic_slice_in_dim(actions, slot, width, axis=1)
            edge = (forests.first_edges(forest)[:, None] + some).T.reshape(-1)
            edge = forests.end_of(edge, forests.root_cells(forest, edge))
            new, embedding = forests.expand(forest, model, i * slots + slot, edge)
            return forests.store(forest, new, embedding, first_row + slot * batch)

        forest = in_batches(jnp.max(among), width, evaluate, forest)
        if group.replayed:
            fewer = jnp.any(commit < among) & (i > 0)
            chosen = jax.lax.cond(
                fewer,
                lambda: replay(forest, root, qtransform, actions, first_row, among, commit),
                lambda: actions,
            )
            # a loop of one or no turn: a cond would copy the forest
            forest = jax.lax.fori_loop(
                0,
                jnp.int32(fewer),
                lambda _, x: rearranged(x, actions, chosen, first_row, group.replayed),
                forest,
            )
            actions = chosen

        def back_up(slot: jax.Array, forest: Forest) -> Forest:
            live = (slot + jnp.arange(width)[:, None] < commit[None]).reshape(-1)
            forest, returned = walks.backup(forest, first_row + slot * batch, live, rule, max_depth)
            summed = forest.root_value + jnp.sum(returned.reshape(width, batch), axis=0)
            return dataclasses.replace(forest, root_value=summed)

        forest = in_batches(jnp.max(commit), width, back_up, forest)
        return Wave(forest, actions, first_row + jnp.max(commit) * batch)

    wave = Wave(forest, actions, jnp.int32(batch))
    for group in groups:
        end = jnp.clip(last, group.first, group.end)
        wave = loop_fn(
            group.first, end, lambda i, wave, group=group: one_round(i, wave, group), wave
        )
    return averaged(wave.forest)


def averaged(forest: Forest) -> Forest:
    """With the mean in place of the sum at the roots, at whose value no choice looks."""
    total = forests.roots(forest).total
    return dataclasses.replace(forest, root_value=forest.root_value / total)


def next_action(root: Root, qtransform: QTransform, node: Node, considered: jax.Array) -> jax.Array:
    """The best of the root's actions that were visited `considered` [B] times, [B] int32."""
    added = forests.transformed(qtransform, node)
    score = considered_score(considered[None], root.noisy, added, node.visits)
    return forests.best(jnp.where(root.invalid, -jnp.inf, score))


def ranked(forest: Forest, root: Root, qtransform: QTransform, actions: jax.Array) -> jax.Array:
    """The actions [B, slots] that are as often visited as the first, the best to the front."""
    node = forests.roots(forest)
    added = forests.transformed(qtransform, node)
    considered = forests.pick(node.visits, actions[:, 0])
    score = considered_score(considered, root.noisy, added, node.visits)
    score = jnp.where(root.invalid, -jnp.inf, score).T
    best = jax.lax.top_k(score, min(actions.shape[1], score.shape[1]))[1]
    return actions.at[:, : best.shape[1]].set(best)


def replay(
    forest: Forest,
    root: Root,
    qtransform: QTransform,
    actions: jax.Array,
    first_row: jax.Array,
    among: jax.Array,
    commit: jax.Array,
) -> jax.Array:
    """The choice of `commit` [B] of the first `among` [B] actions, in its order, [B, slots].

    Each is made with all the values that are known by then.
    """
    batch, slots = actions.shape
    node = forests.roots(forest)
    row = first_row + jnp.arange(slots)[:, None] * batch + jnp.arange(batch)[None]
    after = values_after(forest, row.reshape(-1)).reshape(slots, batch).T
    every, slot = jnp.arange(root.noisy.shape[0])[:, None], jnp.arange(slots)[None]
    # the value of each action after its visit, [A, B]
    candidate = (actions[None] == every[..., None]) & (slot < among[:, None])[None]
    fresh = jnp.sum(jnp.where(candidate, after[None], 0.0), axis=-1)
    considered = forests.pick(node.visits, actions[:, 0])[0]

    def choose(i: jax.Array, loop: tuple[Node, jax.Array]) -> tuple[Node, jax.Array]:
        node, order = loop
        action = next_action(root, qtransform, node, considered)
        taken = (action[None] == every) & (i < commit)[None]
        node = node._replace(
            visits=node.visits + taken,
            qvalues=jnp.where(taken, fresh, node.qvalues),
            total=node.total + (i < commit),
        )
        return node, jnp.where(slot == i, action[:, None], order)

    order = jax.lax.fori_loop(0, jnp.max(commit), choose, (node, actions))[1]
    # a root that takes all of its candidates may take more of them than `rearranged` moves
    return jnp.where((commit < among)[:, None], order, actions)


def rearranged(
    forest: Forest, actions: jax.Array, chosen: jax.Array, first_row: jax.Array, most: int
) -> Forest:
    """The new nodes, of `actions` from `first_row` on, with those of the `most` chosen first."""
    batch = forest.batch
    found = jnp.argmax(chosen[:, :most, None] == actions[:, None, :], axis=-1)
    lane = first_row + (found * batch + jnp.arange(batch)[:, None]).T.reshape(-1)
    new = forest.records(lane)
    embedding = jax.tree.map(lambda x: forests.take(x, lane), forest.embedding)
    return forests.store(forest, new, embedding, first_row)


def values_after(forest: Forest, row: jax.Array) -> jax.Array:
    """What the value of each new node's root action is once the node is backed up, [L]."""
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
    cell, returned = walks.walked(lambda walk: jnp.any(inside(walk[0])), level, walk)
    edge, reward, discount = parts(cell)
    above = forests.root_cells(forest, edge)
    visits = above[:, forests.VISITS]
    value = (forests.number(above[:, forests.VALUE]) * visits + returned) / (visits + 1)
    return reward + discount * value


def made(rounds: halving.Rounds, considered: jax.Array, num_nodes: int) -> jax.Array:
    """Which rows hold a node, [B, N]: each round leaves room for the most visits of any root."""
    visits = jnp.asarray(rounds.visits)[considered]
    ends = 1 + jnp.cumsum(jnp.max(visits, axis=0))
    node = jnp.arange(num_nodes)
    at = jnp.minimum(jnp.searchsorted(ends, node, side="right"), len(ends) - 1)
    slot = node - (ends - jnp.max(visits, axis=0))[at]
    return (node == 0)[None] | ((slot >= 0) & (node < ends[-1]))[None] & (
        slot[None] < visits[:, at]
    )
