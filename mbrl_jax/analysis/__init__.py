"""Statistics, plots and run folders, numpy only: no agent, no JAX."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbrl_jax.analysis import arrivals, model_plots, plots, runs, stats

__all__ = ["arrivals", "model_plots", "plots", "runs", "stats"]


def __getattr__(name: str) -> ModuleType:
    # imported when first used: matplotlib is slow, and statistics do not need it
    if name in __all__:
        return importlib.import_module(f"mbrl_jax.analysis.{name}")
    raise AttributeError(f"module 'mbrl_jax.analysis' has no attribute {name!r}")
