"""Vectorised tree search: MuZero's PUCT and Gumbel MuZero, with the signatures of mctx."""

from mbrl_jax.search.base import (
    ChanceRecurrentFnOutput,
    DecisionRecurrentFnOutput,
    PolicyOutput,
    RecurrentFn,
    RecurrentFnOutput,
    RootFnOutput,
    SearchSummary,
    Tree,
)
from mbrl_jax.search.policies import (
    GumbelMuZeroExtraData,
    gumbel_muzero_policy,
    muzero_policy,
)
from mbrl_jax.search.qtransforms import (
    qtransform_by_min_max,
    qtransform_by_parent_and_siblings,
    qtransform_completed_by_mix_value,
)

__all__ = [
    "ChanceRecurrentFnOutput",
    "DecisionRecurrentFnOutput",
    "GumbelMuZeroExtraData",
    "PolicyOutput",
    "RecurrentFn",
    "RecurrentFnOutput",
    "RootFnOutput",
    "SearchSummary",
    "Tree",
    "gumbel_muzero_policy",
    "muzero_policy",
    "qtransform_by_min_max",
    "qtransform_by_parent_and_siblings",
    "qtransform_completed_by_mix_value",
]
