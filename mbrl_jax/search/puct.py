"""PUCT, one simulation of every root after the other (Schrittwieser et al. 2020, appendix B)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax.search import backup, vmapping
from mbrl_jax.search import forest as forests
from mbrl_jax.search import tree as trees
from mbrl_jax.search.base import Budget, Lanes, Number, Params, RecurrentFn, Tree
from mbrl_jax.search.forest import Forest
from mbrl_jax.search.node import Node, Rule, Transform, Values, best, values_of
from mbrl_jax.search.root import takes_traced_bounds
from mbrl_jax.search.vmapping import Model
from mbrl_jax.types import InputError


def lanes_of(
    key: jax.Array,
    root: Any,
    logits: jax.Array,
    invalid: jax.Array,
    transform: Transform,
    constants: tuple[Number, ...],
    before: Tree | None = None,
) -> Lanes:
    """The lanes of a search by PUCT.

    Args:
      key: consumed, for the ties.
      root: as in `muzero_policy`; its logits are not looked at.
      logits: [B, A] float32 with their noise and mask.
      invalid: [B, A] bool.
      transform: of the values.
      constants: [] c1 and c2 of PUCT.
      before: the tree from which the search goes on.
    """
    batch = logits.shape[0]
    return Lanes(
        logits, jnp.asarray(root.value, jnp.float32), root.embedding, invalid,
        ties=jax.random.bits(key, (batch,), jnp.uint32),
        constants=tuple(jnp.broadcast_to(jnp.float32(c), (batch,)) for c in constants),
        closed=transform.for_roots(batch), before=before,
    )  # fmt: skip


def scores(values: Values, lanes: Lanes, node: Node) -> jax.Array:
    """The transformed value and the prior's bonus, [A, L] float32.

    sqrt(N) (c1 + log((N + c2 + 1) / c2)) p / (n + 1), where N counts the node's own evaluation.

    Args:
      values: the transform.
      lanes: whose constants c1, c2 are [B] of each root.
      node: L nodes.
    """
    init, base = (forests.take(x, node.root) for x in lanes.constants)
    total = node.total.astype(jnp.float32)
    factor = init + jnp.log((total + base + 1.0) / base)
    bonus = (jnp.sqrt(total) * factor)[None] * node.prior / (node.visits + 1)
    return values(node) + bonus


def rule_of(transform: Transform, lanes: Lanes) -> Rule:
    """PUCT as a rule: the action of the greatest score, ties broken at random once for each node.

    Args:
      transform: of the values.
      lanes: what the roots bring.
    """
    values = values_of(transform, lanes.closed)

    def rule(node: Node) -> jax.Array:
        found = scores(values, lanes, node)
        return best(found, tie_order(lanes, node))

    return rule


def tie_order(lanes: Lanes, node: Node) -> jax.Array:
    """Random numbers that belong to the actions of a node, [A, L] uint32.

    A hash of the root's number, the node's and the action's, so that nothing has to be kept.

    Args:
      lanes: with `ties` [B].
      node: L nodes.
    """
    assert lanes.ties is not None
    seed = forests.take(lanes.ties, node.root) + node.number.astype(jnp.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        seed = (seed ^ (seed >> shift)) * np.uint32(factor)
    actions = np.arange(node.prior.shape[0], dtype=np.uint32)[:, None] * np.uint32(0x9E3779B9)
    # the high bits of the product, which are those that count, hang on all bits of its factor
    return (seed[None] ^ actions) * np.uint32(0x2C1B3C6D)


def search(
    params: Params,
    key: jax.Array,
    recurrent_fn: RecurrentFn,
    lanes: Lanes,
    make_rule: Callable[[Lanes], Rule],
    transform: Transform,
    budget: Budget,
) -> tuple[Tree, jax.Array]:
    """The trees of simulations one after the other, by a rule that sees a node at a time.

    Beside them the values of their roots, [B] float32.

    Args:
      params, key, recurrent_fn: see `vmapping.over_seeds`.
      lanes: what the roots bring, `ties`, `constants` and `closed` among it; where `before` is
        there, its visits count among the simulations.
      make_rule: (lanes of all seeds) -> the rule of all nodes, the roots too.
      transform: what the rule reads of a node.
      budget: how far to go.

    Raises:
      InputError: a tree to go on from that does not fit.
    """
    if lanes.before is not None:
        batch, num_actions = lanes.prior_logits.shape
        expected = (batch, budget.num_simulations + 1, num_actions)
        if lanes.before.children_index.shape != expected:
            raise InputError(
                f"search_tree of {lanes.before.children_index.shape} roots, nodes and actions: "
                f"expected {expected}; a search goes on from one with as many simulations"
            )

    def run(model: Model, lanes: Lanes) -> tuple[Tree, jax.Array]:
        rule, limit = make_rule(lanes), budget.limit
        # a root without any allowed action takes the first
        barred = lanes.invalid.at[:, 0].set(lanes.invalid[:, 0] & ~lanes.invalid.all(axis=-1))
        prior = jnp.where(barred, -jnp.inf, jax.nn.softmax(lanes.prior_logits))
        forest = forests.plant(
            lanes, prior, budget.num_simulations + 1,
            limited=transform.local and limit is not None, spanned=not transform.local,
            with_outcomes=transform.reads_outcomes,
        )  # fmt: skip
        if lanes.before is not None:
            deepest = limit or budget.num_simulations
            forest = trees.restore(forest, lanes.before, rule, deepest)
        forest = simulate(forest, model, rule, budget, going_on=lanes.before is not None)
        logits, num_simulations = lanes.prior_logits, budget.num_simulations
        return trees.export(forest, num_simulations, logits, lanes.invalid), forest.root_value

    return vmapping.over_seeds(run, recurrent_fn, params, key, lanes)


def simulate(forest: Forest, model: Model, rule: Rule, budget: Budget, going_on: bool) -> Forest:
    """Simulations from every root, until each has as many as the budget allows.

    Args:
      forest: the roots, and what they had before where the search is `going_on`.
      model: see `vmapping.Model`.
      rule: chooses the actions.
      budget: how far to go.
      going_on: whether roots may have visits already.
    """
    batch, max_depth = forest.batch, budget.limit or budget.num_simulations
    every, kept = jnp.ones(batch, bool), forest.root_visits - 1

    def select(forest: Forest) -> jax.Array:
        if forest.span is not None:
            return descend(forest, rule, max_depth)
        return forests.choose(forest, rule)

    def simulation(i: Any, loop: tuple[Forest, jax.Array]) -> tuple[Forest, jax.Array]:
        forest, target = loop
        i = jnp.int32(i)
        new = forests.expand(forest, model, i, target)
        first_row, live = (i + 1) * batch, every
        if going_on:
            # a node that was kept may have its place there
            live = i >= kept
            rows = first_row + jnp.arange(batch, dtype=jnp.int32)
            before = forest.records(rows), jax.tree.map(lambda x: x[rows], forest.embedding)
            new = jax.tree.map(
                lambda x, old: jnp.where(live.reshape(-1, *[1] * (x.ndim - 1)), x, old), new, before
            )
        forest = forests.store(forest, *new, first_row)
        choice = rule if forest.span is None else None
        forest = backup.backup(forest, first_row, live, choice, max_depth)
        return forest, select(forest)

    first: Any = 0
    if going_on and takes_traced_bounds(budget.loop_fn):
        first = jnp.min(kept)
    loop = forest, select(forest)
    return budget.loop_fn(first, budget.num_simulations, simulation, loop)[0]


def descend(forest: Forest, rule: Rule, max_depth: int) -> jax.Array:
    """The edge at which greedy descent from each root ends, [B] int32, in a forest with a span.

    Args:
      forest: whose edges hold the rows of their children.
      rule: chooses the actions.
      max_depth: of a node.
    """

    def level(loop: Any) -> Any:
        depth, row, value, total, target, going = loop
        node, _ = forests.unpack(forests.take(forest.table, row), forest.num_actions)
        node = node._replace(
            value=value, total=total, root=root.root, number=row // forest.batch, span=forest.span,
            outcomes=forests.outcomes_of(forest.outcomes, row),
        )  # fmt: skip
        edge = row * forest.width + rule(node)
        cell = forests.take(forest.cells, edge)
        target = jnp.where(going, edge, target)
        going = going & (cell[:, forests.VISITS] > 0) & (depth + 1 < max_depth)
        row = jnp.where(going, cell[:, forests.TARGET], row)
        value, total = forests.number(cell[:, forests.VALUE]), cell[:, forests.VISITS]
        return depth + 1, row, value, total, target, going

    row, root = jnp.arange(forest.batch, dtype=jnp.int32), forests.roots(forest)
    start = jnp.int32(0), row, root.value, root.total, row, jnp.ones(forest.batch, bool)
    return backup.walked(lambda loop: jnp.any(loop[-1]), level, start)[4]
