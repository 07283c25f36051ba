"""DreamerV3's floats on one environment: all their values and seeds in one compiled program.

    python experiments/dreamer_sweep.py --env Pendulum-v1 --grid learning_rate=3e-4,1e-3
    python experiments/dreamer_sweep.py --env MemoryChain-bsuite --memory-length 10

Floats of a config are traced, so that seeds x points of the grid are one batch, which a GPU takes
in the time of one run as long as kernels are small. A point is one combination of values; what the
grid does not name is that of `learning.SMALL_DREAMER`. Every evaluation of every run is in the
record as soon as it is there; --seconds stops the run at the first evaluation after so many.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from learning import QUICK, SMALL_DREAMER

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
    # floats of the config and their values, each as name=value,value
    grid: tuple[str, ...] = ()
    # runs of each point of the grid
    seeds: int = 6
    # size of the networks, and what their hidden layers compute in
    size: Literal["nano", "1m", "12m"] = SMALL_DREAMER["size"]
    dtype: Literal["float32", "bfloat16"] = "float32"
    # environments side by side, records trained on for each of theirs, and records of a window
    num_envs: int = SMALL_DREAMER["num_envs"]
    train_ratio: int = SMALL_DREAMER["train_ratio"]
    batch_length: int = SMALL_DREAMER["batch_length"]
    # records that the replay holds
    buffer_size: int = SMALL_DREAMER["buffer_size"]
    # no period starts after so many seconds
    seconds: float | None = None
    # name of the record, dreamer_sweep_ENV otherwise
    name: str | None = None
    # folder of the record
    out: Path = Path("experiments/results")
    # tiny batches, to see that it runs
    quick: bool = False


def points(grid: tuple[str, ...], names: tuple[str, ...]) -> list[dict[str, float]]:
    """The combinations of the values of "name=value,value", the last name varying fastest.

    Raises:
      InputError: a text of another form, or a name that is not among `names`.
    """
    values: dict[str, list[float]] = {}
    for text in grid:
        name, _, listed = text.partition("=")
        if name in values:
            raise mbrl_jax.InputError(f"--grid {text}: {name} is there twice; name it once")
        try:
            values[name] = [float(x) for x in listed.split(",")]
        except ValueError:
            raise mbrl_jax.InputError(
                f"--grid {text}: expected name=value,value with numbers, such as "
                "learning_rate=3e-4,1e-3"
            ) from None
        if name not in names:
            raise mbrl_jax.InputError(
                f"--grid {text}: expected a float of Dreamer's config: {', '.join(names)}"
            )
    return [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())]


def main(options: Options) -> Path:
    """Trains all runs at once; -> the record."""
    started = time.perf_counter()
    arguments = {}
    if options.memory_length is not None:
        arguments["memory_length"] = options.memory_length
    env, definition = mbrl_jax.make_env(options.env, **arguments), mbrl_jax.AGENTS["dreamer"]
    names = ("size", "dtype", "num_envs", "train_ratio", "batch_length", "buffer_size")
    fields = SMALL_DREAMER | {name: getattr(options, name) for name in names}
    if options.quick:
        fields |= QUICK["dreamer"]
    config = definition.config_for(env.spec, **fields)
    program = make_program(
        definition, env, config, options.total_steps, options.eval_every, options.eval_episodes
    )
    floats = tuple(
        field.name for field in dataclasses.fields(config)
        if isinstance(getattr(config, field.name), float)
    )  # fmt: skip
    grid = points(options.grid, floats)
    count = options.seeds * len(grid)
    configs = jax.tree.map(lambda x: jnp.full(count, x, jnp.float32), config)
    varied = {
        name: jnp.repeat(jnp.asarray([point[name] for point in grid], jnp.float32), options.seeds)
        for name in grid[0]
    }
    configs = dataclasses.replace(configs, **varied)
    keys = jnp.tile(jax.random.split(jax.random.key(0), options.seeds), len(grid))
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
                         "points": grid, "seeds": options.seeds}}  # fmt: skip
    path = options.out / f"{options.name or f'dreamer_sweep_{options.env}'}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index in range(program.plan.periods):
        run, metrics = go_on(run, configs, jnp.int32(index))
        returns = np.asarray(metrics["eval_return"]).reshape(len(grid), options.seeds)
        means = {name: np.asarray(x).reshape(returns.shape).mean(-1) for name, x in metrics.items()
                 if name.endswith("_loss") or name == "entropy"}  # fmt: skip
        rows.append({
            "env_steps": program.plan.env_steps(index),
            "wall_seconds": round(time.perf_counter() - started, 1),
            "eval_return": [[float(f"{x:.6g}") for x in one] for one in returns],
            **{name: [float(f"{x:.4g}") for x in one] for name, one in means.items()},
        })  # fmt: skip
        write_whole(path, json.dumps({"made": made, "rows": rows}, indent=1) + "\n")
        text = []
        for point, one in zip(grid, returns, strict=True):
            middle, low, high = bootstrap_interval(one)
            name = " ".join(f"{name} {value:g}" for name, value in point.items())
            text.append(f"{name + ': ' if name else ''}{middle:.3g} [{low:.3g}, {high:.3g}]")
        print(f"step {rows[-1]['env_steps']:,}, IQM of {options.seeds} seeds: {'; '.join(text)}",
              flush=True)  # fmt: skip
        if options.seconds is not None and time.perf_counter() - started > options.seconds:
            break
    print(f"written: {path}")
    return path


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except mbrl_jax.InputError as error:
        raise SystemExit(f"error: {error}") from None
