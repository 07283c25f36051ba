"""Reading run folders back: `metrics.csv` as arrays over seeds and evaluations."""

from __future__ import annotations

import csv
import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np


def read_run(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The metrics of a run folder, seeds in ascending order, evaluations by environment steps.

    Args:
        path: a run folder. Its `metrics.csv` has one row per seed and evaluation, in any order;
            an empty cell is NaN.

    Returns:
        `seed` [num_seeds] int64, `env_steps` [num_points] int64 environment steps, and every
        other column under its own name as float64 [num_seeds, num_points].

    Raises:
        ValueError: there is no such file, it has no rows, a row is broken, or a seed lacks or
            repeats an evaluation.
    """
    file = Path(os.path.expanduser(path)) / "metrics.csv"
    if not file.is_file():
        raise ValueError(f"no file {file}; expected a run folder: give the --out of a training run")
    with file.open(newline="") as lines:
        header, *rows = list(csv.reader(lines)) or [[]]
    if header[:2] != ["seed", "env_steps"] or not rows:
        raise ValueError(
            f"{file} has {len(rows)} rows under the columns {header[:2]}; expected rows that begin "
            "with seed, env_steps: let the run reach its first evaluation"
        )
    table = np.array([_numbers(file, i, row, header) for i, row in enumerate(rows, start=2)])
    table = table[np.lexsort((table[:, 1], table[:, 0]))]  # by seed, then by env_steps
    seeds, steps = (np.unique(column) for column in table[:, :2].T)
    found = Counter(map(tuple, table[:, :2].tolist()))
    for seed, step in itertools.product(seeds.tolist(), steps.tolist()):
        if found[seed, step] != 1:
            raise ValueError(
                f"{file} has {found[seed, step]} rows of seed {seed:.0f} at {step:.0f} environment "
                "steps; expected one for every seed and evaluation: finish the run or drop the "
                "odd rows"
            )
    grid = table.reshape(len(seeds), len(steps), len(header))
    columns = {name: grid[..., i] for i, name in enumerate(header)}
    return columns | {"seed": seeds.astype(np.int64), "env_steps": steps.astype(np.int64)}


def _numbers(file: Path, line: int, row: list[str], header: list[str]) -> list[float]:
    try:
        numbers = [float(cell) if cell else np.nan for cell in row]
    except ValueError as error:
        raise ValueError(f"{file} line {line}: {error}; expected numbers: mend the row") from None
    if len(row) != len(header) or np.isnan(numbers[:2]).any():
        raise ValueError(
            f"{file} line {line} has {len(row)} cells, first {row[:2]}; expected {len(header)} "
            "that begin with seed and env_steps: drop the row if the run was cut off in it"
        )
    return numbers
