"""The model-based agents on small tasks: greedy return within a budget of real steps.

    python experiments/model_based.py
    python experiments/model_based.py --only "pets Pendulum"

Agents with their presets (`PRESETS` in `mbrl_jax/agents/`), at least 5 seeds each. How a row is
stored and judged: `learning.py`.
"""

from __future__ import annotations

from pathlib import Path

import learning
import tyro
from learning import Run

RUNS = (
    Run("pets", "Pendulum-v1", 1_200, -200, 200, eval_episodes=10),
    Run("pets", "ContinuousCartPole-v0", 2_000, 475, 1_000, eval_episodes=5),
    Run("mbpo", "Pendulum-v1", 2_000, -160, 200, eval_episodes=10),
    Run("mbpo", "ContinuousCartPole-v0", 2_000, 475, 200, eval_episodes=10),
)

QUICK = {  # fields of a run that only shows that everything works
    "pets": {
        "model": {"hidden": (16,)},
        "training": {"max_epochs": 2},
        "warmup_steps": 64,
        "horizon": 3,
        "num_samples": 8,
        "num_elites": 2,
        "particles": 5,
        "iterations": 1,
    },
    "mbpo": {
        "model": {"hidden": (16,)},
        "training": {"max_epochs": 2},
        "sac": {"hidden": (16,), "critic_hidden": (16,)},
        "warmup_steps": 64,
        "rollouts_per_step": 4,
        "batch_size": 16,
        "updates": 1,
    },
}


def main(
    seeds: int = 6,
    out: Path = Path("experiments/results"),
    only: str = "",
    long: bool = False,
    quick: bool = False,
    redraw: bool = False,
    cpu_devices: int | None = None,
) -> None:
    """The model-based agents on the tasks for which they have presets.

    Args:
      seeds: runs of each row.
      out: folder of the figure and of the table.
      only: a regular expression; rows match as "agent env steps overrides".
      long: the rows marked as long, too.
      quick: 2 seeds and a few hundred steps, into files of their own, to see that it runs.
      redraw: train nothing, only draw anew what is stored.
      cpu_devices: CPU devices to spread the seeds over; by default as many as there are cores, or
        the next smaller number that divides the seeds.
    """
    learning.main("model_based", RUNS, QUICK, seeds, out, only, long, quick, redraw, cpu_devices)


if __name__ == "__main__":
    tyro.cli(main)
