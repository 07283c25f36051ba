"""Model-based reinforcement learning as pure JAX functions that compile end to end."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# imported when first used: gymnax starts the JAX backend, matplotlib and orbax are slow
_NAMES = {
    "AGENTS": "mbrl_jax.agents",
    "make_agent": "mbrl_jax.agents",
    "make_env": "mbrl_jax.envs",
    "make_train": "mbrl_jax.runtime.loop",
    "train": "mbrl_jax.runtime.train",
    "Result": "mbrl_jax.runtime.train",
    "InputError": "mbrl_jax.types",
}
_FOLDERS = ("agents", "analysis", "data", "envs", "models", "runtime")

if TYPE_CHECKING:
    from mbrl_jax.agents import AGENTS, make_agent
    from mbrl_jax.envs import make_env
    from mbrl_jax.runtime.loop import make_train
    from mbrl_jax.runtime.train import Result, train
    from mbrl_jax.types import InputError

__all__ = [
    "AGENTS",
    "InputError",
    "Result",
    "make_agent",
    "make_env",
    "make_train",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _FOLDERS:
        return importlib.import_module(f"mbrl_jax.{name}")
    raise AttributeError(f"module 'mbrl_jax' has no attribute {name!r}")
