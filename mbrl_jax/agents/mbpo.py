"""MBPO: SAC on short rollouts of a learned ensemble, branched from real states.

Janner et al. (2019), "When to trust your model: model-based policy optimization": every
`model_period` steps the ensemble is fitted to all real data and rolled out from states of the
replay under the policy; after each step SAC makes `updates` gradient steps on batches of which a
fixed share is real.

In reading order: `update` is what happens after a step, `refresh` what happens after a period
(`imagine` rolls out), and `batches` what SAC learns from.

Switches: rules of rollouts beyond the paper's, MACURA and M2AC among them
(`models.rollout_rules`); the remedies of failing scales (`model.normalise_targets`,
`model.residual`); REDQ, DroQ and LayerNorm critics, a fixed temperature and coloured exploration
(`sac`).
"""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax import prng
from mbrl_jax.agents import AgentDef, sac_learner
from mbrl_jax.agents.mbpo_presets import PRESETS
from mbrl_jax.data import ring
from mbrl_jax.data.ring import Ring
from mbrl_jax.data.rows import Rows, write_slice
from mbrl_jax.models import dynamics, ensemble, fit, rollout, rollout_rules
from mbrl_jax.types import (
    Agent,
    EnvSpec,
    InputError,
    Metrics,
    Mode,
    NStep,
    PyTree,
    Scalar,
    Schedule,
    Step,
    Transition,
    config,
    ranged,
)


@config
class Config(rollout_rules.Config):
    """The paper's fields, and those of the rules of rollouts."""

    # the network
    model: dynamics.Config = dynamics.Config(termination="known")
    # its training, after every `model_period` steps
    training: fit.Config = fit.Config()
    # policy, critics and temperature
    sac: sac_learner.LearnerConfig = sac_learner.LearnerConfig(target_entropy=-0.5)
    # networks in the ensemble
    num_members: int = ranged("[1, inf)", default=7)
    # the best of them, which predict
    num_elites: int = ranged("[1, inf)", default=5)
    # steps of every environment between two trainings of the model
    model_period: int = ranged("[1, inf)", default=250)
    # rollouts that are started after a training, for each environment step since the last one
    rollouts_per_step: int = ranged("[1, inf)", default=400)
    # how many trainings ago rollouts are forgotten
    retained: int = ranged("[1, inf)", default=4)
    # steps of a rollout at first and at last
    rollout_length: tuple[int, ...] = (1, 1)
    # environment steps after the warm-up between which the length grows linearly
    rollout_growth: tuple[int, ...] = ranged("[0, inf)", default=(20_000, 150_000))
    # predictions are clipped to the range of the data, wider by so many times itself
    clip_margin: float = ranged("[0, inf)", default=1.0)
    # share of real transitions in a batch
    real_ratio: float = ranged("[0, 1]", default=0.05)
    # transitions of a gradient step
    batch_size: int = ranged("[1, inf)", default=256)
    # gradient steps after a step of every environment
    updates: int = ranged("[1, inf)", default=20)
    # environment steps that the replay holds
    buffer_size: int = ranged("[1, inf)", default=1_000_000)
    # environments side by side
    num_envs: int = ranged("[1, inf)", default=1)
    # environment steps of random actions before the first training
    warmup_steps: int = ranged("[2, inf)", default=5_000)


class Imagined(NamedTuple):
    """Transitions of the last `retained` trainings' rollouts, those of one behind the other."""

    rows: Rows  # [retained * capacity of one, width] for each dtype
    counts: jax.Array  # [retained] int32


class State(NamedTuple):
    learner: sac_learner.LearnerState
    params: ensemble.Params
    opt: PyTree
    replay: Rows
    imagined: Imagined
    memory: PyTree  # of the rules of rollouts
    report: Metrics  # of the last training and its rollouts


def models(cfg: Config, spec: EnvSpec) -> ensemble.Ensemble:
    """The ensemble that is learned."""
    return ensemble.make(cfg.model, spec, cfg.num_members, cfg.num_elites)


def replay(cfg: Config, spec: EnvSpec) -> Ring:
    """The ring of real transitions."""
    return ring.make(Transition.example(spec), cfg.buffer_size, cfg.num_envs)


def one_round(cfg: Config, spec: EnvSpec) -> Ring:
    """The ring that the rollouts after one training fill at most."""
    return ring.make(Transition.example(spec), num_rollouts(cfg) * cfg.rollout_length[1])


def num_rollouts(cfg: Config) -> int:
    """How many are started after a training."""
    return cfg.rollouts_per_step * cfg.model_period * cfg.num_envs


def rules(cfg: Config, spec: EnvSpec) -> rollout_rules.RolloutRules:
    """What ends a rollout and how long it is."""
    # at the first training the model has seen nothing, and there is the warm-up alone
    fresh = min(cfg.model_period, -(-cfg.warmup_steps // cfg.num_envs))
    lengths = rollout_rules.Lengths(cfg.rollout_length, cfg.rollout_growth, fresh)
    measured = models(cfg, spec).model("expectation")
    return rollout_rules.make_rules(cfg, lengths, measured, replay(cfg, spec))


def scheduled_steps(cfg: Config, n: jax.Array) -> jax.Array:
    """Environment steps of the rollout schedule at update `n` ([] int32): [] int32.

    Those after the warm-up, as the authors count their epochs; no more than the schedule tells
    apart, so that int32 holds them.
    """
    last = max(cfg.rollout_growth) // cfg.num_envs + 1
    return jnp.minimum(n, last) * cfg.num_envs


def init(cfg: Config, spec: EnvSpec, key: jax.Array) -> State:
    """`Agent.init`."""
    learner_key, model_key = jax.random.split(key)
    many, store = models(cfg, spec), one_round(cfg, spec)
    params = many.init(model_key)
    rows = store.layout.zeros(cfg.retained * store.capacity)
    state = State(
        learner=sac_learner.make_learner(cfg.sac, spec).init(learner_key),
        params=params,
        opt=many.init_opt(params),
        replay=replay(cfg, spec).init(),
        imagined=Imagined(rows, jnp.zeros(cfg.retained, jnp.int32)),
        memory=rules(cfg, spec).init(),
        report={},
    )
    again = partial(refresh, cfg, spec)
    shapes = jax.eval_shape(again, state, jax.random.key(0), jnp.int32(0), jnp.int32(0)).report
    return state._replace(report=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))


def act(
    cfg: Config, spec: EnvSpec, state: State, memory, obs, is_first, key, t: jax.Array, mode: Mode
):
    """`Agent.act`: SAC's."""
    learner = sac_learner.make_learner(cfg.sac, spec)
    return learner.act(state.learner.params.actor, memory, obs, is_first, key, mode)


def observe(cfg: Config, spec: EnvSpec, state: State, step: Step, extras, t: jax.Array) -> State:
    """`Agent.observe`."""
    rows = replay(cfg, spec).add(state.replay, Transition.of(step), t)
    return state._replace(replay=rows)


def update(
    cfg: Config, spec: EnvSpec, state: State, key: jax.Array, t: jax.Array, n: jax.Array
) -> tuple[State, Metrics]:
    """`Agent.update`: a refresh where it is due, and SAC's gradient steps."""
    refresh_key, batch_key, learn_key = prng.split(key, 3)
    due = n % cfg.model_period == 0
    # a loop of one or no turn: a cond would copy the rollouts at every step
    state = jax.lax.fori_loop(
        0,
        jnp.int32(due),
        lambda i, s: refresh(cfg, spec, s, jax.random.fold_in(refresh_key, i), t, n),
        state,
    )
    learner = sac_learner.make_learner(cfg.sac, spec)
    drawn = batches(cfg, spec, state, batch_key, t)
    moved, metrics = learner.update(state.learner, drawn, learn_key, n * cfg.updates)
    return state._replace(learner=moved), metrics | state.report


def refresh(
    cfg: Config, spec: EnvSpec, state: State, key: jax.Array, t: jax.Array, n: jax.Array
) -> State:
    """Fits the model to all real data and replaces the oldest rollouts.

    Args:
      cfg, spec: the settings and the environment's.
      state: with the batched step `t` observed.
      key: consumed.
      t: [] int32, the newest batched step, not vmapped.
      n: [] int32, the number of the update, which tells the round of rollouts and the schedule.
    """
    length_key, fit_key, start_key, rollout_key = jax.random.split(key, 4)
    buffer, many = replay(cfg, spec), models(cfg, spec)
    length = rules(cfg, spec).length(
        state.params, state.replay, length_key, t, scheduled_steps(cfg, n)
    )
    data = buffer.all(state.replay)
    size = jnp.minimum(t + 1, buffer.steps) * cfg.num_envs
    params, opt, curves = many.fit(state.params, state.opt, cfg.training, data, size, fit_key)
    state = state._replace(params=params, opt=opt)
    starts = buffer.sample_index(start_key, num_rollouts(cfg), t + 1)
    obs = buffer.get(state.replay, starts).obs
    state, imagined = imagine(cfg, spec, state, obs, rollout_key, length, n)
    written = jnp.arange(cfg.buffer_size) < size
    real_reward = jnp.mean(data.reward, where=written)
    report = fit.report(curves, params.bounds) | imagined | {"real_reward": real_reward}
    return state._replace(report=report)


def imagine(
    cfg: Config,
    spec: EnvSpec,
    state: State,
    obs: jax.Array,
    key: jax.Array,
    length: jax.Array,
    n: jax.Array,
) -> tuple[State, Metrics]:
    """Rolls the model out under the policy and stores what counts in place of the oldest round.

    Args:
      cfg, spec, state, n: as in `refresh`, with the model fitted.
      obs: [num_rollouts, D] where the rollouts start.
      key: consumed.
      length: [] int32, their steps.

    Returns:
      The state, and the metrics `rollout_limit`, `rollout_steps` (steps that count, of a rollout),
      `rollout_faults` (rollouts that met a number that is not finite) and `imagined_reward` (the
      mean of a step; a policy that exploits the model is promised more than it gets).
    """
    store, rule = one_round(cfg, spec), rules(cfg, spec)
    model = models(cfg, spec).model("ts1", rule.score, clip_margin=cfg.clip_margin)

    def write(carry: PyTree, depth, row: Transition, score, mask) -> PyTree:
        rows, cursor, memory, rewards = carry
        rows, cursor = store.add_masked(rows, row, mask, cursor)
        memory = rule.remember(memory, depth, score)
        return rows, cursor, memory, rewards + jnp.sum(jnp.where(mask, row.reward, 0.0))

    carry = (store.init(), ring.empty_cursor(), state.memory, jnp.float32(0))
    policy = sampled_actions(cfg, spec, state.learner.params.actor)
    (rows, cursor, memory, rewards), ending = rollout.unroll(
        model, state.params, obs, policy, key, length, write, carry,
        rule.rules(state.memory, length),
    )  # fmt: skip
    number = n // cfg.model_period % cfg.retained
    stored = {
        name: write_slice(x, rows[name], number * store.capacity)
        for name, x in state.imagined.rows.items()
    }
    counts = jnp.where(jnp.arange(cfg.retained) == number, cursor.size, state.imagined.counts)
    report = {
        "rollout_limit": length.astype(jnp.float32),
        "rollout_steps": cursor.size / num_rollouts(cfg),
        "rollout_faults": ending.faults.astype(jnp.float32),
        "imagined_reward": rewards / jnp.maximum(cursor.size, 1),
    }
    return state._replace(imagined=Imagined(stored, counts), memory=memory), report


def sampled_actions(cfg: Config, spec: EnvSpec, actor: PyTree) -> rollout.Act:
    """The policy of SAC's `actor` parameters, which draws its actions, for rollouts."""
    learner = sac_learner.make_learner(cfg.sac, spec)

    def sample(obs: jax.Array, key: jax.Array, depth: jax.Array) -> jax.Array:
        distribution = learner.policy(actor, obs)
        noise = jax.random.normal(key, distribution.mean_before.shape)
        return spec.from_unit(distribution.from_noise(noise)[0])

    return sample


def batches(cfg: Config, spec: EnvSpec, state: State, key: jax.Array, t: jax.Array) -> NStep:
    """What SAC learns from after the batched step `t`: [updates, batch_size, ...].

    The same share of each batch is real; all of it where there is not one imagined transition.
    """
    real_key, imagined_key = prng.split(key)
    num, counts = cfg.updates * cfg.batch_size, state.imagined.counts
    buffer, store = replay(cfg, spec), one_round(cfg, spec)
    real: Transition = buffer.get(state.replay, buffer.sample_index(real_key, num, t + 1))
    index = sample_imagined(imagined_key, num, counts, store.capacity)
    imagined: Transition = store.get(state.imagined.rows, index)
    share = jnp.where(jnp.sum(counts) == 0, 1.0, cfg.real_ratio)
    row = mixed(real, imagined, share, cfg.batch_size)
    discount = jnp.where(row.terminated, 0.0, cfg.sac.gamma)
    return NStep(row.obs, spec.to_unit(row.action), row.reward, row.next_obs, discount)


def sample_imagined(key: jax.Array, num: int, counts: jax.Array, capacity: int) -> jax.Array:
    """`num` rows, [num] int32, uniform with replacement over those of all rounds.

    Round i has `counts[i]` rows from i * capacity on; row 0 where there is none at all.
    """
    place = ring.below(key, num, jnp.maximum(jnp.sum(counts), 1))
    ends = jnp.cumsum(counts)
    at = jnp.minimum(jnp.sum(place[:, None] >= ends[None], axis=1), counts.shape[0] - 1)
    return at * capacity + jnp.maximum(place - (ends - counts)[at], 0)


def mixed(
    real: Transition, imagined: Transition, real_ratio: Scalar, batch_size: int
) -> Transition:
    """Batches [G, B, ...] of rows [G * B, ...]; floor(real_ratio * B) of each are real."""
    num_real = jnp.floor(real_ratio * batch_size + 1e-4)
    take_real = jnp.arange(batch_size) < num_real

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = (x.reshape(-1, batch_size, *x.shape[1:]) for x in (a, b))
        return jnp.where(take_real.reshape(1, -1, *[1] * (a.ndim - 2)), a, b)

    return Transition(*map(pick, real, imagined))


def make(config: Config, spec: EnvSpec) -> Agent:
    """The agent of one environment with continuous actions and vector observations.

    Raises:
      InputError: discrete or unbounded actions; a warm-up too short for a holdout; a rollout length
        or schedule that goes backwards; as `dynamics.make`, `ensemble.make`, `make_learner` of SAC
        and `rollout_rules.make_rules`.
    """
    cfg = resolve(config, spec)
    _check(cfg)
    learner = sac_learner.make_learner(cfg.sac, spec)
    for part in (models, replay, one_round, rules):
        part(cfg, spec)  # which refuses what it cannot do
    return Agent(
        init=partial(init, cfg, spec),
        init_memory=learner.init_memory,
        act=partial(act, cfg, spec),
        observe=partial(observe, cfg, spec),
        update=partial(update, cfg, spec),
        schedule=Schedule(cfg.num_envs, cfg.warmup_steps, 1),
    )


def resolve(config: Config, spec: EnvSpec) -> Config:
    """`config` as it is used in an environment like `spec`: a termination that is not known there
    is learned, and a warning tells. Raises InputError for a spec that MBPO cannot act in."""
    spec.check_usable("MBPO")
    sac_learner.make_learner(config.sac, spec)
    if config.model.termination != "known" or spec.termination_fn is not None:
        return config
    warnings.warn(
        f"{spec.id} has no known termination function; MBPO learns it "
        "(model.termination = 'never' if the task has no end)",
        stacklevel=2,
    )
    model = dataclasses.replace(config.model, termination="learned")
    return dataclasses.replace(config, model=model)


def _check(cfg: Config) -> None:
    for name in ("rollout_length", "rollout_growth"):
        value = getattr(cfg, name)
        if len(value) != 2 or value[0] > value[1]:
            raise InputError(f"{name} = {value}: expected two numbers, the second not the smaller")
    fit.check_warmup(cfg.training, cfg.warmup_steps, cfg.buffer_size)
    if cfg.truncation != "none" and cfg.score == "jensen_shannon" and not cfg.model.probabilistic:
        raise InputError(
            "score = 'jensen_shannon': expected model.probabilistic = True; take 'std' or "
            "'max_distance'"
        )


AGENTS = {
    "mbpo": AgentDef(
        "mbpo",
        "MBPO: SAC on short rollouts of a learned ensemble",
        Config(),
        make,
        PRESETS,
        resolve,
        dynamic_loops=True,
    )
}
