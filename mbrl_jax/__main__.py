"""The command line: train, evaluate, compare, list."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from mbrl_jax.runtime.console import guarded, parse, tell
from mbrl_jax.types import RESERVED, InputError, unknown

_USAGE = """usage: mbrl-jax COMMAND ...

  train AGENT --env ID --total-steps T --out DIR   train many seeds at once
  evaluate DIR                                     greedy episodes from the newest checkpoint
  compare DIR DIR ...                              a table with intervals, and one plot
  list agents|envs                                 what there is

mbrl-jax train AGENT --help shows every option with its default and meaning.
"""


def _arg(text: str, **kwargs: Any) -> Any:
    return tyro.conf.arg(help=text, **kwargs)


@dataclasses.dataclass(kw_only=True)
class TrainOptions:
    """Options of `train` that every agent shares."""

    env: Annotated[str, _arg("environment id; `list envs` shows them")]
    total_steps: Annotated[int, _arg("environment steps of each seed")]
    out: Annotated[Path, _arg("the run folder to write")]
    env_args: Annotated[
        tuple[str, ...],
        _arg("KEY=VALUE ...: constructor arguments and parameters of the environment"),
    ] = ()
    seeds: Annotated[int, _arg("independent runs, all at once")] = 1
    seed: Annotated[int, _arg("of the key that the runs' keys are split from")] = 0
    eval_every: Annotated[
        int | None,
        _arg(
            "environment steps between evaluations; if None a twentieth of the total, and with "
            "--resume that of the run"
        ),
    ] = None
    eval_episodes: Annotated[int, _arg("greedy episodes of an evaluation")] = 10
    eval_max_steps: Annotated[
        int | None, _arg("ends an evaluation episode early; the environment's limit if None")
    ] = None
    seed_mode: Annotated[
        str,
        _arg(
            "vmap: a device's seeds in one batch; map: one after another; auto: map on a CPU for "
            "agents with networks"
        ),
    ] = "auto"
    checkpoint_every: Annotated[
        int | None,
        _arg(
            "environment steps between checkpoints, rounded up to whole evaluations; if None a "
            "state of up to 64 MiB (all seeds) is saved at every evaluation, a larger one so "
            "rarely that an evaluation writes 64 MiB on average, but four times a run at least"
        ),
    ] = None
    keep_checkpoints: Annotated[int, _arg("how many of the newest checkpoints stay")] = 3
    resume: Annotated[
        bool,
        _arg(
            "go on from the newest checkpoint in --out, also to a larger --total-steps with the "
            "same evaluation periods; --checkpoint-every and --keep-checkpoints may change"
        ),
    ] = False
    cpu_devices: Annotated[
        int | None, _arg("spread the seeds over this many CPU devices; the cores if None")
    ] = None
    coordinator: Annotated[
        str | None,
        _arg("HOST:PORT of process 0, for runs over several hosts; auto asks the cluster"),
    ] = None
    num_processes: Annotated[int | None, _arg("how many processes take part")] = None
    process_id: Annotated[int | None, _arg("which of them this one is")] = None


@dataclasses.dataclass
class EvaluateOptions:
    run: Annotated[tyro.conf.Positional[Path], _arg("a run folder")]
    episodes: Annotated[int, _arg("greedy episodes of each seed")] = 100
    seed: Annotated[int, _arg("of the evaluation's keys")] = 0


@dataclasses.dataclass
class CompareOptions:
    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], _arg("run folders, the baseline first")]
    metric: Annotated[str, _arg("a column of metrics.csv")] = "eval_return"
    out: Annotated[Path, _arg("the plot to write, as PNG and SVG")] = Path("compare.png")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Returns:
      0; 2 for bad input or where the output cannot be written; 3 for divergence; 128 + n for
      signal n, that of a closed pipe (`| head -1`) among them.
    """
    return guarded(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(args: list[str]) -> int:
    commands = {"train": _train, "evaluate": _evaluate, "compare": _compare, "list": _list}
    try:
        if not args or args[0] in ("-h", "--help"):
            print(_USAGE, end="")
            return 0
        if args[0] not in commands:
            raise unknown("command", args[0], commands)
        return commands[args[0]](args[1:])
    except KeyboardInterrupt:
        resume = "; --resume goes on from the newest checkpoint" if args[0] == "train" else ""
        tell(f"interrupted{resume}")
        return 130
    except (InputError, ValueError) as error:
        if not isinstance(error, InputError) and not _from_analysis(error):
            raise
        tell(f"error: {error}")
        return 2


def _from_analysis(error: BaseException) -> bool:
    # analysis/ stands apart and raises plain ValueErrors of the same kind
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "mbrl_jax/analysis/" in trace.tb_frame.f_code.co_filename


def _train(args: list[str]) -> int:
    from mbrl_jax.agents import AGENTS

    if args[:1] in (["-h"], ["--help"]):
        print(f"usage: mbrl-jax train AGENT ...; AGENT: {', '.join(AGENTS)}")
        return 0
    if not args or args[0].startswith("-"):
        raise InputError(f"train: expected an agent first, one of {', '.join(AGENTS)}")
    definition = AGENTS[args[0]]
    preset = definition.config_for(_peek(args, "--env") or "")
    options_type = dataclasses.make_dataclass(
        "Train",
        [("agent", type(preset), dataclasses.field(default=preset))],
        bases=(TrainOptions,),
        kw_only=True,
    )
    options = parse(options_type, args[1:], f"mbrl-jax train {args[0]}")
    _check_processes(options)
    if definition.tabular or definition.dynamic_loops:
        from mbrl_jax.runtime import devices

        if definition.tabular:
            devices.loops_as_kernels()
        if definition.dynamic_loops:
            devices.loops_as_graphs()
    _start_backend(options.cpu_devices, options.seeds // (options.num_processes or 1))
    if options.coordinator is not None:
        _join(options)
    return _train_with(definition, options)


def _train_with(definition: Any, options: Any) -> int:
    from mbrl_jax.envs import make_env
    from mbrl_jax.runtime.logs import user_path
    from mbrl_jax.runtime.train import Diverged, Stopped, train

    out = user_path(options.out)
    config = options.agent
    overrides = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    env = make_env(options.env, **_env_args(options.env_args))
    try:
        result = train(
            definition,
            env,
            options.total_steps,
            options.seeds,
            out,
            seed=options.seed,
            eval_every=options.eval_every,
            eval_episodes=options.eval_episodes,
            eval_max_steps=options.eval_max_steps,
            seed_mode=options.seed_mode,
            checkpoint_every=options.checkpoint_every,
            keep_checkpoints=options.keep_checkpoints,
            resume=options.resume,
            progress=True,
            **overrides,
        )
    except Stopped as stopped:
        tell(stopped)
        return 128 + stopped.signum
    except Diverged as diverged:
        tell(f"error: {diverged}")
        return 3
    _report(out, result.history)
    return 0


def _report(out: Path, history: dict[str, Any]) -> None:
    from mbrl_jax.analysis import stats

    evaluated = history["eval_return"][:, -1]
    text = f"{out}: {evaluated.size} seeds, {history['env_steps'][-1]:,} environment steps each"
    if evaluated.size and not (evaluated != evaluated).any():
        point, low, high = stats.bootstrap_interval(evaluated)
        text += f"; final greedy return {point:.3f} (IQM, 95% interval {low:.3f} to {high:.3f})"
    print(text)


def _evaluate(args: list[str]) -> int:
    options = parse(EvaluateOptions, args, "mbrl-jax evaluate")
    _start_backend(None, 1)
    from rich.table import Table

    from mbrl_jax.analysis import stats
    from mbrl_jax.runtime.console import Output
    from mbrl_jax.runtime.evaluate import evaluate_run

    run, env_steps, returns, lengths = evaluate_run(options.run, options.episodes, options.seed)
    title = f"{run['agent']} on {run['env']} after {env_steps:,} steps, {options.episodes} episodes"
    table = Table("seed", "mean return", "least", "greatest", "mean length", title=title)
    for seed, (row, length) in enumerate(zip(returns, lengths, strict=True)):
        cells = (row.mean(), row.min(), row.max(), length.mean())
        table.add_row(str(seed), *(f"{cell:.3f}" for cell in cells))
    Output().print(table)
    point, low, high = stats.bootstrap_interval(returns.mean(axis=1))
    print(f"IQM over seeds {point:.3f}, 95% interval {low:.3f} to {high:.3f}")
    return 0


def _compare(args: list[str]) -> int:
    options = parse(CompareOptions, args, "mbrl-jax compare")
    from rich.table import Table

    from mbrl_jax.analysis import plots, runs, stats
    from mbrl_jax.runtime.console import Output
    from mbrl_jax.runtime.logs import read_config, user_path

    if not options.runs:
        raise InputError("compare: expected run folders; give at least one")
    folders, out = [user_path(folder) for folder in options.runs], user_path(options.out)
    configs = [read_config(folder) for folder in folders]
    worlds = [(config["env"], config["env_args"]) for config in configs]
    for folder, world in zip(folders, worlds, strict=True):
        if world != worlds[0]:
            raise InputError(
                f"compare: {folder} ran on {world}, {folders[0]} on {worlds[0]}; "
                "expected runs on one environment"
            )
    labels = _short_names(folders)
    tables = [runs.read_run(folder) for folder in folders]
    for folder, table in zip(folders, tables, strict=True):
        if options.metric not in table or options.metric in ("seed", "env_steps"):
            raise unknown(f"metric of {folder}:", options.metric, list(table)[2:])
    final = [table[options.metric][:, -1] for table in tables]
    shown = Table(
        "run", "agent", "seeds", "steps", f"{options.metric} (IQM)", "95% interval",
        f"P(better than {labels[0]})", title=f"{worlds[0][0]}, final evaluation",
    )  # fmt: skip
    for i, (label, config, table) in enumerate(zip(labels, configs, tables, strict=True)):
        point, low, high = stats.bootstrap_interval(final[i])
        better = "baseline"
        if i:
            p = stats.probability_of_improvement(final[i], final[0])
            better = f"{p.point:.2f} ({p.low:.2f} to {p.high:.2f})"
        steps = f"{table['env_steps'][-1]:,}"
        shown.add_row(
            label, config["agent"], str(len(final[i])), steps, f"{point:.3f}",
            f"{low:.3f} to {high:.3f}", better,
        )  # fmt: skip
    # a pipe gets the whole table, not one cut at 80 columns
    Output(width=None if sys.stdout.isatty() else 160).print(shown)
    curves = {
        label: (table["env_steps"], table[options.metric])
        for label, table in zip(labels, tables, strict=True)
    }
    ylabel = options.metric.replace("_", " ")
    try:
        paths = plots.learning_curves(curves, out, title=worlds[0][0], ylabel=ylabel)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from error
    print(f"plot: {', '.join(map(str, paths))}")
    return 0


def _short_names(folders: list[Path]) -> list[str]:
    """The last parts of paths, as few as tell them apart."""
    for num in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = [str(Path(*folder.parts[-num:])) for folder in folders]
        if len(set(names)) == len(set(folders)):
            break
    return names


def _list(args: list[str]) -> int:
    if args == ["agents"]:
        from mbrl_jax.agents import AGENTS

        for name, definition in AGENTS.items():
            print(f"{name:22}{definition.summary}")
        return 0
    if args == ["envs"]:
        from mbrl_jax.envs import list_envs, make_env

        for name in list_envs():
            spec = make_env(name).spec
            actions = f"{spec.num_actions} actions" if spec.discrete else f"{spec.action_shape}"
            obs = f"{spec.num_obs} states" if spec.num_obs else f"{spec.obs_shape}"
            if spec.obs_parts:
                parts = [part.shape for name, part in spec.obs_parts if name not in RESERVED]
                obs = " ".join(map(str, parts))
            print(f"{name:28}{obs:16}{actions:14}limit {spec.episode_limit}")
        return 0
    raise InputError(f"list {' '.join(args)!r}: expected `list agents` or `list envs`")


def _peek(args: list[str], name: str) -> str | None:
    for i, arg in enumerate(args):
        if arg == name and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(name + "="):
            return arg.partition("=")[2]
    return None


def _env_args(pairs: tuple[str, ...]) -> dict[str, Any]:
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"--env-args {pair!r}: expected KEY=VALUE, such as is_slippery=false")
        words = {"true": True, "false": False, "none": None}
        try:
            values[name] = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values


def _start_backend(cpu_devices: int | None, seeds: int) -> None:
    """Sets what JAX reads before its backend starts, which importing gymnax does."""
    import jax

    if cpu_devices is not None and cpu_devices < 1:
        raise InputError(f"--cpu-devices {cpu_devices}: expected 1 or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(RuntimeError):  # a program that calls main may have started it
        jax.config.update("jax_num_cpu_devices", cpu_devices or max(1, min(cores or 1, seeds)))
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and (cache := _cache_folder()):
        jax.config.update("jax_compilation_cache_dir", str(cache))


def _cache_folder() -> Path | None:
    """Where compiled programs stay for the next process; None where nothing can be written."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # https://specifications.freedesktop.org/basedir-spec: relative paths are ignored
        folder = (given if given.is_absolute() else Path.home() / ".cache") / "mbrl_jax"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    writable = folder.is_absolute() and os.access(folder, os.W_OK | os.X_OK)
    return folder if writable else None


def _check_processes(options: Any) -> None:
    """Raises InputError unless the options of a run over several processes come together."""
    count, number = options.num_processes, options.process_id
    if options.coordinator in (None, "auto"):
        if count is not None or number is not None:
            raise InputError("--num-processes, --process-id: expected --coordinator HOST:PORT too")
        return
    if not re.fullmatch(r"\S+:\d+", options.coordinator):
        raise InputError(f"--coordinator {options.coordinator}: expected HOST:PORT, or auto")
    if count is None or number is None:
        raise InputError("--coordinator: expected --num-processes and --process-id beside it")
    if not 0 <= number < count:
        raise InputError(f"--process-id {number}: expected 0 or more, below {count} processes")


def _join(options: Any) -> None:
    import jax

    if options.coordinator == "auto":
        jax.distributed.initialize()
        return
    jax.distributed.initialize(options.coordinator, options.num_processes, options.process_id)


if __name__ == "__main__":
    sys.exit(main())
