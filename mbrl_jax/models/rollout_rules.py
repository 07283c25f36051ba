"""Which imagined transitions count, and how long a rollout is: one factory for all such rules.

MBPO's own rule (Janner et al. 2019) counts every transition of a rollout whose length is scheduled.
The others look at the model: a fixed threshold of its disagreement; MACURA's threshold, which
follows the disagreement (Frauenknecht et al. 2024, "Trust the model where it trusts itself"); M2AC,
which counts the most certain share and lowers uncertain rewards (Pan et al. 2020, "Trust the model
when it is confident"), with its share ranked by `score`; and a length as long as the error that was
measured on fresh steps stays small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax.data.ring import Ring
from mbrl_jax.data.rows import Rows
from mbrl_jax.models.diagnostics import k_step_errors
from mbrl_jax.models.dynamics import DynamicsModel
from mbrl_jax.models.ensemble import Score
from mbrl_jax.models.rollout import Rules
from mbrl_jax.types import InputError, PyTree, Scalar, Transition, config, ranged

WINDOWS = 256  # of fresh steps, on which the model's error is measured


@config
class Config:
    """Fields annotated float may be vmapped and never recompile."""

    # none; threshold: of the score; macura: a threshold that follows it; m2ac: keeps a share
    truncation: Literal["none", "threshold", "macura", "m2ac"] = "none"
    # the measure of disagreement that truncates
    score: Literal["std", "max_distance", "jensen_shannon"] = "jensen_shannon"
    # truncation="threshold": a rollout ends before a transition at it or above
    threshold: float = ranged("(0, inf)", default=1.0)
    # MACURA's factor of the percentile
    macura_factor: float = ranged("(0, inf)", default=2.0)
    # MACURA's percentile of the scores at a rollout's first step
    macura_percentile: float = ranged("[0, 100]", default=95.0)
    # M2AC's penalty: times the score, subtracted from the reward
    m2ac_penalty: float = ranged("[0, inf)", default=0.001)
    # schedule: grows with the steps; error: the longest, within these bounds, whose error is small
    length_by: Literal["schedule", "error"] = "schedule"
    # length_by="error": the error of a rollout at most, in standard deviations of the states
    error_limit: float = ranged("(0, inf)", default=0.2)


class Lengths(NamedTuple):
    """Between which lengths a rollout's lies, and when it grows; static."""

    bounds: tuple[int, ...]  # two: steps at first and at last
    growth: tuple[int, ...]  # two: environment steps between which the length grows linearly
    fresh: int  # batched steps that the model has not seen when its error is measured


class RolloutRules(NamedTuple):
    """The rules of one configuration; a memory holds what a rule remembers of earlier rollouts."""

    score: Score
    """The disagreement that the model must give with its predictions."""
    init: Callable[[], PyTree]
    """() -> memory before the first rollout."""
    length: Callable[..., jax.Array]
    """(params, rows of the replay, key, t, env_steps) -> int32 steps of the next rollout; `t` is
    the batched step, `env_steps` are those that the schedule counts."""
    rules: Callable[[PyTree, jax.Array], Rules]
    """(memory, length) -> the rules of the next rollout, for `rollout.unroll`."""
    remember: Callable[[PyTree, jax.Array, jax.Array], PyTree]
    """(memory, depth, disagreement [B]) -> memory, for the `write` of `rollout.unroll`."""


def make_rules(
    config: Config, lengths: Lengths, model: DynamicsModel, replay: Ring
) -> RolloutRules:
    """The rules that `config` names.

    Args:
      config: what truncates and what sets the length.
      lengths: its bounds and its schedule.
      model: whose error is measured, `Ensemble.model("expectation")`.
      replay: where the real transitions lie.

    Raises:
      InputError: fewer fresh steps than the longest rollout where the error decides.
    """
    cfg = config
    if cfg.length_by == "error" and lengths.fresh < lengths.bounds[1]:
        raise InputError(
            f"a rollout length of {lengths.bounds[1]} where the error decides: expected at most "
            f"{lengths.fresh}, the steps between two trainings (or of the warm-up, if fewer)"
        )

    def length(
        params: PyTree, rows: Rows, key: jax.Array, t: jax.Array, env_steps: jax.Array
    ) -> jax.Array:
        if cfg.length_by == "schedule":
            return scheduled_length(lengths.bounds, lengths.growth, env_steps)
        shortest, longest = lengths.bounds
        errors = fresh_errors(model, params, replay, rows, key, t, longest, lengths.fresh)
        return length_of_small_error(errors, cfg.error_limit, shortest)

    def macura(history: History, score: jax.Array) -> tuple[jax.Array, History]:
        return macura_threshold(history, score, cfg.macura_factor, cfg.macura_percentile)

    def rules(memory: PyTree, length: jax.Array) -> Rules:
        match cfg.truncation:
            case "none":
                return Rules()
            case "threshold":
                return Rules(cfg.threshold)
            case "macura":
                return Rules(lambda score: macura(memory, score)[0])
            case "m2ac":
                share = lambda depth: m2ac_share(depth, length)  # noqa: E731
                return Rules(keep=share, penalty=cfg.m2ac_penalty)

    def remember(memory: PyTree, depth: jax.Array, score: jax.Array) -> PyTree:
        if cfg.truncation != "macura":
            return memory
        return jax.lax.cond(depth == 0, lambda h: macura(h, score)[1], lambda h: h, memory)

    score: Score = "none" if cfg.truncation == "none" else cfg.score
    init = empty_history if cfg.truncation == "macura" else tuple
    return RolloutRules(score, init, length, rules, remember)


def scheduled_length(
    bounds: tuple[int, ...], growth: tuple[int, ...], env_steps: jax.Array
) -> jax.Array:
    """Steps of a rollout after `env_steps`, int32: linear between both ends, rounded down.

    Janner et al. (2019), appendix C: from bounds[0] at growth[0] to bounds[1] at growth[1]. Their
    code counts environment steps from the end of the random ones.
    """
    (shortest, longest), (begin, end) = bounds, growth
    more, span = longest - shortest, max(end - begin, 1)
    # the step from which each further one is taken; whole numbers, since float32 would round
    reached = [min(begin - -i * span // more, 2**31 - 1) for i in range(1, more + 1)]
    return jnp.int32(shortest) + jnp.sum(env_steps >= np.array(reached, np.int32), dtype=jnp.int32)


def length_of_small_error(errors: jax.Array, limit: Scalar, shortest: int) -> jax.Array:
    """The longest rollout whose `errors` [T] after 1, 2, ... steps are all below `limit`; int32."""
    return jnp.maximum(jnp.sum(jnp.cumprod(errors < limit)), shortest).astype(jnp.int32)


def fresh_errors(
    model: DynamicsModel,
    params: PyTree,
    replay: Ring,
    rows: Rows,
    key: jax.Array,
    t: jax.Array,
    depth: int,
    fresh: int,
) -> jax.Array:
    """Error of a model after 1 to `depth` steps on steps that it has not seen; [depth] float32.

    The root of the mean squared error over dimensions, each in standard deviations of all
    observations, over 256 open-loop windows of the real trajectories.

    Args:
      model, params: the dynamics model; `expectation` adds no noise of its own.
      replay, rows: the ring of real transitions and what it holds.
      key: consumed.
      t: int32, the newest batched step in the replay.
      depth: steps of a window.
      fresh: how many of the newest batched steps the model has not seen, `depth` or more.
    """
    start_key, model_key = jax.random.split(key)
    back = jax.random.randint(start_key, (WINDOWS,), 0, max(fresh - depth + 1, 1))
    starts = jnp.maximum(t - (depth - 1) - back, 0)
    steps = (starts[None] + jnp.arange(depth)[:, None]) % replay.steps
    envs = jnp.arange(WINDOWS) % replay.num_envs
    row: Transition = replay.get(rows, steps * replay.num_envs + envs[None])
    ends = row.terminated | row.truncated
    whole = jnp.cumsum(ends, axis=0) - ends == 0
    errors = k_step_errors(model, params, row.obs[0], row.action, row.next_obs, whole, model_key)
    seen: Transition = replay.all(rows)
    written = jnp.arange(replay.capacity) < jnp.minimum(t + 1, replay.steps) * replay.num_envs
    spread = jnp.var(seen.obs, axis=0, where=written[:, None]) + 1e-6
    return jnp.sqrt(jnp.mean(errors.per_dim / spread[None], axis=1))


class History(NamedTuple):
    """The last n values of MACURA's threshold before it is averaged."""

    values: jax.Array  # [n] float32
    added: jax.Array  # [] int32, how many there ever were


def empty_history(size: int = 2_000) -> History:
    """MACURA's memory before the first rollout; its code averages over 2,000 of them."""
    return History(jnp.zeros(size), jnp.int32(0))


def macura_threshold(
    history: History, scores: jax.Array, factor: Scalar, percentile: Scalar
) -> tuple[jax.Array, History]:
    """MACURA's threshold, [] float32, and the history with this one added.

    The mean over the history of `factor` (xi) times the `percentile`-th (zeta) percentile of the
    disagreements `scores` [B] at the first depth (Frauenknecht et al. 2024, section 4.2).
    """
    size = history.values.shape[0]
    now = factor * jnp.percentile(scores, percentile)
    values = history.values.at[history.added % size].set(now)
    added = history.added + 1
    seen = jnp.minimum(added, size)
    mean = jnp.sum(jnp.where(jnp.arange(size) < seen, values, 0.0)) / seen
    return mean, History(values, added)


def m2ac_share(depth: jax.Array, length: Scalar) -> jax.Array:
    """The share of transitions that M2AC keeps at `depth` i of a rollout of `length` H, float32:
    (H - i) / (2 (H + 1))."""
    return (length - depth) / (2.0 * (length + 1.0))
