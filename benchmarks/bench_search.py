"""Gumbel MuZero's and MuZero's searches against mctx, in one process.

Every cell is a policy, a recurrent function, a batch of roots, a number of simulations and of
actions; both sides give the actions, the action weights and the visits of the roots. They run in
turn; the ratio is the median of the pairs' ratios of seconds. Recurrent functions: `trivial` (a
dozen operations), `mlp` (two layers of 64) and `residual` (four residual blocks of 128). Beside the
time: of both sides the seconds of tracing and compilation and the temporary memory of the program,
and whether the visits at all roots agree.

The floor of a search is its network: simulations * batch calls of the recurrent function.

    python benchmarks/bench_search.py
    python benchmarks/bench_search.py --batches 1 32 --simulations 16 50

mctx comes with the extra `dev`, or `peers`. Writes benchmarks/results/bench_search.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import mctx
import numpy as np
from peer_process import timed

from mbrl_jax import search
from mbrl_jax.runtime.logs import describe_machine

HERE = Path(__file__).parent
POLICIES = ("gumbel_muzero_policy", "muzero_policy")
STATE, HIDDEN, LEAST_SECONDS = 64, 128, 0.05


def weights(num_actions: int) -> dict[str, jax.Array]:
    """Of all three recurrent functions."""
    shapes = {
        "first": (STATE + num_actions, STATE), "second": (STATE, STATE),
        "policy": (STATE, num_actions), "value": (STATE,), "reward": (STATE,),
        "wide": (STATE + num_actions, HIDDEN), "blocks": (4, 2, HIDDEN, HIDDEN),
        "narrow": (HIDDEN, STATE),
    }  # fmt: skip
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape) / math.sqrt(shape[-2] if len(shape) > 1 else shape[0])
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def heads(params: dict[str, jax.Array], state: jax.Array) -> tuple[Any, jax.Array]:
    out = search.RecurrentFnOutput(
        reward=state @ params["reward"], discount=jnp.full(state.shape[:1], 0.97),
        prior_logits=3.0 * state @ params["policy"], value=state @ params["value"],
    )  # fmt: skip
    return out, state


def trivial(params: Any, key: jax.Array, action: jax.Array, state: jax.Array) -> Any:
    num = jnp.arange(params["policy"].shape[1])
    state = 0.99 * jnp.roll(state, 1, axis=-1) + 0.1 * (0.37 * action[:, None] % 1.0)
    logits = 2.0 * state[:, :1] * jnp.sin(1.7 * num)[None] + jnp.cos(1.0 * num)[None]
    out = search.RecurrentFnOutput(
        reward=state[:, 0], discount=jnp.full(action.shape, 0.97), prior_logits=logits,
        value=state[:, 1],
    )  # fmt: skip
    return out, state


def with_action(params: Any, action: jax.Array, state: jax.Array) -> jax.Array:
    return jnp.concatenate([state, jax.nn.one_hot(action, params["policy"].shape[1])], axis=-1)


def mlp(params: Any, key: jax.Array, action: jax.Array, state: jax.Array) -> Any:
    hidden = jax.nn.relu(with_action(params, action, state) @ params["first"])
    return heads(params, jnp.tanh(hidden @ params["second"]))


def residual(params: Any, key: jax.Array, action: jax.Array, state: jax.Array) -> Any:
    hidden = with_action(params, action, state) @ params["wide"]
    for first, second in params["blocks"]:
        hidden = hidden + jax.nn.relu(jax.nn.relu(hidden) @ first) @ second
    return heads(params, jnp.tanh(hidden @ params["narrow"]))


FUNCTIONS: dict[str, Callable[..., Any]] = {"trivial": trivial, "mlp": mlp, "residual": residual}


def side(
    library: ModuleType, policy: str, function: str, num_simulations: int, args: tuple[Any, ...]
) -> dict[str, Any]:
    """The compiled search of one library."""

    def run(params: Any, key: jax.Array, state: jax.Array) -> Any:
        root = library.RootFnOutput(
            prior_logits=state @ params["policy"], value=state @ params["value"], embedding=state
        )
        found = getattr(library, policy)(params, key, root, FUNCTIONS[function], num_simulations)
        counts = found.search_tree.summary().visit_counts
        return found.action, found.action_weights, counts

    start = time.perf_counter()
    ready = jax.jit(run).lower(*args).compile()
    seconds = time.perf_counter() - start
    return {
        "run": ready, "compile_s": seconds,
        "temp_mb": ready.memory_analysis().temp_size_in_bytes / 1e6,
    }  # fmt: skip


def cell(
    policy: str, function: str, batch: int, num_simulations: int, num_actions: int, repeats: int
) -> dict[str, Any]:
    params = weights(num_actions)
    state = jax.random.normal(jax.random.key(1), (batch, STATE))
    args = (params, jax.random.key(2), state)
    sides = [side(lib, policy, function, num_simulations, args) for lib in (search, mctx)]
    visits = [np.asarray(timed(one["run"], *args)[1][2]) for one in sides]
    # short searches are repeated within one measurement
    times = max(1, math.ceil(LEAST_SECONDS / timed(sides[1]["run"], *args)[0]))

    def seconds(run: Callable[..., Any]) -> float:
        return timed(lambda: [run(*args) for _ in range(times)])[0] / times

    own, other = zip(*([seconds(one["run"]) for one in sides] for _ in range(repeats)), strict=True)
    ratios = [b / a for a, b in zip(own, other, strict=True)]
    return {
        "policy": policy, "function": function, "batch": batch, "simulations": num_simulations,
        "actions": num_actions, "ms": 1e3 * statistics.median(own),
        "mctx_ms": 1e3 * statistics.median(other), "ratio": statistics.median(ratios),
        "ratio_min": min(ratios), "ratio_max": max(ratios),
        "same_visits": float((visits[0] == visits[1]).all(axis=-1).mean()),
        **{name: sides[0][name] for name in ("compile_s", "temp_mb")},
        **{f"mctx_{name}": sides[1][name] for name in ("compile_s", "temp_mb")},
    }  # fmt: skip


HEADER = [
    "| policy | function | batch | simulations | actions | ms | mctx | ratio | visits agree "
    "| compile s | mctx | temp MB | mctx |",
    "|" + "---|" * 13,
]


def line(row: dict[str, Any]) -> str:
    ratio = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
    cells = [row["policy"].removesuffix("_policy"), row["function"], row["batch"],
             row["simulations"], row["actions"], f"{row['ms']:.3g}", f"{row['mctx_ms']:.3g}",
             ratio, f"{row['same_visits']:.0%}"]  # fmt: skip
    cells += [f"{row[name]:.3g}" for name in
              ("compile_s", "mctx_compile_s", "temp_mb", "mctx_temp_mb")]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256, 1024])
    parser.add_argument("--simulations", type=int, nargs="+", default=[16, 50, 128])
    parser.add_argument("--actions", type=int, nargs="+", default=[4, 18, 82])
    parser.add_argument("--functions", nargs="+", default=list(FUNCTIONS), choices=list(FUNCTIONS))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    record: dict[str, Any] = {"made": describe_machine(), "rows": []}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "bench_search.json"
    grid = itertools.product(
        POLICIES, args.functions, args.batches, args.simulations, args.actions
    )  # fmt: skip
    for policy, function, batch, num_simulations, num_actions in grid:
        row = cell(policy, function, batch, num_simulations, num_actions, args.repeats)
        record["rows"].append(row)
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(line(row), flush=True)
        jax.clear_caches()
    for policy in POLICIES:
        ratios = [r["ratio"] for r in record["rows"] if r["policy"] == policy and r["batch"] >= 32]
        if ratios:
            print(f"{policy}, batch 32 and more: {statistics.geometric_mean(ratios):.2f} times")
    print("\n".join(["", *HEADER, *map(line, record["rows"])]) + f"\n\nwritten: {path}")


if __name__ == "__main__":
    main()
