"""Milliseconds of an update of DreamerV3 and of its parts, and environment steps of its whole loop.

An update is the published one: 16 windows of 64 records, 15 imagined steps, float32 on a CPU and
bfloat16 on an accelerator. Observations are a vector of 24 numbers or an image of 64 x 64 x 3, an
action is 6 numbers. Timed apart, each compiled by itself:

- the update: losses, gradient, LaProp, slow critic,
- the world model: its losses and their gradient,
- imagination: 15 steps from 1,024 states, forward alone,
- behaviour: imagination with the losses of actor and critic and their gradient; what it takes
  beyond imagination are the heads,
- the optimiser: clipping, LaProp and the new parameters.

Several seeds are one batch (`vmap`) or one after another (`map`). The floor is the machine's best
rate of matrix products of 2,048 x 2,048, measured in the same run; GFLOP are those of all matrix
products and convolutions in the jaxpr, loops counted out.

    python benchmarks/bench_dreamer.py
    python benchmarks/bench_dreamer.py --sizes 1m --kinds vector --seeds 1 4 --loops

Writes benchmarks/results/bench_dreamer.json. The authors' code (danijar/dreamerv3, made to run with
JAX 0.10.2) took 595 ms (477 to 630) for the update at 1m with a vector on two cores, 15.5 s of
compilation and 443 MB of temporary memory; at 12m, with JAX 0.4.33, 6,731 ms.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from common import Record as Results
from common import (
    alternate,
    compiled_period,
    launched,
    line,
    markdown,
    options,
    seed_modes,
    start_jax,
    timed,
)

from mbrl_jax import AGENTS, make_env
from mbrl_jax.agents import dreamer
from mbrl_jax.agents.dreamer_config import Config, model_of, window_length
from mbrl_jax.agents.dreamer_records import Record
from mbrl_jax.models import rssm
from mbrl_jax.runtime.train import make_job
from mbrl_jax.types import EnvSpec, PyTree

OBSERVATIONS = {"vector": ((24,), "float32"), "image": ((64, 64, 3), "uint8")}
CEILING = 2_048  # side of the matrices of the floor
LOOP = {"env": "CartPole-v1", "train_ratio": 512, "num_envs": 1, "start_windows": 16,
        "buffer_size": 10_000}  # fmt: skip


def spec_of(kind: str) -> EnvSpec:
    shape, dtype = OBSERVATIONS[kind]
    bounds = {"action_low": (-1.0,) * 6, "action_high": (1.0,) * 6}
    return EnvSpec(f"random {kind}", shape, dtype, 1_000, **bounds)


def window_of(cfg: Config, spec: EnvSpec, key: jax.Array) -> Record:
    """Records [B, L, ...] as a replay might hold them."""
    model, lead = model_of(cfg, spec), (cfg.batch_size, window_length(cfg))
    keys = jax.random.split(key, 5)
    if spec.obs_dtype == "uint8":
        obs = jax.random.randint(keys[0], (*lead, *spec.obs_shape), 0, 256).astype(jnp.uint8)
    else:
        obs = jax.random.normal(keys[0], (*lead, *spec.obs_shape))
    sizes, flag = model.sizes, jnp.zeros(lead, bool)
    return Record(
        obs=obs,
        action=jax.random.normal(keys[1], (*lead, *spec.action_shape)),
        reward=jax.random.normal(keys[2], lead),
        is_first=flag.at[:, 20].set(True),
        is_last=flag.at[:, 19].set(True),
        is_terminal=flag,
        deter=jax.random.uniform(keys[3], (*lead, sizes.deter)).astype(model.dtype),
        stoch=jax.random.randint(keys[4], (*lead, sizes.stoch), 0, sizes.classes).astype(jnp.uint8),
    )


def flops(fn: Callable[..., Any], *args: Any) -> float:
    """Of all matrix products and convolutions of a call, as its jaxpr has them."""

    def of(jaxpr: Any) -> float:
        total = 0.0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (axes, _), _ = eqn.params["dimension_numbers"]
                inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in axes)
                total += 2 * inner * eqn.outvars[0].aval.size
            elif eqn.primitive.name == "conv_general_dilated":
                kernel, out = eqn.invars[1].aval, eqn.params["dimension_numbers"].rhs_spec[0]
                groups = eqn.params["batch_group_count"]
                each = kernel.size // kernel.shape[out] / groups
                total += 2 * each * eqn.outvars[0].aval.size
            parts = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
            inside = sum(of(getattr(x, "jaxpr", x)) for x in parts if hasattr(x, "eqns"))
            total += inside * eqn.params.get("length", 1)
        return total

    return of(jax.make_jaxpr(fn)(*args).jaxpr)


def parts(cfg: Config, spec: EnvSpec) -> dict[str, Callable[..., PyTree]]:
    """The timed functions of (state without a replay, window, draws, number of the update)."""
    model = model_of(cfg, spec)

    def update(state: Any, window: Any, draws: Any, number: Any) -> PyTree:
        after, learnt, metrics = dreamer.learn(cfg, spec, state, window, draws, number)
        return after, learnt.latent, metrics

    def world_model(state: Any, window: Any, draws: Any, number: Any) -> PyTree:
        trained = jax.tree.map(lambda x: x[:, -cfg.batch_length :], window)

        def loss(params: PyTree) -> jax.Array:
            posterior = dreamer.posterior_of(cfg, model, params, window, draws.posterior)
            made = dreamer.world_model_losses(cfg, model, params, trained, posterior)
            return sum(map(jnp.mean, made.values()))

        return jax.value_and_grad(loss)(state.params)

    def starts(window: Any) -> rssm.State:
        trained = jax.tree.map(lambda x: x[:, -cfg.batch_length :], window)
        latent = dreamer.records.unstored(model, trained.deter, trained.stoch)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), latent)

    def imagination(state: Any, window: Any, draws: Any, number: Any) -> PyTree:
        def policy(deter: jax.Array, stoch: jax.Array, noise: jax.Array) -> jax.Array:
            made = dreamer.act_in(cfg, model, state.params["actor"], rssm.State(deter, stoch))
            return dreamer.rssm_actions.sample_action(made, noise, model.actions)

        noise = draws.prior, draws.action
        return rssm.imagine(
            state.params, starts(window), policy, noise, cfg.horizon, **model.latent
        )

    def behaviour(state: Any, window: Any, draws: Any, number: Any) -> PyTree:
        def loss(heads: PyTree) -> jax.Array:
            made = dreamer.imagine(
                cfg, model, {**state.params, **heads}, state.slow, state.range_, starts(window),
                draws,
            )  # fmt: skip
            return jnp.mean(made.actor) + jnp.mean(made.critic)

        return jax.value_and_grad(loss)({name: state.params[name] for name in ("actor", "critic")})

    def optimiser(state: Any, window: Any, draws: Any, number: Any) -> PyTree:
        # moments stand in for a gradient: arrays of the same shapes that XLA does not know
        grads = jax.tree.map(lambda x: 1e-3 * x, state.params)
        moves, opt = dreamer.optimiser(cfg, number).update(grads, state.opt, state.params)
        return jax.tree.map(jnp.add, state.params, moves), opt

    return {
        "update": update, "world model": world_model, "imagination": imagination,
        "behaviour": behaviour, "optimiser": optimiser,
    }  # fmt: skip


def over(fn: Callable[..., PyTree], seeds: int, mode: str) -> Callable[..., PyTree]:
    """`fn` of one seed, or of several; the number of the update is the same for all."""
    if seeds == 1:
        return fn
    if mode == "vmap":
        return jax.vmap(fn, (0, 0, 0, None))
    return lambda *args: jax.lax.map(lambda own: fn(*own, args[3]), args[:3])


def arguments(cfg: Config, spec: EnvSpec, seeds: int) -> tuple[Any, ...]:
    small = cfg.__class__(**{**vars(cfg), "buffer_size": cfg.num_envs * window_length(cfg),
                             "start_windows": 1})  # fmt: skip

    def one(key: jax.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 3)
        state = dreamer.init(small, spec, keys[0])._replace(replay=(), queue=(), arrived=())
        return state, window_of(cfg, spec, keys[1]), dreamer.draw(cfg, spec, keys[2])

    keys = jax.random.split(jax.random.key(0), seeds)
    made = jax.jit(one)(keys[0]) if seeds == 1 else jax.jit(jax.vmap(one))(keys)
    return *made, jnp.int32(5)


def row_of(
    size: str, kind: str, seeds: int, mode: str, names: list[str], repeats: int
) -> dict[str, Any]:
    """The milliseconds of the parts of one size, and what the update needs beside."""
    cfg, spec = Config(size=size), spec_of(kind)
    args, found = arguments(cfg, spec, seeds), {}
    row: dict[str, Any] = {"size": size, "kind": kind, "seeds": seeds, "mode": mode}
    runs: dict[str, Callable[[], float]] = {}
    for name, fn in parts(cfg, spec).items():
        if name not in names:
            continue
        lowered = jax.jit(over(fn, seeds, mode)).lower(*args)
        compile_s, found[name] = timed(lowered.compile)
        runs[name] = lambda ready=found[name]: timed(ready, *args)[0]
        runs[name]()
        if name == "update":
            row |= {
                "compile_s": compile_s,
                "temporary_mb": found[name].memory_analysis().temp_size_in_bytes / 1e6,
                "gflop": seeds * flops(fn, *_first(args, seeds)) / 1e9,
            }
    row["seconds"] = alternate(runs, repeats)
    row["ms"] = {name: 1e3 * statistics.median(times) for name, times in row["seconds"].items()}
    if "update" in found and jax.default_backend() != "cpu":
        row["kernels"], row["host_reads"] = launched(lambda: found["update"](*args))
    return row


def _first(args: tuple[Any, ...], seeds: int) -> tuple[Any, ...]:
    return args if seeds == 1 else (*jax.tree.map(lambda x: x[0], args[:3]), args[3])


def ceiling(dtype: str, repeats: int) -> float:
    """GFLOP/s of large matrix products."""
    side = CEILING if jax.default_backend() == "cpu" else 4 * CEILING
    x = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    timed(product, x, x)
    seconds = alternate({"product": lambda: timed(product, x, x)[0]}, max(repeats, 3))["product"]
    return 2 * side**3 / min(seconds) / 1e9


def loop_row(size: str, seeds: int, mode: str, steps: int, repeats: int) -> dict[str, Any]:
    """The whole loop on CartPole with small batches: environment steps a second."""
    fields = {name: value for name, value in LOOP.items() if name != "env"}
    env, definition = make_env(LOOP["env"]), AGENTS["dreamer"]
    config = definition.config_for(env.spec, size=size, **fields)
    schedule = definition.make(config, env.spec).schedule
    before = schedule.warmup_steps + schedule.prefill_steps
    job = make_job(
        definition, env, before + steps, seeds, 0, steps, 0, None, mode, {"size": size, **fields}
    )
    compile_s, run = compiled_period(job)
    seconds = alternate({"loop": run}, repeats)["loop"]
    taken = job.program.plan.steps_per_period * job.program.plan.num_envs
    return {
        "size": size, **LOOP, "seeds": seeds, "mode": job.mode, "steps": taken,
        "compile_s": compile_s, "seconds": seconds,
        "env_steps_per_s": seeds * taken / statistics.median(seconds),
    }  # fmt: skip


HEADER = ["size", "observations", "seeds", "mode", "update ms", "world model", "imagination",
          "behaviour", "optimiser", "GFLOP", "share of ceiling", "compile s", "temporary MB",
          "kernels"]  # fmt: skip


def cells(row: dict[str, Any], best: float) -> list[Any]:
    ms = row["ms"]
    times = [f"{ms[name]:.1f}" if name in ms else "-" for name in PARTS]
    share = f"{row['gflop'] / ms['update'] * 1e3 / best:.0%}" if "update" in ms else "-"
    made = [f"{row[name]:.1f}" if name in row else "-" for name in ("compile_s", "temporary_mb")]
    return [row["size"], row["kind"], row["seeds"], row["mode"], *times,
            f"{row.get('gflop', 0):.1f}", share, *made, row.get("kernels", "-")]  # fmt: skip


PARTS = ("update", "world model", "imagination", "behaviour", "optimiser")


def modes(seeds: int) -> Iterator[str]:
    yield from ("vmap",) if seeds == 1 else seed_modes(seeds)


def main() -> None:
    parser = options(__doc__, "quick")
    parser.add_argument("--sizes", nargs="+", default=["1m", "12m", "50m"])
    parser.add_argument("--kinds", nargs="+", default=list(OBSERVATIONS), choices=OBSERVATIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--loops", action="store_true", help="the whole loop too, of each size")
    parser.add_argument("--steps", type=int, default=64, help="environment steps of the loop")
    args = parser.parse_args()
    start_jax(1)
    if args.quick:
        args.sizes, args.kinds, args.seeds, args.steps = ["nano"], ["vector"], [1], 8
    dtype = str(jnp.dtype(model_of(Config(), spec_of("vector")).dtype))
    best = ceiling(dtype, args.repeats)
    record = Results(args, "bench_dreamer", dtype=dtype, ceiling_gflop_per_s=best)
    print(f"matrix products in {dtype}: {best:,.0f} GFLOP/s")
    for size in args.sizes:
        for kind in args.kinds:
            for seeds in args.seeds:
                for mode in modes(seeds):
                    row = row_of(size, kind, seeds, mode, args.parts, args.repeats)
                    record.add(row)
                    print(line(cells(row, best)), flush=True)
        if args.loops:
            for seeds in args.seeds:
                for mode in modes(seeds):
                    record.add(loop_row(size, seeds, mode, args.steps, args.repeats), "loops")
                    print(
                        f"{size}, {seeds} seeds, {mode}: "
                        f"{record.data['loops'][-1]['env_steps_per_s']:.0f} steps/s",
                        flush=True,
                    )
    print("\n" + markdown(HEADER, (cells(row, best) for row in record.data["rows"])))
    print(f"\nwritten: {record.path}")


if __name__ == "__main__":
    main()
