"""Environments: gymnax's and others behind its interface, and exact tables of the finite ones.

gymnax starts the JAX backend when it is imported, so it loads at the first `make_env`.
"""

from mbrl_jax import lazy
from mbrl_jax.envs.env import Env, TimeStep
from mbrl_jax.envs.registry import list_envs, make_env
from mbrl_jax.envs.tables import (
    Tabular,
    hitting_time,
    policy_evaluation,
    tabular,
    value_iteration,
)

__all__ = [
    "Env",
    "Tabular",
    "TimeStep",
    "hitting_time",
    "list_envs",
    "make_env",
    "policy_evaluation",
    "tabular",
    "value_iteration",
]

__getattr__, __dir__ = lazy.attach(
    __name__, ("bases", "boards", "classic", "craftax", "functions", "locomotion", "sutton")
)
