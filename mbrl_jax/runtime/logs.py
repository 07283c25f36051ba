"""What a run writes and shows: config.json, metrics.csv, progress, and the curve at its end."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mbrl_jax.runtime.console import Output
from mbrl_jax.types import InputError

_FIRST = ("seed", "env_steps", "wall_seconds", "eval_return", "train_return")
_PACKAGES = ("mbrl-jax", "jax", "jaxlib", "flax", "optax", "gymnax", "numpy", "orbax-checkpoint")


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path that a user gave, `~` and `~name` at its start replaced by the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: no such home folder is known; give the whole path") from error


def describe_machine() -> dict[str, Any]:
    """Versions, device and command: what made a result, for the record."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": sys.version.split()[0],
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpus": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join([_program(), *sys.argv[1:]]),
    }


def _program() -> str:
    """How this process was called, as it would be from the same folder elsewhere."""
    path = Path(sys.argv[0])
    if path.name == "__main__.py":
        return "python -m mbrl_jax"
    if path.suffix != ".py":
        return path.name
    here = Path.cwd()
    path = path.resolve()
    return f"python {path.relative_to(here) if path.is_relative_to(here) else path.name}"


def config_fields(config: Any) -> dict[str, Any]:
    """A config, and those within it, as plain JSON values."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return config_fields(value)
        return value.tolist() if hasattr(value, "tolist") else value

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def write_config(out: Path, run: dict[str, Any]) -> None:
    """Writes `config.json`, whole or not at all."""
    write_whole(out / "config.json", json.dumps({"run": run, "made": describe_machine()}, indent=2))


def write_total(out: Path, total_steps: int) -> None:
    """Sets the `total_steps` of a run in `config.json`, whole or not at all.

    The rest stays, `made` too: it tells how the run began.
    """
    config = json.loads((out / "config.json").read_text())
    if config["run"]["total_steps"] != total_steps:
        config["run"]["total_steps"] = total_steps
        write_whole(out / "config.json", json.dumps(config, indent=2))


def read_config(out: Path) -> dict[str, Any]:
    """The `run` part of `config.json`; InputError where there is none or it is not ours."""
    path = out / "config.json"
    try:
        run = json.loads(path.read_text())["run"]
        return {**run, "config": dict(run["config"])}
    except OSError as error:
        raise InputError(f"{out} is no run folder: {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); start a new --out") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file under another name, then renames it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


class MetricsFile:
    """`metrics.csv`: one row for each seed and evaluation, appended and flushed."""

    def __init__(self, out: Path):
        self.path = out / "metrics.csv"
        self._columns: list[str] | None = None

    def cut(self, env_steps: int) -> float:
        """Drops rows past `env_steps`, which the checkpoint does not hold; -> wall seconds so far.

        What a kill has cut short goes too: the last row, or the header where no row is kept.
        """
        if not self.path.exists():
            return 0.0
        try:
            header, *rows = list(csv.reader(self.path.read_text().splitlines())) or [[]]
            kept = [row for row in rows if len(row) == len(header) and int(row[1]) <= env_steps]
            wall_seconds = max((float(row[2]) for row in kept), default=0.0)
        except (ValueError, IndexError) as error:
            raise InputError(f"{self.path} is damaged ({error}); mend or remove it") from error
        if not kept:
            self.path.unlink()
            return 0.0
        write_whole(self.path, "".join(",".join(row) + "\n" for row in [header, *kept]))
        self._columns = header
        return wall_seconds

    def append(self, env_steps: int, wall_seconds: float, metrics: dict[str, np.ndarray]) -> None:
        """Adds the row of every seed; `metrics` maps names to arrays [num_seeds]."""
        lines = []
        if self._columns is None:
            rest = [name for name in metrics if name not in _FIRST]
            self._columns = [*_FIRST, *rest]
            lines.append(",".join(self._columns))
        for seed in range(len(next(iter(metrics.values())))):
            values = {name: float(column[seed]) for name, column in metrics.items()}
            cells = [str(seed), str(env_steps), f"{wall_seconds:.3f}"]
            for name in self._columns[3:]:
                value = values.get(name, float("nan"))
                cells.append("" if np.isnan(value) else repr(value))
            lines.append(",".join(cells))
        with self.path.open("a") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Display:
    """A progress bar on a terminal, a line now and then elsewhere.

    Where it can no longer be shown (a closed pipe, a full disk) the run goes on without it.
    """

    def __init__(self, total: int, done: int, shown: bool):
        self._console = Output(stderr=True)
        self._total, self._done, self._shown = total, done, shown
        self._start, self._first, self._last_line = time.perf_counter(), done, -np.inf
        self._bar: Progress | None = None
        if shown and self._console.is_terminal:
            columns = (
                TextColumn("{task.percentage:3.0f}%"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("compiling", total=total, completed=done)
            self._bar.start()

    def update(self, env_steps: int, num_seeds: int, metrics: dict[str, np.ndarray]) -> None:
        """Shows environment steps of one seed, steps/s of all, and the newest return."""
        if not self._shown:
            return
        rate = (env_steps - self._first) * num_seeds / (time.perf_counter() - self._start)
        column = metrics.get("eval_return", metrics["train_return"])
        newest = np.mean(column[~np.isnan(column)]) if not np.all(np.isnan(column)) else np.nan
        text = f"step {env_steps:,} of {self._total:,} | {rate:,.0f} steps/s | return {newest:.3f}"
        try:
            if self._bar is not None:
                self._bar.update(self._task, completed=env_steps, description=text)
            elif time.perf_counter() - self._last_line > 2.0 or env_steps >= self._total:
                self._last_line = time.perf_counter()
                self._console.print(text, highlight=False)
        except OSError:
            self._shown = False

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()


def draw_curve(out: Path, label: str) -> None:
    """`curve.png` and `curve.svg`: IQM of the returns over seeds with its interval."""
    from mbrl_jax.analysis import plots, runs

    run = runs.read_run(out)
    name = "eval_return" if not np.all(np.isnan(run["eval_return"])) else "train_return"
    if np.all(np.isnan(run[name])):
        return  # no episode has ended yet
    curves = {label: (run["env_steps"], run[name])}
    plots.learning_curves(curves, out / "curve.png", ylabel=name.replace("_", " "))
