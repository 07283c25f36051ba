"""The host driver: the compiled loop in equal chunks, with logs, checkpoints and resume between.

Each chunk is one period of `runtime.loop`, the same compiled function with donated state, so the
result is bit for bit that of the uncut `make_train` on the same seeds.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mbrl_jax.agents import AGENTS, AgentDef
from mbrl_jax.envs import Env, make_env
from mbrl_jax.runtime import devices, logs, reuse
from mbrl_jax.runtime.folder import Saving, prepare
from mbrl_jax.runtime.loop import Evaluate, Program, RunState, make_program
from mbrl_jax.runtime.plan import Plan
from mbrl_jax.types import Agent, InputError, PyTree


class Result(NamedTuple):
    """What `train` gives: learner states [seeds, ...] and metrics by name."""

    state: PyTree
    history: dict[str, np.ndarray]  # `env_steps` [evaluations], the others [seeds, evaluations]


class Stopped(Exception):
    """A signal ended the run after a whole chunk, which is saved."""

    def __init__(self, signum: int, out: Path, env_steps: int):
        name = signal.Signals(signum).name
        super().__init__(
            f"stopped by {name} at step {env_steps:,}, saved in {out}; "
            "go on with the same command and --resume"
        )
        self.signum = signum


class Diverged(Exception):
    """A metric, reward or observation was not finite; the run stops and saves nothing after it."""

    def __init__(self, what: str, env_steps: int, saved: str):
        super().__init__(
            f"{what} by step {env_steps:,}, and the run has stopped; {saved}; "
            "try a smaller learning rate, or look at the environment's rewards and observations"
        )


def train(
    agent: str | AgentDef,
    env: str | Env,
    total_steps: int,
    seeds: int = 1,
    out: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    eval_every: int | None = None,
    eval_episodes: int = 10,
    eval_max_steps: int | None = None,
    seed_mode: str = "auto",
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 3,
    resume: bool = False,
    progress: bool = False,
    evaluate: Evaluate | None = None,
    **overrides: Any,
) -> Result:
    """Trains `seeds` independent runs of an agent at once.

    A process compiles a kind of run once: a later call with the same agent, environment (object),
    static fields, evaluation and lengths of periods, whatever its seed, floats and total, uses the
    program that there is. As under `jax.jit`, functions are taken to stay as they are; where one
    was changed in place, `jax.clear_caches()` has all traced anew.

    Args:
      agent: a name in `AGENTS`, or a definition of one's own.
      env: an id for `make_env`, or an environment from it.
      total_steps, eval_every, eval_episodes, eval_max_steps, evaluate: as in `make_train`.
      seeds: how many; run i has the same key for every number of seeds above i.
      out: a run folder to write: config.json, metrics.csv, checkpoints/, curve.png. Nothing is
        written without it.
      seed: of the key from which the runs' keys are split.
      seed_mode: "vmap" runs a device's seeds in one batch, "map" one after another, "auto" takes
        map on a CPU for agents with networks.
      checkpoint_every: environment steps of a seed between two checkpoints in `out`, rounded up to
        whole evaluation periods. By default a state of up to 64 MiB (all seeds) is written at every
        evaluation; a larger one so rarely that an evaluation costs 64 MiB of writing on average,
        but four times a run at least (`folder.default_spacing`). The end of the run and a
        signal are always saved. What a kill loses is the time since the newest checkpoint: a
        resume trains it again, to the same bits.
      keep_checkpoints: how many of the newest stay; `out` holds one more while it is written.
      resume: go on from the newest checkpoint in `out`. Its periods hold where `eval_every` is not
        given, and `checkpoint_every`, `keep_checkpoints` and `total_steps` may change: a run goes
        on to a larger total as the longer run would have gone, bit for bit, since no agent knows
        the total (schedules count steps). The new total has to have the same periods.
      progress: show steps/s and the newest return.
      **overrides: fields of the agent's config.

    Returns:
      Result; with several processes the state stays spread over their devices.

    Raises:
      InputError: bad input, before anything compiles or is written; a folder that holds another
        run, or one that has done more than `total_steps`; a damaged checkpoint; a full disk.
      Stopped: SIGINT or SIGTERM came while `out` was being written, and the run is saved.
      Diverged: a metric of the agent, a reward or an observation was NaN or infinite.
    """
    if resume and out is None:
        raise InputError("resume = True: expected `out`, the folder of the run to go on with")
    saving = Saving(checkpoint_every, keep_checkpoints)
    saving.check()
    out = None if out is None else logs.user_path(out)
    if resume and eval_every is None and out is not None and (out / "config.json").exists():
        eval_every = logs.read_config(out).get("eval_every")
    job = make_job(
        agent, env, total_steps, seeds, seed, eval_every, eval_episodes, eval_max_steps, seed_mode,
        overrides, evaluate,
    )  # fmt: skip
    if out is None:
        return _run_in_memory(job, progress)
    return _run_in_folder(job, out, resume, progress, saving)


class Job(NamedTuple):
    """A checked training run, ready to compile."""

    run: dict[str, Any]  # all that determines the result, as JSON values; see `config.json`
    env: Env
    agent: Agent
    program: Program
    config: Any
    mode: str  # of the seeds, "vmap" or "map"
    mesh: Mesh

    def functions(self) -> tuple[Any, Any]:
        """Jitted `init(keys, config)` and `chunk(run, config, index)`, which donates `run`."""
        return reuse.compiled(self.program.init, self.program.period, self.mesh, self.mode)

    def keys(self) -> jax.Array:
        """[seeds] keys; run i has the same one for every number of seeds above i."""
        keys = jax.random.split(jax.random.key(self.run["seed"]), self.run["seeds"])
        return devices.put_seeds(keys, self.mesh)

    def like(self) -> RunState:
        """Shapes and shardings of the run state, for a restore."""
        shapes = self.functions()[0].eval_shape(self.keys(), traced(self.config))
        sharding = NamedSharding(self.mesh, PartitionSpec("seed"))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )


def make_job(
    agent: str | AgentDef,
    env: str | Env,
    total_steps: int,
    seeds: int,
    seed: int,
    eval_every: int | None,
    eval_episodes: int,
    eval_max_steps: int | None,
    seed_mode: str,
    overrides: dict[str, Any],
    evaluate: Evaluate | None = None,
) -> Job:
    """Checks the arguments of `train`; compiles nothing and touches no file."""
    definition = agent if isinstance(agent, AgentDef) else AGENTS[agent]
    env = make_env(env) if isinstance(env, str) else env
    config = definition.config_for(env.spec, **overrides)
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise InputError(f"seeds = {seeds!r}: expected a whole number, 1 or more")
    devices.check_seed(seed)
    program = make_program(
        definition, env, config, total_steps, eval_every, eval_episodes, eval_max_steps, evaluate
    )
    built = definition.make(config, env.spec)
    program = reuse.shared(
        program, definition, env, config, built.schedule, eval_episodes, eval_max_steps, evaluate
    )
    shapes = reuse.alone(program.init).eval_shape(jax.random.key(0), config)
    run = {
        "agent": definition.name,
        "env": env.spec.id,
        "env_args": dict(env.arguments),
        "total_steps": total_steps,
        "seeds": seeds,
        "seed": seed,
        "eval_every": program.plan.steps_per_period * program.plan.num_envs,
        "eval_episodes": eval_episodes,
        "eval_max_steps": eval_max_steps,
        "seed_mode": seed_mode,
        "config": logs.config_fields(config),
    }
    if evaluate is not None:
        run["evaluate"] = getattr(evaluate, "__qualname__", type(evaluate).__qualname__)
    devices.check_memory(shapes, seeds)
    mode = devices.seed_mode(seed_mode, shapes.agent)
    run = json.loads(json.dumps(run))  # tuples as the lists that a file gives back
    return Job(run, env, built, program, config, mode, devices.seed_mesh(seeds))


def load_job(out: Path) -> Job:
    """The job of a run folder, from its config.json; InputError where that is not a run's."""
    run = logs.read_config(out)
    try:
        env = make_env(run["env"], **run["env_args"])
        job = make_job(
            run["agent"], env, run["total_steps"], run["seeds"], run["seed"], run["eval_every"],
            run["eval_episodes"], run["eval_max_steps"], run["seed_mode"], run["config"],
        )  # fmt: skip
        return job._replace(run=run)  # an evaluation of one's own is known by its name alone
    except (KeyError, TypeError) as error:
        raise InputError(f"{out / 'config.json'} is damaged ({error!r})") from error


def traced(config: Any) -> Any:
    """The config with its floats as arrays, so that new values never recompile."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32), config)


def _chunks(
    job: Job, run: RunState | None, first: int, display: logs.Display
) -> Iterator[tuple[int, RunState, dict[str, np.ndarray]]]:
    """Runs the periods from `first` on: (period, run after it, metrics [seeds])."""
    init, chunk = job.functions()
    config = traced(job.config)
    told: set[str] = set()
    run = init(job.keys(), config) if run is None else run
    for period in range(first, job.program.plan.periods):
        run, metrics = chunk(run, config, jnp.int32(period))
        metrics = _means(devices.to_host(metrics))
        display.update(job.program.plan.env_steps(period), job.run["seeds"], metrics)
        _warn_of_clipping(metrics, told)
        yield period, run, metrics


def _means(metrics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A mean over no episode is NaN, which the program must not give under JAX_DEBUG_NANS."""
    none = metrics["train_episodes"] == 0
    names = ("train_return", "train_length")
    return metrics | {name: np.where(none, np.float32(np.nan), metrics[name]) for name in names}


def _warn_of_clipping(metrics: dict[str, np.ndarray], told: set[str]) -> None:
    """Says once in a run that targets lie beyond the bins of a distribution, which clips them.

    An agent with such bins gives `X_clipped`, the share of targets, and `X_largest`, the largest
    magnitude in a batch, as metrics, which are means over updates.

    Args:
      metrics: [seeds] by name.
      told: names that were told of; grows.
    """
    for name in metrics:
        kind = name.removesuffix("_clipped")
        if kind != name and kind not in told and np.any(metrics[name] > 0):
            told.add(kind)
            share, largest = np.max(metrics[name]), np.max(metrics[f"{kind}_largest"])
            warnings.warn(
                f"{share:.2%} of the {kind} targets lie beyond the agent's bins and are clipped; "
                f"the largest of a batch is {largest:.6g} on average; widen reward_range or "
                "value_limit",
                stacklevel=2,
            )


def _run_in_memory(job: Job, progress: bool) -> Result:
    plan = job.program.plan
    rows = []
    with closing(logs.Display(plan.env_steps(plan.periods - 1), 0, progress)) as display:
        for period, state, metrics in _chunks(job, None, 0, display):
            rows.append(metrics)
            if (fault := _fault(metrics)) is not None:
                raise Diverged(fault, plan.env_steps(period), "nothing is saved without `out`")
            learner = state.agent
    history = {name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]}
    env_steps = np.array([plan.env_steps(period) for period in range(plan.periods)])
    return Result(learner, {"env_steps": env_steps, **history})


def _run_in_folder(job: Job, out: Path, resume: bool, progress: bool, saving: Saving) -> Result:
    from mbrl_jax.analysis import runs
    from mbrl_jax.runtime.checkpoint import Checkpoints

    plan, leader = job.program.plan, jax.process_index() == 0
    devices.on_leader(prepare, out, job.run, plan, resume)
    folder = out / "checkpoints"
    try:
        with closing(Checkpoints(folder, job.run, saving.keep_checkpoints)) as checkpoints:
            like = job.like()
            spacing = saving.spacing(plan, like)
            saved = checkpoints.newest()
            first = saved or 0
            done = plan.env_steps(first - 1) if first else 0
            if first > plan.periods:
                raise InputError(
                    f"total_steps = {job.run['total_steps']}: the run in {out} has done {done:,} "
                    "steps; expected at least as many, or another --out"
                )
            state = None if saved is None else checkpoints.restore(saved, like)
            devices.on_leader(logs.write_total, out, job.run["total_steps"])
            metrics_file = logs.MetricsFile(out)
            before = devices.on_leader(metrics_file.cut, done) or 0.0
            start = time.perf_counter()
            display = logs.Display(plan.env_steps(plan.periods - 1), done, progress and leader)
            chunks = _chunks(job, state, first, display)
            with _signals() as received, closing(display):
                for period, state, metrics in chunks:
                    wall = before + time.perf_counter() - start
                    devices.on_leader(metrics_file.append, plan.env_steps(period), wall, metrics)
                    if (fault := _fault(metrics)) is not None:
                        last = _last_good(plan, saved, folder)
                        raise Diverged(fault, plan.env_steps(period), last)
                    number = period + 1
                    if number % spacing == 0 or number == plan.periods:
                        checkpoints.save(number, state)
                        saved = number
                    if devices.any_process(bool(received)):
                        if saved != number:
                            checkpoints.save(number, state)
                        signum = received[0] if received else signal.SIGTERM
                        raise Stopped(signum, out, plan.env_steps(period))
        if leader:
            logs.draw_curve(out, job.run["agent"])
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or out}: {error.strerror}; mend that, then go on "
            "with --resume"
        ) from error
    history = runs.read_run(out)
    history = {name: column for name, column in history.items() if name != "seed"}
    return Result(state.agent, history)  # type: ignore[union-attr]  # restored, or run


def _fault(metrics: dict[str, np.ndarray]) -> str | None:
    """What is not finite in a chunk's metrics [seeds], or None."""
    faults = []
    for name, column in metrics.items():
        bad = ~np.isfinite(column)
        # these two are NaN where no episode has ended
        if name not in ("train_return", "train_length") and np.any(bad):
            seed = int(np.argmax(bad))
            faults.append(f"{name} was {column[seed]} (seed {seed})")
            break
    # either may have caused the other, so both are told
    steps = metrics["nonfinite_steps"]
    if np.any(steps > 0):
        seed = int(np.argmax(steps > 0))
        faults.append(
            f"{steps[seed]:.0f} rewards or observations of the environment were not finite "
            f"(seed {seed})"
        )
    return " and ".join(faults) or None


def _last_good(plan: Plan, saved: int | None, folder: Path) -> str:
    if saved is None:
        return f"there is no checkpoint yet in {folder.parent}"
    return (
        f"the last good checkpoint is {folder / str(saved)}, of step {plan.env_steps(saved - 1):,}"
    )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that a chunk ends whole; a second one acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(signum: int, frame: Any) -> None:
        received.append(signum)
        for s, handler in old.items():
            signal.signal(s, handler)

    for s in old:
        signal.signal(s, note)
    try:
        yield received
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
