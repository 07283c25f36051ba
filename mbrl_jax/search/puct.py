"""PUCT, one simulation of every root after the other (Schrittwieser et al. 2020, appendix B)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mbrl_jax.search import forest as forests
from mbrl_jax.search.base import LoopFn, QTransform
from mbrl_jax.search.forest import Forest, Node, Rule
from mbrl_jax.search.seeds import Model


def puct(
    qtransform: QTransform, pb_c_init: jax.Array | float, pb_c_base: jax.Array | float
) -> Rule:
    """The transformed value and the prior's bonus, [L, A].

    sqrt(N) (c1 + log((N + c2 + 1) / c2)) p / (n + 1), where N counts the node's own evaluation.
    """

    def rule(node: Node) -> jax.Array:
        factor = pb_c_init + jnp.log((node.total + pb_c_base + 1.0) / pb_c_base)
        bonus = (jnp.sqrt(node.total) * factor)[:, None] * node.prior / (node.visits + 1)
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
) -> Forest:
    """`num_simulations` of them from every root; `ties` [B, A] times the priors of its nodes."""
    batch = forest.batch
    every = jnp.ones(batch, bool)
    first_edges = jnp.arange(batch) * forest.width

    def simulation(i: jax.Array, loop: tuple[Forest, jax.Array]) -> tuple[Forest, jax.Array]:
        forest, target = loop
        rows, embedding = forests.expand(forest, model, i, target, ties)
        first_row = (i + 1) * batch
        forest = forests.store(forest, rows, embedding, first_row)
        forest, returned = forests.backup(forest, first_row, every, rule, max_depth)
        visits = i + 1.0
        value = (forest.root_value * visits + returned) / (visits + 1.0)
        forest = dataclasses.replace(forest, root_value=value)
        target = forests.choose(forest.cells, rule, forests.roots(forest), first_edges)
        return forest, target

    target = forests.choose(forest.cells, rule, forests.roots(forest), first_edges)
    forest, _ = loop_fn(0, num_simulations, simulation, (forest, target))
    return forest
