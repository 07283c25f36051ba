"""Our own runs as a worker of bench_flags.py, whose process has XLA flags of its own.

It speaks as peer_process.py tells: `load` compiles a case, `run` makes its period once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from common import compiled_period, start_jax
from peer_process import serve


def load(request: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], float]]:
    """Compiles a period of an agent with its preset, without evaluation, and runs its beginning."""
    from mbrl_jax import AGENTS, make_env
    from mbrl_jax.runtime.train import make_job

    start_jax(1)
    env, definition = make_env(request["env"]), AGENTS[request["agent"]]
    seeds, updates = request["seeds"], request["updates"]
    schedule = definition.make(definition.config_for(env.spec), env.spec).schedule
    batched = schedule.num_envs * schedule.steps_per_update * updates
    total = schedule.warmup_steps + schedule.prefill_steps + batched
    job = make_job(definition, env, total, seeds, 0, batched, 0, None, "vmap", {})
    compile_s, run = compiled_period(job)
    return {"compile_s": compile_s, "backend": jax.default_backend()}, run


if __name__ == "__main__":
    serve(load)
