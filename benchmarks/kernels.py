"""Kernels of every agent's program on an H100, counted on a machine that has none.

On small networks a GPU's time goes by the number of kernels, and by the waits of the host for a
number (conditionals, loops whose length only data tell). Counted are one step of all environments,
one update, and a whole period without its evaluation, with one seed and with 16 under vmap, each
agent with its preset. Needs the extra `cuda13` (4.4 GB) and no GPU.

    python benchmarks/kernels.py

Writes benchmarks/results/kernels.json and prints the table; `--agents` and `--seeds` take less of
it, `--against` a record of another version, whose period is shown beside.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import Record, markdown, options, start_jax


class Case(NamedTuple):
    env: str
    updates: int  # of the period


CASES = {
    "q_learning": Case("FrozenLake-misc", 100),
    "dyna_q": Case("FrozenLake-misc", 100),
    "dyna_q_plus": Case("FrozenLake-misc", 100),
    "prioritised_sweeping": Case("FrozenLake-misc", 100),
    "dqn": Case("CartPole-v1", 100),
    "ppo": Case("CartPole-v1", 8),
    "sac": Case("Pendulum-v1", 100),
    "pets": Case("Pendulum-v1", 100),
    "mbpo": Case("Pendulum-v1", 100),
    "dreamer": Case("CartPole-v1", 2),  # of the published size 1m, 16 windows of 64 records
    "muzero": Case("CartPole-v1", 2),  # each of them a step of all environments and 8 updates
}


def programs(name: str, case: Case, seeds: int) -> Iterator[tuple[str, Any, tuple[Any, ...], int]]:
    """(kind, jitted function, shapes of its arguments, updates in it) of an agent's programs."""
    import jax
    import jax.numpy as jnp

    from mbrl_jax import AGENTS, make_env
    from mbrl_jax.runtime.loop import env_step, make_program

    env, definition = make_env(case.env), AGENTS[name]
    config = definition.config_for(env.spec)
    schedule = definition.make(config, env.spec).schedule
    batched = schedule.num_envs * schedule.steps_per_update * case.updates
    total = schedule.warmup_steps + schedule.prefill_steps + batched
    program = make_program(definition, env, config, total, batched, eval_episodes=0)
    run = jax.eval_shape(program.init, jax.random.key(0), config)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)

    def step(run: Any, config: Any, act_key: Any, env_key: Any, t: Any) -> Any:
        agent = definition.make(config, env.spec)
        return env_step(agent, env, run, act_key, env_key, t, "train")

    def update(state: Any, config: Any, key: Any, t: Any, n: Any) -> Any:
        return definition.make(config, env.spec).update(state, key, t, n)

    def jitted(fn: Any, *axes: int | None) -> Any:
        return jax.jit(fn if seeds == 1 else jax.vmap(fn, axes), donate_argnums=0)

    def many(tree: Any) -> Any:
        if seeds == 1:
            return tree
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((seeds, *x.shape), x.dtype), tree)

    run, key = many(run), many(key)
    yield "step", jitted(step, 0, None, 0, 0, None), (run, config, key, key, count), 1
    arguments = (run.agent, config, key, count, count)
    yield "update", jitted(update, 0, None, 0, None, None), arguments, 1
    updates = program.plan.updates
    yield "period", jitted(program.period, 0, None, None), (run, config, count), updates


def rows_of(name: str, case: Case, seeds: int) -> Iterator[dict[str, Any]]:
    """A row for each program of an agent."""
    from gpu_program import as_on_an_accelerator, measure

    for kind, fn, shapes, updates in as_on_an_accelerator(lambda: [*programs(name, case, seeds)]):
        counted = measure(fn, *shapes)
        yield {
            "agent": name,
            "env": case.env,
            "seeds": seeds,
            "program": kind,
            "updates": updates,
            **counted._asdict(),
        }


def table(rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> str:
    """The rows as Markdown: a line for each agent and number of seeds."""

    def cell(rows: list[dict[str, Any]], agent: str, seeds: int, kind: str, field: str) -> Any:
        for row in rows:
            if (row["agent"], row["seeds"], row["program"]) == (agent, seeds, kind):
                return row[field]
        return None

    def text(number: Any, form: str = ",") -> str:
        return "-" if number is None else format(number, form)

    lines = []
    for agent, seeds in dict.fromkeys((row["agent"], row["seeds"]) for row in rows):
        at = (agent, seeds)
        memory = cell(rows, *at, "period", "temporary_bytes")
        lines.append([
            agent,
            next(row["env"] for row in rows if row["agent"] == agent),
            seeds,
            *(text(cell(rows, *at, kind, "kernels")) for kind in ("step", "update")),
            text(cell(rows, *at, "period", "updates")),
            text(cell(rows, *at, "period", "kernels")),
            text(cell(before, *at, "period", "kernels")),
            text(cell(rows, *at, "period", "waits")),
            text(cell(before, *at, "period", "waits")),
            text(None if memory is None else memory / 1e6, ".1f"),
            text(cell(rows, *at, "period", "compile_seconds"), ".0f"),
        ])  # fmt: skip
    header = [
        "agent", "environment", "seeds", "a step", "an update", "updates of a period",
        "kernels of a period", "before", "waits", "before", "temporary MB", "compiled in s",
    ]  # fmt: skip
    return markdown(header, lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = options(__doc__, repeats=1)
    made.add_argument("--agents", nargs="+", choices=CASES, default=list(CASES))
    made.add_argument("--seeds", nargs="+", type=int, default=[1, 16])
    made.add_argument("--against", type=Path, help="a record of another version")
    return made


def main() -> None:
    args = parser().parse_args()
    before = json.loads(args.against.read_text())["rows"] if args.against else []
    import gpu_program  # noqa: F401, sets what JAX reads when it starts

    start_jax()
    record = Record(args, "kernels", target="NVIDIA H100 80GB HBM3, compiled without one")
    for name in args.agents:
        for seeds in args.seeds:
            for row in rows_of(name, CASES[name], seeds):
                record.add(row)
    print(table(record.data["rows"], before))


if __name__ == "__main__":
    main()
