"""Vectorised tree search: MuZero's, Gumbel MuZero's and Stochastic MuZero's, as mctx has them.

A map for readers of mctx
-------------------------

===========================  =======================================================================
there                        here
===========================  =======================================================================
`policies`                   `policies.py`, `stochastic.py`; preparation and advice in `root.py`
`search.search`              `puct.search`, `gumbel.search`
`search.simulate`            one lookup, `forest.choose`; a loop only with the tree's range of
                             values, `puct.descend`
`search.expand`              `forest.expand` and `forest.store`
`search.backward`            `backup.backup`, which also renews the choice of every node on its way
`action_selection`           `puct.rule_of`, `gumbel.improved_policy`, and at a Gumbel root
                             `candidates.py`
`seq_halving`                `schedule.py`
`qtransforms`                `qtransforms.py`; what they see of a node is in `node.py`
`Tree`                       during a search `forest.Forest`, one table for all trees; afterwards
                             `base.Tree`, made by `tree.export`
`jax.vmap` of a search       `vmapping.py`: the seeds' roots become lanes of one search
===========================  =======================================================================

What differs from mctx
----------------------

Beside speed, and without ties in PUCT, the visits at the roots are the same.

===========================  =======================================================================
Selection functions          `search`, `muzero_action_selection`,
                             `gumbel_muzero_root_action_selection`,
                             `gumbel_muzero_interior_action_selection`, `RootActionSelectionFn` and
                             `InteriorActionSelectionFn` are not there: a rule of selection sees one
                             node alone, which is what makes descent a lookup. Instead: a
                             `qtransform` of one's own for `muzero_policy` or
                             `gumbel_muzero_policy`.
Transforms                   Read their own node alone, at the `node_index` that they are given (a
                             traced number, 0 at the root): `qvalues`, `node_visits`, `raw_values`,
                             `node_values`, `children_prior_logits` (log probabilities),
                             `children_visits`, `children_values`, `children_rewards`,
                             `children_discounts`. Anything else raises `InputError`. Rewards and
                             discounts are kept beside the table, and only where one reads them.
Transforms with Gumbel       Must give all actions that are not visited the same value, or rounds
                             in batches may visit others.
Ties                         PUCT breaks equal scores by an order that is drawn once for each node;
                             mctx adds noise below 1e-7 to the scores at every visit, which also
                             decides between scores that are less apart. Both choose among n equal
                             actions each with probability 1 / n (mctx roughly: float32 has few
                             numbers in 1e-7). Gumbel's ties, and those of chance outcomes, go to
                             the first, as there.
Masked actions below         Logits of -1e9, as there; a prior below 1.2e-38 (a logit 87 below the
                             others) counts as 0. Gumbel never takes such an action. PUCT takes one
                             where its transform puts actions not visited above those visited, as
                             `qtransform_completed_by_mix_value` does, and as mctx does.
Calls of the model           One in each simulation; Gumbel's may hold several nodes of each root,
                             some of which are dropped. Call n gets `fold_in(key, n)`.
Loop functions               One of Python ints alone works, but runs Gumbel's simulations one after
                             another, and not with `halve_once`.
Numbers                      float32, whatever comes in, also with JAX_ENABLE_X64; actions int32.
                             Embeddings keep their shapes and dtypes, or an `InputError` says so.
Numbers of nodes             At most that of the simulation which made the node. With `max_depth`, a
                             node that is evaluated again gets a new number; the old one is empty.
Roots with NaN               Their weights are NaN and their action is the first allowed one
                             (`PolicyOutput`); NaN where an action is not allowed does not matter.
Stochastic search            Its tree shows the A actions, without the outcomes beside them.
`invalid_actions`            bool or numbers; `Tree.root_invalid_actions` is bool.
Beyond mctx                  `sampled_policy`, `qtransform_by_tree_min_max`, `advance` and
                             `muzero_policy(search_tree=...)`, `halve_once`, `search_metrics`.
===========================  =======================================================================
"""

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
