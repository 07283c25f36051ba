"""MuZero on gymnax's worlds beside model-free agents at equal real steps.

    python experiments/muzero_gymnax.py
    python experiments/muzero_gymnax.py --only "muzero CartPole-v1"
    python experiments/muzero_gymnax.py --long --only Breakout

Every agent has the preset of the environment (`PRESETS` in `mbrl_jax/agents/`); Pendulum, whose
actions are continuous, is searched among sampled ones. Beside MuZero run PPO, and DQN or SAC. How a
row is stored and judged: `learning.py`. MinAtar's games are rows of --long, since each of their
steps costs MuZero a search and an update with fresh searches.
"""

from __future__ import annotations

import learning
import tyro
from learning import Options
from worlds import World, beside_peers

FROZEN_LAKE = 0.7442
"""Success within the 100 steps of an episode of the slippery 4x4 lake, where the best policy may
look at the clock; by dynamic programming."""

WORLDS = (
    World("CartPole-v1", 15_000, 475),
    World("Catch-bsuite", 10_000, 0.95),
    World("Acrobot-v1", 50_000, -100),
    World("FrozenLake-misc", 40_000, round(0.95 * FROZEN_LAKE, 3), eval_episodes=400),
    World("Pendulum-v1", 10_000, -250, continuous=True),
    World("MountainCar-v0", 50_000),
    World("DeepSea-bsuite", 20_000),
    World("Breakout-MinAtar", 500_000, 15, long=True),
    World("SpaceInvaders-MinAtar", 500_000, long=True),
    World("Freeway-MinAtar", 500_000, long=True),
    World("Asterix-MinAtar", 500_000, long=True),
    World("Seaquest-MinAtar", 500_000, long=True),
)
RUNS = tuple(beside_peers("muzero", WORLDS))

if __name__ == "__main__":
    learning.main(
        "muzero_gymnax", RUNS,
        tyro.cli(Options, default=Options(seeds=5), description=__doc__),
    )  # fmt: skip
