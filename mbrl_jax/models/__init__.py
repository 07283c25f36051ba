"""Learned models of the world, usable on plain arrays without any agent or environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mbrl_jax import lazy

if TYPE_CHECKING:
    from mbrl_jax.models import (
        diagnostics,
        dynamics,
        ensemble,
        fit,
        latent,
        muzero_chance,
        muzero_layers,
        muzero_net,
        oracle,
        rollout,
        rollout_rules,
        rssm,
        rssm_actions,
        rssm_codec,
        rssm_forecast,
        rssm_heads,
        rssm_latents,
        rssm_layers,
        rssm_params,
        tabular,
    )

__all__ = [
    "diagnostics",
    "dynamics",
    "ensemble",
    "fit",
    "latent",
    "muzero_chance",
    "muzero_layers",
    "muzero_net",
    "oracle",
    "rollout",
    "rollout_rules",
    "rssm",
    "rssm_actions",
    "rssm_codec",
    "rssm_forecast",
    "rssm_heads",
    "rssm_latents",
    "rssm_layers",
    "rssm_params",
    "tabular",
]

__getattr__, __dir__ = lazy.attach(__name__, tuple(__all__))
