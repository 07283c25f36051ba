"""Random shooting, CEM, iCEM, MPPI, and CEM over discrete actions.

Each is a pure function of `value` and of the last call's plan, for one state. Candidates that are
worth nan rank last. At an episode's start give `start_...`, and nothing of the last one remains.
Bounds `low` and `high` are [A]; candidates [N, H, A] lie within them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.nn.precision import FULL
from mbrl_jax.planning.noise import colored_noise
from mbrl_jax.planning.value import Value
from mbrl_jax.types import InputError, Scalar
from mbrl_jax.x64 import in_32_bits


class Result(NamedTuple):
    """What to do now, and what to begin with at the next step."""

    action: jax.Array  # [A] float32 or [] int32
    plan: Any  # of the next call
    sequence: jax.Array  # [H, A] or [H], whose first entry is `action`
    value: jax.Array  # [] the best candidate's


class ICEMPlan(NamedTuple):
    """What iCEM remembers."""

    mean: jax.Array  # [H, A]
    elites: jax.Array  # [K, H, A]
    fresh: jax.Array  # [] bool, there are no elites yet


class MPPIPlan(NamedTuple):
    """What MPPI remembers."""

    mean: jax.Array  # [H, A]
    last: jax.Array  # [A], the action before


@in_32_bits
def start_cem(horizon: int, low: jax.Array, high: jax.Array) -> jax.Array:
    """The plan before the first step: the middle of the bounds, [H, A].

    Raises:
      InputError: a horizon below 1.
    """
    _at_least(1, horizon=horizon)
    middle = (jnp.asarray(low) + jnp.asarray(high)) / 2.0
    return jnp.broadcast_to(middle, (horizon, *middle.shape))


def start_icem(horizon: int, low: jax.Array, high: jax.Array, num_kept: int) -> ICEMPlan:
    """As `start_cem`, with `num_kept` places for elites: `kept_elites(num_elites)`."""
    mean = start_cem(horizon, low, high)
    return ICEMPlan(mean, jnp.broadcast_to(mean, (num_kept, *mean.shape)), jnp.bool_(True))


def start_mppi(horizon: int, low: jax.Array, high: jax.Array) -> MPPIPlan:
    """As `start_cem`."""
    mean = start_cem(horizon, low, high)
    return MPPIPlan(mean, mean[0])


@in_32_bits
def start_categorical_cem(horizon: int, num_actions: int) -> jax.Array:
    """Uniform probabilities, [H, num_actions]."""
    _at_least(1, horizon=horizon, num_actions=num_actions)
    return jnp.full((horizon, num_actions), 1.0 / num_actions)


def kept_elites(num_elites: int, share: float = 0.3) -> int:
    """How many of `num_elites` iCEM carries over: the `share` of its authors, rounded down."""
    return int(share * num_elites)


@in_32_bits
def random_shooting(
    value: Value,
    key: jax.Array,
    horizon: int,
    low: jax.Array,
    high: jax.Array,
    num_samples: int = 2_000,
) -> Result:
    """The best of uniformly random sequences (Nagabandi et al. 2018)."""
    _at_least(1, horizon=horizon, num_samples=num_samples)
    draw_key, value_key = jax.random.split(key)
    low, high = jnp.asarray(low), jnp.asarray(high)
    shape = (num_samples, horizon, *low.shape)
    low, high = (bound.reshape(1, 1, -1) for bound in (low, high))
    candidates = low + (high - low) * jax.random.uniform(draw_key, shape)
    worth = _ranked(value(candidates, value_key))
    best = jnp.argmax(worth)
    return Result(candidates[best, 0], (), candidates[best], worth[best])


@in_32_bits
def cem(
    value: Value,
    key: jax.Array,
    plan: jax.Array,
    low: jax.Array,
    high: jax.Array,
    num_samples: int = 400,
    num_elites: int = 40,
    iterations: int = 5,
    momentum: Scalar = 0.1,
    take_best: bool = False,
) -> Result:
    """The cross-entropy method as PETS has it (Chua et al. 2018, section 5; Botev et al. 2013).

    A Gaussian truncated at two deviations, which shrink where a bound is near, is refitted to the
    elites; `momentum` is the share of the old mean and variance. The sequence is the last mean, or
    with `take_best` the best candidate of all iterations.

    Raises:
      InputError: a count below 1, or more elites than samples.
    """
    _check_elites(num_samples, num_elites, iterations)
    low, high = jnp.asarray(low)[None], jnp.asarray(high)[None]
    mean = _shifted(plan, (low + high) / 2.0)
    spread = jnp.broadcast_to(jnp.square(high - low) / 16.0, mean.shape)
    start = (mean, spread, mean, jnp.float32(-jnp.inf))

    def iteration(i: jax.Array, carry: Any) -> Any:
        mean, var, best, best_value = carry
        draw_key, value_key = jax.random.split(jax.random.fold_in(key, i))
        noise = jax.random.truncated_normal(draw_key, -2.0, 2.0, (num_samples, *mean.shape))
        room = jnp.square(jnp.minimum(mean - low, high - mean) / 2.0)
        candidates = mean[None] + jnp.sqrt(jnp.minimum(room, var))[None] * noise
        worth = _ranked(value(candidates, value_key))
        top, index = jax.lax.top_k(worth, num_elites)
        elites = candidates[index]
        better = top[0] > best_value
        best = jnp.where(better, elites[0], best)
        mean = momentum * mean + (1.0 - momentum) * jnp.mean(elites, axis=0)
        var = momentum * var + (1.0 - momentum) * jnp.var(elites, axis=0)
        return mean, var, best, jnp.maximum(top[0], best_value)

    mean, _, best, best_value = jax.lax.fori_loop(0, iterations, iteration, start)
    sequence = best if take_best else mean
    return Result(sequence[0], mean, sequence, best_value)


@in_32_bits
def icem(
    value: Value,
    key: jax.Array,
    plan: ICEMPlan,
    low: jax.Array,
    high: jax.Array,
    num_samples: int = 200,
    num_elites: int = 20,
    iterations: int = 4,
    momentum: Scalar = 0.1,
    decay: float = 1.3,
    beta: Scalar = 2.0,
) -> Result:
    """iCEM, a CEM for few samples (Pinneri et al. 2020, algorithm 1).

    Noise is coloured with exponent `beta`; the population falls by `decay` at each iteration, to no
    fewer than twice the elites; the best elites stay candidates of every later iteration, and,
    shifted by a step, of the next call's first; the mean itself is a candidate of the last
    iteration. The plan's mean is shifted with its last entry repeated. The sequence is the best
    candidate of the last iteration. Elites that stay are judged anew each time, so that a lucky
    draw of a stochastic `value` does not stick.

    Args:
      value: what candidates [N, H, A] are worth, see `planning.Value`.
      key: consumed.
      plan: of the last call, or `start_icem` at an episode's start.
      low, high: [A] bounds of an action.
      num_samples: candidates of the first iteration.
      num_elites: the best ones, to which the Gaussian is fitted.
      iterations: how often candidates are drawn.
      momentum: share of the old mean and deviation in the new ones.
      decay: factor by which the population falls, 1 or more.
      beta: exponent of the noise's spectrum 1 / f**beta, 0 is white.

    Raises:
      InputError: a count below 1, more elites than samples or kept ones than elites, or a decay
        below 1.
    """
    _check_elites(num_samples, num_elites, iterations)
    num_kept = plan.elites.shape[0]
    if num_kept > num_elites:
        raise InputError(f"the plan keeps {num_kept} elites: expected at most {num_elites}")
    if decay < 1.0:
        raise InputError(f"decay = {decay}: expected 1 or more")
    low, high = jnp.asarray(low)[None], jnp.asarray(high)[None]
    mean = _shifted(plan.mean, plan.mean[-1:])
    horizon, size = mean.shape
    std = jnp.broadcast_to((high - low) / 4.0, mean.shape)
    for i in range(iterations):
        draw_key, tail_key, value_key = jax.random.split(jax.random.fold_in(key, i), 3)
        count = max(int(num_samples * decay**-i), 2 * num_elites)
        noise = jnp.swapaxes(colored_noise(draw_key, (count, size, horizon), beta), 1, 2)
        if i == 0:
            tail = jax.random.normal(tail_key, (num_kept, 1, size))
            tail = jnp.clip(mean[None, -1:] + std[None, -1:] * tail, low[None], high[None])
            kept = jnp.concatenate([plan.elites[:, 1:], tail], axis=1)
        drawn = jnp.clip(mean[None] + std[None] * noise, low[None], high[None])
        last = [mean[None]] if i == iterations - 1 else []
        candidates = jnp.concatenate([drawn, kept, *last])
        worth = _ranked(value(candidates, value_key))
        if i == 0:  # an episode's first step has no elites to take up
            absent = jnp.arange(num_kept) + count
            worth = jnp.where(plan.fresh, worth.at[absent].set(-jnp.inf), worth)
        top, index = jax.lax.top_k(worth, num_elites)
        elites = candidates[index]
        kept = elites[:num_kept]
        mean = momentum * mean + (1.0 - momentum) * jnp.mean(elites, axis=0)
        std = momentum * std + (1.0 - momentum) * jnp.std(elites, axis=0)
    return Result(elites[0, 0], ICEMPlan(mean, kept, jnp.bool_(False)), elites[0], top[0])


@in_32_bits
def mppi(
    value: Value,
    key: jax.Array,
    plan: MPPIPlan,
    low: jax.Array,
    high: jax.Array,
    num_samples: int = 350,
    iterations: int = 1,
    sigma: Scalar = 1.0,
    gamma: Scalar = 0.9,
    beta: Scalar = 0.9,
) -> Result:
    """Model-predictive path integrals with filtered noise (Nagabandi et al. 2020, PDDM, sec. 3.3).

    Gaussian noise of deviation `sigma` around the mean, which is shifted with its last entry
    repeated; each action is `beta` of itself and the rest of the one before; candidates are clipped
    and averaged with the softmax weights of `gamma` times their worth. If none is worth a finite
    number, the plan stays.

    Raises:
      InputError: a count below 1.
    """
    _at_least(1, num_samples=num_samples, iterations=iterations)
    low, high = jnp.asarray(low)[None], jnp.asarray(high)[None]
    mean = _shifted(plan.mean, plan.mean[-1:])

    def iteration(i: jax.Array, carry: Any) -> Any:
        mean, best_value = carry
        draw_key, value_key = jax.random.split(jax.random.fold_in(key, i))
        noise = jax.random.normal(draw_key, (num_samples, *mean.shape))
        wanted = jnp.swapaxes(mean[None] + sigma * noise, 0, 1)

        def smooth(last: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
            action = beta * now + (1.0 - beta) * last
            return action, action

        before = jnp.broadcast_to(plan.last[None], wanted.shape[1:])
        _, smoothed = jax.lax.scan(smooth, before, wanted)
        candidates = jnp.clip(jnp.swapaxes(smoothed, 0, 1), low[None], high[None])
        worth = _ranked(value(candidates, value_key))
        top = jnp.max(worth)
        some = jnp.isfinite(top)
        weight = jnp.exp(gamma * (worth - jnp.where(some, top, 0.0)))
        total = jnp.maximum(jnp.sum(weight), 1e-30)
        new = jnp.tensordot(weight / total, candidates, axes=1, precision=FULL)
        return jnp.where(some, new, mean), jnp.maximum(best_value, top)

    start = (mean, jnp.float32(-jnp.inf))
    mean, best_value = jax.lax.fori_loop(0, iterations, iteration, start)
    return Result(mean[0], MPPIPlan(mean, mean[0]), mean, best_value)


@in_32_bits
def categorical_cem(
    value: Value,
    key: jax.Array,
    plan: jax.Array,
    num_samples: int = 200,
    num_elites: int = 20,
    iterations: int = 5,
    momentum: Scalar = 0.1,
    floor: Scalar = 0.01,
) -> Result:
    """CEM over discrete actions: independent probabilities [H, n] refitted to the elites' shares.

    Botev et al. (2013), section 3, with `momentum` of the old probabilities and at least `floor` /
    n for each action while sampling. Candidates are [N, H] int32; the best of all is the sequence.

    Raises:
      InputError: as `cem`.
    """
    _check_elites(num_samples, num_elites, iterations)
    horizon, num_actions = plan.shape
    probs = _shifted(plan, jnp.full((1, num_actions), 1.0 / num_actions))
    start = (probs, jnp.argmax(probs, axis=-1).astype(jnp.int32), jnp.float32(-jnp.inf))

    def iteration(i: jax.Array, carry: Any) -> Any:
        probs, best, best_value = carry
        draw_key, value_key = jax.random.split(jax.random.fold_in(key, i))
        logits = jnp.log((1.0 - floor) * probs + floor / num_actions)
        candidates = jax.random.categorical(draw_key, logits[None], shape=(num_samples, horizon))
        worth = _ranked(value(candidates.astype(jnp.int32), value_key))
        top, index = jax.lax.top_k(worth, num_elites)
        elites = candidates[index].astype(jnp.int32)
        best = jnp.where(top[0] > best_value, elites[0], best)
        share = jnp.mean(jax.nn.one_hot(elites, num_actions), axis=0)
        probs = momentum * probs + (1.0 - momentum) * share
        return probs, best, jnp.maximum(top[0], best_value)

    probs, best, best_value = jax.lax.fori_loop(0, iterations, iteration, start)
    return Result(best[0], probs, best, best_value)


def _ranked(worth: jax.Array) -> jax.Array:
    """Candidates without a number rank last."""
    return jnp.where(jnp.isfinite(worth), worth, -jnp.inf)


def _shifted(plan: jax.Array, fill: jax.Array) -> jax.Array:
    return jnp.concatenate([plan[1:], fill])


def _check_elites(num_samples: int, num_elites: int, iterations: int) -> None:
    _at_least(1, num_samples=num_samples, num_elites=num_elites, iterations=iterations)
    if num_elites > num_samples:
        raise InputError(f"num_elites = {num_elites}: expected at most num_samples = {num_samples}")


def _at_least(least: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < least:
            raise InputError(f"{name} = {count}: expected {least} or more")
