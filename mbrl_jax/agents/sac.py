"""Soft actor-critic with its high update-to-data variants as switches.

The algorithm is in `sac_learner` (losses, gradient steps, and the variants REDQ, DroQ and CrossQ);
here it gets a replay of real steps and a schedule.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from mbrl_jax import prng
from mbrl_jax.agents import AgentDef
from mbrl_jax.agents.sac_learner import LearnerConfig, LearnerState, make_learner
from mbrl_jax.data import ring
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
class Config(LearnerConfig):
    """The learner's fields and those of the replay."""

    # environments side by side
    num_envs: int = ranged("[1, inf)", default=1)
    # environment steps that the replay holds
    buffer_size: int = ranged("[1, inf)", default=1_000_000)
    # environment steps of random actions before the first update
    warmup_steps: int = ranged("[1, inf)", default=5_000)
    # transitions of a gradient step
    batch_size: int = ranged("[1, inf)", default=256)
    # steps of every environment between two rounds of updates
    steps_per_update: int = ranged("[1, inf)", default=1)
    # gradient steps of a round; the update-to-data ratio is updates / (num_envs * steps_per_update)
    updates: int = ranged("[1, inf)", default=1)


class State(NamedTuple):
    learner: LearnerState
    replay: PyTree


def make(config: Config, spec: EnvSpec) -> Agent:
    """The agent of one environment with continuous actions.

    Raises:
      InputError: as `make_learner`; a batch larger than the replay, or a replay that does not
        divide by the environments.
    """
    cfg, learner = config, make_learner(config, spec)
    if cfg.batch_size > cfg.buffer_size:
        raise InputError(
            f"batch_size = {cfg.batch_size}: expected at most buffer_size = {cfg.buffer_size}"
        )
    replay = ring.make(Transition.example(spec), cfg.buffer_size, cfg.num_envs)

    def init(key: jax.Array) -> State:
        return State(learner.init(key), replay.init())

    def act(state: State, memory, obs, is_first, key, t: jax.Array, mode: Mode):
        return learner.act(state.learner.params.actor, memory, obs, is_first, key, mode)

    def observe(state: State, step: Step, extras, t: jax.Array) -> State:
        row = Transition.of(step)._replace(action=spec.to_unit(step.action))
        return state._replace(replay=replay.add(state.replay, row, t))

    def update(state: State, key: jax.Array, t: jax.Array, n: jax.Array) -> tuple[State, Metrics]:
        index_key, key = prng.split(key)
        shape = (cfg.updates, cfg.batch_size)
        index = replay.sample_index(index_key, cfg.updates * cfg.batch_size, t + 1)
        batches = replay.n_step(state.replay, index.reshape(shape), 1, cfg.gamma)
        learnt, metrics = learner.update(state.learner, batches, key, n * cfg.updates)
        return state._replace(learner=learnt), metrics

    schedule = Schedule(cfg.num_envs, cfg.warmup_steps, cfg.steps_per_update)
    return Agent(init, learner.init_memory, act, observe, update, schedule)


_SMALL = {
    "hidden": (64, 64),
    "critic_hidden": (64, 64),
    "learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "temperature_learning_rate": 1e-3,
    "buffer_size": 100_000,
    "warmup_steps": 1_000,
}
_NORMED = {**_SMALL, "tau": 0.02, "layer_norm": True}
PRESETS = {
    "Pendulum-v1": _SMALL,
    "ContinuousCartPole-v0": {
        **_NORMED,
        "learning_rate": 3e-4,
        "gamma": 0.995,
        "reward_scale": 0.1,
    },
    "MountainCarContinuous-v0": {**_NORMED, "noise_correlation": 0.99},
    "Reacher-misc": _SMALL,
    "PointRobot-misc": _SMALL,
}

AGENTS = {
    "sac": AgentDef(
        "sac", "SAC: off-policy actor-critic with maximum entropy", Config(), make, PRESETS
    )
}
