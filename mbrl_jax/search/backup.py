"""The backup: the values of new nodes carried up to the roots, many lanes at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from mbrl_jax.search.base import FEW
from mbrl_jax.search.forest import (
    DISCOUNT,
    PARENT,
    RAW,
    REWARD,
    VALUE,
    VISITS,
    Forest,
    bits,
    divided,
    end_of,
    number,
    outcomes_of,
    take,
    unpack,
)
from mbrl_jax.search.node import Rule

WALKERS = 512
"""New nodes that a CPU backs up at once: more wait for the deepest among them and leave the cache.
Accelerators take all."""
NOWHERE = -1
"""The row of a lane that carries nothing."""
SMALL = 2**18
"""Bytes of a table up to which XLA takes its rows on one thread."""


class Walk(NamedTuple):
    """Lanes on their way from new nodes to the roots; L of them."""

    table: jax.Array  # [R, 4 W] of the forest
    lanes: jax.Array  # [L, 3] int32: number of the new node, row or NOWHERE, bits of the return
    returns: jax.Array  # [new nodes, or L if that is more] at the roots, 0 before they are known
    span: jax.Array | None  # of the forest
    outcomes: jax.Array | None  # of the forest
    scratch: list[jax.Array]  # see `fetched`


def backup(
    forest: Forest, first_row: jax.Array, live: jax.Array, rule: Rule | None, max_depth: int
) -> Forest:
    """Counts new nodes at all edges above them and in the values of the roots.

    Args:
      forest: in which they are stored.
      first_row: [] int32; the new nodes are the rows from there on.
      live: [k * B] bool, k nodes of each root one after another; those that are not live change
        nothing. In a forest with a span k is 1.
      rule: chooses the edges' targets; None where no lookup will follow.
      max_depth: of a node; looked at in a forest that keeps depths.
    """
    forest, returns = carried(forest, first_row, live, rule, max_depth)
    returns, live = (x.reshape(-1, forest.batch) for x in (returns, live))
    value, visits = forest.root_value, forest.root_visits
    for returned, counts in zip(returns, live, strict=True):
        visits = visits + counts
        # one after another and with a counted divisor, as mctx has it: where all values are equal,
        # the last bit of a mean chooses among the actions
        value = jnp.where(counts, (value * (visits - 1) + returned) / visits, value)
    return dataclasses.replace(forest, root_value=value, root_visits=visits)


def carried(
    forest: Forest, first_row: jax.Array, live: jax.Array, rule: Rule | None, max_depth: int
) -> tuple[Forest, jax.Array]:
    """Carries the raw values of new nodes up to the roots, which stay as they are.

    Args:
      forest, first_row, live, rule, max_depth: as in `backup`.

    Returns:
      The forest, and the returns at the roots [k * B] float32, 0 where not live.
    """
    batch, width, num = forest.batch, forest.width, live.shape[0]
    most = num if forest.span is not None or jax.default_backend() != "cpu" else WALKERS
    # one has another beside it that has nothing to do, since XLA makes a write of one row a slice
    # update that copies the table
    walkers = max(min(most, num), 2)
    rows = first_row + jnp.arange(num, dtype=jnp.int32)
    raw = take(forest.cells, (rows + 1) * width - 1)[:, RAW]

    def begin(new: jax.Array) -> jax.Array:
        """Lanes at the new nodes of these numbers."""
        inside = jnp.minimum(new, num - 1)
        row = jnp.where((new < num) & take(live, inside), first_row + inside, NOWHERE)
        return jnp.stack([new, row, take(raw, inside)], axis=-1)

    def level(walk: Walk) -> Walk:
        new, row, returned = walk.lanes[:, 0], walk.lanes[:, 1], number(walk.lanes[:, 2])
        cells, span, scratch = walk.table.reshape(-1, 4), walk.span, list(walk.scratch)
        outcomes = walk.outcomes
        busy, row = row >= 0, jnp.maximum(row, 0)
        if rule is None:
            own, scratch[0] = fetched(cells, (row + 1) * width - 1, scratch[0])
        else:
            whole, scratch[0] = fetched(walk.table, row, scratch[0])
            node, own = unpack(whole, forest.num_actions)
        above = own[:, PARENT]
        up, action = divided(above, width)
        cell, scratch[1] = fetched(cells, above, scratch[1])
        visits, before = cell[:, VISITS] + 1, number(cell[:, VALUE])
        value = (before * cell[:, VISITS] + returned) / visits
        reward, discount = number(own[:, REWARD]), number(own[:, DISCOUNT])
        qvalue = reward + discount * value
        if outcomes is not None:
            # written before it is read, or XLA copies all of it
            place = jnp.where(busy, up, outcomes.shape[0]), action
            pair = jnp.stack([reward, discount], axis=-1)
            outcomes = outcomes.at[place].set(pair, mode="drop", unique_indices=True)
        if span is not None:
            wider = jnp.minimum(span[0], qvalue), jnp.maximum(span[1], qvalue)
            span = jnp.where(busy[None], jnp.stack(wider), span)
        target = row
        if rule is not None:
            own_number, root = divided(row, batch)
            node = node._replace(
                value=value, total=visits, root=root, number=own_number,
                outcomes=outcomes_of(outcomes, row),
            )  # fmt: skip
            chosen = rule(node)
            target = end_of(row * width + chosen, cell_of(whole, chosen, forest.num_actions))
            if forest.depth is not None:
                # descent ends above a node that is as deep as allowed: its edge is taken once more
                target = jnp.where(take(forest.depth, row) >= max_depth, above, target)
        cell = jnp.stack([visits, bits(qvalue), bits(value), target], axis=-1)
        # lanes that have nothing to carry write beyond the end, which drops what they write
        index = jnp.where(busy, above, cells.shape[0])
        cells = cells.at[index].set(cell, mode="drop", unique_indices=True)

        returned = reward + discount * returned
        arrived = busy & (up < batch)
        done = arrived | ~busy
        following = jnp.where(done, new + walkers, new)
        row = jnp.where(done, NOWHERE, up)
        lanes = jnp.stack([following, row, bits(returned)], axis=-1)
        if walkers < num:
            returns = walk.returns.at[jnp.where(arrived, new, num)].set(
                returned, mode="drop", unique_indices=True
            )
            # a lane that is done takes up the next of its share
            lanes = jnp.where(done[:, None], begin(following), lanes)
        else:
            returns = jnp.where(arrived, returned, walk.returns)
        return Walk(cells.reshape(walk.table.shape), lanes, returns, span, outcomes, scratch)

    widths = (4, 4) if rule is None else (4 * width, 4)
    scratch = [jnp.zeros((walkers + 1, n), jnp.int32) for n in widths]
    start = Walk(
        forest.table, begin(jnp.arange(walkers, dtype=jnp.int32)),
        jnp.zeros(max(walkers, num), jnp.float32), forest.span, forest.outcomes, scratch,
    )  # fmt: skip
    walk = walked(lambda walk: jnp.any(walk.lanes[:, 0] < num), level, start)
    forest = dataclasses.replace(forest, table=walk.table, span=walk.span, outcomes=walk.outcomes)
    return forest, walk.returns[:num]


Lanes = TypeVar("Lanes")


def walked(
    going: Callable[[Lanes], jax.Array], level: Callable[[Lanes], Lanes], start: Lanes
) -> Lanes:
    """The lanes after as many levels as it takes.

    An accelerator waits for its host before each turn of the loop, so that a turn is two levels.

    Args:
      going: (lanes) -> [] bool, whether any has a level to go.
      level: (lanes) -> lanes one level on; it leaves those alone that have arrived.
      start: the lanes before the first level.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.while_loop(going, level, start)
    return jax.lax.while_loop(going, lambda lanes: level(level(lanes)), start)


def cell_of(rows: jax.Array, action: jax.Array, num_actions: int) -> jax.Array:
    """The cells [L, 4] of actions in rows of a table.

    Args:
      rows: [L, 4 W] int32.
      action: [L] int32.
      num_actions: A.
    """
    cells = rows.reshape(rows.shape[0], -1, 4)
    if num_actions > FEW:
        return jnp.take_along_axis(cells, action[:, None, None], 1, mode="promise_in_bounds")[:, 0]
    found = cells[:, 0]
    for a in range(1, num_actions):
        found = jnp.where((action == a)[:, None], cells[:, a], found)
    return found


def fetched(x: jax.Array, index: jax.Array, scratch: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of an array that the same turn of a loop writes to afterwards.

    On an accelerator XLA would move the gather into the write that follows, which then copies all
    of x. On a CPU it takes a gather for a pass over all of x and spreads it over threads, which
    costs more than the few rows do. An update of a slice, here of all but one row, it does not
    spread; nor a small x.

    Args:
      x: [R, C].
      index: [L] int32.
      scratch: [L + 1, C], which the loop carries.

    Returns:
      x at index [L, C], and the scratch to carry on.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.optimization_barrier(take(x, index)), scratch
    if x.nbytes <= SMALL:
        return take(x, index), scratch
    scratch = jax.lax.dynamic_update_slice(scratch, take(x, index), (0, 0))
    return scratch[:-1], scratch
