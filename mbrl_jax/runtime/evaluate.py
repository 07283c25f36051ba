"""Greedy evaluation of a finished or running run, from its newest checkpoint."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax.runtime import devices, logs, matches
from mbrl_jax.runtime.checkpoint import Checkpoints
from mbrl_jax.runtime.loop import RunState, play_episodes
from mbrl_jax.runtime.train import load_job
from mbrl_jax.types import InputError

# above every number of a run, so that `fold_in` gives no key that `split` gives to training
_STREAM = 0x6576616C


class Evaluation(NamedTuple):
    """Episodes of every seed of a run."""

    run: dict[str, Any]  # the `run` part of config.json
    env_steps: int  # of training behind the checkpoint
    returns: np.ndarray  # [seeds, episodes] float32, with two players results against uniform
    lengths: np.ndarray  # [seeds, episodes] int32


def evaluation_keys(seed: int, seeds: int) -> jax.Array:
    """[seeds] keys of a stream of their own: no seed repeats a key of any training run."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), _STREAM), seeds)


def evaluate_run(out: str | os.PathLike[str], episodes: int = 100, seed: int = 0) -> Evaluation:
    """Evaluates each seed of a run over greedy episodes, from its newest checkpoint.

    Args:
      out: the run folder; it is only read, so the run may be training.
      episodes: how many for each seed, 1 or more.
      seed: of the evaluation's keys, which differ from training's for every seed.

    Raises:
      InputError: a folder without a run or without a whole checkpoint; no episodes.
    """
    out = logs.user_path(out)
    if isinstance(episodes, bool) or not isinstance(episodes, int) or episodes < 1:
        raise InputError(f"episodes = {episodes!r}: expected a whole number, 1 or more")
    devices.check_seed(seed)
    job = load_job(out)
    checkpoints = Checkpoints(out / "checkpoints", job.run, write=False)
    newest = checkpoints.newest()
    if newest is None:
        raise InputError(f"{out} holds no checkpoint yet; let the run reach its first one")
    state = checkpoints.restore(newest, job.like())
    checkpoints.close()

    def one(run: RunState, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        origin = jax.tree.map(lambda x: x[0], run.batch.env)
        limit = job.run["eval_max_steps"]
        return play(job.agent, job.env, run.agent, key, t, episodes, limit, origin)

    play = matches.play_uniform if job.env.spec.num_players > 1 else play_episodes
    plan = job.program.plan
    t = jnp.int32(plan.start + newest * plan.steps_per_period)
    keys = evaluation_keys(seed, job.run["seeds"])
    run = devices.over_seeds(one, job.mesh, job.mode, shared=0)
    returns, lengths = jax.jit(run)(state, devices.put_seeds(keys, job.mesh))
    steps = plan.env_steps(newest - 1)
    return Evaluation(job.run, steps, devices.to_host(returns), devices.to_host(lengths))
