"""Tabular models of a finite world: what was seen last, or counts of all that was seen.

S states, A actions; a pair is `state * A + action`. Both models keep the same book of visits, so
planning draws from either in the same way. Everything is a pure function on one model; `vmap`
gives a batch of them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax import prng
from mbrl_jax.types import Scalar
from mbrl_jax.x64 import in_32_bits


class Transition(NamedTuple):
    """One observed transition, all scalars."""

    state: jax.Array  # int32
    action: jax.Array  # int32
    reward: jax.Array  # float32
    next_state: jax.Array  # int32
    continues: jax.Array  # float32, 0 where the task ended


class Outcome(NamedTuple):
    """What follows pairs of any shape [...]: one successor each, or a distribution of them."""

    reward: jax.Array  # [...] float32
    next_state: jax.Array | None  # [...] int32; None where there is a distribution
    continues: jax.Array  # [...] 0 where the task ends; or [..., S] successor probabilities
    tries: jax.Array  # [...] float32, how often each was tried


class Visits(NamedTuple):
    """Which states and pairs were visited, in the order of their first visit."""

    counts: jax.Array  # [S*A] float32 visits of each pair
    last: jax.Array  # [S*A] int32 step of the newest visit, 0 before the first
    pairs: jax.Array  # [S*A] int32, the first `num_pairs` are visited
    num_pairs: jax.Array  # int32
    states: jax.Array  # [S] int32, the first `num_states` are visited
    num_states: jax.Array  # int32


class LastOutcome(NamedTuple):
    """What followed each pair when it was last tried: exact in a deterministic world.

    A pair that was never tried leads back to its own state with reward 0.
    """

    visits: Visits
    outcome: jax.Array  # [S*A, 3] float32 (next state, reward, continues); one row, one gather


class Counts(NamedTuple):
    """Counts of all outcomes: the maximum-likelihood model of a stochastic world.

    Memory: 4 * S * S * A bytes.
    """

    visits: Visits
    reward_sum: jax.Array  # [S*A] float32
    successors: jax.Array  # [S*A, S] float32 counts of successors that did not end the task


Model = LastOutcome | Counts


@in_32_bits
def init_last_outcome(num_states: int, num_actions: int) -> LastOutcome:
    """An empty model; states must stay below 2**24 to be exact in float32."""
    own = jnp.repeat(jnp.arange(num_states), num_actions).astype(jnp.float32)
    outcome = jnp.stack([own, jnp.zeros_like(own), jnp.ones_like(own)], axis=-1)
    return LastOutcome(_no_visits(num_states, num_actions), outcome)


@in_32_bits
def init_counts(num_states: int, num_actions: int) -> Counts:
    """An empty model."""
    pairs = num_states * num_actions
    return Counts(
        _no_visits(num_states, num_actions), jnp.zeros(pairs), jnp.zeros((pairs, num_states))
    )


@in_32_bits
def observe(model: Model, seen: Transition, num_actions: int, t: jax.Array) -> Model:
    """The model after the transition `seen` at step `t`."""
    pair = seen.state * num_actions + seen.action
    visits = _visit(model.visits, seen.state, pair, num_actions, t)
    if isinstance(model, LastOutcome):
        row = jnp.stack([seen.next_state.astype(jnp.float32), seen.reward, seen.continues])
        return LastOutcome(visits, model.outcome.at[pair].set(row, mode="promise_in_bounds"))
    return Counts(
        visits,
        model.reward_sum.at[pair].add(seen.reward),
        model.successors.at[pair, seen.next_state].add(seen.continues),
    )


@in_32_bits
def recall(model: Model, pairs: jax.Array) -> Outcome:
    """What the model says of `pairs` (any shape)."""
    tries = model.visits.counts[pairs]
    if isinstance(model, LastOutcome):
        row = model.outcome[pairs]
        return Outcome(row[..., 1], row[..., 0].astype(jnp.int32), row[..., 2], tries)
    num_pairs, num_states = model.successors.shape
    own = pairs // (num_pairs // num_states)
    once = jnp.maximum(tries, 1.0)
    tried = model.successors[pairs] / once[..., None]
    untried = jax.nn.one_hot(own, num_states)
    continues = jnp.where(tries[..., None] > 0, tried, untried)
    return Outcome(model.reward_sum[pairs] / once, None, continues, tries)


@in_32_bits
def bootstrapped(outcome: Outcome, q: jax.Array, num_actions: int, gamma: Scalar) -> jax.Array:
    """reward + gamma * E[max_a q(s', a)], 0 where the task ends; `q` is flat, [S*A]."""
    if outcome.next_state is not None and outcome.next_state.ndim == 0:
        start = (outcome.next_state * num_actions,)
        ahead = jnp.max(jax.lax.dynamic_slice(q, start, (num_actions,)))
        return outcome.reward + gamma * outcome.continues * ahead
    values = jnp.max(q.reshape(-1, num_actions), axis=-1)
    if outcome.next_state is not None:
        return outcome.reward + gamma * outcome.continues * values[outcome.next_state]
    values = values.reshape((1,) * (outcome.continues.ndim - 1) + values.shape)
    # a product and a sum, not a matrix product: the same bits for one seed and for many
    return outcome.reward + gamma * jnp.sum(outcome.continues * values, axis=-1)


@in_32_bits
def leads_to(model: Model, state: jax.Array) -> jax.Array:
    """Which visited pairs the model predicts to lead to `state`, [S*A] bool."""
    if isinstance(model, Counts):
        return model.successors[:, state] > 0
    arrives = model.outcome[:, 0].astype(jnp.int32) == state
    return arrives & (model.outcome[:, 2] > 0) & (model.visits.counts > 0)


@in_32_bits
def sample_pairs(
    visits: Visits, key: jax.Array, n: int, num_actions: int, sampler: str
) -> jax.Array:
    """`n` pairs to plan from, [n] int32, drawn with replacement.

    sampler:
      "pairs": uniformly among the visited pairs.
      "state_action": a visited state, then an action that was taken there (Sutton and Barto 2018,
        Section 8.2, the box "Tabular Dyna-Q").
      "any_action": a visited state, then any action, tried or not (the footnote of Section 8.3).
    """
    if sampler == "pairs":
        slot = (prng.uniform(key, n) * visits.num_pairs).astype(jnp.int32)
        return visits.pairs[jnp.minimum(slot, visits.num_pairs - 1)]
    draws = prng.uniform(key, 2 * n).reshape(2, n)
    slot = (draws[0] * visits.num_states).astype(jnp.int32)
    state = visits.states[jnp.minimum(slot, visits.num_states - 1)]
    if sampler == "any_action":
        return state * num_actions + (draws[1] * num_actions).astype(jnp.int32)
    tried = visits.counts.reshape(-1, num_actions)[state] > 0
    return state * num_actions + choose(tried, draws[1])


def choose(mask: jax.Array, uniform: jax.Array) -> jax.Array:
    """A uniformly random index of the True entries of `mask` [..., A], given `uniform` [...]."""
    ranks = jnp.cumsum(mask, axis=-1)
    wanted = (uniform * ranks[..., -1]).astype(jnp.int32)
    return jnp.argmax(ranks > wanted[..., None], axis=-1).astype(jnp.int32)


def _no_visits(num_states: int, num_actions: int) -> Visits:
    pairs = num_states * num_actions
    return Visits(
        counts=jnp.zeros(pairs),
        last=jnp.zeros(pairs, jnp.int32),
        pairs=jnp.zeros(pairs, jnp.int32),
        num_pairs=jnp.int32(0),
        states=jnp.zeros(num_states, jnp.int32),
        num_states=jnp.int32(0),
    )


def _visit(
    visits: Visits, state: jax.Array, pair: jax.Array, num_actions: int, t: jax.Array
) -> Visits:
    # read after the write: a reader of the old table would make XLA copy it
    counts = visits.counts.at[pair].add(1.0)
    new_pair = counts[pair] == 1
    row = jax.lax.dynamic_slice(counts, (state * num_actions,), (num_actions,))
    new_state = jnp.sum(row) == 1
    # an old one is written past the end of the list, where the write is dropped
    pair_slot = jnp.where(new_pair, visits.num_pairs, visits.pairs.shape[0])
    state_slot = jnp.where(new_state, visits.num_states, visits.states.shape[0])
    return Visits(
        counts=counts,
        last=visits.last.at[pair].set(t),
        pairs=visits.pairs.at[pair_slot].set(pair, mode="drop"),
        num_pairs=visits.num_pairs + new_pair,
        states=visits.states.at[state_slot].set(state, mode="drop"),
        num_states=visits.num_states + new_state,
    )
