"""MBPO: SAC on short rollouts of a learned ensemble, branched from real states.

Janner et al. (2019), "When to trust your model: model-based policy optimization": every
`model_period` steps the ensemble is fitted to all real data and rolled out from states of the
replay under the policy; after each step SAC makes `updates` gradient steps on batches of which a
fixed share is real.

Switches: truncation of uncertain rollouts (a fixed threshold; MACURA, Frauenknecht et al. 2024; the
masks and the penalty of M2AC, Pan et al. 2020, with its rank by `score`), the remedies of failing
scales (`model.normalise_targets`, `model.residual`), REDQ, DroQ and LayerNorm critics, a fixed
temperature, coloured exploration (`sac.noise_correlation`), and a rollout length that follows the
measured error of the model.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax import prng
from mbrl_jax.agents import AgentDef, sac
from mbrl_jax.data import ring
from mbrl_jax.data.rows import Rows, write_slice
from mbrl_jax.models import diagnostics, dynamics, ensemble, fit, rollout
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

WINDOWS = 256  # of fresh steps, on which the model's error is measured


@config
class Config:
    """Fields annotated float may be vmapped and never recompile."""

    # the network
    model: dynamics.Config = dynamics.Config(termination="known")
    # its training, after every `model_period` steps
    training: fit.Config = fit.Config()
    # policy, critics and temperature
    sac: sac.LearnerConfig = sac.LearnerConfig(target_entropy=-0.5)
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
    # environment steps between which the length grows linearly
    rollout_growth: tuple[int, ...] = ranged("[0, inf)", default=(20_000, 150_000))
    # scheduled: as above; measured: the longest, within these bounds, whose error is small
    length_by: Literal["schedule", "error"] = "schedule"
    # length_by="error": the error of a rollout at most, in standard deviations of the states
    error_limit: float = ranged("(0, inf)", default=0.2)
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
    learner: sac.LearnerState
    params: ensemble.Params
    opt: PyTree
    replay: Rows
    imagined: Imagined
    history: rollout.History
    report: Metrics  # of the last training and its rollouts


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

    An environment whose termination is not known learns it, whatever the config says, and a
    warning tells.

    Raises:
      InputError: discrete or unbounded actions; a warm-up too short for a holdout; a rollout length
        or schedule that goes backwards; as `dynamics.make`, `ensemble.make`, `sac.make_learner`.
    """
    cfg = config
    spec.check_usable("MBPO")
    _check(cfg)
    learner = sac.make_learner(cfg.sac, spec)
    models = ensemble.make(_termination(cfg.model, spec), spec, cfg.num_members, cfg.num_elites)
    replay = ring.make(Transition.example(spec), cfg.buffer_size, cfg.num_envs)
    num_rollouts = cfg.rollouts_per_step * cfg.model_period * cfg.num_envs
    longest = cfg.rollout_length[1]
    one_round = ring.make(Transition.example(spec), num_rollouts * longest)
    score = cfg.score if cfg.truncation != "none" else "none"
    model = models.model("ts1", score)
    first = -(-cfg.warmup_steps // cfg.num_envs)  # the batched step of the first update

    def init(key: jax.Array) -> State:
        learner_key, model_key = jax.random.split(key)
        params = models.init(model_key)
        rows = one_round.layout.zeros(cfg.retained * one_round.capacity)
        imagined = Imagined(rows, jnp.zeros(cfg.retained, jnp.int32))
        state = State(
            learner.init(learner_key), params, models.init_opt(params), replay.init(), imagined,
            rollout.empty_history(), {},
        )  # fmt: skip
        shapes = jax.eval_shape(refresh, state, jax.random.key(0), jnp.int32(first)).report
        return state._replace(report=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))

    def act(state: State, memory: jax.Array, obs, is_first, key, t: jax.Array, mode: Mode):
        return learner.act(state.learner.params.actor, memory, obs, is_first, key, mode)

    def observe(state: State, step: Step, extras, t: jax.Array) -> State:
        return state._replace(replay=replay.add(state.replay, Transition.of(step), t))

    def policy(actor: PyTree):
        def sample(obs: jax.Array, key: jax.Array, depth: jax.Array) -> jax.Array:
            distribution = learner.policy(actor, obs)
            noise = jax.random.normal(key, distribution.mean_before.shape)
            return spec.from_unit(distribution.from_noise(noise)[0])

        return sample

    def fresh_errors(state: State, key: jax.Array, t: jax.Array) -> jax.Array:
        """Error after each number of steps [longest] on the steps since the last training.

        The model has not seen them. The root of the mean squared error over dimensions, each in
        standard deviations of all observations.
        """
        start_key, model_key = jax.random.split(key)
        since = min(cfg.model_period, first) - longest + 1
        steps = t - (longest - 1) - jax.random.randint(start_key, (WINDOWS,), 0, max(since, 1))
        steps = jnp.maximum(steps, 0)[None] + jnp.arange(longest)[:, None]
        index = steps % replay.steps * cfg.num_envs + (jnp.arange(WINDOWS) % cfg.num_envs)[None]
        row: Transition = replay.get(state.replay, index)
        ends = row.terminated | row.truncated
        whole = jnp.cumsum(ends, axis=0) - ends == 0
        errors = diagnostics.k_step_errors(
            models.model("expectation"), state.params, row.obs[0], row.action, row.next_obs, whole,
            model_key,
        )  # fmt: skip
        everything: Transition = replay.get(state.replay, jnp.arange(cfg.buffer_size))
        written = (jnp.arange(cfg.buffer_size) < (t + 1) * cfg.num_envs)[:, None]
        spread = jnp.var(everything.obs, axis=0, where=written) + 1e-6
        return jnp.sqrt(jnp.mean(errors.per_dim / spread[None], axis=1))

    def length_now(state: State, key: jax.Array, t: jax.Array) -> jax.Array:
        if cfg.length_by == "error":
            errors = fresh_errors(state, key, t)
            return rollout.length_of_small_error(errors, cfg.error_limit, cfg.rollout_length[0])
        return rollout.scheduled_length(
            cfg.rollout_length, cfg.rollout_growth, (t + 1) * cfg.num_envs
        )

    def rules(state: State, length: jax.Array) -> rollout.Rules:
        limits = rollout.obs_limits(state.params.scaling, cfg.clip_margin)
        match cfg.truncation:
            case "none":
                return rollout.Rules(limits)
            case "threshold":
                return rollout.Rules(limits, cfg.threshold)
            case "macura":
                return rollout.Rules(limits, lambda score: macura(state.history, score)[0])
            case "m2ac":
                share = lambda depth: rollout.m2ac_share(depth, length)  # noqa: E731
                return rollout.Rules(limits, keep=share, penalty=cfg.m2ac_penalty)

    def macura(history: rollout.History, score: jax.Array) -> tuple[jax.Array, rollout.History]:
        return rollout.macura_threshold(history, score, cfg.macura_factor, cfg.macura_percentile)

    def refresh(state: State, key: jax.Array, t: jax.Array) -> State:
        """Fits the model to all real data and replaces the oldest rollouts."""
        length_key, fit_key, start_key, rollout_key = jax.random.split(key, 4)
        length = length_now(state, length_key, t)
        data = replay.get(state.replay, jnp.arange(cfg.buffer_size))
        size = jnp.minimum(t + 1, replay.steps) * cfg.num_envs
        params, opt, curves = models.fit(state.params, state.opt, cfg.training, data, size, fit_key)
        state = state._replace(params=params, opt=opt)
        starts = replay.sample_index(start_key, num_rollouts, t + 1)
        obs = replay.get(state.replay, starts).obs

        def write(carry: PyTree, depth, row: Transition, score, mask) -> PyTree:
            rows, cursor, history, rewards = carry
            rows, cursor = one_round.add_masked(rows, row, mask, cursor)
            if cfg.truncation == "macura":
                history = jax.lax.cond(
                    depth == 0, lambda h: macura(h, score)[1], lambda h: h, history
                )
            return rows, cursor, history, rewards + jnp.sum(jnp.where(mask, row.reward, 0.0))

        carry = (one_round.init(), ring.empty_cursor(), state.history, jnp.float32(0))
        actor = policy(state.learner.params.actor)
        (rows, cursor, history, rewards), ending = rollout.unroll(
            model, params, obs, actor, rollout_key, length, write, carry, rules(state, length)
        )
        number = (t - first) // cfg.model_period % cfg.retained
        stored = {
            name: write_slice(x, rows[name], number * one_round.capacity)
            for name, x in state.imagined.rows.items()
        }
        counts = jnp.where(jnp.arange(cfg.retained) == number, cursor.size, state.imagined.counts)
        written = jnp.arange(cfg.buffer_size) < size
        report = {
            "holdout_error": jnp.nanmin(curves.holdout),
            "model_loss": curves.loss[curves.rounds - 1],
            "model_rounds": curves.rounds.astype(jnp.float32),
            "logvar_min": jnp.mean(params.bounds.low),
            "logvar_max": jnp.mean(params.bounds.high),
            "rollout_limit": length.astype(jnp.float32),
            "rollout_steps": cursor.size / num_rollouts,
            "rollout_faults": ending.faults.astype(jnp.float32),
            # a policy that exploits the model is promised more than it gets
            "imagined_reward": rewards / jnp.maximum(cursor.size, 1),
            "real_reward": jnp.mean(data.reward, where=written),
        }
        return state._replace(imagined=Imagined(stored, counts), history=history, report=report)

    def batches(state: State, key: jax.Array, t: jax.Array) -> NStep:
        real_key, model_key = prng.split(key)
        num = cfg.updates * cfg.batch_size
        counts = state.imagined.counts
        real: Transition = replay.get(state.replay, replay.sample_index(real_key, num, t + 1))
        index = sample_imagined(model_key, num, counts, one_round.capacity)
        dreamt: Transition = one_round.get(state.imagined.rows, index)
        # without a single imagined row, all are real
        share = jnp.where(jnp.sum(counts) == 0, 1.0, cfg.real_ratio)
        row = mixed(real, dreamt, share, cfg.batch_size)
        discount = jnp.where(row.terminated, 0.0, cfg.sac.gamma)
        return NStep(row.obs, spec.to_unit(row.action), row.reward, row.next_obs, discount)

    def update(state: State, key: jax.Array, t: jax.Array, n: jax.Array) -> tuple[State, Metrics]:
        refresh_key, batch_key, learn_key = prng.split(key, 3)
        due = n % cfg.model_period == 0
        # a loop of one or no turn: a cond would copy the rollouts at every step
        state = jax.lax.fori_loop(
            0, jnp.int32(due), lambda i, s: refresh(s, jax.random.fold_in(refresh_key, i), t), state
        )
        moved, metrics = learner.update(
            state.learner, batches(state, batch_key, t), learn_key, n * cfg.updates
        )
        return state._replace(learner=moved), metrics | state.report

    schedule = Schedule(cfg.num_envs, cfg.warmup_steps, 1)
    return Agent(init, learner.init_memory, act, observe, update, schedule)


def _termination(model: dynamics.Config, spec: EnvSpec) -> dynamics.Config:
    if model.termination != "known" or spec.termination_fn is not None:
        return model
    warnings.warn(
        f"{spec.id} has no known termination function; MBPO learns it "
        "(model.termination = 'never' if the task has no end)",
        stacklevel=2,
    )
    return dataclasses.replace(model, termination="learned")


def _check(cfg: Config) -> None:
    for name in ("rollout_length", "rollout_growth"):
        value = getattr(cfg, name)
        if len(value) != 2 or value[0] > value[1]:
            raise InputError(f"{name} = {value}: expected two numbers, the second not the smaller")
    fit.check_warmup(cfg.training, cfg.warmup_steps, cfg.buffer_size)
    if cfg.length_by == "error" and cfg.model_period < max(cfg.rollout_length):
        raise InputError(
            f"rollout_length = {cfg.rollout_length}: expected at most model_period = "
            f"{cfg.model_period} where the error decides"
        )
    if cfg.truncation != "none" and cfg.score == "jensen_shannon" and not cfg.model.probabilistic:
        raise InputError(
            "score = 'jensen_shannon': expected model.probabilistic = True; take 'std' or "
            "'max_distance'"
        )


# of the paper and its code (jannerm/mbpo); entropies are for each dimension of the action
_PAPER = {"updates": 20, "sac": {"target_entropy": -0.5}}
_SAC = {
    "hidden": (64, 64),
    "critic_hidden": (64, 64),
    "learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "temperature_learning_rate": 1e-3,
    "gamma": 0.98,
    "reward_scale": 0.1,
    "tau": 0.01,
    "target_entropy": -1.0,
    "layer_norm": True,
}
_SMALL = {
    "model": {"hidden": (128, 128), "weight_decay": (1e-5,)},
    "training": {"batch_size": 32},
    "sac": _SAC,
    "num_members": 5,
    "num_elites": 3,
    "model_period": 100,
    "rollouts_per_step": 100,
    "real_ratio": 0.1,
    "batch_size": 128,
    "buffer_size": 50_000,
    "warmup_steps": 200,
}
PRESETS = {
    "Pendulum-v1": {**_SMALL, "model_period": 50, "rollout_length": (10, 10), "updates": 40},
    "ContinuousCartPole-v0": {**_SMALL, "sac": {**_SAC, "gamma": 0.995, "learning_rate": 3e-4}},
    "MountainCarContinuous-v0": {
        **_SMALL,
        "sac": {**_SAC, "gamma": 0.99, "noise_correlation": 0.99},
        "warmup_steps": 1_000,
    },
    "Reacher-misc": _SMALL,
    "PointRobot-misc": _SMALL,
    "HalfCheetah-v5": _PAPER | {"updates": 40, "buffer_size": 400_000},
    "Hopper-v5": {
        "updates": 20,
        "sac": {"target_entropy": -1.0 / 3.0},
        "rollout_length": (1, 15),
        "buffer_size": 125_000,
    },
    "Walker2d-v5": _PAPER | {"buffer_size": 300_000},
    "Ant-v5": _PAPER
    | {
        "rollout_length": (1, 25),
        "rollout_growth": (20_000, 100_000),
        "buffer_size": 300_000,
    },
    "Humanoid-v5": {
        "model": {"hidden": (400, 400, 400, 400)},
        "updates": 20,
        "sac": {"target_entropy": -2.0 / 17.0},
        "model_period": 1_000,
        "retained": 5,
        "rollouts_per_step": 100,
        "rollout_length": (1, 25),
        "rollout_growth": (20_000, 300_000),
        "buffer_size": 300_000,
    },
    "InvertedPendulum-v5": {
        "updates": 10,
        "sac": {"target_entropy": -0.05},
        "retained": 1,
        "buffer_size": 20_000,
        "warmup_steps": 500,
    },
}

AGENTS = {
    "mbpo": AgentDef(
        "mbpo", "MBPO: SAC on short rollouts of a learned ensemble", Config(), make, PRESETS
    )
}
