"""rejax 0.1.3 as a worker of bench_model_free.py; runs in a virtual environment of its own.

It speaks as peer_process.py tells: `load` compiles a cell and counts what it does, `run` trains it
once. It imports nothing of ours.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from common import start_jax, timed
from peer_process import serve


def algorithm(cell: dict[str, Any], total_steps: int) -> Any:
    """rejax's algorithm with the settings of `cell`, without evaluation."""
    import rejax

    num_envs, net = cell["num_envs"], {"activation": cell["activation"]}
    options = {
        "env": cell["env"],
        "num_envs": num_envs,
        "learning_rate": cell["learning_rate"],
        "gamma": cell["gamma"],
        "total_timesteps": total_steps,
        "eval_freq": total_steps,
        "skip_initial_evaluation": True,
    }
    if cell["agent"] == "ppo":
        options |= {
            "agent_kwargs": {**net, "hidden_layer_sizes": cell["hidden"]},
            "num_steps": cell["num_steps"],
            "num_epochs": cell["epochs"],
            "num_minibatches": cell["minibatches"],
            "gae_lambda": cell["gae_lambda"],
            "clip_eps": cell["clip_eps"],
            "vf_coef": cell["value_coef"],
            "ent_coef": cell["entropy_coef"],
            "max_grad_norm": cell["max_grad_norm"],
        }
    else:
        options |= {
            "agent_kwargs": net,
            "buffer_size": cell["buffer_size"],
            "batch_size": cell["batch_size"],
            "num_epochs": cell["updates"],
            "polyak": 1.0 - cell["tau"],
            "target_update_freq": 1,
        }
    if cell["agent"] == "dqn":
        if list(cell["hidden"]) != [64, 64]:
            raise ValueError(f"hidden = {cell['hidden']}: rejax's DQN has 64 x 64 built in")
        # updates begin with the first iteration that starts beyond `fill_buffer`
        options |= {"fill_buffer": cell["warmup_steps"] - num_envs, "ddqn": True}
        options |= {"max_grad_norm": cell["max_grad_norm"], "exploration_fraction": 0.5}
    if cell["agent"] == "sac":
        # updates begin with the first iteration that ends beyond `fill_buffer`
        options |= {"fill_buffer": cell["warmup_steps"], "num_critics": 2}
        options |= {"hidden_layer_sizes": cell["hidden"]}
    made = rejax.get_algo(cell["agent"]).create(**options)
    return made.replace(eval_callback=lambda algo, state, key: ())


def candidates(train: Callable, seeds: int) -> dict[str, tuple[Any, jax.Array]]:
    """The ways in which its README runs seeds: name -> (jitted function, keys)."""
    keys = jax.random.split(jax.random.PRNGKey(0), seeds)
    ways = {"vmap": (jax.jit(jax.vmap(train)), keys)}
    devices = jax.device_count()
    if seeds == 1:
        ways = {"jit": (jax.jit(train), keys[0]), **ways}
    elif devices > 1 and seeds % devices == 0:
        shares = keys.reshape(devices, seeds // devices, *keys.shape[1:])
        ways["pmap"] = (jax.pmap(jax.vmap(train)), shares)
    return ways


def counts(state: Any) -> dict[str, int]:
    """Environment steps and gradient updates of each seed, from its own counters."""
    parts = ("q_ts", "actor_ts", "critic_ts", "alpha_ts")
    learners = [getattr(state, name) for name in parts if hasattr(state, name)]
    updates = {int(n) for part in learners for n in np.unique(np.asarray(part.step))}
    steps = {int(n) for n in np.unique(np.asarray(state.global_step))}
    (env_steps,), (num_updates,) = steps, updates  # all seeds and all networks alike
    return {"env_steps": env_steps, "updates": num_updates}


def uniform_replay() -> None:
    """Draws with replacement, O(batch), in place of rejax's draws without it, O(buffer)."""
    from rejax.buffers import ReplayBuffer

    def sample(self: Any, num: int, rng: jax.Array) -> Any:
        index = jax.random.randint(rng, (num,), 0, self.num_entries)
        return jax.tree.map(lambda column: column[index], self.data)

    ReplayBuffer.sample = sample


def load(request: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], float]]:
    """Compiles every candidate, keeps the one whose run is shortest, and tells what it did."""
    start_jax(request["devices"])
    if request["draw"] == "uniform":
        uniform_replay()
    algo = algorithm(request["cell"], request["total_steps"])
    found: list[tuple[float, str, float, Any, jax.Array]] = []
    done = {}
    for name, (fn, keys) in candidates(algo.train, request["seeds"]).items():
        compile_s, compiled = timed(lambda fn=fn, keys=keys: fn.lower(keys).compile())
        run_s, (state, _) = timed(compiled, keys)
        done = counts(state)
        found.append((run_s, name, compile_s, compiled, keys))
        if request["quick"]:
            break
    _, name, compile_s, compiled, keys = min(found, key=lambda entry: entry[0])
    tried = {entry[1]: entry[0] for entry in found}
    packages = ("rejax", "gymnax", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = {package: importlib.metadata.version(package) for package in packages}
    info = {"mode": name, "tried": tried, "compile_s": compile_s, **done, "versions": versions}
    info["backend"] = jax.default_backend()
    return info, lambda: timed(compiled, keys)[0]


if __name__ == "__main__":
    serve(load)
