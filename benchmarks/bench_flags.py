"""XLA's flags for an accelerator, each against XLA's own choice, over whole periods of our agents.

A GPU starts kernels one by one, unless XLA has put them into a command buffer (a CUDA graph), which
is started as one. XLA's own choice leaves loops out: the host then starts each of their turns.
Compared are

- `default`: XLA's own choice,
- `while`: `devices.GRAPHS`, the flags that the command line sets, loops and conditionals in graphs,
- `none`: no command buffers.

Each side is a process with its own flags; they compile side by side, then run in turn. The ratio is
the median of the pairs' ratios of seconds: how many times as long the other side takes.

    python benchmarks/bench_flags.py

Writes benchmarks/results/bench_flags.json.
"""

from __future__ import annotations

import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from common import HERE, Record, alternate, line, markdown, options, ratios
from peer_process import Peer

from mbrl_jax.runtime import devices


class Case(NamedTuple):
    agent: str
    env: str
    updates: int  # of the period that is timed


CASES = (
    Case("sac", "Pendulum-v1", 2_000),
    Case("dqn", "CartPole-v1", 2_000),
    Case("ppo", "CartPole-v1", 32),
    Case("mbpo", "Pendulum-v1", 100),
    Case("pets", "Pendulum-v1", 50),
    Case("dyna_q", "FrozenLake-misc", 5_000),
)
FLAGS = {"default": "", "while": devices.GRAPHS, "none": "--xla_gpu_enable_command_buffer="}


def start(case: Case, seeds: int, flags: str) -> Peer:
    """A worker that has compiled the case under these flags, beside what the user has set."""
    own = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()
    # memory is shared by the processes
    variables = {"XLA_FLAGS": own, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return Peer(sys.executable, HERE / "peer_flags.py", variables, seeds=seeds, **case._asdict())


def cells(row: dict[str, Any]) -> list[Any]:
    def text(name: str) -> str:
        found = row[name]
        return f"{found['ratio']:.2f} ({found['ratio_min']:.2f} to {found['ratio_max']:.2f})"

    return [
        row["agent"], row["env"], row["seeds"], f"{1e6 * row['seconds_per_update']:,.0f}",
        *(text(name) for name in FLAGS if name != "default"),
        *(f"{row['compile_s'][name]:.0f}" for name in FLAGS),
    ]  # fmt: skip


def main() -> None:
    parser = options(__doc__, "quick", repeats=3)
    parser.add_argument("--agents", nargs="+", default=[case.agent for case in CASES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--processes", type=int, default=12, help="that compile at a time")
    args = parser.parse_args()
    record = Record(args, "bench_flags", flags=FLAGS)
    cases = [case._replace(updates=8) if args.quick else case for case in CASES]
    tasks = [(case, seeds) for case in cases if case.agent in args.agents for seeds in args.seeds]
    with ThreadPoolExecutor(args.processes) as pool:
        loading = {
            (case, seeds, name): pool.submit(start, case, seeds, flags)
            for case, seeds in tasks
            for name, flags in FLAGS.items()
        }
    # all have compiled now: a program that waits for the host is measured on cores that are free
    for case, seeds in tasks:
        sides = {name: loading[case, seeds, name].result() for name in FLAGS}
        times = alternate({name: side.seconds for name, side in sides.items()}, args.repeats)
        for side in sides.values():
            side.close()
        row: dict[str, Any] = {
            **case._asdict(), "seeds": seeds, "backend": sides["default"].info["backend"],
            "compile_s": {name: side.info["compile_s"] for name, side in sides.items()},
            "seconds": times,
            "seconds_per_update": statistics.median(times["default"]) / case.updates,
            **{name: ratios(times["default"], times[name]) for name in FLAGS},
        }  # fmt: skip
        record.add(row)
        print(line(cells(row)), flush=True)
    header = ["agent", "environment", "seeds", "us an update", "while", "none",
              *(f"compile s, {name}" for name in FLAGS)]  # fmt: skip
    print(f"\n{markdown(header, map(cells, record.data['rows']))}\n\nwritten: {record.path}")


if __name__ == "__main__":
    main()
