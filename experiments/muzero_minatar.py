"""MuZero on a game of MinAtar as long as time allows, its returns written as they come.

    python experiments/muzero_minatar.py --env Breakout-MinAtar
    python experiments/muzero_minatar.py --env Freeway-MinAtar --seeds 2 --seconds 3600

With the preset of the game, for an accelerator, which takes all seeds in one batch. After every
evaluation the record holds the whole curve so far: greedy returns of all seeds, and wall seconds,
with compilation and evaluations. A run is saved when it ends, and when --seconds or a signal stops
it; the same command goes on from there. Beside DQN and PPO at equal steps: `muzero_gymnax.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro
from learning import QUICK
from records import train_recorded

import mbrl_jax


@dataclasses.dataclass(frozen=True)
class Options:
    # environment id
    env: str
    # environment steps of each seed
    total_steps: int = 2_000_000
    # independent runs
    seeds: int = 5
    # environment steps between evaluations
    eval_every: int = 50_000
    # greedy episodes of an evaluation
    eval_episodes: int = 10
    # the run is saved and stopped at the first evaluation after so many seconds
    seconds: float | None = None
    # folder of the record
    out: Path = Path("experiments/results")
    # the run folder; by default one for each environment
    run: Path | None = None
    # tiny networks and batches, to see that it runs
    quick: bool = False


def main(options: Options) -> int:
    """Trains, or goes on; -> 0, or 128 + the number of the signal that stopped it."""
    label = options.env + ("_quick" if options.quick else "")
    names = ("total_steps", "seeds", "eval_every", "eval_episodes")
    return train_recorded(
        "muzero",
        options.env,
        options.out / f"muzero_{label}.json",
        options.run or Path("runs", "muzero_minatar", label),
        arguments={name: getattr(options, name) for name in names},
        overrides=QUICK["muzero"] if options.quick else {},
        fixed={},
        seconds=options.seconds,
    )


if __name__ == "__main__":
    try:
        raise SystemExit(main(tyro.cli(Options, description=__doc__)))
    except mbrl_jax.InputError as error:
        raise SystemExit(f"error: {error}") from None
