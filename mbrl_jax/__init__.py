"""Model-based reinforcement learning as pure JAX functions that compile end to end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mbrl_jax import lazy, xla

if TYPE_CHECKING:
    from mbrl_jax import (
        agents,
        analysis,
        data,
        envs,
        models,
        nn,
        planning,
        runtime,
        search,
        types,
    )
    from mbrl_jax.agents import AGENTS, make_agent
    from mbrl_jax.envs import make_env
    from mbrl_jax.runtime.loop import make_train
    from mbrl_jax.runtime.train import Result, train
    from mbrl_jax.types import InputError

xla.avoid_wrong_sums()  # before the backend reads it

__version__ = "0.1.0"
__all__ = [
    "AGENTS",
    "InputError",
    "Result",
    "agents",
    "analysis",
    "data",
    "envs",
    "make_agent",
    "make_env",
    "make_train",
    "models",
    "nn",
    "planning",
    "runtime",
    "search",
    "train",
    "types",
]

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
__getattr__, __dir__ = lazy.attach(
    __name__, tuple(name for name in __all__ if name not in _NAMES), _NAMES
)
