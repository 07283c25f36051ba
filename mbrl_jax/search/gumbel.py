"""Gumbel MuZero: sequential halving at the root, the improved policy below, in exact batches.

Danihelka et al. (2022), "Policy improvement by planning with Gumbel", algorithm 2 and its
implementation in mctx, which scores anew before each simulation. A round visits every considered
action once. Within a phase the order of its visits changes nothing, since simulations below
different actions do not meet, so a round is one batch. In the first round of a later phase, fewer
actions are visited than were considered before, chosen one at a time as their values come in: all
are evaluated, the choice is replayed with the values now known, and only the chosen are kept. The
visits are those of one simulation after the other, which is how a search runs whose batches would
hold one action of each root.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mbrl_jax.search import backup, schedule, vmapping
from mbrl_jax.search import forest as forests
from mbrl_jax.search import tree as trees
from mbrl_jax.search.base import (
    Budget,
    Lanes,
    Number,
    Params,
    RecurrentFn,
    Tree,
    over_actions,
    record,
)
from mbrl_jax.search.candidates import (
    Halving,
    considered_score,
    next_action,
    noisy,
    ranked,
    rearranged,
    replay,
)
from mbrl_jax.search.forest import Forest
from mbrl_jax.search.node import Node, Rule, Transform, Values, best, values_of
from mbrl_jax.search.root import logits_of, masked, takes_traced_bounds
from mbrl_jax.search.vmapping import Model
from mbrl_jax.types import InputError


@record
class GumbelMuZeroExtraData:
    """The noise of a Gumbel search, in its tree's `extra_data`."""

    root_gumbel: chex.Array  # [B, A]


def improved_policy(values: Values) -> Rule:
    """The action most behind its share in the improved policy (section 5 of the paper).

    The greatest pi'(a) - n(a) / (1 + sum of n), with pi' = softmax(log prior + completed values).

    Args:
      values: the transform.
    """

    def rule(node: Node) -> jax.Array:
        added = values(node)
        # an action of prior 0, such as an illegal one, must not set the scale of the others
        allowed = node.prior >= jnp.finfo(node.prior.dtype).tiny
        top = over_actions(jnp.maximum, jnp.where(allowed, added, -jnp.inf))
        weights = node.prior * jnp.exp(jnp.minimum(added - top, 0.0))
        policy = weights / over_actions(jnp.add, weights)
        return best(policy - node.visits / node.total.astype(jnp.float32)[None])

    return rule


def lanes_of(
    key: jax.Array,
    root: Any,
    invalid: jax.Array,
    transform: Transform,
    scale: Number,
    with_masks: bool,
) -> Lanes:
    """The lanes of a Gumbel search.

    Args:
      key: consumed, for the noise.
      root: as in `muzero_policy`.
      invalid: [B, A] bool.
      transform: of the values.
      scale: [] of the noise.
      with_masks: whether `invalid` is looked at.
    """
    logits = logits_of(root, invalid)
    if with_masks:
        logits = masked(logits, invalid)
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    return Lanes(
        logits, jnp.asarray(root.value, jnp.float32), root.embedding, invalid,
        gumbel=jnp.float32(scale) * noise, closed=transform.for_roots(logits.shape[0]),
    )  # fmt: skip


def search(
    params: Params,
    key: jax.Array,
    recurrent_fn: RecurrentFn,
    lanes: Lanes,
    transform: Transform,
    budget: Budget,
    max_considered: int,
    halve_once: bool,
    with_masks: bool,
) -> tuple[Tree, jax.Array, jax.Array]:
    """The trees of a Gumbel search.

    Beside them the transformed values at their roots, [B, A], and the roots' values, [B] float32.

    Args:
      params, key, recurrent_fn: see `vmapping.over_seeds`.
      lanes: what the roots bring, `gumbel` and `closed` among it.
      transform: of the values.
      budget: how far to go.
      max_considered: actions that a root considers at most.
      halve_once: see `gumbel_muzero_policy`.
      with_masks: whether roots may have invalid actions.

    Raises:
      InputError: no action to consider; a transform that reads the range of the whole tree; a loop
        function that runs Python ints alone, with `halve_once`.
    """
    if max_considered < 1:
        raise InputError(f"max_num_considered_actions = {max_considered}: expected 1 or more")
    if not transform.local:
        raise InputError(
            "qtransform reads the range of the whole tree, as qtransform_by_tree_min_max: expected "
            "a transform that sees one node alone, such as qtransform_completed_by_mix_value; the "
            "tree's is for muzero_policy"
        )
    most = min(max_considered, lanes.prior_logits.shape[1])
    rounds = schedule.rounds_of(most, budget.num_simulations, halve_once)
    among = range(most + 1) if with_masks else range(most, most + 1)
    traced_bounds = takes_traced_bounds(budget.loop_fn)
    if halve_once and not traced_bounds:
        raise InputError(
            "halve_once=True with a loop_fn that takes Python ints alone: expected one that takes "
            "traced bounds too, such as jax.lax.fori_loop"
        )

    def run(model: Model, lanes: Lanes) -> tuple[Tree, jax.Array, jax.Array]:
        logits, batch = lanes.prior_logits, lanes.prior_logits.shape[0]
        considered = jnp.full(batch, most, jnp.int32)
        if with_masks:
            allowed = jnp.sum(~lanes.invalid, axis=-1, dtype=jnp.int32)
            considered = jnp.minimum(most, allowed)
        machine = schedule.CPU if jax.default_backend() == "cpu" else schedule.ACCELERATOR
        groups = schedule.plan(rounds, among, batch, machine)
        one_by_one = schedule.one_by_one(groups) or not traced_bounds
        num_nodes = budget.num_simulations + 1
        if not one_by_one:
            num_nodes = schedule.peak(rounds, among, groups)
        forest = forests.plant(
            lanes, jax.nn.softmax(logits), num_nodes, limited=budget.limit is not None,
            spanned=False, with_outcomes=transform.reads_outcomes,
        )  # fmt: skip
        values, gumbel = values_of(transform, lanes.closed), lanes.gumbel
        assert gumbel is not None
        halving = Halving(
            noisy(gumbel, logits),
            lanes.invalid.T,
            considered,
            values,
            transform.reads,
            rounds,
            halve_once,
        )
        if one_by_one:
            forest = in_sequence(forest, model, halving, budget)
        else:
            forest = in_rounds(forest, model, halving, groups, budget)
        made = None
        if with_masks and not one_by_one:
            made = schedule.made(rounds, considered, forest.table.shape[0] // batch)
        extra = GumbelMuZeroExtraData(root_gumbel=gumbel)
        # of the forest, since a tree's values would be made for all of its nodes
        added = values(forests.roots(forest)).T
        tree = trees.export(forest, budget.num_simulations, logits, lanes.invalid, extra, made)
        return tree, added, forest.root_value

    return vmapping.over_seeds(run, recurrent_fn, params, key, lanes)


def in_sequence(forest: Forest, model: Model, halving: Halving, budget: Budget) -> Forest:
    """The forest after all simulations, one of every root after the other.

    Args:
      forest: the roots.
      model: see `vmapping.Model`.
      halving: what the choice at the roots needs.
      budget: how far to go.
    """
    batch, num_simulations = forest.batch, budget.num_simulations
    rule, counts = improved_policy(halving.values), jnp.asarray(schedule.counts(halving.rounds))
    every = jnp.ones(batch, bool)

    def select(i: jax.Array, forest: Forest) -> jax.Array:
        action = next_action(halving, forests.roots(forest), counts[halving.considered, i])
        edge = forests.first_edges(forest) + action
        return forests.end_of(edge, forests.root_cells(forest, edge))

    def simulation(i: Any, loop: tuple[Forest, jax.Array]) -> tuple[Forest, jax.Array]:
        forest, edge = loop
        i = jnp.int32(i)
        new, embedding = forests.expand(forest, model, i, edge)
        first_row = (i + 1) * batch
        forest = forests.store(forest, new, embedding, first_row)
        forest = backup.backup(forest, first_row, every, rule, budget.limit or 0)
        return forest, select(jnp.minimum(i + 1, num_simulations - 1), forest)

    start = forest, select(jnp.int32(0), forest)
    return budget.loop_fn(0, num_simulations, simulation, start)[0]


class Wave(NamedTuple):
    """A search between two rounds."""

    forest: Forest
    actions: jax.Array  # [B, slots] int32, the considered ones first
    first_row: jax.Array  # [] int32 of the next nodes


def in_rounds(
    forest: Forest, model: Model, halving: Halving, groups: list[schedule.Group], budget: Budget
) -> Forest:
    """The forest after all simulations, those of a round in batches.

    Args:
      forest: the roots.
      model: see `vmapping.Model`.
      halving: what the choice at the roots needs.
      groups: of rounds, see `schedule.plan`.
      budget: how far to go; its loop function takes traced bounds.
    """
    batch, rounds, loop_fn = forest.batch, halving.rounds, budget.loop_fn
    # nothing descends after the only round
    rule = improved_policy(halving.values) if groups[-1].end > 1 else None
    candidates, visits = jnp.asarray(rounds.candidates), jnp.asarray(rounds.visits)
    node = forests.roots(forest)
    start = considered_score(node.visits[:1], halving.noisy, halving.values(node), node.visits)
    most = int(rounds.candidates.max())
    actions = jax.lax.top_k(jnp.where(halving.invalid, -jnp.inf, start).T, most)[1]
    # dead lanes fill up the last batch of a round
    slots = max(-(-most // group.width) * group.width for group in groups)
    actions = jnp.pad(actions.astype(jnp.int32), ((0, 0), (0, slots - most)))
    last = jnp.max(jnp.asarray(rounds.total)[halving.considered])

    def in_batches(number: jax.Array, width: int, body: Any, carry: Any) -> Any:
        # on an accelerator XLA turns the table's axes around for what is not in a loop
        if most <= width and jax.default_backend() == "cpu":
            return body(jnp.int32(0), carry)
        return loop_fn(0, -(-number // width), lambda n, x: body(jnp.int32(n) * width, x), carry)

    def one_round(i: jax.Array, wave: Wave, group: schedule.Group) -> Wave:
        forest, actions, first_row = wave
        i, width = jnp.int32(i), group.width
        among, commit = candidates[halving.considered, i], visits[halving.considered, i]
        if halving.once:
            before = visits[halving.considered, jnp.maximum(i - 1, 0)]
            actions = jax.lax.cond(
                jnp.any(commit < before),
                lambda: ranked(forest, halving, actions),
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
                lambda: replay(forest, halving, actions, first_row, among, commit),
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
            some = slot + jnp.arange(width, dtype=jnp.int32)[:, None]
            live = (some < commit[None]).reshape(-1)
            row = first_row + slot * batch
            return backup.backup(forest, row, live, rule, budget.limit or 0)

        forest = in_batches(jnp.max(commit), width, back_up, forest)
        return Wave(forest, actions, first_row + jnp.max(commit) * batch)

    wave = Wave(forest, actions, jnp.int32(batch))
    for group in groups:
        end = jnp.clip(last, group.first, group.end)
        wave = loop_fn(
            group.first, end, lambda i, wave, group=group: one_round(i, wave, group), wave
        )
    return wave.forest
