"""An agent with one row for each of many worlds, beside its model-free peers at equal real steps.

What `dreamer_gymnax.py` and `muzero_gymnax.py` share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from learning import Run


class World(NamedTuple):
    """An environment with its budget."""

    env: str
    steps: int
    target: float | None = None  # of the agent, not of its peers
    continuous: bool = False
    long: bool = False
    env_args: Mapping[str, Any] = {}
    eval_episodes: int = 10
    overrides: Mapping[str, Any] = {}  # of the agent, beyond its preset


def beside_peers(agent: str, worlds: Iterable[World]) -> Iterator[Run]:
    """The rows of an agent and of its peers, world by world: PPO, and DQN or SAC."""
    for world in worlds:
        row = Run(
            agent,
            world.env,
            world.steps,
            world.target,
            world.steps // 20,
            world.eval_episodes,
            overrides=world.overrides,
            long=world.long,
            env_args=world.env_args,
            title=agent,
        )
        yield row
        for peer in ("ppo", "sac" if world.continuous else "dqn"):
            yield row._replace(agent=peer, target=None, overrides={}, title="")
