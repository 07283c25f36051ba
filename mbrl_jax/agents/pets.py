"""PETS: plan with a learned probabilistic ensemble, at every step anew.

Chua et al. (2018), "Deep reinforcement learning in a handful of trials using probabilistic dynamics
models": an ensemble fitted to all data so far, trajectory sampling with a fixed member for each
particle (TSinf), and model-predictive control by the cross-entropy method. iCEM, MPPI and random
shooting take its place by `planner`; discrete actions are planned by a categorical CEM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax import planning
from mbrl_jax.agents import AgentDef
from mbrl_jax.data import ring
from mbrl_jax.data.rows import Rows
from mbrl_jax.models import dynamics, ensemble, fit
from mbrl_jax.planning.planners import kept_elites
from mbrl_jax.types import (
    Agent,
    EnvSpec,
    InputError,
    Metrics,
    Mode,
    PyTree,
    Schedule,
    Step,
    Transition,
    config,
    ranged,
)


@config
class Config:
    """Fields annotated float may be vmapped and never recompile."""

    # the network
    model: dynamics.Config = dynamics.Config(
        hidden=(200, 200, 200), weight_decay=(2.5e-5, 5e-5, 5e-5, 1e-4)
    )
    # its training, after every `steps_per_update` steps
    training: fit.Config = fit.Config()
    # networks in the ensemble, all of which predict
    num_members: int = ranged("[1, inf)", default=5)
    # how uncertainty travels along a rollout
    propagation: Literal["ts1", "tsinf", "expectation", "distribution"] = "tsinf"
    # rollouts of each candidate
    particles: int = ranged("[1, inf)", default=20)
    # for continuous actions
    planner: Literal["cem", "icem", "mppi", "random_shooting"] = "cem"
    # steps that are planned ahead
    horizon: int = ranged("[1, inf)", default=25)
    # candidates of an iteration
    num_samples: int = ranged("[1, inf)", default=400)
    # the best of them, to which the next iteration is fitted
    num_elites: int = ranged("[1, inf)", default=40)
    # how often candidates are drawn for an action; random shooting draws once
    iterations: int = ranged("[1, inf)", default=5)
    # share of the old distribution in the new one (CEM, iCEM, discrete actions)
    momentum: float = ranged("[0, 1)", default=0.1)
    # environment steps that the replay holds
    buffer_size: int = ranged("[1, inf)", default=100_000)
    # environments side by side
    num_envs: int = ranged("[1, inf)", default=1)
    # environment steps of random actions before the first training
    warmup_steps: int = ranged("[2, inf)", default=200)
    # steps of every environment between two trainings
    steps_per_update: int = ranged("[1, inf)", default=200)


class State(NamedTuple):
    params: ensemble.Params
    opt: PyTree
    replay: Rows


def make(config: Config, spec: EnvSpec) -> Agent:
    """The agent of one environment with vector observations.

    Raises:
      InputError: as `dynamics.make`; unbounded actions, more elites than samples, a warm-up too
        short for a holdout, or a replay that does not divide by the environments.
    """
    cfg = config
    if cfg.num_elites > cfg.num_samples:
        raise InputError(
            f"num_elites = {cfg.num_elites}: expected at most num_samples = {cfg.num_samples}"
        )
    spec.check_usable("PETS")
    fit.check_warmup(cfg.training, cfg.warmup_steps, cfg.buffer_size)
    if not spec.discrete:
        spec.check_bounded("PETS")
    models = ensemble.make(cfg.model, spec, cfg.num_members, cfg.num_members)
    model = models.model(cfg.propagation)
    replay = ring.make(Transition.example(spec), cfg.buffer_size, cfg.num_envs)
    start, plan_one = make_planner(cfg, spec)

    def init(key: jax.Array) -> State:
        params = models.init(key)
        return State(params, models.init_opt(params), replay.init())

    def init_memory(num_envs: int) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], num_envs, axis=0), start)

    def act(state: State, memory: PyTree, obs, is_first, key, t: jax.Array, mode: Mode):
        if mode == "random":
            # no plan leads to what was done, so the next one starts anew
            return spec.random_actions(key, obs), init_memory(obs.shape[0]), ()

        def one(obs: jax.Array, plan: PyTree, is_first: jax.Array, key: jax.Array):
            plan = jax.tree.map(lambda new, old: jnp.where(is_first, new, old), start, plan)
            value = planning.model_value(model, state.params, obs, cfg.particles)
            got = plan_one(value, key, plan)
            return got.action, got.plan

        action, memory = jax.vmap(one)(obs, memory, is_first, jax.random.split(key, obs.shape[0]))
        return action, memory, ()

    def observe(state: State, step: Step, extras, t: jax.Array) -> State:
        row = Transition.of(step)
        return state._replace(replay=replay.add(state.replay, row, t))

    def update(state: State, key: jax.Array, t: jax.Array, n: jax.Array) -> tuple[State, Metrics]:
        data = replay.get(state.replay, jnp.arange(cfg.buffer_size))
        size = jnp.minimum(t + 1, replay.steps) * cfg.num_envs
        params, opt, curves = models.fit(state.params, state.opt, cfg.training, data, size, key)
        metrics = {
            "holdout_error": jnp.nanmin(curves.holdout),
            "model_loss": curves.loss[curves.rounds - 1],
            "model_rounds": curves.rounds.astype(jnp.float32),
            "logvar_min": jnp.mean(params.bounds.low),
            "logvar_max": jnp.mean(params.bounds.high),
        }
        return State(params, opt, state.replay), metrics

    schedule = Schedule(cfg.num_envs, cfg.warmup_steps, cfg.steps_per_update)
    return Agent(init, init_memory, act, observe, update, schedule)


def make_planner(cfg: Config, spec: EnvSpec) -> tuple[PyTree, Callable[..., planning.Result]]:
    """The plan of an episode's start, and (value, key, plan) -> planning.Result."""
    num, top, iterations = cfg.num_samples, cfg.num_elites, cfg.iterations
    if spec.num_actions is not None:

        def discrete(value: planning.Value, key: jax.Array, plan: PyTree) -> planning.Result:
            return planning.categorical_cem(value, key, plan, num, top, iterations, cfg.momentum)

        return planning.start_categorical_cem(cfg.horizon, spec.num_actions), discrete
    low, high = jnp.array(spec.action_low), jnp.array(spec.action_high)
    kept = kept_elites(top, 0.3)

    def continuous(value: planning.Value, key: jax.Array, plan: PyTree) -> planning.Result:
        match cfg.planner:
            case "cem":
                return planning.cem(value, key, plan, low, high, num, top, iterations, cfg.momentum)
            case "icem":
                return planning.icem(
                    value, key, plan, low, high, num, top, iterations, cfg.momentum
                )
            case "mppi":
                return planning.mppi(value, key, plan, low, high, num, iterations)
            case "random_shooting":
                return planning.random_shooting(value, key, cfg.horizon, low, high, num)

    match cfg.planner:
        case "cem":
            return planning.start_cem(cfg.horizon, low, high), continuous
        case "icem":
            return planning.start_icem(cfg.horizon, low, high, kept), continuous
        case "mppi":
            return planning.start_mppi(cfg.horizon, low, high), continuous
        case "random_shooting":
            return (), continuous


_SMALL = {
    "model": {
        "hidden": (64, 64),
        "weight_decay": (1e-5,),
        "reward": "known",
        "termination": "known",
    },
    "training": {"batch_size": 64, "max_epochs": 50},
    "particles": 5,
    "buffer_size": 10_000,
    "steps_per_update": 100,
}
# a reward of 1 a step ties all that do not fall: a plan must reach as far as a drift to the edge
_POLE = _SMALL | {"horizon": 60, "num_samples": 60, "num_elites": 12, "iterations": 3}
PRESETS = {
    "Pendulum-v1": _SMALL | {"horizon": 20, "num_samples": 100, "num_elites": 10, "iterations": 4},
    "ContinuousCartPole-v0": _POLE,
    "CartPole-v1": _POLE | {"num_samples": 100, "num_elites": 30, "momentum": 0.8},
}

AGENTS = {
    "pets": AgentDef(
        "pets", "PETS: planning with a probabilistic ensemble", Config(), make, PRESETS
    )
}
