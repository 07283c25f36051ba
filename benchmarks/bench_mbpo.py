"""Seconds of 1,000 real steps of MBPO, the whole loop and its parts, against mbrl-lib's MBPO.

Two sizes on equal settings, the same networks, batches, epochs, rollouts and updates on both sides:

- Pendulum: Pendulum-v1, model 2 x 128 with 5 members (mbrl-lib cannot cut the rollouts into 3
  elites), policy and critics 2 x 64, 20 updates a step.
- HalfCheetah: 17 observations and 6 actions that drift linearly (so that the environment costs
  nothing), model 4 x 200 with 7 members, policy and critics 2 x 256, 40 updates a step.
- HalfCheetah-v5, only where --sizes names it: the robot itself (extra `envs`) and the preset, whose
  settings are the paper's, trained until the model stops getting better; ours alone.

The model is trained every `period` steps for the same number of passes, without early stopping. The
clock runs over as many steps, updates and trainings on both sides, from the first step with a model
to the end; neither side is evaluated, and our compilation is told apart. The sides alternate; the
ratio is the median of the pairs'. Several seeds are one run of ours (one after another on each CPU
device, in one batch on an accelerator) against as many of theirs in turn.

The parts are functions of ours alone, compiled and timed by themselves and multiplied by how often
1,000 steps call them.

    python benchmarks/bench_mbpo.py

mbrl-lib lives in benchmarks/.venv-mbrl-lib, which bench_models.py makes too. Writes
benchmarks/results/bench_mbpo.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import peer_process
from bench_models import MBRL_LIB, MBRL_LIB_NEEDS
from common import (
    HERE,
    Record,
    against,
    alternate,
    line,
    markdown,
    options,
    ratio_text,
    start_jax,
    timed,
)
from peer_process import Peer

from mbrl_jax import AGENTS, make_env
from mbrl_jax.agents import sac
from mbrl_jax.envs import Env
from mbrl_jax.models import ensemble, rollout
from mbrl_jax.runtime import devices
from mbrl_jax.runtime.loop import make_program
from mbrl_jax.types import EnvSpec, NStep, Transition

SIZES = {
    "Pendulum": {
        "env": "Pendulum-v1", "shape": (3, 1), "steps": 1_000, "period": 100, "warmup": 500,
        "model_hidden": 128, "model_layers": 2, "members": 5, "elites": 5, "model_batch": 128,
        "epochs": 20, "rollouts": 100, "sac_hidden": 64, "updates": 20, "batch": 128,
        "real_ratio": 0.05,
    },
    "HalfCheetah": {
        "env": "linear", "shape": (17, 6), "steps": 250, "period": 250, "warmup": 5_000,
        "model_hidden": 200, "model_layers": 4, "members": 7, "elites": 5, "model_batch": 256,
        "epochs": 20, "rollouts": 400, "sac_hidden": 256, "updates": 40, "batch": 256,
        "real_ratio": 0.05,
    },
}  # fmt: skip


PAPER = {"HalfCheetah-v5": {"env": "HalfCheetah-v5", "steps": 500, "warmup": 5_000}}
"""Sizes of a preset, which has the rest."""


def world(size: dict[str, Any]) -> Env:
    return drift(*size["shape"]) if size["env"] == "linear" else make_env(size["env"])


def drift(num_obs: int, num_actions: int) -> Env:
    """obs' = 0.95 obs + 0.1 times the action, repeated over the dimensions."""
    # gymnax starts the backend, which has to wait until `main` has set the devices
    from gymnax.environments import environment

    class Linear(environment.Environment):
        def reset_env(self, key: jax.Array, params: Any) -> Any:
            obs = jnp.zeros(num_obs)
            return obs, {"time": jnp.int32(0), "obs": obs}

        def step_env(self, key: jax.Array, state: Any, action: Any, params: Any) -> Any:
            obs = 0.95 * state["obs"] + 0.1 * jnp.resize(action, (num_obs,))
            state = {"time": state["time"] + 1, "obs": obs}
            return obs, state, -jnp.sum(jnp.square(obs)), jnp.bool_(False), {}

        def is_truncated(self, state: Any, params: Any) -> jax.Array:
            return state["time"] >= 1_000

    low, high = (-1.0,) * num_actions, (1.0,) * num_actions
    spec = EnvSpec("linear", (num_obs,), "float32", 1_000, action_low=low, action_high=high)
    base = Linear()
    return Env(base, base.default_params, spec, low, high)


def config(size: dict[str, Any]) -> Any:
    memory = {"buffer_size": size["warmup"] + size["steps"], "warmup_steps": size["warmup"]}
    if "model_hidden" not in size:
        return AGENTS["mbpo"].config_for(size["env"], **memory)
    hidden = (size["sac_hidden"],) * 2
    return AGENTS["mbpo"].config_for(
        "",
        model={
            "hidden": (size["model_hidden"],) * size["model_layers"], "weight_decay": (5e-5,),
            "learn_bounds": False, "normalise_targets": False, "termination": "never",
        },
        training={
            "batch_size": size["model_batch"], "max_epochs": size["epochs"],
            "patience": size["epochs"],
        },
        sac={"hidden": hidden, "critic_hidden": hidden},
        num_members=size["members"], num_elites=size["elites"], model_period=size["period"],
        rollouts_per_step=size["rollouts"], retained=max(size["steps"] // size["period"], 1),
        real_ratio=size["real_ratio"], batch_size=size["batch"], updates=size["updates"], **memory,
    )  # fmt: skip


def whole(size: dict[str, Any], seeds: int) -> tuple[Callable[[], float], float]:
    """Runs of `steps` real steps after the warm-up, and the seconds of compilation."""
    env, cfg, agent = world(size), config(size), AGENTS["mbpo"]
    total = size["warmup"] + size["steps"]
    program = make_program(agent, env, cfg, total, size["steps"], 0)
    mesh = devices.seed_mesh(seeds)
    mode = devices.seed_mode("auto", jax.eval_shape(program.init, jax.random.key(0), cfg).agent)
    init = jax.jit(devices.over_seeds(program.init, mesh, mode, shared=1))
    period = jax.jit(devices.over_seeds(program.period, mesh, mode, shared=2))
    keys = devices.put_seeds(jax.random.split(jax.random.key(0), seeds), mesh)
    run = jax.block_until_ready(init(keys, cfg))
    compile_s, ready = timed(lambda: period.lower(run, cfg, jnp.int32(0)).compile())
    return lambda: timed(ready, run, cfg, jnp.int32(0))[0], compile_s


def parts(size: dict[str, Any], repeats: int) -> dict[str, float]:
    """Seconds of 1,000 steps spent in each part, timed by itself."""
    env, cfg = world(size), config(size)
    spec, thousand = env.spec, 1_000
    models = ensemble.make(cfg.model, spec, cfg.num_members, cfg.num_elites)
    learner = sac.make_learner(cfg.sac, spec)
    num = cfg.rollouts_per_step * cfg.model_period
    keys = jax.random.split(jax.random.key(0), 8)
    params, state = models.init(keys[0]), learner.init(keys[1])

    def rows(key: jax.Array, *lead: int) -> Transition:
        obs = jax.random.normal(key, (*lead, *spec.obs_shape))
        flag = jnp.zeros(lead, bool)
        return Transition(obs, jnp.tanh(jax.random.normal(key, (*lead, *spec.action_shape))),
                          jnp.zeros(lead), 0.9 * obs, flag, flag)  # fmt: skip

    def train(params: Any, data: Transition) -> Any:
        size_now = jnp.int32(data.reward.shape[0])
        opt = models.init_opt(params)
        return models.fit(params, opt, cfg.training, data, size_now, keys[2])[0].net

    def imagine(params: Any, state: Any, obs: jax.Array) -> Any:
        def act(obs: jax.Array, key: jax.Array, depth: jax.Array) -> jax.Array:
            distribution = learner.policy(state.params.actor, obs)
            noise = jax.random.normal(key, distribution.mean_before.shape)
            return distribution.from_noise(noise)[0]

        return rollout.rollout(models.model("ts1"), params, obs, act, keys[3], max_length=1)

    def learn(state: Any, batches: NStep) -> Any:
        return learner.update(state, batches, keys[4], jnp.int32(0))[0]

    def step(world_state: Any, actions: jax.Array) -> Any:
        return jax.lax.scan(lambda s, a: (env.step(keys[5], s, a)[0], None), world_state, actions)[
            0
        ]

    batch = rows(keys[6], cfg.updates, cfg.batch_size)
    batches = NStep(*batch[:4], jnp.full(batch.reward.shape, 0.99))
    calls = {
        "model training": (
            thousand / cfg.model_period, train, params, rows(keys[6], cfg.buffer_size),
        ),
        "rollouts": (thousand / cfg.model_period, imagine, params, state, rows(keys[6], num).obs),
        "policy updates": (thousand, learn, state, batches),
        "environment": (
            1, step, env.reset(keys[7])[0], jnp.zeros((thousand, *spec.action_shape)),
        ),
    }  # fmt: skip
    found = {}
    for name, (times, fn, *args) in calls.items():
        ready = jax.jit(fn)
        timed(ready, *args)
        seconds = alternate({name: lambda one=ready, args=args: timed(one, *args)[0]}, repeats)
        found[name] = times * statistics.median(seconds[name])
    return found


def main() -> None:
    parser = options(__doc__, "no-peers", "quick", repeats=3)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=[*SIZES, *PAPER])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    start_jax(2)

    folder = HERE / ".venv-mbrl-lib"
    if not args.quick and not args.no_peers:
        peer_process.provide(folder, MBRL_LIB, *MBRL_LIB_NEEDS, loose="mbrl")
    with_peer = not args.no_peers and peer_process.has(folder, MBRL_LIB)
    record = Record(args, "bench_mbpo", versions=MBRL_LIB)
    for name in args.sizes:
        size = {**SIZES, **PAPER}[name]
        if args.quick:
            size = {**size, "steps": 8, "period": 4, "warmup": 300, "epochs": 1, "updates": 1}
        split = parts(size, args.repeats)
        for seeds in args.seeds:
            run, compile_s = whole(size, seeds)
            run()
            peer = None
            if with_peer and name in SIZES:
                peer = Peer(
                    peer_process.interpreter(folder), HERE / "peer_mbpo.py", env=size["env"],
                    shape=size["shape"], steps=size["steps"], settings=size,
                )  # fmt: skip
            row: dict[str, Any] = {"size": name, "seeds": seeds, "compile_s": compile_s}
            row |= {"parts": split, "steps": size["steps"]}
            # theirs trains one seed after another
            theirs = peer.seconds if peer else None
            row |= against(run, theirs, args.repeats, scale=seeds)
            if peer:
                row["peer"] = peer.info
                peer.close()
            record.add(row)
            print(line(cells(row)), flush=True)
    print(f"\n{markdown(HEADER, map(cells, record.data['rows']))}\n\nwritten: {record.path}")


HEADER = [
    "size", "seeds", "s per 1,000 steps and seed", "theirs", "ratio", "training", "rollouts",
    "updates", "environment", "compile s",
]  # fmt: skip


def cells(row: dict[str, Any]) -> list[Any]:
    each = 1_000 / row["steps"] / row["seeds"]
    ours, theirs = (
        f"{each * statistics.median(row[side]):.1f}" if side in row else "-"
        for side in ("seconds", "peer_seconds")
    )
    parts = [f"{seconds:.2f}" for seconds in row["parts"].values()]
    return [row["size"], row["seeds"], ours, theirs, ratio_text(row), *parts,
            f"{row['compile_s']:.1f}"]  # fmt: skip


if __name__ == "__main__":
    main()
