"""Random worlds as tables, for the tests of the search."""

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax import search
from mbrl_jax.search import halving

STATES = 4_096
MACHINES = {"alone": halving.Machine(128, 1, 1), "whole": halving.Machine(16384, 16384, 1024)}
"""One simulation after the other, and whole rounds."""


def world(seed, num_actions, discount, scale, ties=False):
    """A random world as tables: its model's parameters. `ties` draws few different numbers."""
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
    return jax.tree.map(jnp.asarray, tables)


def model(params, key, action, state):
    state = params["next"][state, action]
    out = search.RecurrentFnOutput(
        reward=params["reward"][state], discount=params["discount"][state],
        prior_logits=params["logits"][state], value=params["value"][state],
    )  # fmt: skip
    return out, state


def root_of(params, batch):
    state = jnp.arange(batch, dtype=jnp.int32)
    return search.RootFnOutput(
        prior_logits=params["logits"][state], value=params["value"][state], embedding=state
    )


def step_of(params):
    def step(state, action):
        after = int(params["next"][state, action])
        number = (float(params[name][after]) for name in ("reward", "discount"))
        return (*number, np.float64(params["logits"][after]), float(params["value"][after]), after)

    return step


def invalid_of(seed, batch, num_actions):
    mask = np.random.default_rng(seed).random((batch, num_actions)) < 0.5
    mask[:, 0] &= ~mask.all(axis=1)
    return mask


def searcher(library, policy, batch, num_simulations, **options):
    """(params, invalid or None) -> PolicyOutput, compiled once for worlds of one shape."""

    @jax.jit
    def made(params, key, invalid):
        return getattr(library, policy)(
            params, key, root_of(params, batch), model, num_simulations, invalid_actions=invalid,
            **options,
        )  # fmt: skip

    def run(params, invalid=None):
        invalid = None if invalid is None else jnp.asarray(invalid, jnp.float32)
        return made(params, jax.random.key(5), invalid)

    return run


def run(library, policy, params, batch, num_simulations, invalid=None, **options):
    return searcher(library, policy, batch, num_simulations, **options)(params, invalid)
