"""PUCT, one simulation of every root after the other (Schrittwieser et al. 2020, appendix B)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mbrl_jax.search import forest as forests
from mbrl_jax.search import walks
from mbrl_jax.search.base import LoopFn, QTransform
from mbrl_jax.search.forest import Forest, Node, Rule
from mbrl_jax.search.seeds import Model


def puct(qtransform: QTransform, pb_c_init: jax.Array, pb_c_base: jax.Array) -> Rule:
    """The transformed value and the prior's bonus, [A, L], with constants [B] of each root.

    sqrt(N) (c1 + log((N + c2 + 1) / c2)) p / (n + 1), where N counts the node's own evaluation.
    """

    def rule(node: Node) -> jax.Array:
        init, base = (forests.take(x, node.root) for x in (pb_c_init, pb_c_base))
        factor = init + jnp.log((node.total + base + 1.0) / base)
        bonus = (jnp.sqrt(node.total) * factor)[None] * node.prior / (node.visits + 1)
        return forests.transformed(qtransform, node) + bonus

    return rule


def simulate(
    forest: Forest,
    model: Model,
    rule: Rule,
    num_simulations: int,
    max_depth: int,
    ties: jax.Array,
    loop_fn: LoopFn,
    kept: jax.Array | None = None,
) -> Forest:
    """Simulations from every root, until it has `num_simulations`.

    `ties` [B, A] times the priors of its new nodes; `kept` [B] int32 visits it had before.
    """
    batch = forest.batch
    every = jnp.ones(batch, bool)

    def select(forest: Forest) -> jax.Array:
        if forest.span is not None:
            return descend(forest, rule, max_depth)
        return forests.choose(forest, rule)

    def simulation(i: jax.Array, loop: tuple[Forest, jax.Array]) -> tuple[Forest, jax.Array]:
        forest, target = loop
        records, embedding = forests.expand(forest, model, i, target, ties)
        first_row = (i + 1) * batch
        live = every if kept is None else i >= kept
        if kept is not None:
            # a node that was kept may have its place there
            rows = first_row + jnp.arange(batch)
            before = forest.records(rows), jax.tree.map(lambda x: x[rows], forest.embedding)
            records, embedding = jax.tree.map(
                lambda new, x: jnp.where(live.reshape(-1, *[1] * (new.ndim - 1)), new, x),
                (records, embedding), before,
            )  # fmt: skip
        forest = forests.store(forest, records, embedding, first_row)
        choice = rule if forest.span is None else None
        forest, returned = walks.backup(forest, first_row, live, choice, max_depth)
        # counted and not i + 2, by which XLA would multiply the reciprocal, not divide: where all
        # values are equal, the last bit of a mean chooses among the actions
        total = forests.roots(forest).total
        value = (forest.root_value * (total - 1) + returned) / total
        forest = dataclasses.replace(forest, root_value=jnp.where(live, value, forest.root_value))
        return forest, select(forest)

    first = 0 if kept is None else jnp.min(kept)
    forest, _ = loop_fn(first, num_simulations, simulation, (forest, select(forest)))
    return forest


def descend(forest: Forest, rule: Rule, max_depth: int) -> jax.Array:
    """The edge at which greedy descent from each root ends, [B] int32, in a forest with a span."""

    def level(loop: Any) -> Any:
        depth, row, value, total, target, going = loop
        node, _ = forests.unpack(forests.take(forest.table, row), forest.num_actions)
        at = node._replace(value=value, total=total, root=root.root, span=forest.span)
        scores = rule(at)
        edge = row * forest.width + forests.best(scores)
        cell = forests.take(forest.cells, edge)
        target = jnp.where(going, edge, target)
        going = going & (cell[:, forests.VISITS] > 0) & (depth + 1 < max_depth)
        row = jnp.where(going, cell[:, forests.TARGET], row)
        value, total = forests.number(cell[:, forests.VALUE]), cell[:, forests.VISITS]
        return depth + 1, row, value, total, target, going

    row, root = jnp.arange(forest.batch, dtype=jnp.int32), forests.roots(forest)
    start = jnp.int32(0), row, root.value, root.total, row, jnp.ones(forest.batch, bool)
    return walks.walked(lambda loop: jnp.any(loop[-1]), level, start)[4]
