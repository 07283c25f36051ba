"""Gumbel MuZero's and MuZero's searches against mctx, in one process.

Every cell is a policy, a recurrent function, a batch of roots, a number of simulations and of
actions; both sides give the actions, the action weights and the visits of the roots. They run in
turn; the ratio is the median of the pairs' ratios of seconds. Recurrent functions: `trivial` (a
dozen operations), `mlp` (two layers of 64) and `residual` (four residual blocks of 128). Beside the
time: of both sides the seconds of tracing and compilation and the temporary memory of the program,
and whether the visits at all roots agree.

Two more tables. `levels`: what runs one after another in a search on an accelerator, calls of the
network and levels that walks of the trees take, both told from the depths of the nodes, for `mlp`
and 32 roots (a CPU takes narrower batches, see `schedule.CPU`); and, where there is an accelerator,
the kernels that a profile of one search counts, copies among them, and how often the host waits for
a number. `seeds`: a search under vmap, of 8 seeds with parameters of their own, against one search
of as many roots with one seed's, and the same for as many calls of the network alone.

The floor of a search is its network: simulations * batch calls of the recurrent function.

    python benchmarks/bench_search.py
    python benchmarks/bench_search.py --batches 1 32 --simulations 16 50

Most of the time is compilation. With `--processes` programs are compiled side by side, while
measurements still take turns; on an accelerator tuning then has to be off, since it measures too:

    XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS=--xla_gpu_autotune_level=0 \
        python benchmarks/bench_search.py --processes 14 --name bench_search_h100

mctx comes with the extra `dev`, or `peers`. Writes benchmarks/results/bench_search.json.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import mctx
import numpy as np
from common import (
    ALONE,
    Record,
    alone,
    alternate,
    launched,
    line,
    markdown,
    options,
    ratio_text,
    ratios,
    start_jax,
    timed,
)
from search_models import FUNCTIONS, STATE, weights

from mbrl_jax import search
from mbrl_jax.search import schedule
from mbrl_jax.search.tree import node_depths

POLICIES = ("gumbel_muzero_policy", "muzero_policy")
LEAST_SECONDS = 0.05
MANY, MOST_EDGES = 800, 5_000
"""Simulations that an accelerator is asked for too, with `trivial` and so many edges of roots at
most, beyond which a search of mctx takes minutes."""
TABLES = ("seeds", "levels", "rows", "many")
"""What can be measured; `many` are the rows of MANY simulations."""


def searched(library: ModuleType, policy: str, function: str, num_simulations: int) -> Callable:
    """(params, key, state [B, STATE]) -> PolicyOutput."""

    def run(params: Any, key: jax.Array, state: jax.Array) -> Any:
        root = library.RootFnOutput(
            prior_logits=state @ params["policy"], value=state @ params["value"], embedding=state
        )
        return getattr(library, policy)(params, key, root, FUNCTIONS[function], num_simulations)

    return run


def advice(output: Any) -> tuple[jax.Array, ...]:
    """What the timed programs give."""
    return output.action, output.action_weights, output.search_tree.summary().visit_counts


def arguments(num_actions: int, batch: int) -> tuple[Any, ...]:
    state = jnp.float32(np.random.default_rng(1).standard_normal((batch, STATE)))
    return weights(num_actions), jax.random.key(2), state


def compiled(run: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    start = time.perf_counter()
    ready = jax.jit(run).lower(*args).compile()
    seconds = time.perf_counter() - start
    return {
        "run": ready, "compile_s": seconds,
        "temp_mb": ready.memory_analysis().temp_size_in_bytes / 1e6,
    }  # fmt: skip


def in_turn(pair: list[Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Milliseconds of both, in turn, and how much longer the second takes."""
    first = timed(pair[1])[0]
    # short calls are repeated within one measurement, long ones measured less often
    times = max(1, math.ceil(LEAST_SECONDS / first))
    repeats = min(repeats, 2 if first > 10 else 3) if first > 1 else repeats

    def seconds(run: Callable[[], Any]) -> float:
        return timed(lambda: [run() for _ in range(times)])[0] / times

    sides = dict(zip("ab", (lambda run=run: seconds(run) for run in pair), strict=True))
    own, other = alternate(sides, repeats).values()
    return {
        "ms": 1e3 * statistics.median(own), "other_ms": 1e3 * statistics.median(other),
        **ratios(own, other),
    }  # fmt: skip


def cell(
    policy: str, function: str, batch: int, num_simulations: int, num_actions: int, repeats: int
) -> dict[str, Any]:
    args = arguments(num_actions, batch)
    runs = [searched(library, policy, function, num_simulations) for library in (search, mctx)]
    sides = [compiled(lambda *x, run=run: advice(run(*x)), args) for run in runs]
    with alone():
        visits = [np.asarray(one["run"](*args)[2]) for one in sides]
        times = in_turn([lambda one=one: one["run"](*args) for one in sides], repeats)
    row = {
        "policy": policy, "function": function, "batch": batch, "simulations": num_simulations,
        "actions": num_actions, **times,
        "same_visits": float((visits[0] == visits[1]).all(axis=-1).mean()),
        **{name: sides[0][name] for name in ("compile_s", "temp_mb")},
        **{f"mctx_{name}": sides[1][name] for name in ("compile_s", "temp_mb")},
    }  # fmt: skip
    row["mctx_ms"] = row.pop("other_ms")
    return row


def levels(policy: str, batch: int, num_simulations: int, num_actions: int) -> dict[str, Any]:
    """Calls of the network, levels and kernels, one after another, of both libraries."""
    args = arguments(num_actions, batch)
    depth, counted = [], {}
    for name, library in (("", search), ("mctx_", mctx)):
        run = searched(library, policy, "mlp", num_simulations)
        tree = compiled(lambda *x, run=run: run(*x).search_tree, args)["run"]
        with alone():
            depth.append(np.asarray(node_depths(tree(*args)))[:, 1:].max(axis=0))
        if jax.default_backend() != "cpu":
            ready = compiled(lambda *x, run=run: advice(run(*x)), args)["run"]
            with alone():
                jax.block_until_ready(ready(*args))
                found = launched(lambda ready=ready: ready(*args))
            counted |= {f"{name}kernels": found[0], f"{name}host_reads": found[1]}
    # down to the leaf and up again, for the deepest of the roots
    theirs = int(2 * depth[1].sum())
    calls, own = num_simulations, int(depth[0].sum())
    if policy == "gumbel_muzero_policy":
        most = min(16, num_actions)
        rounds = schedule.rounds_of(most, num_simulations)
        calls = own = first = 0
        for group in schedule.plan(rounds, range(most, most + 1), batch, schedule.ACCELERATOR):
            for i in range(group.first, group.end):
                among, commit = (int(x[most, i]) for x in (rounds.candidates, rounds.visits))
                deep = depth[0][first : first + commit]
                calls += -(-among // group.width)
                own += sum(int(deep[n : n + group.width].max())
                           for n in range(0, commit, group.width))  # fmt: skip
                if i and commit < among:
                    # the walk that tells the values, and the replay
                    own += int(deep.max()) - 1 + commit
                first += commit
    return {
        "policy": policy, "batch": batch, "simulations": num_simulations, "actions": num_actions,
        "calls": calls, "mctx_calls": num_simulations, "levels": own, "mctx_levels": theirs,
        **counted,
    }  # fmt: skip


def network(function: str, num_calls: int) -> Callable:
    """(params, key, state [B, STATE]) -> state, as many calls of the recurrent function later."""

    def run(params: Any, key: jax.Array, state: jax.Array) -> jax.Array:
        action = jnp.zeros(state.shape[0], jnp.int32)
        return jax.lax.fori_loop(
            0, num_calls, lambda _, s: FUNCTIONS[function](params, key, action, s)[1], state
        )

    return run


def seeds(policy: str, function: str, batch: int, num_simulations: int, repeats: int) -> Any:
    """8 seeds of `batch` roots under vmap against 8 times as many roots."""
    number, num_actions = 8, 18
    params, key, state = whole = arguments(num_actions, number * batch)
    own = jax.tree.map(lambda x: jnp.stack([x] * number), params)
    apart = own, jax.random.split(key, number), state.reshape(number, batch, STATE)

    def ratio(run: Callable) -> dict[str, Any]:
        single, mapped = compiled(run, whole)["run"], compiled(jax.vmap(run), apart)["run"]
        with alone():
            return in_turn([lambda: single(*whole), lambda: mapped(*apart)], repeats)

    run = searched(search, policy, function, num_simulations)
    return {
        "policy": policy, "function": function, "seeds": number, "batch": batch,
        "simulations": num_simulations, "actions": num_actions,
        **ratio(lambda *x: advice(run(*x))),
        "network_ratio": ratio(network(function, num_simulations))["ratio"],
    }  # fmt: skip


HEADER = [
    "policy", "function", "batch", "simulations", "actions", "ms", "mctx", "ratio",
    "visits agree", "compile s", "mctx", "temp MB", "mctx",
]  # fmt: skip
LEVELS = [
    "policy", "simulations", "actions", "calls", "mctx", "levels", "mctx", "kernels", "mctx",
    "host reads", "mctx",
]  # fmt: skip
SEEDS = ["policy", "function", "one search ms", "8 seeds ms", "seeds / one", "of the network alone"]


def cell_cells(row: dict[str, Any]) -> list[Any]:
    cells = [row["policy"].removesuffix("_policy"), row["function"], row["batch"],
             row["simulations"], row["actions"], f"{row['ms']:.3g}", f"{row['mctx_ms']:.3g}",
             ratio_text(row), f"{row['same_visits']:.0%}"]  # fmt: skip
    return cells + [f"{row[name]:.3g}" for name in
                    ("compile_s", "mctx_compile_s", "temp_mb", "mctx_temp_mb")]  # fmt: skip


def level_cells(row: dict[str, Any]) -> list[Any]:
    own = "calls", "levels", "kernels", "host_reads"
    names = ["simulations", "actions", *(x for name in own for x in (name, f"mctx_{name}"))]
    return [row["policy"].removesuffix("_policy"), *(row.get(name, "") for name in names)]


def seeds_cells(row: dict[str, Any]) -> list[Any]:
    return [row["policy"].removesuffix("_policy"), row["function"], f"{row['ms']:.3g}",
            f"{row['other_ms']:.3g}", ratio_text(row), f"{row['network_ratio']:.2f}"]  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """What the targets speak of."""
    found = []
    for policy in POLICIES:
        own = [row for row in rows if row["policy"] == policy]
        ratios = [row["ratio"] for row in own if row["batch"] >= 32]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            found.append(f"{policy}, batch 32 and more: {mean:.2f} times as fast")
        if own:
            worst = {name: max(row[name] / row[f"mctx_{name}"] for row in own)
                     for name in ("ms", "compile_s", "temp_mb")}  # fmt: skip
            parts = ", ".join(f"{name} {value:.2f}" for name, value in worst.items())
            found.append(f"{policy}, worst cell against mctx: {parts}")
        many = [row for row in own if row["batch"] == 256]
        times = {(row["function"], row["actions"], row["simulations"]): row["ms"] for row in many}
        longer = [(ms, times.get((f, a, 50))) for (f, a, n), ms in times.items() if n == 128]
        growth = [math.log(ms / before) / math.log(128 / 50) for ms, before in longer if before]
        if growth:
            powers = ", ".join(f"{x:.2f}" for x in growth)
            found.append(f"{policy}, batch 256, power of growth from 50 to 128: {powers}")
    return found


def measured(task: tuple[Any, ...]) -> dict[str, Any]:
    function, *sizes = task
    row = function(*sizes)
    jax.clear_caches()
    return row


def rows(tasks: list[tuple[Any, ...]], processes: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbers of tasks (function, *its arguments) and what they give, as it comes."""
    if processes == 1:
        start_jax()
        yield from ((i, measured(task)) for i, task in enumerate(tasks))
        return
    # started anew, since a fork of a process that has started XLA may hang
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault(ALONE, os.path.join(folder, "lock"))
        with ProcessPoolExecutor(processes, spawn, start_jax) as pool:
            waiting = {pool.submit(measured, task): i for i, task in enumerate(tasks)}
            for done in as_completed(waiting):
                yield waiting[done], done.result()


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--policies", nargs="+", default=POLICIES, choices=POLICIES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256, 1024])
    parser.add_argument("--simulations", type=int, nargs="+", default=[16, 50, 128])
    parser.add_argument("--actions", type=int, nargs="+", default=[4, 18, 82])
    parser.add_argument("--functions", nargs="+", default=list(FUNCTIONS), choices=list(FUNCTIONS))
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--name", default="bench_search")
    args = parser.parse_args()
    record, found = Record(args, args.name), {}
    made = record.data["made"]
    made["versions"]["mctx"] = importlib.metadata.version("mctx")
    made["xla_flags"] = os.environ.get("XLA_FLAGS", "")

    tables = {
        seeds: ("seeds", SEEDS, seeds_cells),
        levels: ("levels", LEVELS, level_cells),
        cell: ("rows", HEADER, cell_cells),
    }
    most = args.simulations[-1]
    grid: dict[str, list[tuple[Any, ...]]] = {
        "seeds": [(seeds, *names, 32, most, args.repeats)
                  for names in itertools.product(args.policies, args.functions)],
        "levels": [(levels, policy, 32, *sizes) for policy, *sizes in itertools.product(
                       args.policies, args.simulations, args.actions)],
        "rows": [(cell, *sizes, args.repeats) for sizes in itertools.product(
                     args.policies, args.functions, args.batches, args.simulations, args.actions)],
        "many": [(cell, policy, "trivial", batch, MANY, num_actions, args.repeats)
                 for policy, batch, num_actions in itertools.product(
                     args.policies, args.batches, args.actions)
                 if batch * num_actions <= MOST_EDGES],
    }  # fmt: skip
    if jax.default_backend() == "cpu" or "trivial" not in args.functions:
        del grid["many"]
    tasks = [task for name in grid if name in args.tables for task in grid[name]]
    for i, row in rows(tasks, args.processes):
        found[i] = row
        record.data |= {"rows": [], "levels": [], "seeds": []}
        for n in sorted(found):
            record.data[tables[tasks[n][0]][0]].append(found[n])
        record.write()
        print(line(tables[tasks[i][0]][2](row)), flush=True)
    for name, header, form in tables.values():
        print(f"\n{markdown(header, map(form, record.data.get(name, [])))}")
    print("\n".join(["", *summary(record.data["rows"]), f"\nwritten: {record.path}"]))


if __name__ == "__main__":
    main()
