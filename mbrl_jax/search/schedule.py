"""The schedule of sequential halving at a root: rounds of visits, and the batches they run in.

Danihelka et al. (2022), "Policy improvement by planning with Gumbel", algorithm 2. All but `made`
is numpy and known before anything is compiled; `gumbel.py` says why a round is a batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rounds(NamedTuple):
    """The rounds of one budget of simulations.

    Rows are numbers of considered actions, 0 to m; columns are rounds.
    """

    candidates: np.ndarray  # [m + 1, rounds] actions that a round chooses from
    visits: np.ndarray  # [m + 1, rounds] how many of them it visits
    total: np.ndarray  # [m + 1] rounds until the budget is spent


def sizes(considered: int, num_simulations: int) -> list[int]:
    """How many actions each round visits; they sum to the simulations.

    Args:
      considered: actions that the search begins with.
      num_simulations: of the whole search.
    """
    if considered <= 1:
        return [1] * num_simulations
    phases = math.ceil(math.log2(considered))
    found: list[int] = []
    left, size = num_simulations, considered
    while left > 0:
        for _ in range(max(1, num_simulations // (phases * size))):
            if left > 0:
                found.append(min(size, left))
                left -= found[-1]
        size = max(2, size // 2)
    return found


def rounds_of(most: int, num_simulations: int, halve_once: bool = False) -> Rounds:
    """The rounds of every number of considered actions.

    Args:
      most: considered actions at most.
      num_simulations: of the whole search.
      halve_once: a round visits all that it has, since the others were dropped before it.
    """
    table = [sizes(n, num_simulations) for n in range(most + 1)]
    longest = max(map(len, table))
    visits = np.zeros((most + 1, longest), np.int32)
    candidates = np.zeros_like(visits)
    for n, row in enumerate(table):
        visits[n, : len(row)] = row
        candidates[n, : len(row)] = row if halve_once else [max(n, 1), *row[:-1]]
    return Rounds(candidates, visits, np.array([len(row) for row in table], np.int32))


class Group(NamedTuple):
    """Consecutive rounds that one program runs."""

    first: int  # of the rounds
    end: int  # the first round after them
    width: int  # actions of a batch; a round is as many batches as it takes
    replayed: int  # most visits of a round that visits fewer actions than there are candidates


class Machine(NamedTuple):
    """What batches of simulations cost; a lane is one node for the network."""

    latency: int  # lanes that take as long as the fixed cost of a batch
    lanes: int  # of a batch in which several actions of a root share it, at most
    actions: int  # of a root that share a batch, at most


# measured: wider batches gain little time, and their temporary memory is more than the trees'
CPU = Machine(latency=128, lanes=32, actions=4)
# measured on an H100: a smaller batch is launches, and takes as long; batches of more actions gain
# little, and their temporary memory may be more than the trees'
ACCELERATOR = Machine(latency=16_384, lanes=16_384, actions=8)


def plan(rounds: Rounds, considered: range, batch: int, machine: Machine) -> list[Group]:
    """The groups of rounds of the least cost, two at most, since each is a program to compile.

    A batch of simulations costs as many lanes as it has, dead ones too, and its latency.

    Args:
      rounds: see there.
      considered: the numbers of considered actions that roots may have.
      batch: the number of roots, B.
      machine: what batches cost.
    """
    rows = np.array(considered)
    length = int(rounds.total[rows].max())
    candidates = rounds.candidates[rows, :length]
    visits = rounds.visits[rows, :length]
    need = candidates.max(axis=0)
    widest = min(max(machine.lanes // batch, 1), machine.actions, int(need.max()))
    widths = sorted({min(2**i, widest) for i in range(widest.bit_length() + 1)})

    def cheapest(first: int, end: int) -> tuple[int, int]:
        batches = [(int(np.sum(-(-need[first:end] // w))), w) for w in widths]
        return min((n * (machine.latency + w * batch), w) for n, w in batches)

    def group(first: int, end: int) -> Group:
        fewer = (visits < candidates) & (visits > 0)
        # the very first round takes the best of all actions, which needs no values
        fewer[:, 0] = False
        replayed = np.max(visits[:, first:end], initial=0, where=fewer[:, first:end])
        return Group(first, end, cheapest(first, end)[1], int(replayed))

    cuts = [n for n in range(1, length) if need[n] != need[n - 1]]
    whole = cheapest(0, length)[0]
    costs = {n: cheapest(0, n)[0] + cheapest(n, length)[0] for n in cuts} | {0: whole}
    cut = min(costs, key=costs.__getitem__)
    return [group(0, cut), group(cut, length)] if cut else [group(0, length)]


def one_by_one(groups: list[Group]) -> bool:
    """Whether no batch holds two actions of a root, so that evaluating more than are kept is waste.

    A search that drops actions unseen (`halve_once`) or never has no waste.
    """
    return all(group.width == 1 for group in groups) and any(group.replayed for group in groups)


def counts(rounds: Rounds) -> np.ndarray:
    """How often the action of each simulation was visited before, [m + 1, simulations] int32."""
    table = [np.repeat(np.arange(len(row)), row) for row in rounds.visits]
    return np.array(table, np.int32)


def peak(rounds: Rounds, considered: range, groups: list[Group]) -> int:
    """The nodes that a tree needs room for, those among them that a round drops again.

    Args:
      rounds, considered: as in `plan`.
      groups: what `plan` made of them.
    """
    rows = np.array(considered)
    visits, candidates = rounds.visits[rows].max(axis=0), rounds.candidates[rows].max(axis=0)
    before = 1 + np.cumsum(visits) - visits

    def room(i: int, group: Group) -> int:
        batches = -(-int(candidates[i]) // group.width)
        return int(before[i]) + max(batches * group.width, group.replayed)

    return max(room(i, group) for group in groups for i in range(group.first, group.end))


def made(rounds: Rounds, considered: jax.Array, num_nodes: int) -> jax.Array:
    """Which nodes of the roots' room are theirs, [B, N] bool.

    Each round leaves room for the most visits of any root.

    Args:
      rounds: see there.
      considered: [B] int32 numbers of considered actions.
      num_nodes: N for which there is room.
    """
    visits = jnp.asarray(rounds.visits)[considered]
    most = jnp.max(visits, axis=0)
    ends = 1 + jnp.cumsum(most, dtype=jnp.int32)
    node = jnp.arange(num_nodes, dtype=jnp.int32)
    at = jnp.minimum(jnp.searchsorted(ends, node, side="right"), len(ends) - 1)
    slot = node - (ends - most)[at]
    inside = (slot >= 0) & (node < ends[-1])
    return (node == 0)[None] | (inside[None] & (slot[None] < visits[:, at]))
