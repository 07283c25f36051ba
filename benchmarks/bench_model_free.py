"""DQN, PPO and SAC as whole compiled runs against rejax 0.1.3, and SAC's updates against PyTorch.

Each cell trains the same algorithm with the same network, activation, batch, environments, replay
size, steps without updates and number of updates on both sides, from the first reset to the last
update, evaluation left out of both. The counters in both final states are compared with the
numbers that the rates are computed from. The sides alternate; the ratio is the median of the
pairs' ratios of seconds, with the least and the greatest. Compilation is timed apart.

Ours runs with a device for each core, as the command line does. rejax 0.1.3 needs gymnax below
1.0, so it lives in benchmarks/.venv-rejax, made at the first run with our versions of jax and
jaxlib, and is timed there by peer_rejax.py. Each side runs several seeds in all its ways (ours:
`seed_mode` map and vmap; rejax: `vmap` and `pmap`, as in its README), and what was fastest in a
run of each is taken.

What still differs, in the time of a run unless said otherwise:

- rejax draws its batches without replacement with `jax.random.choice`, which looks at the whole
  replay for every update; ours draws with replacement and looks at the batch alone. The replays
  are those of rejax's own configs, 10,000 and 50,000, not its default of 131,072: larger ones slow
  rejax further. A second row of every cell with a replay, "uniform draw", gives rejax our way of
  drawing, to see the rest alone: its `sample` is replaced in its process (peer_rejax.py).
- rejax stores the observation after a reset as the successor of an episode's last step, and a time
  limit as an end; ours keeps the true successor and tells the two apart.
- rejax's `max_grad_norm` clips each element; ours scales by the global norm (SAC: neither clips).
- PPO: rejax takes a gradient of the actor's loss and one of the critic's, ours one of their sum.
  rejax evaluates the critic at each step of the rollout, ours for the whole rollout afterwards
  (all observations and all successors). rejax draws a permutation for each epoch, ours sorts
  random words for all of them at once.
- SAC: before the first update rejax acts by its policy, ours at random. rejax updates the actor
  first, ours the critics.
- Environments: gymnax 0.0.9 there, 1.0.1 and its truncation here. Ours counts returns and lengths
  of episodes and averages losses into metrics; rejax does neither.
- rejax's DQN has 64 x 64 built in; its duelling network has other heads than ours, so neither side
  has duelling heads. Observations are normalised on neither side.

The PyTorch SAC (peer_torch.py, extra `peers`) draws and updates eagerly from a full replay with one
thread or all, whichever is faster; ours scans `agent.update` over a full replay, one seed. No
environment runs in either.

    python benchmarks/bench_model_free.py

Writes benchmarks/results/bench_model_free.json and prints the tables. The floor is in the column
GFLOP/s: the dense layers' multiply-adds of all updates, over the time of the whole run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import peer_process
from common import (
    HERE,
    Record,
    against,
    alternate,
    line,
    markdown,
    options,
    ratio_text,
    ratios,
    seed_modes,
    start_jax,
    timed,
)
from peer_cells import CELLS, Cell

REJAX = "0.1.3"
DRAWS = ("own", "uniform")
"""How rejax draws its batches; see above."""


class Ours(NamedTuple):
    run: Callable[[], float]  # trains once, seconds
    info: dict[str, Any]


def adam_steps(state: Any) -> set[int]:
    """Distinct step counts of all Adam states in `state`."""
    import optax

    kind = optax.ScaleByAdamState
    found = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    counts = [node.count for node in found if isinstance(node, kind)]
    return {int(n) for count in counts for n in np.unique(np.asarray(count))}


def ours(cell: Cell, seeds: int, total_steps: int, mode: str) -> Ours:
    """Our run, compiled, run once, and its counters checked."""
    from mbrl_jax import AGENTS, make_env
    from mbrl_jax.runtime.train import make_job, traced

    env = make_env(cell.env)
    definition = AGENTS[cell.agent]._replace(presets={})
    fields = cell.fields(total_steps)
    job = make_job(definition, env, total_steps, seeds, 0, total_steps, 0, None, mode, fields)
    init, chunk = job.functions()
    keys, config, index = job.keys(), traced(job.config), np.int32(0)

    def compile_both() -> tuple[Any, Any]:
        first = init.lower(keys, config).compile()
        return first, chunk.lower(job.like(), config, index).compile()

    compile_s, (first, rest) = timed(compile_both)

    def train() -> Any:
        return rest(first(keys, config), config, index)

    plan, expected = job.program.plan, cell.num_updates(total_steps)
    done = (plan.env_steps(plan.periods - 1), adam_steps(timed(train)[1][0].agent))
    check(cell, "mbrl_jax", done, (total_steps, {expected}))
    info = {"mode": job.mode, "devices": job.mesh.size, "compile_s": compile_s}
    gflop = cell.flops(env.spec) * expected * seeds / 1e9
    return Ours(lambda: timed(train)[0], {**info, "updates": expected, "gflop": gflop})


def check(cell: Cell, side: str, done: Any, wanted: Any) -> None:
    if done != wanted:
        raise SystemExit(f"{cell.name}: {side} made {done} steps and updates, not {wanted}")


def whole_run(cell: Cell, seeds: int, args: argparse.Namespace, python: Path | None) -> list[dict]:
    """The rows of a cell with so many seeds: one for each of rejax's ways to draw."""
    steps = cell.total_steps(seeds, args.quick)
    modes = seed_modes(seeds, args.quick)
    ways = [ours(cell, seeds, steps, mode) for mode in modes]
    tried = [way.run() for way in ways]
    mine = ways[tried.index(min(tried))]
    row = {**cell._asdict(), "seeds": seeds, "total_steps": steps, **mine.info}
    row["tried"] = dict(zip(modes, tried, strict=True))
    del row["steps"]
    peers: dict[str, peer_process.Peer] = {}
    for draw in (DRAWS if cell.agent != "ppo" else DRAWS[:1]) if python else ():
        peers[draw] = peer_process.Peer(
            python, HERE / "peer_rejax.py", cell=cell._asdict(), seeds=seeds, total_steps=steps,
            devices=args.devices, draw=draw, quick=args.quick,
        )  # fmt: skip
        done = peers[draw].info
        check(cell, "rejax", (done["env_steps"], done["updates"]), (steps, row["updates"]))
        check(cell, "rejax", done["backend"], jax.default_backend())
    theirs = {draw: peer.seconds for draw, peer in peers.items()}
    times = alternate({"ours": mine.run, **theirs}, args.repeats)
    row |= {"seconds": times["ours"], **rates(row, times["ours"])}
    if not peers:
        return [row]
    rows = []
    for draw, peer in peers.items():
        peer.close()
        info = {**peer.info, **rates(row, times[draw])}
        compared = {"peer_seconds": times[draw], **ratios(times["ours"], times[draw])}
        rows.append({**row, "draw": draw, **compared, "peer": info})
    return rows


def rates(row: dict[str, Any], seconds: list[float]) -> dict[str, float]:
    per_second = row["seeds"] / statistics.median(seconds)
    return {
        "env_steps_per_s": row["total_steps"] * per_second,
        "updates_per_s": row["updates"] * per_second,
        "gflop_per_s": row["gflop"] * per_second / row["seeds"],
    }


def updates_alone(cell: Cell, args: argparse.Namespace) -> dict:
    """SAC's draws and updates on a full replay, against PyTorch."""
    from mbrl_jax import AGENTS, make_env
    from mbrl_jax.runtime.train import make_job, traced

    env, count = make_env(cell.env), 5 if args.quick else 1_000
    full = cell.buffer_size
    fields = cell.fields(full + 1) | {"warmup_steps": full}
    definition = AGENTS["sac"]._replace(presets={})
    job = make_job(definition, env, full + 1, 1, 0, 1, 0, None, "vmap", fields)
    config = traced(job.config)
    learner = job.functions()[0](job.keys(), config).agent
    learner = jax.tree.map(lambda x: x[0], learner)
    before = adam_steps(learner)

    def many(learner: Any, config: Any, key: jax.Array) -> Any:
        agent = definition.make(config, env.spec)

        def one(learner: Any, i: jax.Array) -> tuple[Any, Any]:
            return agent.update(learner, jax.random.fold_in(key, i), full + i, i)

        return jax.lax.scan(one, learner, np.arange(count, dtype=np.int32))

    key = jax.random.key(1)
    lowered = jax.jit(many, donate_argnums=0).lower(learner, config, key)
    compile_s, update = timed(lowered.compile)
    holder = [update(learner, config, key)[0]]  # the learner, which every call gives away
    check(cell, "mbrl_jax", adam_steps(holder[0]), {n + count for n in before})

    def run() -> float:
        took, (holder[0], _) = timed(update, holder[0], config, key)
        return took

    sizes = {"obs_size": env.spec.obs_shape[0], "action_size": env.spec.action_shape[0]}
    peer = peer_process.Peer(
        sys.executable, HERE / "peer_torch.py", cell=cell._asdict(), updates=count, **sizes
    )
    row = {"name": f"{cell.name}, updates alone", "seeds": 1, "total_steps": 0, "updates": count}
    row |= {"compile_s": compile_s, "gflop": cell.flops(env.spec) * count / 1e9, "peer": peer.info}
    row |= against(run, peer.seconds, args.repeats)
    peer.close()
    row["peer"] |= rates(row, row["peer_seconds"])
    return {**row, **rates(row, row["seconds"])}


def table(rows: list[dict], peer: str) -> str:
    """The rows as Markdown."""
    header = ["run", "seeds", "env steps/s", peer, "updates/s", peer, "ratio", "GFLOP/s",
              "compile s", peer]  # fmt: skip
    return markdown(header, map(cells, rows))


def cells(row: dict) -> list[Any]:
    def pair(name: str, form: str) -> list[str]:
        values = (row.get(name), row.get("peer", {}).get(name))
        return [format(value, form) if value else "-" for value in values]

    name = row["name"] + (", uniform draw" if row.get("draw") == "uniform" else "")
    return [
        name, row["seeds"], *pair("env_steps_per_s", ",.0f"), *pair("updates_per_s", ",.0f"),
        ratio_text(row), f"{row['gflop_per_s']:.1f}", *pair("compile_s", ".1f"),
    ]  # fmt: skip


def geometric_means(rows: list[dict]) -> dict[str, float]:
    """Of the ratios: over all rows, of each agent and of each number of seeds, and by the draw."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        suffix = ", uniform draw" if row["draw"] == "uniform" else ""
        for group in ("all", row["agent"], f"seeds = {row['seeds']}"):
            groups.setdefault(group + suffix, []).append(row["ratio"])
    return {group: statistics.geometric_mean(ratios) for group, ratios in groups.items()}


def main() -> None:
    parser = options(__doc__, "no-peers", "no-install", "quick")
    parser.add_argument("--agents", nargs="+", default=["dqn", "ppo", "sac"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--devices", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peer-venv", type=Path, default=HERE / ".venv-rejax")
    args = parser.parse_args()
    start_jax(args.devices)

    versions = {"rejax": REJAX, "jax": jax.__version__, "jaxlib": jax.lib.__version__}
    chosen = [cell for cell in CELLS if cell.agent in args.agents]
    if args.quick:
        chosen = [next(cell for cell in chosen if cell.agent == agent) for agent in args.agents]
    elif not args.no_peers and not args.no_install:
        peer_process.provide(args.peer_venv, versions, "gymnax<1.0")
    python = None
    if not args.no_peers and peer_process.has(args.peer_venv, versions):
        python = peer_process.interpreter(args.peer_venv)

    record = Record(args, "bench_model_free", devices=args.devices)
    if not args.no_peers and python is None:
        why = f"rejax is left out: no {args.peer_venv.name} with rejax {REJAX} and this JAX"
        record.data["left_out"] = why
        print(why)
    for cell in chosen:
        for seeds in args.seeds:
            for row in whole_run(cell, seeds, args, python):
                record.add(row)
                print(line(cells(row)), flush=True)
    rows = record.data["rows"]
    print("\n" + table(rows, "rejax"))
    if python:
        record.data["geometric_means"] = geometric_means(rows)
        means = [f"{name} {mean:.2f}" for name, mean in record.data["geometric_means"].items()]
        print(f"\ngeometric means of the ratios: {'; '.join(means)}")
    wide = next(cell for cell in CELLS if cell.name == "sac 256 x 256")
    # PyTorch's side runs on the CPU
    if "sac" in args.agents and not args.no_peers and jax.default_backend() == "cpu":
        if importlib.util.find_spec("torch"):
            record.add(updates_alone(wide, args), "torch")
            print("\n" + table(record.data["torch"], "PyTorch"))
        else:
            print("\nPyTorch's SAC is left out: no torch here; pip install 'mbrl-jax[peers]'")
    record.write()
    print(f"\nwritten: {record.path}")


if __name__ == "__main__":
    main()
