"""Running agents: the compiled loop, the host driver, checkpoints, run folders and devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mbrl_jax import lazy

if TYPE_CHECKING:
    from mbrl_jax.runtime import (
        checkpoint,
        console,
        devices,
        evaluate,
        folder,
        logs,
        loop,
        matches,
        plan,
        players,
        playouts,
        reuse,
        train,
    )

__all__ = [
    "checkpoint",
    "console",
    "devices",
    "evaluate",
    "folder",
    "logs",
    "loop",
    "matches",
    "plan",
    "players",
    "playouts",
    "reuse",
    "train",
]

__getattr__, __dir__ = lazy.attach(__name__, tuple(__all__))
