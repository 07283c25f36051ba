"""Long runs whose record is written as it comes, and which a time or a signal may stop.

What `mbpo_locomotion.py`, `dreamer_craftax.py`, `muzero_minatar.py` and `muzero_boards.py` share.
After every evaluation the record holds the whole curve so far, with what made it; a run that was
stopped is saved, and the same command goes on from there.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import statistics
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import mbrl_jax
from mbrl_jax.analysis.runs import read_run
from mbrl_jax.envs import Env
from mbrl_jax.runtime.logs import config_fields, describe_machine, write_whole
from mbrl_jax.runtime.loop import Evaluate
from mbrl_jax.runtime.train import Stopped


def curve(folder: Path, names: Collection[str] = ("eval_return",)) -> list[dict[str, Any]]:
    """The evaluations of a run folder so far, one row each; none before the first is whole.

    A row has the metrics `names`, a number for each seed, None for one that is not finite.
    """
    try:
        found = read_run(folder)
    except ValueError:  # no row yet, or the last one is being written
        return []
    return [
        {
            "env_steps": int(steps),
            "wall_seconds": round(float(found["wall_seconds"][0, i]), 3),
            **{name: [_number(value) for value in found[name][:, i]] for name in names},
        }
        for i, steps in enumerate(found["env_steps"])
    ]


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def pace(rows: list[dict[str, Any]]) -> float | None:
    """Median wall seconds of 1,000 steps between evaluations, the next evaluation included."""
    each = [
        1_000 * (b["wall_seconds"] - a["wall_seconds"]) / (b["env_steps"] - a["env_steps"])
        for a, b in itertools.pairwise(rows)
    ]
    return statistics.median(each) if each else None


def follow(folder: Path, save: Callable[[], None], ended: threading.Event) -> None:
    """Calls `save` whenever the run in `folder` has written an evaluation, until it has ended."""
    metrics, seen = folder / "metrics.csv", 0.0
    while not ended.wait(1.0):
        changed = metrics.stat().st_mtime if metrics.exists() else 0.0
        if changed != seen:
            save()
            seen = changed


def train_recorded(
    agent: str,
    env: str | Env,
    path: Path,
    folder: Path,
    *,
    arguments: dict[str, Any],
    overrides: dict[str, Any],
    fixed: dict[str, Any],
    seconds: float | None,
    names: Collection[str] = ("eval_return",),
    evaluate: Evaluate | None = None,
) -> int:
    """Trains, or goes on; -> 0, or 128 + the number of the signal that stopped it.

    Args:
      agent: its name.
      env: an id, or an environment.
      path: of the record, a JSON file.
      folder: of the run; one that holds a run goes on.
      arguments: of `mbrl_jax.train`, `total_steps` among them.
      overrides: fields of the agent's config.
      fixed: what else the record holds, beside the machine, settings and curve.
      seconds: the run is saved and stopped at the first evaluation after so many; None never.
      names: the metrics of the record's rows.
      evaluate: as in `mbrl_jax.train`.
    """
    env_id = env if isinstance(env, str) else env.spec.id
    config = mbrl_jax.AGENTS[agent].config_for(env_id, **overrides)
    settings = {"env": env_id, **arguments, "config": config_fields(config)}
    fixed = {"made": {**describe_machine(), "settings": settings}, **fixed}
    path.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        rows = curve(folder, names)
        if rows:
            text = {**fixed, "seconds_per_1000_steps": pace(rows), "rows": rows}
            write_whole(path, json.dumps(text, indent=1) + "\n")

    ended = threading.Event()
    writer = threading.Thread(target=follow, args=(folder, save, ended))
    writer.start()
    timer = None
    if seconds is not None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
    try:
        mbrl_jax.train(
            agent, env, out=folder, resume=(folder / "config.json").exists(), progress=True,
            # replays, and the imagined data of all seeds, make a checkpoint large
            checkpoint_every=arguments["total_steps"], evaluate=evaluate, **arguments, **overrides,
        )  # fmt: skip
    except Stopped as stopped:
        print(stopped)
        return 128 + stopped.signum
    finally:
        if timer is not None:
            timer.cancel()
            timer.join()
        ended.set()
        writer.join()
        save()
    print(f"written: {path}")
    return 0
