"""The jobs of accelerator.py, the most valuable first, and which of them to run next.

A job is one command, small enough for one loan of a machine: `minutes` is what it is expected to
take on an H100, compilation included. Where `least` is given the command writes its rows as they
come, so that it may be started with fewer minutes than it needs, and cut.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {"dev": ("mctx",), "envs": ("mujoco", "mujoco.mjx", "gymnasium", "pgx")}
"""The modules that an extra brings, where a job needs it."""

LOOP = (
    "mbrl_jax/runtime/loop.py", "mbrl_jax/envs/env.py", "mbrl_jax/envs/classic.py",
    "mbrl_jax/prng.py",
)  # fmt: skip
MODELS = ("mbrl_jax/models", "mbrl_jax/nn", "mbrl_jax/planning")
LEARNERS = ("mbrl_jax/data", "mbrl_jax/nn", *LOOP)
MBPO = (
    "mbrl_jax/agents/mbpo.py", "mbrl_jax/agents/mbpo_presets.py", "mbrl_jax/agents/sac_learner.py",
    "mbrl_jax/models", *LEARNERS,
)  # fmt: skip
DREAMER = (
    "mbrl_jax/agents/dreamer.py", "mbrl_jax/agents/dreamer_config.py",
    "mbrl_jax/agents/dreamer_losses.py", "mbrl_jax/agents/dreamer_records.py",
    "mbrl_jax/models", *LEARNERS,
)  # fmt: skip
MUZERO = (
    "mbrl_jax/agents/muzero.py", "mbrl_jax/agents/muzero_config.py",
    "mbrl_jax/agents/muzero_losses.py", "mbrl_jax/agents/muzero_presets.py",
    "mbrl_jax/agents/muzero_search.py", "mbrl_jax/agents/muzero_targets.py",
    "mbrl_jax/models", "mbrl_jax/search", *LEARNERS,
)  # fmt: skip
ROBOTS = (*MBPO, "mbrl_jax/envs/locomotion.py")


class Job(NamedTuple):
    """One measurement: a script with its options, and the script's options at toy size.

    `{processes}`, `{seconds}` and `{run}` in the options stand for the number of processes that
    share the cores, the seconds after which a run saves itself and stops, and a run folder that
    stays for the next attempt with the same code.
    """

    name: str
    measures: str
    script: str
    options: str
    toy: str  # options of --smoke
    minutes: float  # expected
    code: tuple[str, ...]  # files and folders that it measures
    least: float | None = None  # minutes that give the first rows; None where rows come at the end
    extra: str = ""  # in EXTRAS
    earlier: str = ""  # a record made before the queue, of code that is not known
    environment: Mapping[str, str] = {}

    @property
    def start(self) -> float:
        """The minutes that have to be left for a start."""
        return self.minutes if self.least is None else self.least


def search(
    name: str, measures: str, options: str, minutes: float, toy: str = "", earlier: bool = False
) -> Job:
    """A part of bench_search.py, whose programs are compiled side by side."""
    small = "--repeats 1 --batches 2 --simulations 4 --actions 3"
    return Job(
        f"search_{name}", measures, "benchmarks/bench_search.py",
        f"{options} --processes {{processes}}", f"{toy or options} {small}",
        minutes, ("mbrl_jax/search",), least=1.5, extra="dev",
        earlier="bench_search_h100.json" if earlier else "",
        # memory is shared by the processes, and tuning would measure beside the measurements
        environment={
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": "--xla_gpu_autotune_level=0",
        },
    )  # fmt: skip


def search_table(policy: str, function: str) -> Job:
    name = "gumbel" if policy == "gumbel_muzero_policy" else "puct"
    options = f"--policies {policy} --functions {function} --tables rows"
    batches, cells = "", "36 cells"
    if (name, function) == ("puct", "residual"):  # those of 1024 roots are a job of their own
        batches, cells = " --batches 1 32 256", "27 cells"
    return search(
        f"{name}_{function}", f"{name} search, {function}, against mctx: {cells}",
        options + batches, 2.5, options, earlier=True,
    )  # fmt: skip


def model_free(agent: str, seeds: int, cells: int) -> Job:
    return Job(
        f"{agent}_{seeds}", f"{agent}, whole runs of {seeds} seed{'s'[: seeds - 1]}: {cells} cells",
        "benchmarks/bench_model_free.py",
        f"--agents {agent} --seeds {seeds} --repeats 3 --no-install",
        f"--agents {agent} --seeds {min(seeds, 2)} --repeats 1 --quick --no-peers",
        2.5 if agent != "sac" else 2.0,
        (f"mbrl_jax/agents/{agent}.py", *LEARNERS,
         *(("mbrl_jax/agents/sac_learner.py",) if agent == "sac" else ())),
        least=1.0,
    )  # fmt: skip


def dyna(planning: int) -> Job:
    return Job(
        f"dyna_{planning}", f"Dyna-Q, {planning} planning steps, 1, 256 and 1024 seeds",
        "benchmarks/bench_dyna.py", f"--planning {planning} --repeats 2",
        f"--planning {planning} --quick --repeats 1 --seeds 1 4", 3.0,
        ("mbrl_jax/agents/dyna.py", "mbrl_jax/models/tabular.py", *LOOP),
    )  # fmt: skip


def mbpo(name: str, measures: str, options: str, minutes: float, extra: str = "") -> Job:
    """A size of bench_mbpo.py; its toy is Pendulum's."""
    return Job(
        f"mbpo_{name}", measures, "benchmarks/bench_mbpo.py", f"{options} --no-peers",
        "--sizes Pendulum --seeds 2 --repeats 1 --quick --no-peers", minutes,
        ROBOTS if extra else MBPO, least=2.0, extra=extra,
    )  # fmt: skip


def learning(name: str, measures: str, options: str, minutes: float) -> Job:
    """MBPO on a robot, as far as the minutes carry; its toy is Pendulum."""
    fixed = " --length 2" if "--length" in options else ""
    return Job(
        f"mbpo_{name}", measures, "experiments/mbpo_locomotion.py",
        f"{options} --seconds {{seconds}} --run {{run}}",
        "--env Pendulum-v1 --quick --seeds 2 --total-steps 128 --eval-every 32 "
        f"--eval-episodes 1 --run {{run}}{fixed}",
        minutes, ROBOTS, least=4.0, extra="envs",
    )  # fmt: skip


def dreamer(name: str, measures: str, options: str, minutes: float) -> Job:
    """A part of bench_dreamer.py."""
    return Job(
        f"dreamer_{name}", f"Dreamer {measures}", "benchmarks/bench_dreamer.py", options,
        "--quick --repeats 1 --loops", minutes, DREAMER, least=1.5,
    )  # fmt: skip


def dreamer_learning(name: str, measures: str, options: str, minutes: float) -> Job:
    """Runs of dreamer_sweep.py, as far as the minutes carry."""
    return Job(
        f"dreamer_{name}", f"Dreamer {measures}", "experiments/dreamer_sweep.py",
        f"{options} --seconds {{seconds}}",
        "--env Catch-bsuite --quick --seeds 2 --total-steps 60 --eval-every 20 --eval-episodes 2",
        minutes, DREAMER, least=4.0,
    )  # fmt: skip


def dreamer_update(size: str, kind: str, seeds: int, minutes: float = 3.0) -> Job:
    return dreamer(
        f"{size}_{kind}_{seeds}", f"{size}, {kind}: an update of {seeds} seed{'s'[: seeds - 1]}",
        f"--sizes {size} --kinds {kind} --seeds {seeds} --parts update", minutes,
    )  # fmt: skip


def muzero(name: str, measures: str, options: str, minutes: float) -> Job:
    """Cells of bench_muzero.py."""
    return Job(
        f"muzero_{name}", f"MuZero {measures}", "benchmarks/bench_muzero.py",
        f"{options} --repeats 3", "--quick --repeats 1 --searches gumbel --reanalyse 1 --seeds 1",
        minutes, MUZERO, least=2.0, extra="dev",
    )  # fmt: skip


def muzero_game(game: str) -> Job:
    """MuZero on a game of MinAtar, as far as the minutes carry; its toy is Catch."""
    return Job(
        f"muzero_{game.lower()}", f"MuZero, {game} of MinAtar, 5 seeds: returns to 2M steps",
        "experiments/muzero_minatar.py",
        f"--env {game}-MinAtar --total-steps 2000000 --seeds 5 "
        "--seconds {seconds} --run {run}",
        "--env Catch-bsuite --quick --seeds 2 --total-steps 128 --eval-every 32 "
        "--eval-episodes 1 --run {run}",
        60.0, MUZERO, least=4.0,
    )  # fmt: skip


def muzero_board(game: str, minutes: float) -> Job:
    """MuZero on a board game, as far as the minutes carry."""
    return Job(
        f"muzero_{game.lower()}", f"MuZero, {game} by self-play: matches",
        "experiments/muzero_boards.py",
        f"--env {game}-pgx --seconds {{seconds}} --run {{run}}",
        "--env TicTacToe-pgx --quick --total-steps 132 --eval-every 66 --run {run}",
        minutes, (*MUZERO, "mbrl_jax/envs/boards.py", "mbrl_jax/runtime/matches.py",
                  "mbrl_jax/runtime/players.py", "mbrl_jax/runtime/playouts.py"),
        least=4.0, extra="envs",
    )  # fmt: skip


POLICIES, FUNCTIONS = ("gumbel_muzero_policy", "muzero_policy"), ("trivial", "mlp", "residual")
JOBS: tuple[Job, ...] = (
    search("puct_residual_1024", "PUCT, residual, 1024 roots: 9 cells, 7 of them never measured",
           "--policies muzero_policy --functions residual --batches 1024 --tables rows", 2.5),
    Job("flags", "XLA's flags, periods of six agents, 1 and 16 seeds: 12 rows",
        "benchmarks/bench_flags.py", "--processes {processes}",
        "--quick --repeats 1 --agents dqn --seeds 2", 3.0,
        ("mbrl_jax/agents", "mbrl_jax/runtime", *MODELS, *LEARNERS), least=1.5),
    mbpo("cheetah_seconds", "HalfCheetah-v5, the paper's settings, 5 seeds: seconds of 1,000 steps",
         "--sizes HalfCheetah-v5 --seeds 5 --repeats 2", 5.0, "envs"),
    search("800", "both searches of 800 simulations, trivial: 18 cells",
           "--functions trivial --tables many", 6.0, "--functions trivial --tables rows"),
    learning("cheetah", "HalfCheetah-v5, the paper's settings, 5 seeds: returns to 100k steps",
             "--env HalfCheetah-v5 --seeds 5 --total-steps 100000", 40.0),
    mbpo("pendulum", "the whole loop, Pendulum, 1, 16 and 256 seeds",
         "--sizes Pendulum --seeds 1 16 256 --repeats 3", 4.0),
    *(model_free(agent, seeds, cells) for seeds in (1, 16, 256)
      for agent, cells in (("sac", 2), ("dqn", 3), ("ppo", 3))),
    *(dreamer_update(size, "vector", seeds) for size in ("1m", "12m", "200m") for seeds in (1, 8)),
    dreamer("parts", "1m, vector: the parts of an update", "--sizes 1m --kinds vector --seeds 1",
            5.0),
    dreamer("loop", "1m: the whole loop, 1 and 8 seeds",
            "--sizes 1m --kinds vector --seeds 1 8 --parts optimiser --loops", 4.0),
    dreamer_learning(
        "memory", "nano, MemoryChain of length 10, fewer free nats: returns to 60k steps",
        "--env MemoryChain-bsuite --memory-length 10 --total-steps 60000 --eval-every 3000 "
        "--seeds 5 --grid free_nats=0.1 learning_rate=5e-4,1e-3", 25.0,
    ),
    *(dreamer_learning(
        game.lower(), f"1m, {game} of MinAtar, 5 seeds: returns to a million steps",
        f"--env {game}-MinAtar --total-steps 1000000 --eval-every 20000 --seeds 5 --size 1m "
        "--dtype bfloat16 --num-envs 16 --train-ratio 64 --batch-length 64 --buffer-size 1000000",
        40.0,
    ) for game in ("Breakout", "SpaceInvaders", "Freeway", "Asterix", "Seaquest")),
    *(muzero(f"{search}_{seeds}", f"{search}, the whole loop of {seeds} seed{'s'[: seeds - 1]} "
             "beside mctx: 2 cells", f"--searches {search} --seeds {seeds}", 4.0)
      for seeds in (1, 16) for search in ("gumbel", "puct")),
    muzero("grid", "on Breakout of MinAtar, gumbel, the whole loop beside mctx: 2 cells",
           "--env Breakout-MinAtar --searches gumbel --seeds 1", 5.0),
    *(muzero_game(game)
      for game in ("Breakout", "SpaceInvaders", "Freeway", "Asterix", "Seaquest")),
    muzero_board("ConnectFour", 60.0), muzero_board("TicTacToe", 20.0),
    dreamer_update("1m", "image", 1), dreamer_update("50m", "vector", 1),
    dreamer_update("12m", "image", 1),
    mbpo("size", "the whole loop, HalfCheetah's size, 1 and 16 seeds",
         "--sizes HalfCheetah --seeds 1 16 --repeats 3", 4.0),
    *(learning(f"hopper_length_{n}", f"Hopper-v5, rollouts of {n}, 3 seeds: returns to 50k steps",
               f"--env Hopper-v5 --seeds 3 --total-steps 50000 --length {n}", 20.0)
      for n in (1, 20, 5)),
    *(search_table(policy, function) for policy in POLICIES for function in FUNCTIONS),
    search("levels", "kernels, waits and levels of both searches: 18 cells", "--tables levels", 3.0,
           "--tables levels --policies muzero_policy", earlier=True),
    search("seeds", "both searches of 8 seeds under vmap: 6 cells", "--tables seeds", 2.0,
           "--tables seeds --policies muzero_policy --functions trivial", earlier=True),
    Job("models", "ensemble training, rollouts and planning: 7 rows", "benchmarks/bench_models.py",
        "--no-peers", "--quick --no-peers --repeats 1", 3.0, MODELS, least=1.0),
    *(dyna(n) for n in (0, 5, 50)),
    mbpo("size_256", "the whole loop, HalfCheetah's size, 256 seeds, which memory may not hold",
         "--sizes HalfCheetah --seeds 256 --repeats 2", 5.0),
)  # fmt: skip


def code_hash(paths: Iterable[str], root: Path = ROOT) -> str:
    """SHA-256 of the names and contents of Python files, those in folders among them."""
    digest = hashlib.sha256()
    for name in sorted(paths):
        path = root / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            content = file.read_bytes()
            digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def lacking(extra: str) -> list[str]:
    """The modules of an extra that are not installed; nothing is imported but parent packages."""
    missing = []
    for name in EXTRAS.get(extra, ()):
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # of the parent
            found = None
        if found is None:
            missing.append(name)
    return missing


def in_order(jobs: Sequence[Job], states: Mapping[str, str]) -> list[Job]:
    """The jobs to run: by value; those that were tried with this code come after all others.

    Args:
      jobs: the most valuable first.
      states: name -> "missing", "stale", "cut", "failed" or "measured"; measured ones are left out.
    """
    fresh = [job for job in jobs if states[job.name] in ("missing", "stale")]
    return fresh + [job for job in jobs if states[job.name] in ("cut", "failed")]


def choose(waiting: Sequence[Job], minutes: float) -> tuple[Job, float] | None:
    """The next job that fits into the minutes that are left, and the minutes it may take.

    Args:
      waiting: in order.
      minutes: that are left.

    Returns:
      The first job that may start, with twice what it is expected to take, but never more than is
      left; None where none fits.
    """
    for job in waiting:
        if job.start <= minutes:
            return job, min(minutes, 2 * job.minutes)
    return None
