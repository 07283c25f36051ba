"""MuZero's whole loop, its parts, and the same loop with mctx's search in the place of ours.

Both sides are the same agent, networks, replay and keys; the peer's program is traced while mctx's
policies and its transform of values stand where ours are called (`searched_by_mctx`). They run in
turn in one process; the ratio is the median of the pairs' ratios of seconds. A cell is a search, a
share of reanalysed sequences and a number of seeds, with 50 simulations and batches of 64
sequences; what else is the preset. A search is one root: acting searches each environment at each
step, reanalysis each of the states of the sequences that are made anew. Evaluation is left out.

Several seeds run one after another on each device (`map`) or in one batch (`vmap`); each side is
tried in both ways, and the faster one is taken. The parts are functions of ours alone, of one seed,
compiled and timed by themselves and multiplied by how often a round calls them; a round is the
steps between two updates, and the gradient steps after them. `rest` are the environments, the
writing of records, the targets' arithmetic, and what parts gain or lose when they are compiled
together.

    python benchmarks/bench_muzero.py
    python benchmarks/bench_muzero.py --env Breakout-MinAtar --searches gumbel --seeds 1

mctx comes with the extra `dev`, or `peers`. Writes benchmarks/results/bench_muzero.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from common import (
    Record,
    against,
    alternate,
    compiled_period,
    line,
    markdown,
    options,
    ratio_text,
    seed_modes,
    start_jax,
    timed,
)

from mbrl_jax import AGENTS, make_env
from mbrl_jax.agents import muzero, muzero_search
from mbrl_jax.agents.muzero_config import Config, num_fresh, window_length
from mbrl_jax.runtime.train import Job, make_job, traced
from mbrl_jax.types import EnvSpec, PyTree

TINY: dict[str, Any] = {
    "width": 8, "blocks": 0, "hidden": (8,), "bins": 11, "num_envs": 2, "unroll": 2, "n_step": 3,
    "updates": 1,
}  # fmt: skip
PARTS = ("search to act", "windows", "reanalysis", "later values", "learning")


class Cell(NamedTuple):
    """One row: a search, a share of reanalysed sequences, and seeds."""

    search: str
    reanalyse: float
    seeds: int


class Side(NamedTuple):
    """A compiled period of all seeds."""

    job: Job
    compile_s: float
    run: Callable[[], float]  # once more, seconds


@contextlib.contextmanager
def searched_by_mctx() -> Iterator[None]:
    """MuZero calls mctx's searches in the place of ours, in all that is traced inside."""
    import mctx

    names = (
        "gumbel_muzero_policy", "muzero_policy", "qtransform_completed_by_mix_value",
        "qtransform_by_parent_and_siblings",
    )  # fmt: skip
    theirs = {name: getattr(mctx, name) for name in names}
    with mock.patch.multiple(muzero_search.search, **theirs):
        yield


def fields_of(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the config that differ from the preset."""
    return {
        "search": cell.search, "reanalyse_policies": cell.reanalyse,
        "reanalyse_values": cell.reanalyse, "num_simulations": args.simulations,
        "batch_size": args.batch, "buffer_size": 16_384, **(TINY if args.quick else {}),
    }  # fmt: skip


def side(cell: Cell, args: argparse.Namespace, mode: str) -> Side:
    """One period of all seeds, compiled and run once."""
    env, fields = make_env(args.env), fields_of(cell, args)
    # a function of its own, or a process would take the program of another side
    definition = AGENTS["muzero"]._replace(make=lambda config, spec: muzero.make(config, spec))
    schedule = definition.make(definition.config_for(env.spec, **fields), env.spec).schedule
    steps = args.rounds * schedule.num_envs * schedule.steps_per_update
    total = schedule.warmup_steps + schedule.prefill_steps + steps
    job = make_job(definition, env, total, cell.seeds, 0, steps, 0, None, mode, fields)
    return Side(job, *compiled_period(job))


def fastest(cell: Cell, args: argparse.Namespace) -> Side:
    """The side in the mode of seeds that is faster, told from a run of each."""
    found = [side(cell, args, mode) for mode in seed_modes(cell.seeds, args.quick)]
    if len(found) == 1:
        return found[0]
    return min(found, key=lambda one: one.run())


def counts(job: Job) -> dict[str, int]:
    """Environment steps, gradient steps and searched roots of a period of one seed."""
    cfg, plan = job.config, job.program.plan
    steps, updates = plan.steps_per_period * plan.num_envs, plan.updates * cfg.updates
    searches = steps + updates * num_fresh(cfg)[0] * (cfg.unroll + 1)
    return {"env_steps": steps, "updates": updates, "searches": searches}


def row_of(cell: Cell, args: argparse.Namespace) -> tuple[dict[str, Any], Job]:
    """The rates of a cell, and mctx's beside them; and our job."""
    ours, theirs = fastest(cell, args), None
    if not args.no_peers:
        with searched_by_mctx():
            theirs = fastest(cell, args)
    numbers, cfg = counts(ours.job), ours.job.config
    row = {
        "env": args.env, **cell._asdict(), "simulations": cfg.num_simulations,
        "batch": cfg.batch_size, "num_envs": cfg.num_envs, "mode": ours.job.mode,
        "rounds": ours.job.program.plan.updates, **numbers, "compile_s": ours.compile_s,
        **against(ours.run, theirs and theirs.run, args.repeats),
    }  # fmt: skip
    row |= rates(numbers, cell.seeds, row["seconds"])
    if theirs is not None:
        row["peer"] = {
            "name": "mctx", "mode": theirs.job.mode, "compile_s": theirs.compile_s,
            **rates(counts(theirs.job), cell.seeds, row["peer_seconds"]),
        }  # fmt: skip
    return row, ours.job


def rates(numbers: dict[str, int], seeds: int, seconds: list[float]) -> dict[str, float]:
    middle = statistics.median(seconds)
    return {f"{name}_per_s": seeds * number / middle for name, number in numbers.items()}


def parts(cfg: Config, spec: EnvSpec) -> dict[str, Callable[..., PyTree]]:
    """The timed functions of (state without a replay, replay, window, made, obs, key, t)."""

    def act(state, replay, window, made, obs, key, t):
        is_first = jnp.zeros(cfg.num_envs, bool)
        memory = muzero.init_memory(spec, cfg.num_envs)
        return muzero.act(cfg, spec, state, memory, obs, is_first, key, t, "train")

    def windows(state, replay, window, made, obs, key, t):
        return window_of(cfg, spec, replay, key, t)

    def reanalysis(state, replay, window, made, obs, key, t):
        return muzero.searched(cfg, spec, state.target, window, key)

    def later_values(state, replay, window, made, obs, key, t):
        return muzero.later_values(cfg, spec, state.target, window)

    def learning(state, replay, window, made, obs, key, t):
        return muzero.learn(cfg, spec, state, window, made, 1.0, key, t)

    return dict(zip(PARTS, (act, windows, reanalysis, later_values, learning), strict=True))


def window_of(cfg: Config, spec: EnvSpec, replay: PyTree, key: jax.Array, t: jax.Array) -> PyTree:
    """A batch of windows, drawn as an update draws it without priorities."""
    buffer, length = muzero.replay(cfg, spec), window_length(cfg)
    index = buffer.ring.sample_index(key, cfg.batch_size, t, length)
    return buffer.read(replay, index, length)[0]


def parts_row(
    cell: Cell, args: argparse.Namespace, whole: dict[str, Any], job: Job
) -> dict[str, Any]:
    """Milliseconds of a round by parts, of one seed, and their shares of the whole loop's round."""
    cfg, spec, t = job.config, job.env.spec, jnp.int32(job.program.plan.start)
    run = jax.tree.map(lambda x: x[0], job.functions()[0](job.keys(), traced(cfg)))
    state, replay = run.agent._replace(replay=(), priorities=None), run.agent.replay
    keys = jax.random.split(jax.random.key(1), 3)
    window = jax.jit(lambda *x: window_of(cfg, spec, *x))(replay, keys[0], t)
    age = jnp.zeros(cfg.batch_size)
    made = jax.jit(lambda *x: muzero.make_targets(cfg, spec, *x)[0])(state, window, age, keys[1])
    given = state, replay, window, made, run.batch.obs, keys[2], t
    times = 1 if args.quick else 5
    runs: dict[str, Callable[[], float]] = {}
    for name, fn in parts(cfg, spec).items():
        ready = jax.jit(fn).lower(*given).compile()
        runs[name] = lambda ready=ready: timed(lambda: [ready(*given) for _ in range(times)])[0]
        runs[name]()
    calls = dict.fromkeys(PARTS, cfg.updates) | {PARTS[0]: cfg.steps_per_update}
    seconds = alternate(runs, args.repeats)
    ms = {name: 1e3 * calls[name] * statistics.median(seconds[name]) / times for name in PARTS}
    total = 1e3 * statistics.median(whole["seconds"]) / whole["rounds"]
    ms["rest"] = total - sum(ms.values())
    return {
        "env": args.env, **cell._asdict(), "calls": calls, "round_ms": total, "ms": ms,
        "share": {name: each / total for name, each in ms.items()},
    }  # fmt: skip


HEADER = ["search", "reanalysed", "seeds", "mode", "env steps/s", "searches/s", "updates/s",
          "mctx's time / ours", "compile s", "mctx"]  # fmt: skip
PARTS_HEADER = ["search", "reanalysed", "ms a round", *PARTS, "rest"]


def cells(row: dict[str, Any]) -> list[Any]:
    numbers = [f"{row[f'{name}_per_s']:,.0f}" for name in ("env_steps", "searches", "updates")]
    theirs = f"{row['peer']['compile_s']:.1f}" if "peer" in row else "-"
    return [row["search"], f"{row['reanalyse']:g}", row["seeds"], row["mode"], *numbers,
            ratio_text(row), f"{row['compile_s']:.1f}", theirs]  # fmt: skip


def parts_cells(row: dict[str, Any]) -> list[Any]:
    shares = [f"{row['share'][name]:.0%}" for name in (*PARTS, "rest")]
    return [row["search"], f"{row['reanalyse']:g}", f"{row['round_ms']:.1f}", *shares]


def main() -> None:
    parser = options(__doc__, "no-peers", "quick", repeats=3)
    parser.add_argument("--env", default="CartPole-v1", help="of discrete actions")
    parser.add_argument("--searches", nargs="+", default=["gumbel", "puct"],
                        choices=["gumbel", "puct"])  # fmt: skip
    parser.add_argument("--reanalyse", type=float, nargs="+", default=[1.0, 0.0],
                        help="shares of sequences that are made anew")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--simulations", type=int, default=50)
    parser.add_argument("--batch", type=int, default=64, help="sequences of a gradient step")
    parser.add_argument("--rounds", type=int, default=4, help="of a measured period")
    parser.add_argument("--devices", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    start_jax(args.devices)
    if args.quick:
        args.simulations, args.batch, args.rounds = 4, 4, 2
    record = Record(args, "bench_muzero", devices=args.devices)
    if not args.no_peers:
        record.data["made"]["versions"]["mctx"] = importlib.metadata.version("mctx")
    print(f"{args.env}, {args.simulations} simulations, {args.batch} sequences a gradient step")
    for cell in itertools.starmap(
        Cell, itertools.product(args.searches, args.reanalyse, args.seeds)
    ):
        row, job = row_of(cell, args)
        record.add(row)
        print(line(cells(row)), flush=True)
        if cell.seeds == 1:
            record.add(parts_row(cell, args, row, job), "parts")
            print(line(parts_cells(record.data["parts"][-1])), flush=True)
    print("\n" + markdown(HEADER, map(cells, record.data["rows"])))
    print("\n" + markdown(PARTS_HEADER, map(parts_cells, record.data.get("parts", []))))
    print(f"\nwritten: {record.path}")


if __name__ == "__main__":
    main()
