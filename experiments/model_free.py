"""The model-free agents on their benchmark environments: greedy return within a budget of steps.

    python experiments/model_free.py
    python experiments/model_free.py --long --only Breakout
    python experiments/model_free.py --only "sac Pendulum-v1 10000"

DQN, PPO and SAC with their presets (`PRESETS` in `mbrl_jax/agents/`), at least 10 seeds each. How a
row is stored and judged: `learning.py`.
"""

from __future__ import annotations

import learning
import tyro
from learning import Options, Run

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


if __name__ == "__main__":
    learning.main(
        "model_free", RUNS, tyro.cli(Options, default=Options(seeds=10), description=__doc__)
    )
