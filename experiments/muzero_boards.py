"""MuZero learns board games by playing itself, and plays matches against others.

    python experiments/muzero_boards.py --env TicTacToe-pgx
    python experiments/muzero_boards.py --env ConnectFour-pgx --seconds 7200

With the game's preset; the games need the extra `envs`. Every evaluation is a match against each
opponent, half of whose games MuZero begins: the uniform player, plain Monte-Carlo tree search with
--playouts random games a move, and in tic-tac-toe a perfect player. A win counts 1, a draw 0 and a
loss -1. The record holds the whole curve so far, and wall seconds, with compilation and matches. A
run is saved when it ends, and when --seconds or a signal stops it; the same command goes on from
there. At its end --games games on each side are played against the strongest opponent, and go into
the record too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from learning import QUICK
from records import train_recorded

import mbrl_jax
from mbrl_jax.envs import Env
from mbrl_jax.runtime import devices, matches, players, playouts
from mbrl_jax.runtime.checkpoint import Checkpoints
from mbrl_jax.runtime.evaluate import evaluation_keys
from mbrl_jax.runtime.logs import write_whole
from mbrl_jax.runtime.loop import Evaluate, RunState
from mbrl_jax.runtime.players import Player
from mbrl_jax.runtime.train import load_job
from mbrl_jax.types import Agent, Metrics, PyTree


@dataclasses.dataclass(frozen=True)
class Options:
    # environment id
    env: str
    # moves of each seed, those of both players
    total_steps: int = 400_000
    # independent runs
    seeds: int = 1
    # moves between evaluations
    eval_every: int = 20_000
    # games against each opponent in an evaluation
    eval_games: int = 64
    # random games that plain tree search plays for each of its moves
    playouts: int = 200
    # games of each side against the strongest opponent at the end
    games: int = 500
    # the run is saved and stopped at the first evaluation after so many seconds
    seconds: float | None = None
    # folder of the record
    out: Path = Path("experiments/results")
    # the run folder; by default one for each game
    run: Path | None = None
    # tiny networks, and 4 games of 2 playouts at most, to see that it runs
    quick: bool = False


def opponents(env: Env, num_playouts: int) -> dict[str, Player]:
    """By name, the strongest one last."""
    found = {"uniform": players.uniform(env), "playouts": playouts.playout_mcts(env, num_playouts)}
    if env.spec.id == "TicTacToe-pgx":
        found["perfect"] = players.perfect_tic_tac_toe(env)
    return found


def evaluation(env: Env, num_playouts: int, num_games: int) -> Evaluate:
    """An evaluation against each opponent; `eval_return` is against the strongest one."""

    def evaluate(agent: Agent, state: PyTree, key: jax.Array, t: jax.Array) -> Metrics:
        found: Metrics = {}
        against = opponents(env, num_playouts)
        keys = jax.random.split(key, len(against))
        for own, (name, opponent) in zip(keys, against.items(), strict=True):
            measured = matches.against(env, opponent, num_games)(agent, state, own, t)
            for measure in ("win_rate", "loss_rate"):
                found[f"{name}_{measure}"] = measured[measure]
        return {"eval_return": measured["eval_return"], **found}

    return evaluate


def measures(env: Env) -> tuple[str, ...]:
    """What the record's rows hold of each evaluation."""
    rates = [f"{name}_{rate}" for name in opponents(env, 1) for rate in ("win_rate", "loss_rate")]
    return ("eval_return", *rates)


def last_match(folder: Path, num_playouts: int, num_games: int) -> dict[str, Any]:
    """Wins, draws and losses of each seed, [begun by MuZero, by the other], and against whom.

    Args:
      folder: of the run, whose newest checkpoint plays.
      num_playouts: of plain tree search, where that is the strongest opponent.
      num_games: of each side.
    """
    job = load_job(folder)
    checkpoints = Checkpoints(folder / "checkpoints", job.run, write=False)
    newest = checkpoints.newest()
    state = checkpoints.restore(newest, job.like())
    checkpoints.close()
    plan = job.program.plan
    t = jnp.int32(plan.start + newest * plan.steps_per_period)
    name, opponent = [*opponents(job.env, num_playouts).items()][-1]
    own = players.of_agent(job.agent, t)

    def one(run: RunState, key: jax.Array) -> matches.Score:
        given = (run.agent, None)
        return matches.score(matches.play_games(job.env, own, opponent, given, key, 2 * num_games))

    play: Callable = jax.jit(devices.over_seeds(one, job.mesh, job.mode, shared=0))
    keys = devices.put_seeds(evaluation_keys(0, job.run["seeds"]), job.mesh)
    score = devices.to_host(play(state, keys))._asdict()
    counted = {name: np.asarray(number).tolist() for name, number in score.items()}
    return {"opponent": name, "env_steps": plan.env_steps(newest - 1), **counted}


def main(options: Options) -> int:
    """Trains, or goes on; -> 0, or 128 + the number of the signal that stopped it."""
    label = options.env + ("_quick" if options.quick else "")
    path = options.out / f"muzero_{label}.json"
    folder = options.run or Path("runs", "muzero_boards", label)
    env = mbrl_jax.make_env(options.env)
    settings: dict[str, Any] = {}
    tries, eval_games, games = options.playouts, options.eval_games, options.games
    if options.quick:
        settings, tries, eval_games, games = QUICK["muzero"], 2, 4, 2
    status = train_recorded(
        "muzero",
        env,
        path,
        folder,
        arguments={name: getattr(options, name) for name in ("total_steps", "seeds", "eval_every")},
        overrides=settings,
        fixed={"playouts": tries, "eval_games": eval_games},
        seconds=options.seconds,
        names=measures(env),
        evaluate=evaluation(env, tries, eval_games),
    )
    match = last_match(folder, tries, games)
    write_whole(path, json.dumps({**json.loads(path.read_text()), "match": match}, indent=1) + "\n")
    print(", ".join(f"{name} {value}" for name, value in match.items()))
    return status


if __name__ == "__main__":
    try:
        raise SystemExit(main(tyro.cli(Options, description=__doc__)))
    except mbrl_jax.InputError as error:
        raise SystemExit(f"error: {error}") from None
