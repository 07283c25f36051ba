"""DreamerV3's learning rate on one environment: all rates and seeds in one compiled program.

    python experiments/dreamer_sweep.py --env Pendulum-v1 --total-steps 30000 --eval-every 1500
    python experiments/dreamer_sweep.py --env MemoryChain-bsuite --memory-length 10

Floats of a config are traced, so that seeds x rates are one batch, which a GPU takes in the time of
one run as long as kernels are small. Every evaluation of every run is in the record as soon as it
is there; --seconds stops the run at the first evaluation after so many.
"""

from __future__ import annotations

import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from learning import QUICK

import mbrl_jax
from mbrl_jax.analysis.stats import bootstrap_interval
from mbrl_jax.runtime.logs import config_fields, describe_machine, write_whole
from mbrl_jax.runtime.loop import make_program


@dataclasses.dataclass(frozen=True)
class Options:
    # environment id
    env: str
    # of MemoryChain-bsuite
    memory_length: int | None = None
    # environment steps of each run
    total_steps: int = 15_000
    # environment steps between evaluations
    eval_every: int = 750
    # episodes of an evaluation
    eval_episodes: int = 10
    # learning rates
    rates: tuple[float, ...] = (3e-4, 1e-3)
    # runs of each rate
    seeds: int = 6
    # size of the networks
    size: str = "nano"
    # records that are trained on for each record of the environment
    train_ratio: int = 128
    # windows of an update, and records of each
    batch_size: int = 16
    batch_length: int = 16
    # updates until the learning rate is whole
    warmup_updates: float = 200.0
    # no period starts after so many seconds
    seconds: float = float("inf")
    # folder of the record
    out: Path = Path("experiments/results")
    # tiny batches, to see that it runs
    quick: bool = False


def main(options: Options) -> Path:
    """Trains all runs at once; -> the record."""
    started = time.perf_counter()
    arguments = {}
    if options.memory_length is not None:
        arguments["memory_length"] = options.memory_length
    env, definition = mbrl_jax.make_env(options.env, **arguments), mbrl_jax.AGENTS["dreamer"]
    names = ("size", "train_ratio", "batch_size", "batch_length", "warmup_updates")
    fields: dict[str, Any] = {name: getattr(options, name) for name in names}
    fields |= {"num_envs": 1, "buffer_size": 100_000, "start_windows": 500, "dtype": "float32"}
    if options.quick:
        fields |= QUICK["dreamer"]
    config = definition.config_for(env.spec, **fields)
    program = make_program(
        definition, env, config, options.total_steps, options.eval_every, options.eval_episodes
    )
    count = options.seeds * len(options.rates)
    rates = jnp.repeat(jnp.asarray(options.rates, jnp.float32), options.seeds)
    configs = jax.tree.map(lambda x: jnp.full(count, x, jnp.float32), config)
    configs = dataclasses.replace(configs, learning_rate=rates)
    keys = jnp.tile(jax.random.split(jax.random.key(0), options.seeds), len(options.rates))
    init = jax.jit(jax.vmap(program.init)).lower(keys, configs)
    like = jax.eval_shape(jax.vmap(program.init), keys, configs)
    period = jax.jit(jax.vmap(program.period, (0, 0, None)), donate_argnums=0)
    with ThreadPoolExecutor(2) as pool:
        lowered = (init, period.lower(like, configs, jnp.int32(0)))
        begin, go_on = pool.map(lambda one: one.compile(), lowered)
    compile_s = time.perf_counter() - started
    run = begin(keys, configs)

    made = {**describe_machine(), "compile_seconds": round(compile_s, 1),
            "settings": {**config_fields(config), "env": options.env, **arguments,
                         "rates": list(options.rates), "seeds": options.seeds}}  # fmt: skip
    path = options.out / f"dreamer_sweep_{options.env}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index in range(program.plan.periods):
        run, metrics = go_on(run, configs, jnp.int32(index))
        returns = np.asarray(metrics["eval_return"]).reshape(len(options.rates), options.seeds)
        losses = {name: np.asarray(x).reshape(returns.shape).mean(-1) for name, x in metrics.items()
                  if name.endswith("_loss")}  # fmt: skip
        rows.append({
            "env_steps": program.plan.env_steps(index),
            "wall_seconds": round(time.perf_counter() - started, 1),
            "eval_return": [[float(f"{x:.6g}") for x in one] for one in returns],
            **{name: [float(f"{x:.4g}") for x in one] for name, one in losses.items()},
        })  # fmt: skip
        write_whole(path, json.dumps({"made": made, "rows": rows}, indent=1) + "\n")
        text = []
        for rate, one in zip(options.rates, returns, strict=True):
            point, low, high = bootstrap_interval(one)
            text.append(f"{rate:g}: {point:.3g} [{low:.3g}, {high:.3g}]")
        print(f"step {rows[-1]['env_steps']:,}, IQM of {options.seeds} seeds: {'; '.join(text)}",
              flush=True)  # fmt: skip
        if time.perf_counter() - started > options.seconds:
            break
    print(f"written: {path}")
    return path


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except mbrl_jax.InputError as error:
        raise SystemExit(f"error: {error}") from None
