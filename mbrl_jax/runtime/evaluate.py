"""Greedy evaluation of a finished or running run, from its newest checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax.runtime import devices
from mbrl_jax.runtime.checkpoint import Checkpoints
from mbrl_jax.runtime.loop import RunState, play_episodes
from mbrl_jax.runtime.train import load_job
from mbrl_jax.types import InputError


class Evaluation(NamedTuple):
    """Episodes of every seed of a run."""

    run: dict[str, Any]  # the `run` part of config.json
    env_steps: int  # of training behind the checkpoint
    returns: np.ndarray  # [seeds, episodes] float32
    lengths: np.ndarray  # [seeds, episodes] int32


def evaluate_run(out: Path, episodes: int = 100, seed: int = 0) -> Evaluation:
    """Evaluates each seed of the run in `out` over `episodes` greedy episodes.

    Raises InputError for a folder without a run or without a whole checkpoint.
    """
    if episodes < 1:
        raise InputError(f"episodes = {episodes}: expected 1 or more")
    devices.check_seed(seed)
    job = load_job(out)
    checkpoints = Checkpoints(out / "checkpoints", job.run, write=False)
    newest = checkpoints.newest()
    if newest is None:
        raise InputError(f"{out} holds no checkpoint yet; let the run reach its first evaluation")
    state = checkpoints.restore(newest, job.like())
    checkpoints.close()

    def one(run: RunState, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        origin = jax.tree.map(lambda x: x[0], run.batch.env)
        limit = job.run["eval_max_steps"]
        return play_episodes(job.agent, job.env, run.agent, key, t, episodes, limit, origin)

    plan = job.program.plan
    t = jnp.int32(plan.start + newest * plan.steps_per_period)
    keys = jax.random.split(jax.random.key(seed), job.run["seeds"])
    run = devices.over_seeds(one, job.mesh, job.mode, shared=0)
    returns, lengths = jax.jit(run)(state, devices.put_seeds(keys, job.mesh))
    steps = job.program.plan.env_steps(newest - 1)
    return Evaluation(job.run, steps, devices.to_host(returns), devices.to_host(lengths))
