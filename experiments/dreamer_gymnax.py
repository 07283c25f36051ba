"""DreamerV3 with one configuration on every gymnax environment that needs no download.

    python experiments/dreamer_gymnax.py
    python experiments/dreamer_gymnax.py --only "dreamer CartPole-v1"
    python experiments/dreamer_gymnax.py --long --only Breakout

The configuration is `learning.SMALL_DREAMER` everywhere. Beside it run PPO, and DQN or SAC, at
equal real steps, each with the preset that it has for an environment. How a row is stored and
judged: `learning.py`. MinAtar's games are rows of --long, since a step costs Dreamer an update of
its world model.
"""

from __future__ import annotations

import learning
import tyro
from learning import SMALL_DREAMER, Options
from worlds import World, beside_peers

WORLDS = (
    World("CartPole-v1", 40_000, 450),
    World("Pendulum-v1", 30_000, -250, continuous=True),
    World("Acrobot-v1", 40_000),
    World("MountainCar-v0", 40_000),
    World("MountainCarContinuous-v0", 40_000, continuous=True),
    World("ContinuousCartPole-v0", 20_000, continuous=True),
    World("Catch-bsuite", 15_000, 0.95),
    # a network without memory is right half of the time, a return of 0
    World("MemoryChain-bsuite", 60_000, 0.95, env_args={"memory_length": 10}),
    World("DeepSea-bsuite", 20_000),
    World("DiscountingChain-bsuite", 20_000),
    World("UmbrellaChain-bsuite", 20_000),
    World("SimpleBandit-bsuite", 10_000),
    World("FrozenLake-misc", 20_000),
    World("FourRooms-misc", 40_000),
    World("MetaMaze-misc", 40_000),
    World("BernoulliBandit-misc", 20_000),
    World("GaussianBandit-misc", 20_000),
    World("PointRobot-misc", 20_000, continuous=True),
    World("Reacher-misc", 20_000, continuous=True),
    World("Swimmer-misc", 20_000, continuous=True),
    World("Pong-misc", 100_000, long=True),
    # read off a figure of a DreamerV2 on these games, 5 seeds, after a million steps
    World("Breakout-MinAtar", 1_000_000, 60, long=True),
    World("SpaceInvaders-MinAtar", 1_000_000, 140, long=True),
    World("Freeway-MinAtar", 1_000_000, 31, long=True),
    World("Asterix-MinAtar", 1_000_000, 2, long=True),
    World("Seaquest-MinAtar", 1_000_000, long=True),
)

RUNS = tuple(beside_peers("dreamer", (world._replace(overrides=SMALL_DREAMER) for world in WORLDS)))

if __name__ == "__main__":
    learning.main(
        "dreamer_gymnax", RUNS,
        tyro.cli(Options, default=Options(seeds=5), description=__doc__),
    )  # fmt: skip
