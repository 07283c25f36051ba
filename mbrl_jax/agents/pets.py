"""PETS: plan with a learned probabilistic ensemble, at every step anew.

Chua et al. (2018), "Deep reinforcement learning in a handful of trials using probabilistic dynamics
models": an ensemble fitted to all data so far, trajectory sampling with a fixed member for each
particle (TSinf), and model-predictive control by the cross-entropy method. iCEM, MPPI and random
shooting take its place by `planner`; discrete actions are planned by a categorical CEM.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax import planning
from mbrl_jax.agents import AgentDef
from mbrl_jax.data import ring
from mbrl_jax.data.ring import Ring
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
    # environment steps of random actions; the first training comes `steps_per_update` steps later,
    # which are random too
    warmup_steps: int = ranged("[2, inf)", default=200)
    # steps of every environment between two trainings
    steps_per_update: int = ranged("[1, inf)", default=200)


class State(NamedTuple):
    params: ensemble.Params
    opt: PyTree
    replay: Rows


def models(cfg: Config, spec: EnvSpec) -> ensemble.Ensemble:
    """The ensemble that is learned; all of its members predict."""
    return ensemble.make(cfg.model, spec, cfg.num_members, cfg.num_members)


def replay(cfg: Config, spec: EnvSpec) -> Ring:
    """The ring of real transitions."""
    return ring.make(Transition.example(spec), cfg.buffer_size, cfg.num_envs)


def init(cfg: Config, spec: EnvSpec, key: jax.Array) -> State:
    """`Agent.init`."""
    many = models(cfg, spec)
    params = many.init(key)
    return State(params, many.init_opt(params), replay(cfg, spec).init())


def init_memory(cfg: Config, spec: EnvSpec, num_envs: int) -> PyTree:
    """`Agent.init_memory`: the plan of an episode's start for each environment."""
    start, _ = make_planner(cfg, spec)
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], num_envs, axis=0), start)


def untrained_steps(cfg: Config) -> int:
    """The batched steps before the first training."""
    return -(-cfg.warmup_steps // cfg.num_envs) + cfg.steps_per_update


def act(
    cfg: Config, spec: EnvSpec, state: State, memory, obs, is_first, key, t: jax.Array, mode: Mode
):
    """`Agent.act`: the first action of a plan in modes "train" and "eval" alike.

    A model that was never trained is not worth planning with: until then "train" is random too.
    """
    num_envs = obs.shape[0]

    def at_random(key: jax.Array) -> tuple[jax.Array, PyTree]:
        # no plan leads to what is done, so the next one starts anew
        return spec.random_actions(key, obs), init_memory(cfg, spec, num_envs)

    def one(obs: jax.Array, plan: PyTree, is_first: jax.Array, key: jax.Array):
        start, _ = make_planner(cfg, spec)
        plan = jax.tree.map(lambda new, old: jnp.where(is_first, new, old), start, plan)
        got = plan_action(cfg, spec, state.params, obs, plan, key)
        return got.action, got.plan

    def planned(key: jax.Array) -> tuple[jax.Array, PyTree]:
        return jax.vmap(one)(obs, memory, is_first, jax.random.split(key, num_envs))

    if mode == "random":
        action, memory = at_random(key)
    elif mode == "train":
        action, memory = jax.lax.cond(t < untrained_steps(cfg), at_random, planned, key)
    else:
        action, memory = planned(key)
    return action, memory, ()


def plan_action(
    cfg: Config,
    spec: EnvSpec,
    params: ensemble.Params,
    obs: jax.Array,
    plan: PyTree,
    key: jax.Array,
) -> planning.Result:
    """Plans from one state.

    Args:
      cfg, spec: the settings and the environment's.
      params: of the ensemble.
      obs: [D] the state.
      plan: of the step before, or the start that `make_planner` gives.
      key: consumed.

    Returns:
      The action [A] float32 or [] int32, the plan for the next step, and the whole sequence.
    """
    model = models(cfg, spec).model(cfg.propagation)
    value = planning.model_value(model, params, obs, cfg.particles)
    return make_planner(cfg, spec)[1](value, key, plan)


def observe(cfg: Config, spec: EnvSpec, state: State, step: Step, extras, t: jax.Array) -> State:
    """`Agent.observe`."""
    rows = replay(cfg, spec).add(state.replay, Transition.of(step), t)
    return state._replace(replay=rows)


def update(
    cfg: Config, spec: EnvSpec, state: State, key: jax.Array, t: jax.Array, n: jax.Array
) -> tuple[State, Metrics]:
    """`Agent.update`: trains the ensemble on all that was observed up to the batched step `t`."""
    buffer = replay(cfg, spec)
    data, size = buffer.all(state.replay), jnp.minimum(t + 1, buffer.steps) * cfg.num_envs
    params, opt, curves = models(cfg, spec).fit(
        state.params, state.opt, cfg.training, data, size, key
    )
    return State(params, opt, state.replay), fit.report(curves, params.bounds)


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
    for part in (models, replay, make_planner):
        part(cfg, spec)  # which refuses what it cannot do
    return Agent(
        init=partial(init, cfg, spec),
        init_memory=partial(init_memory, cfg, spec),
        act=partial(act, cfg, spec),
        observe=partial(observe, cfg, spec),
        update=partial(update, cfg, spec),
        schedule=Schedule(cfg.num_envs, cfg.warmup_steps, cfg.steps_per_update),
    )


def make_planner(cfg: Config, spec: EnvSpec) -> tuple[PyTree, Callable[..., planning.Result]]:
    """The plan of an episode's start, and (value, key, plan) -> planning.Result."""
    num, top, iterations = cfg.num_samples, cfg.num_elites, cfg.iterations
    if spec.num_actions is not None:

        def discrete(value: planning.Value, key: jax.Array, plan: PyTree) -> planning.Result:
            return planning.categorical_cem(value, key, plan, num, top, iterations, cfg.momentum)

        return planning.start_categorical_cem(cfg.horizon, spec.num_actions), discrete
    low, high = jnp.array(spec.action_low), jnp.array(spec.action_high)
    kept = kept_elites(top)

    def continuous(value: planning.Value, key: jax.Array, plan: PyTree) -> planning.Result:
        bounded = (value, key, plan, low, high)
        match cfg.planner:
            case "cem":
                return planning.cem(*bounded, num, top, iterations, cfg.momentum)
            case "icem":
                return planning.icem(*bounded, num, top, iterations, cfg.momentum)
            case "mppi":
                return planning.mppi(*bounded, num, iterations)
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
        "pets",
        "PETS: planning with a probabilistic ensemble",
        Config(),
        make,
        PRESETS,
        dynamic_loops=True,
    )
}
