"""Statistics, plots and run folders, numpy only: no agent, no JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mbrl_jax import lazy

if TYPE_CHECKING:
    from mbrl_jax.analysis import arrivals, forecast_plots, model_plots, plots, runs, stats

__all__ = ["arrivals", "forecast_plots", "model_plots", "plots", "runs", "stats"]

# imported when first used: matplotlib is slow, and statistics do not need it
__getattr__, __dir__ = lazy.attach(__name__, tuple(__all__))
