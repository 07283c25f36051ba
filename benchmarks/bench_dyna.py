"""Dyna-Q: loops in Python and for numba against the compiled loop, all in turn in one run.

All learn deterministic FrozenLake 4x4 with alpha 0.1, gamma 0.99, epsilon 0.1 and random ties.
The peers (peer_dyna.py) are the textbook's loop on numpy rows, on Python lists, and for numba
(extra `peers`), on one core and on as many threads as ours has devices. Ours is the whole compiled
training run, environment and episode counts included, evaluation left out of all. Planning updates
are sequential in all. One seed of ours runs on one core; many are shared out among the devices, one
after another in each or vmapped, whichever a first run finds faster. XLA compiles whole loops as
kernels (`runtime.devices.loops_as_kernels`), as the command line asks it to for these agents.

    python benchmarks/bench_dyna.py

Writes benchmarks/results/bench_dyna.json and prints the table. A ratio is ours to the peer's
environment steps per second; the last column tells which goal is met: one seed 2 times the Python
lists, 256 seeds as fast as numba on as many cores at n = 50, and half as fast at n = 0 and 5.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import peer_dyna
from common import (
    Record,
    alternate,
    line,
    markdown,
    options,
    ratio_text,
    ratios,
    seed_modes,
    start_jax,
)
from peer_dyna import ALPHA, EPSILON, GAMMA

# environment steps of numpy rows, of Python lists, and of each seed of ours and of numba
SIZES = {0: (40_000, 150_000, 20_000), 5: (10_000, 40_000, 10_000), 50: (1_500, 6_000, 2_000)}
MANY = 256  # seeds of numba, and of ours against it
LISTS, NUMBA = "Python lists", "numba, all cores"
GOALS = {0: 0.5, 5: 0.5, 50: 1.0}  # of 256 seeds, against numba on as many cores


def compiled(env: Any, n: int, seeds: int, steps: int, mode: str) -> Callable[[], None]:
    """Our run of `seeds` seeds, compiled and warmed up."""
    from mbrl_jax import AGENTS
    from mbrl_jax.runtime.train import make_job, traced

    fields = {"step_size": ALPHA, "gamma": GAMMA, "epsilon": EPSILON, "planning_steps": n}
    job = make_job(AGENTS["dyna_q"], env, steps, seeds, 0, steps, 0, None, mode, fields)
    init, chunk = job.functions()
    config = traced(job.config)

    def run() -> None:
        jax.block_until_ready(chunk(state(), config, np.int32(0)))

    def state() -> Any:
        return jax.block_until_ready(init(job.keys(), config))

    run()
    return run


def fastest(env: Any, n: int, seeds: int, steps: int) -> tuple[str, Callable[[], None]]:
    """Our faster way to run so many seeds, and its name."""
    ways = {mode: compiled(env, n, seeds, steps, mode) for mode in seed_modes(seeds)}
    if len(ways) == 1:
        return next(iter(ways.items()))
    mode = min(ways, key=lambda mode: min(seconds(ways[mode]) for _ in range(2)))
    return mode, ways[mode]


def seconds(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def rows_of(env: Any, n: int, seeds: list[int], devices: int, args: Any) -> list[dict[str, Any]]:
    """The rows of one number of planning steps: the peers', then ours, with ratios to the peers."""
    world, sizes = peer_dyna.tabulate(env), (100, 100, 50) if args.quick else SIZES[n]
    each = sizes[2]
    many = 4 if args.quick else MANY
    # name -> (seeds, cores, environment steps of each seed, a run)
    sides: dict[str, tuple[int, int, int, Callable[[], object]]] = {
        "numpy rows": (1, 1, sizes[0], partial(peer_dyna.numpy_rows, world, n, sizes[0], 0)),
        LISTS: (1, 1, sizes[1], partial(peer_dyna.python_lists, world, n, sizes[1], 0)),
    }
    if importlib.util.find_spec("numba"):
        peer_dyna.numba_loop(world, n, 1, 0)
        for name, cores in (("numba, one core", 1), (NUMBA, devices)):
            run = partial(peer_dyna.numba_threads, world, n, each, many, cores)
            sides[name] = (many, cores, each, run)
    peers = list(sides)
    for count in seeds:
        # an accelerator's kernels are started by one core
        cores = jax.device_count() if count % jax.device_count() == 0 else 1
        mode, run = fastest(env, n, count, each)
        sides[f"mbrl_jax, {mode}, {count}"] = (count, cores, each, run)
    times = alternate({name: partial(seconds, side[3]) for name, side in sides.items()},
                      args.repeats)  # fmt: skip
    per_step = {
        name: [took / (count * steps) for took in times[name]]
        for name, (count, _, steps, _) in sides.items()
    }
    rows = []
    for name, (count, cores, _, _) in sides.items():
        row: dict[str, Any] = {
            "n": n, "loop": name.removesuffix(f", {count}"), "seeds": count, "cores": cores,
            "env_steps_per_s": 1 / statistics.median(per_step[name]),
        }  # fmt: skip
        if name not in peers:
            row["against"] = {peer: ratios(per_step[name], per_step[peer]) for peer in peers}
        rows.append(row)
    return rows


def goal(row: dict[str, Any]) -> str:
    """Whether the goal of a row is met, and an empty text where it has none."""
    peer, least = (LISTS, 2.0) if row["seeds"] == 1 else (NUMBA, GOALS[row["n"]])
    if row["seeds"] not in (1, MANY) or peer not in row.get("against", {}):
        return ""
    met = row["against"][peer]["ratio"] >= least
    return f"{least:g} times {peer}: {'met' if met else 'missed'}"


HEADER = ["n", "loop", "seeds", "cores", "environment steps/s", "planning updates/s",
          "to numpy rows", "to Python lists", "to numba, one core", "to numba, all cores",
          "goal"]  # fmt: skip


def cells(row: dict[str, Any]) -> list[Any]:
    rate, found = row["env_steps_per_s"], row.get("against", {})
    planning = f"{rate * row['n']:,.0f}" if row["n"] else "-"
    return [
        row["n"], row["loop"], row["seeds"], row["cores"], f"{rate:,.0f}", planning,
        *(ratio_text(found.get(name.removeprefix("to "), {})) for name in HEADER[6:10]), goal(row),
    ]  # fmt: skip


def main() -> None:
    parser = options(__doc__, "quick")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, MANY, 1024])
    parser.add_argument("--planning", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--devices", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    start_jax(args.devices)

    from mbrl_jax import make_env
    from mbrl_jax.runtime.devices import loops_as_kernels

    loops_as_kernels()

    env = make_env("FrozenLake-misc", is_slippery=False)
    record = Record(args, "bench_dyna", devices=args.devices)
    if importlib.util.find_spec("numba"):
        record.data["made"]["versions"]["numba"] = importlib.metadata.version("numba")
    else:
        print("numba is left out: not installed; pip install 'mbrl-jax[peers]'")
    for n in args.planning:
        for row in rows_of(env, n, args.seeds, args.devices, args):
            record.add(row)
            print(line(cells(row)), flush=True)
    print(f"\n{markdown(HEADER, map(cells, record.data['rows']))}\n\nwritten: {record.path}")


if __name__ == "__main__":
    main()
