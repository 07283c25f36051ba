"""What the experiments share: training many seeds at once, their episodes, tables and files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from mbrl_jax.agents import AGENTS
from mbrl_jax.analysis.stats import Interval, bootstrap_interval, mean
from mbrl_jax.envs import Env, Tabular, value_iteration
from mbrl_jax.runtime.logs import describe_machine
from mbrl_jax.runtime.loop import make_train

Tables = dict[str, dict[str, dict[str, Any]]]  # title -> agent -> measure -> number or Interval

mean_interval = partial(bootstrap_interval, statistic=mean)


def histories(
    agent: str,
    env: Env,
    total_steps: int,
    seeds: int,
    fields: Mapping[str, Any],
    names: Collection[str],
    seed: int = 0,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Trains `seeds` seeds in one compiled call; -> the metrics `names`, each [seeds, periods].

    `fields` differ from the agent's defaults, `options` are those of `make_train`; `seed` sets
    all keys, so that two agents with different ones are independent.
    """
    config = AGENTS[agent].config_for(env.spec.id, **fields)
    train = make_train(agent, env, total_steps, **options)

    @jax.jit
    @jax.vmap
    def run(key: jax.Array) -> dict[str, jax.Array]:
        history = train(key, config)[1]
        return {name: history[name] for name in names}  # the others are never stored

    keys = jax.random.split(jax.random.key(seed), seeds)
    return {name: np.asarray(values) for name, values in run(keys).items()}


def per_episode(history: Mapping[str, np.ndarray], name: str, count: int) -> np.ndarray:
    """The metric `name` of each seed's first `count` episodes, [seeds, count].

    `history` has one entry per environment step (`eval_every=1`), so each holds the end of one
    episode or none. NaN stands for an episode that had not ended when the run did.
    """
    ended = history["train_episodes"] > 0
    number = np.cumsum(ended, axis=1) - 1
    seeds, steps = np.nonzero(ended & (number < count))
    values = np.full((len(ended), count), np.nan)
    values[seeds, number[seeds, steps]] = history[name][seeds, steps]
    return values


def exploring_optimum(model: Tabular, gamma: float, epsilon: float) -> np.ndarray:
    """The policy [S, A] that is optimal but for a uniform action now and then; ties are shared."""
    values, action_values = value_iteration(model, gamma)
    best = np.isclose(action_values, values[:, None], rtol=0, atol=1e-10)
    greedy = best / best.sum(axis=1, keepdims=True)
    return (1 - epsilon) * greedy + epsilon / greedy.shape[1]


def report(out: Path, name: str, tables: Tables, started: float, **settings: Any) -> Tables:
    """Prints the tables and writes them to `name`.json with how they were made; -> the tables."""
    wall = round(time.perf_counter() - started, 1)
    console = Console()
    for title, rows in tables.items():
        # turned round, since there are more measures than agents
        table = Table("", *rows, title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for measure in dict.fromkeys(name for row in rows.values() for name in row):
            table.add_row(measure, *(_text(row.get(measure, "")) for row in rows.values()))
        console.print(table)
    console.print(f"{name}: {wall} s, files in {out}", highlight=False)
    made = {**describe_machine(), "wall_seconds": wall, "settings": settings}
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"made": made, "tables": _plain(tables)}, indent=1)
    (out / f"{name}.json").write_text(text + "\n")
    return tables


def _text(cell: Any) -> str:
    if isinstance(cell, Interval):
        return f"{_text(cell.point)} [{_text(cell.low)}, {_text(cell.high)}]"
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
    return str(cell)


def _plain(value: Any) -> Any:
    """`value` as JSON has it, where nothing is infinite."""
    if isinstance(value, Interval):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
