"""What tests share: tiny worlds of known values, slow gradients, and a compiler that optimises."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from mbrl_jax.envs.env import Env
from mbrl_jax.runtime import reuse
from mbrl_jax.types import EnvSpec

STATES = 3


@struct.dataclass
class Table:
    """A world of three states and two actions; the leaves may be vmapped over worlds."""

    reward: jax.Array  # [S, 2]
    successor: jax.Array  # [S, 2] int32
    ends: jax.Array  # [S, 2] bool, the task terminates after this action
    starts: jax.Array  # [] int32, episodes start in one of so many first states
    max_steps_in_episode: jax.Array  # [] int32


@struct.dataclass
class Place:
    position: jax.Array
    time: jax.Array


class World:
    """The table's world with gymnax's methods; the observation is the one-hot state.

    A continuous action in [-1, 1] is the lottery of action 1 with chance (action + 1) / 2, and
    earns the mean reward, so that its value is linear in it.
    """

    def __init__(self, discrete):
        self.discrete = discrete

    def reset_env(self, key, params):
        position = jax.random.randint(key, (), 0, params.starts)
        return jax.nn.one_hot(position, STATES), Place(position, jnp.int32(0))

    def step_env(self, key, state, action, params):
        here = state.position
        if self.discrete:
            reward = params.reward[here, action]
        else:
            chance = (action[0] + 1.0) / 2.0
            reward = (1.0 - chance) * params.reward[here, 0] + chance * params.reward[here, 1]
            action = jnp.asarray(jax.random.uniform(key) < chance, jnp.int32)
        there = Place(params.successor[here, action], state.time + 1)
        obs = jax.nn.one_hot(there.position, STATES)
        return obs, there, reward, params.ends[here, action], {}

    def is_truncated(self, state, params):
        return state.time >= params.max_steps_in_episode


WORLDS = {True: World(True), False: World(False)}  # one object each, so that nothing retraces


def make(table: Table, discrete: bool) -> Env:
    spec = EnvSpec("probe", (STATES,), "float32", 100)
    if discrete:
        return Env(WORLDS[True], table, dataclasses.replace(spec, num_actions=2))
    spec = dataclasses.replace(spec, action_low=(-1.0,), action_high=(1.0,))
    return Env(WORLDS[False], table, spec, (-1.0,), (1.0,))


class Probe(NamedTuple):
    table: Table
    visited: list[int]  # states whose values are asked for
    q: np.ndarray  # [S, 2] exact action values of the best policy

    @property
    def values(self):
        return self.q.max(-1)[self.visited]

    @property
    def best(self):
        """[visited] 0 or 1, or -1 where both actions are as good."""
        rows = self.q[self.visited]
        return np.where(rows[:, 0] == rows[:, 1], -1, rows.argmax(-1))


def probe(gamma, reward, successor, ends, starts=1, limit=100, visited=(0,)) -> Probe:
    """Rows of `reward`, `successor` and `ends` are states, columns actions; solved exactly."""
    reward, successor = np.float32(reward), np.int32(successor)
    reward, successor, ends = (
        np.broadcast_to(np.asarray(x).reshape(STATES, -1), (STATES, 2))
        for x in (reward, successor, ends)
    )
    q = np.zeros((STATES, 2))
    for _ in range(2000):
        q = reward + gamma * ~ends * q.max(-1)[successor]
    table = Table(reward, successor, ends, np.int32(starts), np.int32(limit))
    return Probe(table, list(visited), q)


def probes(gamma: float) -> dict[str, Probe]:
    """Worlds that each need one thing more to be right; after Jones (2021), "Debugging RL"."""
    end, on = [[True]] * 3, [[False]] * 3
    stay = [[0]] * 3
    return {
        "one step earns 1": probe(gamma, [1, 0, 0], stay, end),
        "the reward is seen": probe(gamma, [-1, 0.5, 1], stay, end, 3, visited=(0, 1, 2)),
        "the reward comes a step later": probe(
            gamma, [0, 1, 0], [1, 1, 1], [[False], [True], [True]], visited=(0, 1)
        ),
        "the action earns it": probe(gamma, [[-1, 1], [0, 0], [0, 0]], stay, end),
        "the state tells the action": probe(
            gamma, [[-1, 1], [1, -1], [0, 0]], stay, end, 2, visited=(0, 1)
        ),
        "an action leads to the reward of the next": probe(
            gamma,
            [[0, 0], [0, 1], [0.5, 0]],
            [[1, 2], [0, 0], [0, 0]],
            [[False, False], [True, True], [True, True]],
            visited=(0, 1),
        ),
        "termination ends the sum": probe(
            gamma, [1, 1, 1], [1, 2, 0], [[False], [False], [True]], visited=(0, 1, 2)
        ),
        "truncation does not": probe(gamma, [1, 1, 1], [1, 2, 0], on, 3, 2, (0, 1, 2)),
        "truncation goes on from the true successor": probe(
            gamma, [0, 1, 0], [1, 1, 0], on, 2, 1, (0, 1)
        ),
    }


usual_functions = reuse.compiled
# the first level of optimisation, where the suite has none
OPTIMISED = {"xla_backend_optimization_level": 1}


@functools.lru_cache(8)
def optimised_functions(init, period, mesh, mode):
    """`reuse.compiled` with `OPTIMISED`."""
    init, chunk = (one.__wrapped__ for one in usual_functions(init, period, mesh, mode))
    start = jax.jit(init, compiler_options=OPTIMISED)
    return start, jax.jit(chunk, compiler_options=OPTIMISED, donate_argnums=0)


def first_gradient(opt, b1=0.9):
    """What Adam was given at its first step, all leaves as one vector."""
    return _vector(optax.tree_utils.tree_get(opt, "mu")) / (1 - b1)


def _vector(tree):
    return np.concatenate([np.float64(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def slopes(loss, params):
    """The gradient of `loss` by central differences in float64, as one vector."""
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda x: np.array(x, np.float64), params))
    grads = []
    for leaf in leaves:
        for place in np.ndindex(*leaf.shape):
            old, values = leaf[place], []
            for step in (1e-5, -1e-5):
                leaf[place] = old + step
                values.append(loss(jax.tree.unflatten(structure, leaves)))
            leaf[place] = old
            grads.append((values[0] - values[1]) / 2e-5)
    return np.array(grads)


def assert_near(a, b, rtol=2e-3, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def randomly(shapes, seed):
    """Arrays like `shapes`, without a compilation: floats drawn at random."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.7, x.dtype), shapes)


def zeros(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
