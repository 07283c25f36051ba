"""MBPO on MuJoCo's robots with the paper's settings, its returns written as they come.

    python experiments/mbpo_locomotion.py --env HalfCheetah-v5 --total-steps 100000
    python experiments/mbpo_locomotion.py --env Hopper-v5 --seeds 3 --length 20 --total-steps 50000

The presets (`mbrl_jax.agents.mbpo_presets`) are the paper's settings; --length fixes the rollout
length, as the paper's ablation does. The robots need the extra `envs`, and these sizes an
accelerator, which takes all seeds in one batch. After every evaluation the record holds the whole
curve so far: greedy returns of all seeds, and wall seconds, with compilation and evaluations. A run
is saved when it ends, and when --seconds or a signal stops it; the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro
from learning import QUICK
from records import train_recorded

import mbrl_jax

# Janner et al. (2019), on the HalfCheetah of their Gym: greedy returns after so many steps
PUBLISHED = {"HalfCheetah-v5": {"50000": 7_900, "100000": 9_500}}


@dataclasses.dataclass(frozen=True)
class Options:
    # environment id
    env: str
    # environment steps of each seed, the warm-up's among them
    total_steps: int = 100_000
    # independent runs
    seeds: int = 5
    # environment steps between evaluations
    eval_every: int = 2_500
    # greedy episodes of an evaluation
    eval_episodes: int = 5
    # steps of every rollout, from first to last; by default the preset's schedule
    length: int | None = None
    # the run is saved and stopped at the first evaluation after so many seconds
    seconds: float | None = None
    # folder of the record
    out: Path = Path("experiments/results")
    # the run folder; by default one for each environment and length
    run: Path | None = None
    # tiny networks and few rollouts, to see that it runs
    quick: bool = False


def main(options: Options) -> int:
    """Trains, or goes on; -> 0, or 128 + the number of the signal that stopped it."""
    length = options.length
    label = "preset" if length is None else f"length_{length}"
    overrides = dict(QUICK["mbpo"]) if options.quick else {}
    if options.quick:  # a number for each layer would not fit the tiny network
        overrides["model"] = {**overrides["model"], "weight_decay": (1e-5,)}
    if length is not None:
        overrides["rollout_length"] = (length, length)
    fixed = {"published": PUBLISHED[options.env]} if options.env in PUBLISHED else {}
    return train_recorded(
        "mbpo",
        options.env,
        options.out / f"mbpo_{options.env}_{label}.json",
        options.run or Path("runs", "mbpo_locomotion", f"{options.env}_{label}"),
        arguments={
            name: getattr(options, name)
            for name in ("total_steps", "seeds", "eval_every", "eval_episodes")
        },
        overrides=overrides,
        fixed=fixed,
        seconds=options.seconds,
    )


if __name__ == "__main__":
    try:
        raise SystemExit(main(tyro.cli(Options, description=__doc__)))
    except mbrl_jax.InputError as error:
        raise SystemExit(f"error: {error}") from None
