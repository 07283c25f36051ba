"""Dyna-Q: a textbook Python/numpy loop against the compiled loop, alternating in one run.

Both learn deterministic FrozenLake 4x4 with alpha 0.1, gamma 0.99, epsilon 0.1 and random ties.
The textbook loop is written as in Sutton and Barto (2018, Section 8.2): numpy action values, a
dictionary as the model, lists of what was visited; its world is a table, which is faster than
any simulator. Ours is the whole compiled training run, environment and episode counts included,
evaluation left out of both. Planning updates are sequential in both.

    python benchmarks/bench_dyna.py

Writes benchmarks/results/bench_dyna.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

ALPHA, GAMMA, EPSILON, LIMIT = 0.1, 0.99, 0.1, 100


def tables(env) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """A deterministic world as successors [S, A], rewards [S, A], ends [S, A] and its start."""
    from mbrl_jax import envs

    exact = envs.tabular(env)
    ends = exact.terminates.sum(axis=-1) > 0.5
    return exact.transition.argmax(axis=-1), exact.reward, ends, int(exact.start.argmax())


def textbook(world: tuple[np.ndarray, ...], n: int, steps: int, seed: int) -> np.ndarray:
    """Tabular Dyna-Q for `steps` environment steps; returns the action values."""
    successor, reward, ends, start = world
    successor, reward, ends = successor.tolist(), reward.tolist(), ends.tolist()
    rng = random.Random(seed)
    num_states, num_actions = len(successor), len(successor[0])
    q = np.zeros((num_states, num_actions))
    model: dict[tuple[int, int], tuple[float, int, bool]] = {}
    visited: list[tuple[int, int]] = []
    state, time_in_episode = start, 0
    for _ in range(steps):
        if rng.random() < EPSILON:
            action = rng.randrange(num_actions)
        else:
            row = q[state]
            action = int(rng.choice(np.flatnonzero(row == row.max())))
        following, r, end = successor[state][action], reward[state][action], ends[state][action]
        goal = r if end else r + GAMMA * q[following].max()
        q[state, action] += ALPHA * (goal - q[state, action])
        if n:  # Q-learning needs no model
            if (state, action) not in model:
                visited.append((state, action))
            model[state, action] = (r, following, end)
        for _ in range(n):
            s, a = visited[int(rng.random() * len(visited))]
            r_model, s_model, end_model = model[s, a]
            goal = r_model if end_model else r_model + GAMMA * q[s_model].max()
            q[s, a] += ALPHA * (goal - q[s, a])
        time_in_episode += 1
        if end or time_in_episode == LIMIT:
            state, time_in_episode = start, 0
        else:
            state = following
    return q


def compiled(env, n: int, seeds: int, steps: int) -> Callable[[], None]:
    """Our run of `seeds` seeds, compiled and warmed up."""
    from mbrl_jax import AGENTS
    from mbrl_jax.runtime.train import make_job, traced

    fields = {"step_size": ALPHA, "gamma": GAMMA, "epsilon": EPSILON, "planning_steps": n}
    job = make_job(AGENTS["dyna_q"], env, steps, seeds, 0, steps, 0, None, "vmap", fields)
    init, chunk = job.functions()
    config = traced(job.config)

    def run() -> None:
        jax.block_until_ready(chunk(state(), config, np.int32(0)))

    def state():
        return jax.block_until_ready(init(job.keys(), config))

    run()
    return run


def seconds(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 256, 1024])
    parser.add_argument("--devices", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)

    from mbrl_jax import make_env
    from mbrl_jax.runtime.logs import describe_machine

    env = make_env("FrozenLake-misc", is_slippery=False)
    world = tables(env)
    rows = []
    for n, book_steps, our_steps in ((0, 40_000, 20_000), (5, 10_000, 10_000), (50, 1_500, 2_000)):
        if args.quick:
            book_steps, our_steps = 200, 50
        ours = {seeds: compiled(env, n, seeds, our_steps) for seeds in args.seeds}
        book_times: list[float] = []
        our_times: dict[int, list[float]] = {seeds: [] for seeds in args.seeds}
        for repeat in range(args.repeats):
            book_times.append(seconds(lambda n=n, r=repeat, t=book_steps: textbook(world, n, t, r)))
            for seeds, run in ours.items():
                our_times[seeds].append(seconds(run))
        book = book_steps / statistics.median(book_times)
        rows.append({"n": n, "loop": "textbook", "seeds": 1, "env_steps_per_s": book})
        for seeds, times in our_times.items():
            pairs = [
                (seeds * our_steps / ours_s) / (book_steps / book_s)
                for ours_s, book_s in zip(times, book_times, strict=True)
            ]
            rate = seeds * our_steps / statistics.median(times)
            rows.append({
                "n": n, "loop": "mbrl_jax", "seeds": seeds, "env_steps_per_s": rate,
                "ratio": statistics.median(pairs), "ratio_min": min(pairs), "ratio_max": max(pairs),
            })  # fmt: skip
        print_rows(rows[-1 - len(ours) :])
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"made": describe_machine(), "devices": args.devices, "repeats": args.repeats}
    path = args.out / "bench_dyna.json"
    path.write_text(json.dumps({**record, "rows": rows}, indent=2) + "\n")
    print(f"written: {path}")


def print_rows(rows: list[dict]) -> None:
    for row in rows:
        rate = row["env_steps_per_s"]
        ratio = f"{row['ratio']:7.1f} x" if "ratio" in row else "        -"
        spread = f"({row['ratio_min']:.1f} to {row['ratio_max']:.1f})" if "ratio" in row else ""
        print(
            f"n = {row['n']:2d}  {row['loop']:9} {row['seeds']:5d} seeds  {rate:12,.0f} env steps/s"
            f"  {rate * row['n']:13,.0f} planning/s  {ratio} {spread}",
            flush=True,
        )


if __name__ == "__main__":
    main()
