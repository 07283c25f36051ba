"""MBPO on MuJoCo's robots with the paper's settings, its returns written as they come.

    python experiments/mbpo_locomotion.py --env HalfCheetah-v5 --total-steps 100000
    python experiments/mbpo_locomotion.py --env Hopper-v5 --seeds 3 --length 20 --total-steps 50000

The presets (`mbrl_jax.agents.mbpo_presets`) are the paper's settings; --length fixes the rollout
length, as the paper's ablation does. The robots need the extra `envs`, and these sizes an
accelerator, which takes all seeds in one batch. After every evaluation the record holds the whole
curve so far: greedy returns of all seeds, and wall seconds, with compilation and evaluations. A run
is saved when it ends, and when --seconds or a signal stops it; the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import statistics
import threading
from pathlib import Path
from typing import Any

import tyro
from learning import QUICK

import mbrl_jax
from mbrl_jax.analysis.runs import read_run
from mbrl_jax.runtime.logs import config_fields, describe_machine, write_whole
from mbrl_jax.runtime.train import Stopped

# Janner et al. (2019), on the HalfCheetah of their Gym: greedy returns after so many steps
PUBLISHED = {"HalfCheetah-v5": {"50000": 7_900, "100000": 9_500}}


@dataclasses.dataclass(frozen=True)
class Options:
    # environment id
    env: str
    # environment steps of each seed, the warm-up's among them
    total_steps: int = 100_000
    # independent runs
    seeds: int = 5
    # environment steps between evaluations
    eval_every: int = 2_500
    # greedy episodes of an evaluation
    eval_episodes: int = 5
    # steps of every rollout, from first to last; by default the preset's schedule
    length: int | None = None
    # the run is saved and stopped at the first evaluation after so many seconds
    seconds: float | None = None
    # folder of the record
    out: Path = Path("experiments/results")
    # the run folder; by default one for each environment and length
    run: Path | None = None
    # tiny networks and few rollouts, to see that it runs
    quick: bool = False


def curve(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run folder so far, one row each; none before the first is whole."""
    try:
        found = read_run(folder)
    except ValueError:  # no row yet, or the last one is being written
        return []
    returns, wall = found["eval_return"], found["wall_seconds"]
    return [
        {
            "env_steps": int(steps),
            "wall_seconds": round(float(wall[0, i]), 3),
            "eval_return": [float(f"{value:.6g}") for value in returns[:, i]],
        }
        for i, steps in enumerate(found["env_steps"])
    ]


def pace(rows: list[dict[str, Any]]) -> float | None:
    """Median wall seconds of 1,000 steps between evaluations, the next evaluation included."""
    each = [
        1_000 * (b["wall_seconds"] - a["wall_seconds"]) / (b["env_steps"] - a["env_steps"])
        for a, b in itertools.pairwise(rows)
    ]
    return statistics.median(each) if each else None


def save(path: Path, folder: Path, fixed: dict[str, Any]) -> None:
    """Writes the record, whole, with the curve that the run folder holds."""
    rows = curve(folder)
    if rows:
        text = {**fixed, "seconds_per_1000_steps": pace(rows), "rows": rows}
        write_whole(path, json.dumps(text, indent=1) + "\n")


def follow(path: Path, folder: Path, fixed: dict[str, Any], ended: threading.Event) -> None:
    """Saves the record again whenever the run has written an evaluation."""
    metrics, seen = folder / "metrics.csv", 0.0
    while not ended.wait(1.0):
        changed = metrics.stat().st_mtime if metrics.exists() else 0.0
        if changed != seen:
            save(path, folder, fixed)
            seen = changed


def main(options: Options) -> int:
    """Trains, or goes on; -> 0, or 128 + the number of the signal that stopped it."""
    length = options.length
    label = "preset" if length is None else f"length_{length}"
    folder = options.run or Path("runs", "mbpo_locomotion", f"{options.env}_{label}")
    overrides = dict(QUICK["mbpo"]) if options.quick else {}
    if options.quick:  # a number for each layer would not fit the tiny network
        overrides["model"] = {**overrides["model"], "weight_decay": (1e-5,)}
    if length is not None:
        overrides["rollout_length"] = (length, length)
    config = mbrl_jax.AGENTS["mbpo"].config_for(options.env, **overrides)
    names = ("total_steps", "seeds", "eval_every", "eval_episodes")
    arguments = {name: getattr(options, name) for name in names}
    settings = {"env": options.env, **arguments, "config": config_fields(config)}
    fixed: dict[str, Any] = {"made": {**describe_machine(), "settings": settings}}
    if options.env in PUBLISHED:
        fixed["published"] = PUBLISHED[options.env]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"mbpo_{options.env}_{label}.json"
    ended = threading.Event()
    writer = threading.Thread(target=follow, args=(path, folder, fixed, ended))
    writer.start()
    timer = None
    if options.seconds is not None:
        timer = threading.Timer(options.seconds, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
    try:
        mbrl_jax.train(
            "mbpo", options.env, out=folder, resume=(folder / "config.json").exists(),
            progress=True,
            # the imagined data of all seeds make a checkpoint large
            checkpoint_every=options.total_steps, **arguments, **overrides,
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
        save(path, folder, fixed)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(tyro.cli(Options, description=__doc__)))
    except mbrl_jax.InputError as error:
        raise SystemExit(f"error: {error}") from None
