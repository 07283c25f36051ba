"""The model-free agents on their benchmark environments: greedy return within a budget of steps.

    python experiments/model_free.py
    python experiments/model_free.py --long --only Breakout
    python experiments/model_free.py --only "sac Pendulum-v1 10000"

DQN, PPO and SAC with their presets (`PRESETS` in `mbrl_jax/agents/`), at least 10 seeds each. How a
row is stored and judged: `learning.py`.
"""

from __future__ import annotations

from pathlib import Path

import learning
import tyro
from learning import Run

RUNS = (
    Run("dqn", "CartPole-v1", 100_000, 475, 5_000),
    Run("ppo", "CartPole-v1", 200_000, 490, 10_000),
    Run("dqn", "Catch-bsuite", 20_000, 0.95, 1_000),
    Run("ppo", "Acrobot-v1", 500_000, -100, 25_000),
    Run("ppo", "Pendulum-v1", 500_000, -250, 25_000),
    Run("sac", "Pendulum-v1", 10_000, -200, 500),
    Run("sac", "Pendulum-v1", 5_000, -180, 250, overrides={"updates": 4}),
    Run("sac", "ContinuousCartPole-v0", 20_000, 475, 1_000),
    Run("sac", "MountainCarContinuous-v0", 50_000, 90, 2_500),
    # the targets allow 1 and 10 million steps
    Run("dqn", "Breakout-MinAtar", 300_000, 10, 25_000, long=True),
    Run("ppo", "Breakout-MinAtar", 1_000_000, 20, 100_000, long=True),
)

QUICK = {  # fields of a run that only shows that everything works
    "dqn": {"num_envs": 1, "warmup_steps": 64, "hidden": (16,)},
    "ppo": {"num_envs": 4, "num_steps": 32, "minibatches": 2, "hidden": (16,)},
    "sac": {"num_envs": 1, "warmup_steps": 64, "hidden": (16,), "critic_hidden": (16,)},
}


def main(
    seeds: int = 10,
    out: Path = Path("experiments/results"),
    only: str = "",
    long: bool = False,
    quick: bool = False,
    redraw: bool = False,
    cpu_devices: int | None = None,
) -> None:
    """DQN, PPO and SAC on the environments for which they have presets.

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
    learning.main("model_free", RUNS, QUICK, seeds, out, only, long, quick, redraw, cpu_devices)


if __name__ == "__main__":
    tyro.cli(main)
