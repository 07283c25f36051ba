"""Tabular Dyna-Q as a user writes it: on numpy rows, on Python lists, and for numba.

All three are the loop of Sutton and Barto (2018, Section 8.2): epsilon-greedy with random ties, one
direct update, then `n` updates of visited pairs from the newest outcome of each. Their world is a
table, which is faster than any simulator. They count what the compiled loop counts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np

ALPHA, GAMMA, EPSILON, LIMIT = 0.1, 0.99, 0.1, 100


class World(NamedTuple):
    """A deterministic world of S states and A actions."""

    successor: np.ndarray  # [S, A] int64
    reward: np.ndarray  # [S, A] float64
    ends: np.ndarray  # [S, A] bool
    start: int


class Learnt(NamedTuple):
    """What a run of a loop gives."""

    q: np.ndarray  # [S, A] float64 action values
    episodes: int  # that ended, at a terminal state or after LIMIT steps
    steps: int  # in those episodes
    returns: float  # sum of their rewards


def tabulate(env: Any) -> World:
    """The table of a deterministic environment of ours."""
    from mbrl_jax import envs

    exact = envs.tabular(env)
    ends = exact.terminates.sum(axis=-1) > 0.5
    return World(exact.transition.argmax(axis=-1), exact.reward, ends, int(exact.start.argmax()))


def numpy_rows(world: World, n: int, steps: int, seed: int) -> Learnt:
    """`steps` environment steps of one seed; action values are a numpy table, read by rows."""
    successor, reward, ends = (table.tolist() for table in world[:3])
    rng = random.Random(seed)
    num_states, num_actions = world.successor.shape
    q = np.zeros((num_states, num_actions))
    model: dict[tuple[int, int], tuple[float, int, bool]] = {}
    visited: list[tuple[int, int]] = []
    episodes, finished, returns = 0, 0, 0.0
    state, length, total = world.start, 0, 0.0
    for _ in range(steps):
        if rng.random() < EPSILON:
            action = rng.randrange(num_actions)
        else:
            row = q[state]
            action = int(rng.choice(np.flatnonzero(row == row.max())))
        following, r, end = successor[state][action], reward[state][action], ends[state][action]
        goal = r if end else r + GAMMA * q[following].max()
        q[state, action] += ALPHA * (goal - q[state, action])
        if n:  # Q-learning needs no model
            if (state, action) not in model:
                visited.append((state, action))
            model[state, action] = (r, following, end)
        for _ in range(n):
            s, a = visited[int(rng.random() * len(visited))]
            r_model, s_model, end_model = model[s, a]
            goal = r_model if end_model else r_model + GAMMA * q[s_model].max()
            q[s, a] += ALPHA * (goal - q[s, a])
        length, total, state = length + 1, total + r, following
        if end or length == LIMIT:
            episodes, finished, returns = episodes + 1, finished + length, returns + total
            state, length, total = world.start, 0, 0.0
    return Learnt(q, episodes, finished, returns)


def python_lists(world: World, n: int, steps: int, seed: int) -> Learnt:
    """`steps` environment steps of one seed; action values are lists of floats."""
    successor, reward, ends = (table.tolist() for table in world[:3])
    uniform = random.Random(seed).random
    num_states, num_actions = world.successor.shape
    q = [[0.0] * num_actions for _ in range(num_states)]
    model: list[list[tuple[float, int, bool] | None]] = [[None] * num_actions for _ in q]
    visited: list[tuple[int, int]] = []
    episodes, finished, returns = 0, 0, 0.0
    state, length, total = world.start, 0, 0.0
    for _ in range(steps):
        row = q[state]
        if uniform() < EPSILON:
            action = int(uniform() * num_actions)
        else:
            best = max(row)
            if row.count(best) == 1:
                action = row.index(best)
            else:
                ties = [a for a, value in enumerate(row) if value == best]
                action = ties[int(uniform() * len(ties))]
        following, r, end = successor[state][action], reward[state][action], ends[state][action]
        goal = r if end else r + GAMMA * max(q[following])
        row[action] += ALPHA * (goal - row[action])
        if n:
            if model[state][action] is None:
                visited.append((state, action))
            model[state][action] = (r, following, end)
            for _ in range(n):
                s, a = visited[int(uniform() * len(visited))]
                r_model, s_model, end_model = model[s][a]  # type: ignore[misc]
                row = q[s]
                goal = r_model if end_model else r_model + GAMMA * max(q[s_model])
                row[a] += ALPHA * (goal - row[a])
        length, total, state = length + 1, total + r, following
        if end or length == LIMIT:
            episodes, finished, returns = episodes + 1, finished + length, returns + total
            state, length, total = world.start, 0, 0.0
    return Learnt(np.array(q), episodes, finished, returns)


def array_loop(successor: Any, reward: Any, ends: Any, start: int, n: int, steps: int, seed: int):
    """The same in the Python that numba compiles; -> the fields of `Learnt`."""
    np.random.seed(seed)
    num_states, num_actions = successor.shape
    q = np.zeros((num_states, num_actions))
    tried = np.zeros((num_states, num_actions), np.bool_)
    next_model = np.zeros((num_states, num_actions), np.int64)
    reward_model = np.zeros((num_states, num_actions))
    end_model = np.zeros((num_states, num_actions), np.bool_)
    visited = np.zeros((num_states * num_actions, 2), np.int64)
    num_visited = 0
    episodes, finished, returns = 0, 0, 0.0
    state, length, total = start, 0, 0.0
    for _ in range(steps):
        if np.random.random() < EPSILON:
            action = int(np.random.random() * num_actions)
        else:
            best, ties, action = q[state, 0], 1, 0
            for a in range(1, num_actions):
                if q[state, a] > best:
                    best, ties, action = q[state, a], 1, a
                elif q[state, a] == best:
                    # the k-th of equal values takes over with probability 1 / k
                    ties += 1
                    if np.random.random() * ties < 1.0:
                        action = a
        following, r, end = successor[state, action], reward[state, action], ends[state, action]
        goal = r if end else r + GAMMA * q[following].max()
        q[state, action] += ALPHA * (goal - q[state, action])
        if n > 0:
            if not tried[state, action]:
                tried[state, action] = True
                visited[num_visited, 0], visited[num_visited, 1] = state, action
                num_visited += 1
            next_model[state, action] = following
            reward_model[state, action] = r
            end_model[state, action] = end
            for _ in range(n):
                k = int(np.random.random() * num_visited)
                s, a = visited[k, 0], visited[k, 1]
                goal = reward_model[s, a]
                if not end_model[s, a]:
                    goal += GAMMA * q[next_model[s, a]].max()
                q[s, a] += ALPHA * (goal - q[s, a])
        length, total, state = length + 1, total + r, following
        if end or length == LIMIT:
            episodes, finished, returns = episodes + 1, finished + length, returns + total
            state, length, total = start, 0, 0.0
    return q, episodes, finished, returns


@cache
def compiled_loop() -> Callable[..., Any]:
    """`array_loop` by numba, with the interpreter's lock released."""
    import numba

    return numba.njit(nogil=True)(array_loop)


def numba_loop(world: World, n: int, steps: int, seed: int) -> Learnt:
    """`steps` environment steps of one seed, compiled by numba; the first call compiles."""
    return Learnt(*compiled_loop()(*world, n, steps, seed))


def numba_threads(world: World, n: int, steps: int, seeds: int, threads: int) -> list[Learnt]:
    """Seeds 0, 1, ..., of `steps` environment steps each, shared out among threads."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda seed: numba_loop(world, n, steps, seed), range(seeds)))
