"""Learning runs of agents on environments: trained, stored, and drawn with their targets.

What `model_free.py` and `model_based.py` share. Each row is stored as soon as it has run, with the
machine, date, settings and whole config that made it, and takes the place of an earlier result of
the same row. Figure and table are drawn from all stored rows, so long ones can be made one by one.

A target counts as met only if the statistic over seeds is there at the last evaluation within the
budget; the best evaluation and the step from which on the target holds are reported beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

import mbrl_jax
from mbrl_jax.analysis.plots import PALETTE
from mbrl_jax.analysis.stats import Interval, bootstrap_curve, iqm, mean

# `common` loads gymnax, which starts the backend, so it waits until `main` has set the devices

STATISTICS = {"IQM": iqm, "mean": mean}


class Run(NamedTuple):
    """One agent on one environment."""

    agent: str
    env: str
    total_steps: int  # the budget; no evaluation after it counts
    target: float | None  # at the last evaluation; None where there is nothing to reach
    eval_every: int  # environment steps, or somewhat less; see `fitted`
    eval_episodes: int = 20
    statistic: Literal["IQM", "mean"] = "IQM"  # over seeds
    overrides: Mapping[str, Any] = {}  # beyond the preset
    long: bool = False  # only with --long
    env_args: Mapping[str, Any] = {}  # of `make_env`
    title: str = ""  # in place of the overrides

    @property
    def name(self) -> str:
        if self.title:
            return self.title
        return " ".join([self.agent, *(f"{k}={v}" for k, v in self.overrides.items())])

    @property
    def label(self) -> str:
        """Unique among the runs of an environment."""
        return f"{self.name}, {EngFormatter(sep='')(self.total_steps)} steps"

    @property
    def key(self) -> str:
        """Under which a result is stored, and what --only is compared with."""
        rest = f" {self.title}" if self.title else self.name.removeprefix(self.agent)
        world = "".join(f" {k}={v}" for k, v in self.env_args.items())
        return f"{self.agent} {self.env} {self.total_steps}{world}{rest}"


STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "font.size": 9,
    "grid.color": "#E6E6E6",
    "legend.fontsize": 7.5,
}


SMALL_DREAMER: dict[str, Any] = {
    "size": "nano",
    "num_envs": 1,
    "train_ratio": 128,
    "batch_length": 16,
    "start_windows": 500,
    "buffer_size": 100_000,
    "learning_rate": 5e-4,
    "warmup_updates": 200.0,
    "entropy_scale": 1e-2,
}
"""One Dreamer for every small world, that a CPU trains in minutes."""

QUICK: dict[str, dict[str, Any]] = {  # of a run that only shows that everything works
    "dqn": {"num_envs": 1, "warmup_steps": 64, "hidden": (16,)},
    "ppo": {"num_envs": 4, "num_steps": 32, "minibatches": 2, "hidden": (16,)},
    "sac": {"num_envs": 1, "warmup_steps": 64, "hidden": (16,), "critic_hidden": (16,)},
    "pets": {
        "model": {"hidden": (16,)},
        "training": {"max_epochs": 2},
        "warmup_steps": 64,
        "horizon": 3,
        "num_samples": 8,
        "num_elites": 2,
        "particles": 5,
        "iterations": 1,
    },
    "mbpo": {
        "model": {"hidden": (16,)},
        "training": {"max_epochs": 2},
        "sac": {"hidden": (16,), "critic_hidden": (16,)},
        "warmup_steps": 64,
        "rollouts_per_step": 4,
        "batch_size": 16,
        "updates": 1,
    },
    "dreamer": {
        "size": "nano",
        "train_ratio": 2,
        "num_envs": 1,
        "batch_size": 2,
        "batch_length": 8,
        "horizon": 3,
        "start_windows": 4,
        "buffer_size": 1_000,
    },
    "muzero": {
        "width": 8,
        "blocks": 0,
        "hidden": (8,),
        "bins": 11,
        "num_simulations": 2,
        "num_candidates": 4,
        "wide_candidates": 2,
        "num_envs": 2,
        "warmup_steps": 64,
        "buffer_size": 1_000,
        "updates": 1,
        "batch_size": 4,
        "unroll": 2,
        "n_step": 3,
    },
}


# MBPO on HalfCheetah as two cores carry it: smaller networks, a tenth of the rollouts, and the
# paper's 40 updates a step cut to mbrl-lib's 10
CHEETAH: dict[str, Any] = {
    "model": {"hidden": (128, 128), "weight_decay": (1e-5,)},
    "training": {"max_epochs": 20},
    "sac": {
        "hidden": (128, 128),
        "critic_hidden": (128, 128),
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "temperature_learning_rate": 1e-3,
        "target_entropy": -0.5,
        "layer_norm": True,
    },
    "num_members": 5,
    "num_elites": 3,
    "rollouts_per_step": 40,
    "retained": 2,
    "real_ratio": 0.1,
    "batch_size": 128,
    "updates": 10,
    "buffer_size": 20_000,
    "warmup_steps": 1_000,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Of every script here, on its command line."""

    # runs of each row
    seeds: int = 6
    # folder of the figures and of the table
    out: Path = Path("experiments/results")
    # a regular expression; rows match as "agent env steps", then their title or overrides
    only: str = ""
    # the rows marked as long, too
    long: bool = False
    # 2 seeds and a few hundred steps, into files of their own, to see that it runs
    quick: bool = False
    # train nothing, only draw anew what is stored
    redraw: bool = False
    # CPU devices to spread the seeds over; by default as many as there are cores, or the next
    # smaller number that divides the seeds
    cpu_devices: int | None = None


def main(name: str, rows: Sequence[Run], options: Options) -> Path:
    """Trains the chosen rows one by one and draws what is stored; -> the table's file."""
    only, long, quick, cpu_devices = options.only, options.long, options.quick, options.cpu_devices
    started = time.perf_counter()
    seeds = 2 if quick else options.seeds
    if quick:
        rows = tuple(r._replace(total_steps=512, eval_every=192, eval_episodes=2) for r in rows)
    chosen = [r for r in rows if re.search(only, r.key) and (long or not r.long)]
    if not chosen:
        names = "\n".join(f"  {r.key}{' (--long)' if r.long else ''}" for r in rows)
        raise SystemExit(f"--only {only!r} matches no row; there are\n{names}")
    if seeds < 1 or (cpu_devices is not None and cpu_devices < 1):
        raise SystemExit(f"--seeds {seeds} --cpu-devices {cpu_devices}: expected 1 or more")
    if cpu_devices is None:
        cpu_devices = max(n for n in range(1, (os.cpu_count() or 1) + 1) if seeds % n == 0)
    with contextlib.suppress(RuntimeError):  # a program that calls main may have started it
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    path = options.out / f"{name}{'_quick' if quick else ''}.json"
    if options.redraw:
        save(path, rows, {}, seeds, started)
        return path
    # all of them before the first trains, so that a bad row is not found hours later
    trained = [fitted(row, QUICK[row.agent] if quick else {}) for row in chosen]
    for row, exact in zip(chosen, trained, strict=True):
        print(f"{row.key}, {seeds} seeds", flush=True)
        save(path, rows, {row.key: train(exact, seeds)}, seeds, started)
    return path


def fitted(run: Run, fields: Mapping[str, Any]) -> Run:
    """The run with an evaluation at the end of its budget, or as few updates before as can be.

    The loop rounds up to whole periods, which would go beyond the budget; at most half as many
    evaluations again are made to come close to it. `fields` of the config yield to the overrides.
    """
    from mbrl_jax.runtime.loop import make_program

    overrides = {**fields, **run.overrides}
    definition = mbrl_jax.AGENTS[run.agent]
    env = mbrl_jax.make_env(run.env, **run.env_args)
    try:
        config = definition.config_for(run.env, **overrides)
        plan = make_program(definition, env, config, run.total_steps, run.eval_every).plan
    except mbrl_jax.InputError as error:
        raise SystemExit(f"{run.key}: {error}") from None
    start, unit = plan.num_envs * plan.start, plan.num_envs * plan.steps_per_update
    updates = (run.total_steps - start) // unit
    if updates < 1:
        raise SystemExit(f"{run.key}: the first update is at step {start + unit}, past the budget")
    least = min(updates, max(1, updates * unit // run.eval_every))
    count = max(range(least, least * 3 // 2 + 1), key=lambda n: updates // n * n)
    every = updates // count * unit
    return run._replace(total_steps=start + count * every, eval_every=every, overrides=overrides)


def train(run: Run, seeds: int) -> dict[str, Any]:
    """Trains all seeds; -> what is stored of them, as JSON has it."""
    from mbrl_jax.runtime.logs import config_fields, describe_machine

    started = time.perf_counter()
    options = {name: getattr(run, name) for name in ("total_steps", "eval_every", "eval_episodes")}
    options["seeds"] = seeds
    env = mbrl_jax.make_env(run.env, **run.env_args)
    result = mbrl_jax.train(run.agent, env, progress=True, **options, **run.overrides)
    returns = result.history["eval_return"]
    finite = np.isfinite(returns)
    # a run that failed scores as the worst one, see `analysis.stats`
    scores = np.where(finite, returns, returns.min(where=finite, initial=np.inf))
    config = mbrl_jax.AGENTS[run.agent].config_for(run.env, **run.overrides)
    settings = {**options, "config": config_fields(config)}
    wall = round(time.perf_counter() - started, 1)  # compilation and evaluations included
    return {
        "made": {**describe_machine(), "wall_seconds": wall, "settings": settings},
        "failed_seeds": int((~finite).any(axis=1).sum()),
        "env_steps": result.history["env_steps"].tolist(),
        "eval_return": [[float(f"{score:.6g}") for score in seed] for seed in scores],
    }


def save(
    path: Path, rows: Sequence[Run], new: Mapping[str, Any], seeds: int, started: float
) -> None:
    """Adds the results `new` to those stored in `path`; draws its figure and table from all."""
    from common import report

    from mbrl_jax.runtime.logs import write_whole

    # read only now: meanwhile another process may have stored another row
    stored = json.loads(path.read_text())["runs"] if path.exists() else {}
    stored = {**stored, **new}
    done = [row for row in rows if row.key in stored]  # in their order; those not listed go
    if not done:
        raise SystemExit(f"{path} holds no row to draw; train one first")
    tables: Any = {}
    for row in done:
        record = stored[row.key]
        band = bootstrap_curve(record["eval_return"], STATISTICS[row.statistic])
        curve = {name: np.round(values, 6).tolist() for name, values in band._asdict().items()}
        record |= {"statistic": row.statistic, "curve": curve}
        tables.setdefault(row.env, {})[row.label] = summary(row, record)
    runs = {row.key: stored[row.key] for row in done}
    report(path.parent, path.stem, tables, started, seeds=seeds)
    whole = json.dumps({**json.loads(path.read_text()), "runs": runs}, indent=1)
    # lists of numbers on one line each
    whole = re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match[0].split()), whole)
    write_whole(path, whole + "\n")
    draw(done, runs, path.with_suffix(".png"))


def summary(run: Run, record: Mapping[str, Any]) -> dict[str, Any]:
    """One column of the table."""
    steps, curve = np.array(record["env_steps"]), Interval(*map(np.array, record["curve"].values()))
    best = int(curve.point.argmax())
    column = {
        f"{run.statistic} at the end": Interval(*(float(values[-1]) for values in curve)),
        "the end: environment steps": int(steps[-1]),
        f"best {run.statistic}": float(curve.point[best]),
        "best: environment steps": int(steps[best]),
    }
    if run.target is not None:
        column["target"] = float(run.target)
        column["target met at the end"] = bool(curve.point[-1] >= run.target)
        column["target held from step"] = held_from(steps, curve.point, run.target)
    column["seeds"] = len(record["eval_return"])
    if record["failed_seeds"]:
        column["seeds with returns that are not finite"] = record["failed_seeds"]
    column["wall seconds"] = record["made"]["wall_seconds"]
    return column


def held_from(steps: np.ndarray, points: np.ndarray, target: float) -> float:
    """The first step from which on no evaluation is below the target; infinity if there is none."""
    below = np.flatnonzero(~(points >= target))
    first = below[-1] + 1 if below.size else 0
    return float(steps[first]) if first < len(steps) else math.inf


def draw(rows: Sequence[Run], runs: Mapping[str, Any], path: Path) -> None:
    """A panel for each environment: curves with bands; dashed, the targets up to the budget."""
    panels: dict[str, list[Run]] = {}
    for row in rows:
        panels.setdefault(row.env, []).append(row)
    names = list(dict.fromkeys(row.name for row in rows))  # one colour each in all panels
    columns, lines = min(3, len(panels)), -(-len(panels) // 3)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(max(6.0, 3.9 * columns), 0.6 + 2.9 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, (env, group) in zip(grid, panels.items(), strict=False):
            for row in group:
                record, color = runs[row.key], PALETTE[names.index(row.name) % len(PALETTE)]
                steps, curve = record["env_steps"], record["curve"]
                label = row.label if row.target is None else f"{row.label}, target {row.target:g}"
                axes.fill_between(steps, curve["low"], curve["high"], color=color, alpha=0.18, lw=0)
                axes.plot(steps, curve["point"], "o-", color=color, label=label, ms=2, lw=1.5)
                if row.target is not None:
                    axes.hlines(row.target, steps[0], row.total_steps, color, "--", lw=1)
            budgets = [row.total_steps for row in group]
            if max(budgets) >= 10 * min(budgets):
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter(NullFormatter())
            else:
                axes.set_xlim(left=0)
                axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.set_title(env)
            axes.legend()
        for axes in grid[len(panels) :]:
            axes.remove()
        seeds = " or ".join(sorted({str(len(runs[row.key]["eval_return"])) for row in rows}))
        names = " or ".join(sorted({row.statistic for row in rows}))
        note = f"{names} and 95 % bootstrap interval over {seeds} seeds; dashed: targets"
        figure.supxlabel(f"environment steps\n{note}", fontsize=9)
        figure.supylabel("greedy return", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        # without the version, so that it changes only with its data
        figure.savefig(path, dpi=110, metadata={"Software": None})
