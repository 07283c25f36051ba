"""PETS planning of rl-blox as a worker of bench_models.py. It speaks as peer_process.py tells."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from peer_process import serve
from rl_blox.algorithm import pets


def load(request: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], float]]:
    """What `train_pets` builds before its first step, with a reward of the state acted on."""
    sizes, cem = request["sizes"], request["cem"]
    action_space = gym.spaces.Box(-1.0, 1.0, (sizes["act"],), np.float32)
    env = SimpleNamespace(
        observation_space=gym.spaces.Box(-10.0, 10.0, (sizes["obs"],), np.float32),
        action_space=action_space,
    )
    model = pets.create_pets_state(
        env, 0, n_ensemble=request["members"], hidden_nodes=sizes["hidden"], activation="swish"
    ).model
    sample, refit = pets._init_mpc_optimizer_cem(
        action_space, cem["horizon"], cem["samples"], cem["elites"]
    )

    def reward(act: jax.Array, obs: jax.Array) -> jax.Array:
        return -jnp.square(obs).sum(-1) - 0.1 * jnp.square(act).sum(-1)

    bounds = (action_space.low, action_space.high)
    config = pets.PETSMPCConfig(
        plan_horizon=cem["horizon"], n_particles=cem["particles"], n_samples=cem["samples"],
        n_opt_iter=cem["iterations"], init_with_previous_plan=True, reward_model=reward,
        action_space_shape=action_space.shape, avg_act=jnp.asarray(0.5 * (bounds[0] + bounds[1])),
        init_var=jnp.stack([(bounds[1] - bounds[0]) ** 2 / 16.0] * cem["horizon"]),
        sample_fn=sample, update_fn=refit,
    )  # fmt: skip
    plan = pets.PETSMPCState.initial_plan(config)
    state = pets.PETSMPCState(dynamics_model=model, prev_plan=plan, key=jax.random.key(0))
    optimise = nnx.jit(partial(pets._pets_optimize, config))
    obs = np.zeros(sizes["obs"], np.float32)

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(pets.mpc_action(config, state, optimise, obs))
        return time.perf_counter() - start

    compile_s = run()
    return {"compile_s": compile_s, "versions": {"jax": jax.__version__}}, run


if __name__ == "__main__":
    serve(load)
