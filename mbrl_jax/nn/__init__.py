"""Networks, distributions, normalisers and optimisers that the agents and models share.

`precision` states how exactly matrix products are computed on an accelerator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mbrl_jax import lazy

if TYPE_CHECKING:
    from mbrl_jax.nn import (
        distributions,
        networks,
        normaliser,
        optimiser,
        precision,
        returns,
        schedules,
        two_hot,
    )

__all__ = [
    "distributions",
    "networks",
    "normaliser",
    "optimiser",
    "precision",
    "returns",
    "schedules",
    "two_hot",
]

__getattr__, __dir__ = lazy.attach(__name__, tuple(__all__))
