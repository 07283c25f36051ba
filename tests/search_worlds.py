"""Random worlds as tables, for the tests of the search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax import search
from mbrl_jax.search import schedule

STATES = 4_096
MACHINES = {"alone": schedule.Machine(128, 1, 1), "whole": schedule.Machine(16384, 16384, 1024)}
"""One simulation after the other, and whole rounds."""


def world(seed, num_actions, discount, scale, ties=False, hidden=False):
    """A random world as tables: its model's parameters.

    `ties` draws few different numbers; `hidden` masks half of the actions by logits of -1e9, but
    for the first 8 states, which are roots.
    """
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal

    def numbers(*shape):
        x = draw(shape)
        return np.round(x) if ties else x

    tables = {
        "logits": np.float32(numbers(STATES, num_actions)),
        "value": np.float32(scale * numbers(STATES)),
        "reward": np.float32(scale * numbers(STATES)),
        "discount": np.full(STATES, discount, np.float32),
        "next": rng.integers(0, STATES, (STATES, num_actions), np.int32),
    }
    if hidden:
        tables["logits"][8:][invalid_of(seed, STATES - 8, num_actions)] = -1e9
    return jax.tree.map(jnp.asarray, tables)


def model(params, key, action, state):
    state = params["next"][state, action]
    out = search.RecurrentFnOutput(
        reward=params["reward"][state], discount=params["discount"][state],
        prior_logits=params["logits"][state], value=params["value"][state],
    )  # fmt: skip
    return out, state


def chance_functions(num_actions):
    """Decisions and answers of a world whose choices are `num_actions` actions, then outcomes."""

    def decide(params, key, action, state):
        after = params["next"][state, action]
        return search.DecisionRecurrentFnOutput(
            chance_logits=params["logits"][after, num_actions:],
            afterstate_value=params["value"][after],
        ), after  # fmt: skip

    def answer(params, key, outcome, state):
        after = params["next"][state, num_actions + outcome]
        return search.ChanceRecurrentFnOutput(
            action_logits=params["logits"][after, :num_actions], value=params["value"][after],
            reward=params["reward"][after], discount=params["discount"][after],
        ), after  # fmt: skip

    return decide, answer


def root_of(params, batch):
    state = jnp.arange(batch, dtype=jnp.int32)
    return search.RootFnOutput(
        prior_logits=params["logits"][state], value=params["value"][state], embedding=state
    )


def step_of(params):
    """`model` for the reference."""
    params = jax.tree.map(np.asarray, params)

    def step(state, action):
        after = int(params["next"][state, action])
        number = (float(params[name][after]) for name in ("reward", "discount"))
        return (*number, np.float64(params["logits"][after]), float(params["value"][after]), after)

    return step


def chance_steps_of(params, num_actions):
    """`chance_functions` for the reference."""
    params = jax.tree.map(np.asarray, params)

    def decide(state, action):
        after = int(params["next"][state, action])
        logits = np.float64(params["logits"][after, num_actions:])
        return logits, float(params["value"][after]), after

    def answer(state, outcome):
        after = int(params["next"][state, num_actions + outcome])
        number = (float(params[name][after]) for name in ("reward", "discount"))
        logits = np.float64(params["logits"][after, :num_actions])
        return (*number, logits, float(params["value"][after]), after)

    return decide, answer


def first_actions(tree):
    """Of the roots' children that were passed through: their action, and the first one of theirs.

    -> arrays [n], and the root of each.
    """
    tree = jax.tree.map(np.asarray, tree)
    found = []
    for i, parents in enumerate(tree.parents):
        for child in np.flatnonzero(parents == 0):
            below = np.flatnonzero(parents == child)
            if len(below):
                own, first = tree.action_from_parent[i, [child, below.min()]]
                found.append((own, first, i))
    return np.array(found).T


def invalid_of(seed, batch, num_actions):
    mask = np.random.default_rng(seed).random((batch, num_actions)) < 0.5
    mask[:, 0] &= ~mask.all(axis=1)
    return mask


def first_in_order(lanes, node):
    """In place of PUCT's order among equals: the first action, as mctx without its noise."""
    return jnp.zeros(node.prior.shape, jnp.uint32)


def searcher(library, policy, batch, num_simulations, transform=None, **options):
    """(params, invalid or None, x, key) -> PolicyOutput, compiled once for worlds of one shape.

    `transform` makes the qtransform of x, numbers.
    """

    @jax.jit
    def made(params, key, invalid, x):
        chosen = {} if transform is None else {"qtransform": transform(x)}
        return getattr(library, policy)(
            params, key, root_of(params, batch), model, num_simulations, invalid_actions=invalid,
            **chosen, **options,
        )  # fmt: skip

    def run(params, invalid=None, x=0.0, key=None):
        invalid = None if invalid is None else jnp.asarray(invalid, jnp.float32)
        key = jax.random.key(5) if key is None else key
        # numpy, of which tests take parts without compiling them
        return jax.tree.map(np.asarray, made(params, key, invalid, jnp.float32(x)))

    return run


plain = functools.cache(functools.partial(searcher, search))
"""`searcher` of this library, once for all tests that change nothing in it."""


def run(library, policy, params, batch, num_simulations, invalid=None, **options):
    return searcher(library, policy, batch, num_simulations, **options)(params, invalid)
