"""Vectorised tree search: MuZero's, Gumbel MuZero's and Stochastic MuZero's, as mctx has them."""

from mbrl_jax.search.base import (
    ChanceRecurrentFnOutput,
    DecisionRecurrentFnOutput,
    LoopFn,
    PolicyOutput,
    QTransform,
    RecurrentFn,
    RecurrentFnOutput,
    RecurrentState,
    RootFnOutput,
    SearchSummary,
    Tree,
)
from mbrl_jax.search.gumbel import GumbelMuZeroExtraData
from mbrl_jax.search.policies import gumbel_muzero_policy, muzero_policy
from mbrl_jax.search.qtransforms import (
    qtransform_by_min_max,
    qtransform_by_parent_and_siblings,
    qtransform_by_tree_min_max,
    qtransform_completed_by_mix_value,
)
from mbrl_jax.search.sampled import (
    SampledPolicyOutput,
    SampledRecurrentFnOutput,
    SampledRootFnOutput,
    sampled_logits,
    sampled_policy,
)
from mbrl_jax.search.stochastic import StochasticRecurrentState, stochastic_muzero_policy
from mbrl_jax.search.tree import advance, search_metrics

__all__ = [
    "ChanceRecurrentFnOutput",
    "DecisionRecurrentFnOutput",
    "GumbelMuZeroExtraData",
    "LoopFn",
    "PolicyOutput",
    "QTransform",
    "RecurrentFn",
    "RecurrentFnOutput",
    "RecurrentState",
    "RootFnOutput",
    "SampledPolicyOutput",
    "SampledRecurrentFnOutput",
    "SampledRootFnOutput",
    "SearchSummary",
    "StochasticRecurrentState",
    "Tree",
    "advance",
    "gumbel_muzero_policy",
    "muzero_policy",
    "qtransform_by_min_max",
    "qtransform_by_parent_and_siblings",
    "qtransform_by_tree_min_max",
    "qtransform_completed_by_mix_value",
    "sampled_logits",
    "sampled_policy",
    "search_metrics",
    "stochastic_muzero_policy",
]
