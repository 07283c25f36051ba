"""Ensemble training, batched rollouts and one PETS action against mbrl-lib, rl-blox and PyTorch.

A world of 17 observations and 6 actions; members of 4 x 200 with SiLU, bounded log-variance (the
bounds frozen, as in mbrl-lib), normalised inputs, batches of 256 for each member. Parts:

- training: the same number of gradient steps on the same number of rows, with a look at the
  held-out rows after each pass; ours is one call of `Ensemble.fit`, data preparation included.
  Against mbrl-lib's `ModelTrainer` (7 members), which looks at them once more, before the first
  pass; and against five separate PyTorch networks trained one after another (5 members).
- rollouts: TS1 over 5 elites of 7 under uniformly random actions, every transition kept. Against
  mbrl-lib's `ModelEnv` on the same 100,000 states, and against a Python loop that takes one state
  at a time (measured on fewer states; its seconds are those of one state times ours).
- planning: one action by CEM, 350 candidates x 20 particles x 15 steps x 5 iterations, 5 members
  that particles keep (TSinf) and a known reward. Against mbrl-lib's `TrajectoryOptimizerAgent` and
  rl-blox's PETS, whose members share their bounds in another form and whose reward looks at the
  state that was acted on, not at the next one; both of no weight beside the networks.

The sides alternate; the ratio is the median of the pairs' ratios of seconds, with the least and
the greatest. PyTorch runs with one thread or all, whichever is faster. The floor is in the last
columns: the dense layers' multiply-adds over the seconds, and their share of what XLA reaches here
in a batch of matrix products of these shapes, all cores.

    python benchmarks/bench_models.py

mbrl-lib 0.2.0 and rl-blox live in benchmarks/.venv-mbrl-lib and .venv-rl-blox, made at the first
run; the plain PyTorch loops need the extra `peers`. Writes benchmarks/results/bench_models.json.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peer_process
from common import HERE, Record, against, line, markdown, options, ratio_text, start_jax, timed
from peer_process import Peer

from mbrl_jax import planning
from mbrl_jax.models import dynamics, ensemble, fit, rollout
from mbrl_jax.types import EnvSpec, Transition

SIZES = {"obs": 17, "act": 6, "hidden": [200] * 4, "members": 7, "elites": 5, "batch": 256}
CEM = {"samples": 350, "elites": 35, "particles": 20, "horizon": 15, "iterations": 5}
TRAINING = {"rows": 20_000, "held": 4_000, "epochs": 4}
STATES, TEXTBOOK_STATES = 100_000, 400
MBRL_LIB = {"mbrl": "0.2.0", "hydra-core": "1.3.2", "omegaconf": "2.3.0", "gymnasium": "0.26.3"}
MBRL_LIB_NEEDS = ("torch", "numpy<2", "termcolor", "tqdm", "matplotlib", "imageio", "sk-video")
RL_BLOX = {"rl_blox": "0.5.7"}


class Work(NamedTuple):
    """One side of a row."""

    run: Callable[[], float]  # seconds
    compile_s: float
    gflop: float


def compiled(fn: Callable[..., Any], gflop: float, *args: Any) -> Work:
    compile_s, ready = timed(lambda: jax.jit(fn).lower(*args).compile())
    timed(ready, *args)
    return Work(lambda: timed(ready, *args)[0], compile_s, gflop)


def spec(reward: Any = None) -> EnvSpec:
    low, high = (-1.0,) * SIZES["act"], (1.0,) * SIZES["act"]
    return EnvSpec(
        "synthetic", (SIZES["obs"],), "float32", 1_000, action_low=low, action_high=high,
        reward_fn=reward,
    )  # fmt: skip


def make_models(members: int, elites: int, reward: Any = None) -> ensemble.Ensemble:
    config = dynamics.Config(
        hidden=tuple(SIZES["hidden"]), weight_decay=(5e-5,), learn_bounds=False,
        reward="learned" if reward is None else "known", termination="never",
    )  # fmt: skip
    return ensemble.make(config, spec(reward), members, elites)


def gflop_per_row(models: ensemble.Ensemble) -> float:
    """Of one member's forward pass."""
    net = models.dynamics
    widths = [net.num_inputs, *net.config.hidden, 2 * net.num_targets]
    return 2e-9 * sum(a * b for a, b in itertools.pairwise(widths))


def training(members: int, rows: int, held: int, epochs: int) -> tuple[Work, int]:
    """A whole `fit`, and its number of gradient steps."""
    models = make_models(members, min(SIZES["elites"], members))
    per_epoch = -(-(rows - held) // SIZES["batch"])
    steps = epochs * per_epoch
    config = fit.Config(
        mode="fixed_steps", steps=steps, eval_every=per_epoch, batch_size=SIZES["batch"],
        holdout=held / rows, max_holdout=held,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    obs, change = rng.normal(size=(2, rows, SIZES["obs"])).astype(np.float32)
    act = rng.uniform(-1, 1, (rows, SIZES["act"])).astype(np.float32)
    flag = np.zeros(rows, bool)
    reward = rng.normal(size=rows).astype(np.float32)
    data = Transition(obs, act, reward, obs + 0.1 * change, flag, flag)

    def call(key: jax.Array, data: Transition) -> Any:
        params = models.init(key)
        return models.fit(params, models.init_opt(params), config, data, jnp.int32(rows), key)

    forward = gflop_per_row(models) * members
    gflop = forward * (3 * steps * SIZES["batch"] + epochs * held)
    return compiled(call, gflop, jax.random.key(0), data), steps


def rollouts(states: int, length: int) -> Work:
    models = make_models(SIZES["members"], SIZES["elites"])
    params = models.init(jax.random.key(0))
    obs = jax.random.normal(jax.random.key(1), (states, SIZES["obs"]))

    def act(obs: jax.Array, key: jax.Array, depth: jax.Array) -> jax.Array:
        return jax.random.uniform(key, (states, SIZES["act"]), minval=-1.0)

    def call(params: Any, obs: jax.Array, key: jax.Array) -> Any:
        return rollout.rollout(models.model("ts1"), params, obs, act, key, max_length=length)

    gflop = gflop_per_row(models) * states * length
    return compiled(call, gflop, params, obs, jax.random.key(2))


def plan(cem: dict[str, int]) -> Work:
    def reward(obs: jax.Array, act: jax.Array, next_obs: jax.Array) -> jax.Array:
        return -jnp.square(next_obs).sum(-1) - 0.1 * jnp.square(act).sum(-1)

    models = make_models(5, 5, reward)
    params = models.init(jax.random.key(0))
    low, high = -jnp.ones(SIZES["act"]), jnp.ones(SIZES["act"])

    def call(params: Any, obs: jax.Array, key: jax.Array) -> Any:
        value = planning.model_value(models.model("tsinf"), params, obs, cem["particles"])
        start = planning.start_cem(cem["horizon"], low, high)
        return planning.cem(
            value, key, start, low, high, cem["samples"], cem["elites"], cem["iterations"]
        )

    rows = cem["samples"] * cem["particles"] * cem["horizon"] * cem["iterations"]
    arguments = (params, jnp.zeros(SIZES["obs"]), jax.random.key(1))
    return compiled(call, gflop_per_row(models) * rows, *arguments)


def ceiling(repeats: int) -> float:
    """GFLOP/s of the products of the hidden layers: 7 members, batches of 256 and of 1,400."""
    width, best = SIZES["hidden"][0], 0.0
    for rows in (SIZES["batch"], 1_400):
        x = jnp.ones((SIZES["members"], rows, width))
        w = jnp.ones((SIZES["members"], width, width)) / width

        def chain(x: jax.Array, w: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, 50, lambda i, x: jnp.matmul(x, w), x)

        work = compiled(chain, 50 * 2e-9 * x.size * width, x, w)
        best = max(best, work.gflop / min(work.run() for _ in range(max(repeats, 3))))
    return best


def row(
    name: str, peer_name: str, ours: Work, peer: Peer | None, repeats: int, scale: float = 1.0
) -> dict[str, Any]:
    """The sides in turn; `scale` is how many times a run of the peer is to be counted."""
    found: dict[str, Any] = {"name": name, "peer_name": peer_name, "compile_s": ours.compile_s}
    theirs = peer.seconds if peer else None
    found |= {"gflop": ours.gflop, **against(ours.run, theirs, repeats, scale)}
    found["gflop_per_s"] = ours.gflop / statistics.median(found["seconds"])
    if peer:
        found["peer"] = peer.info
        peer.close()
    return found


HEADER = ["part", "against", "seconds", "theirs", "ratio", "GFLOP/s", "of the ceiling", "compile s"]


def cells(row: dict[str, Any], best: float) -> list[str]:
    theirs = f"{statistics.median(row['peer_seconds']):.3g}" if "ratio" in row else "-"
    return [
        row["name"], row["peer_name"], f"{statistics.median(row['seconds']):.3g}", theirs,
        ratio_text(row, ".3g"), f"{row['gflop_per_s']:.0f}", f"{row['gflop_per_s'] / best:.0%}",
        f"{row['compile_s']:.1f}",
    ]  # fmt: skip


def main() -> None:
    parser = options(__doc__, "no-peers", "quick")
    parser.add_argument("--parts", nargs="+", default=["training", "rollouts", "planning"])
    args = parser.parse_args()
    start_jax()

    data, cem, states, textbook = TRAINING, CEM, STATES, TEXTBOOK_STATES
    if args.quick:
        data = {"rows": 600, "held": 100, "epochs": 1}
        cem = {"samples": 10, "elites": 2, "particles": 5, "horizon": 2, "iterations": 2}
        states, textbook = 500, 5
    folders = {"mbrl-lib": HERE / ".venv-mbrl-lib", "rl-blox": HERE / ".venv-rl-blox"}
    if not args.quick and not args.no_peers:
        peer_process.provide(folders["mbrl-lib"], MBRL_LIB, *MBRL_LIB_NEEDS, loose="mbrl")
        peer_process.provide(folders["rl-blox"], RL_BLOX)
    pythons = {
        name: peer_process.interpreter(folders[name])
        for name, versions in (("mbrl-lib", MBRL_LIB), ("rl-blox", RL_BLOX))
        if not args.no_peers and peer_process.has(folders[name], versions)
    }
    if not args.no_peers and importlib.util.find_spec("torch"):
        pythons["PyTorch"] = Path(sys.executable)
    scripts = {
        "mbrl-lib": HERE / "peer_mbrl_lib.py",
        "rl-blox": HERE / "peer_rl_blox.py",
        "PyTorch": HERE / "peer_torch_models.py",
    }

    def peer(name: str, part: str, **request: Any) -> Peer | None:
        if name not in pythons:
            return None
        return Peer(pythons[name], scripts[name], part=part, sizes=SIZES, **request)

    best = ceiling(args.repeats)
    versions = MBRL_LIB | RL_BLOX
    record = Record(args, "bench_models", ceiling_gflop_per_s=best, versions=versions)

    def add(*arguments: Any, scale: float = 1.0) -> None:
        record.add(row(*arguments, args.repeats, scale))
        print(line(cells(record.data["rows"][-1], best)), flush=True)

    if "training" in args.parts:
        work, steps = training(SIZES["members"], **data)
        add("training, 7 members", "mbrl-lib", work,
            peer("mbrl-lib", "training", **data, steps=steps))  # fmt: skip
        work, steps = training(5, **data)
        add("training, 5 members", "PyTorch", work,
            peer("PyTorch", "training", **data, steps=steps, members=5))  # fmt: skip
    if "rollouts" in args.parts:
        for length in (1, 5):
            work = rollouts(states, length)
            name = f"rollouts, {states:,} states, {length} step{'s' * (length > 1)}"
            add(name, "mbrl-lib", work, peer("mbrl-lib", "rollouts", states=states, length=length))
            if length == 1:
                add(name, "PyTorch", work,
                    peer("PyTorch", "rollouts", states=textbook, length=length),
                    scale=states / textbook)  # fmt: skip
    if "planning" in args.parts:
        work = plan(cem)
        for name in ("mbrl-lib", "rl-blox"):
            add("planning, one action", name, work, peer(name, "planning", cem=cem, members=5))
    whole = markdown(HEADER, (cells(row, best) for row in record.data["rows"]))
    print(f"\nceiling: {best:.0f} GFLOP/s\n\n{whole}\n\nwritten: {record.path}")


if __name__ == "__main__":
    main()
