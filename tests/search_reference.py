"""A plain search, one simulation of one root after the other: the oracle of `mbrl_jax.search`.

Written from the papers (Schrittwieser et al. 2020; Danihelka et al. 2022) and the conventions that
mctx fixed where the papers leave them open; numpy in double precision, no cleverness.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Step = Callable[[int, int], tuple[float, float, np.ndarray, float, int]]
"""(state, action) -> reward, discount, logits [A], value, next state."""


@dataclasses.dataclass
class Node:
    logits: np.ndarray
    raw: float
    state: Any
    depth: int
    reward: float = 0.0
    discount: float = 0.0

    def __post_init__(self):
        self.value, self.visits, self.children = self.raw, 1, {}

    @property
    def prior(self):
        shifted = np.exp(self.logits - self.logits.max())
        return shifted / shifted.sum()

    @property
    def counts(self):
        return np.array([self.children[a].visits if a in self.children else 0
                         for a in range(len(self.logits))])  # fmt: skip

    @property
    def qvalues(self):
        found = np.zeros(len(self.logits))
        for action, child in self.children.items():
            found[action] = child.reward + child.discount * child.value
        return found


def parent_and_siblings(node):
    visited = node.counts > 0
    known = np.where(visited, node.qvalues, node.value)
    low, high = min(node.value, known.min()), max(node.value, known.max())
    return (np.where(visited, node.qvalues, low) - low) / max(high - low, 1e-8)


def min_max(node, low, high):
    return (np.where(node.counts > 0, node.qvalues, low) - low) / (high - low)


def completed(node, value_scale=0.1, maxvisit_init=50, rescale=True, mix=True):
    counts, q, prior = node.counts, node.qvalues, np.maximum(node.prior, 1e-38)
    visited, total = counts > 0, counts.sum()
    weighted = (prior * q)[visited].sum() / prior[visited].sum() if visited.any() else 0.0
    missing = (node.raw + total * weighted) / (total + 1) if mix else node.raw
    q = np.where(visited, q, missing)
    if rescale:
        q = (q - q.min()) / max(q.max() - q.min(), 1e-8)
    return (maxvisit_init + counts.max()) * value_scale * q


def puct(node, init=1.25, base=19652, transform=parent_and_siblings):
    factor = init + math.log((node.visits + base + 1) / base)
    bonus = math.sqrt(node.visits) * factor * node.prior / (node.counts + 1)
    return transform(node) + bonus


class TreeRange:
    """Values in the range of those that the tree has seen (Schrittwieser et al. 2020, eq. 5)."""

    def __init__(self, root):
        self.low, self.high = math.inf, -math.inf
        nodes = [root]
        for node in nodes:
            for action, child in node.children.items():
                self.update(node.qvalues[action])
                nodes.append(child)

    def __call__(self, node):
        scaled = (node.qvalues - self.low) / max(self.high - self.low, 1e-8)
        return np.where(node.counts > 0, scaled, 0.0)

    def update(self, qvalue):
        self.low, self.high = min(self.low, qvalue), max(self.high, qvalue)


def improved(node, transform=completed):
    logits = node.logits + transform(node)
    policy = np.exp(logits - logits.max())
    return policy / policy.sum() - node.counts / (1 + node.counts.sum())


def considered_visits(considered, num_simulations):
    """The visit count that each simulation's action has, by sequential halving."""
    if considered <= 1:
        return list(range(num_simulations))
    found, counts, size = [], [0] * considered, considered
    while len(found) < num_simulations:
        rounds = num_simulations // (math.ceil(math.log2(considered)) * size)
        for _ in range(max(1, rounds)):
            found += counts[:size]
            counts[:size] = [n + 1 for n in counts[:size]]
        size = max(2, size // 2)
    return found[:num_simulations]


def run(root, step: Step, choose_root, rule, num_simulations, max_depth=None, seen=None):
    """Grows the tree of `root` in place; `choose_root` gets it and the simulation's number."""
    max_depth = root.depth + (max_depth or num_simulations)
    for i in range(root.visits - 1, num_simulations):
        path, node = [root], root
        action = choose_root(root, i)
        while action in node.children and node.depth + 1 < max_depth:
            node = node.children[action]
            path.append(node)
            action = int(np.argmax(rule(node)))
        reward, discount, logits, value, state = step(node.state, action)
        if action not in node.children:
            node.children[action] = Node(logits, value, state, node.depth + 1, reward, discount)
        else:
            node.children[action].visits += 1
        returned, below = value, node.children[action]
        for node in reversed(path):
            returned = below.reward + below.discount * returned
            node.value = (node.value * node.visits + returned) / (node.visits + 1)
            node.visits += 1
            if seen:
                seen.update(below.reward + below.discount * below.value)
            below = node
    return root


def muzero(
    root, step, num_simulations, invalid, max_depth=None, tree_range=False,
    transform=parent_and_siblings,
):  # fmt: skip
    """Visits [A] of PUCT from priors that have their noise already; a root's visits count."""
    seen = TreeRange(root) if tree_range else None
    rule = functools.partial(puct, transform=seen or transform)

    def choose(node, _):
        return int(np.argmax(np.where(invalid, -np.inf, rule(node))))

    return run(root, step, choose, rule, num_simulations, max_depth, seen).counts


def stochastic(
    root, decide, answer, num_simulations, invalid, tree_range=False, transform=parent_and_siblings
):
    """Visits [A] of PUCT at states, and at afterstates of the outcome most behind its share.

    `decide` (state, action) -> logits [C], value, afterstate; `answer` (afterstate, outcome) ->
    reward, discount, logits [A], value, state.
    """
    root = Node(root.logits, root.raw, (root.state, False), 0)
    seen = TreeRange(root) if tree_range else None

    def step(state, choice):
        place, is_afterstate = state
        if is_afterstate:
            *found, after = answer(place, choice)
            return (*found, (after, False))
        logits, value, after = decide(place, choice)
        return 0.0, 1.0, logits, value, (after, True)

    def rule(node):
        if node.state[1]:
            return node.prior / (node.counts + 1)
        return puct(node, transform=seen or transform)

    def choose(node, _):
        return int(np.argmax(np.where(invalid, -np.inf, rule(node))))

    return run(root, step, choose, rule, num_simulations, None, seen).counts


def gumbel(
    root, step, num_simulations, noise, most, invalid, max_depth=None, halve_once=False,
    transform=completed,
):  # fmt: skip
    """Visits [A] and action weights [A] of sequential halving.

    Scored anew at every simulation or, as in algorithm 2 of the paper, once for each phase.
    """
    table = considered_visits(min(most, int((~invalid).sum())), num_simulations)
    left = []

    def choose(node, i):
        added = transform(node)
        score = np.maximum(-1e9, noise + node.logits - node.logits.max() + added)
        score = np.where((node.counts == table[i]) & ~invalid, score, -np.inf)
        if not halve_once:
            return int(np.argmax(score))
        if not left:
            # the visits of one count that follow on one another are a round
            size = next((n for n, v in enumerate(table[i:]) if v != table[i]), len(table) - i)
            left.extend(np.argsort(-score, kind="stable")[:size].tolist())
        return left.pop(0)

    rule = functools.partial(improved, transform=transform)
    run(root, step, choose, rule, num_simulations, max_depth)
    logits = np.where(invalid, -np.inf, root.logits + transform(root))
    weights = np.exp(logits - logits.max())
    return root.counts, weights / weights.sum()
