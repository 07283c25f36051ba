"""Search policies with the signatures, defaults and results that users of mctx know.

Each prepares its roots, runs a search (`puct.py`, `gumbel.py`) and reads its advice off the trees.
What differs from mctx is told in `mbrl_jax/search/__init__.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from mbrl_jax.search import candidates, gumbel, puct
from mbrl_jax.search.base import (
    Budget,
    LoopFn,
    Number,
    Params,
    PolicyOutput,
    QTransform,
    RecurrentFn,
    Tree,
)
from mbrl_jax.search.node import transform_of
from mbrl_jax.search.qtransforms import (
    qtransform_by_parent_and_siblings,
    qtransform_completed_by_mix_value,
)
from mbrl_jax.search.root import advice, check, logits_of, masked, noisy, tempered


def muzero_policy(
    params: Params,
    rng_key: jax.Array,
    root: Any,
    recurrent_fn: RecurrentFn,
    num_simulations: int,
    invalid_actions: jax.Array | None = None,
    max_depth: int | None = None,
    loop_fn: LoopFn = jax.lax.fori_loop,
    *,
    qtransform: QTransform = qtransform_by_parent_and_siblings,
    dirichlet_fraction: Number = 0.25,
    dirichlet_alpha: Number = 0.3,
    pb_c_init: Number = 1.25,
    pb_c_base: Number = 19652,
    temperature: Number = 1.0,
    search_tree: Tree | None = None,
) -> PolicyOutput:
    """MuZero's search: PUCT from Dirichlet-noisy priors, actions by visits^(1 / temperature).

    Schrittwieser et al. (2020), "Mastering Atari, Go, chess and shogi by planning with a learned
    model", appendix B. All numbers of the search are float32, whatever those that it is given.

    Args:
      params: handed to `recurrent_fn`; a tree of arrays.
      rng_key: consumed.
      root: prior_logits [B, A], value [B] and embedding [B, ...], as in `RootFnOutput`.
      recurrent_fn: (params, key, action [B] int32, embedding) -> (`RecurrentFnOutput`, embedding);
        called once for each simulation with a batch of B. The embedding keeps its shapes and
        dtypes.
      num_simulations: new nodes of each tree.
      invalid_actions: [B, A], true or 1 where the root may not act; a row without any other action
        gets action 0. Below the root, logits of -1e9 do that.
      max_depth: edges from the root down to a leaf at most; a node as deep is evaluated again.
      loop_fn: runs the simulations; as `jax.lax.fori_loop`, or a loop of Python ints alone.
      qtransform: (tree, node index) -> values [A] in [0, 1]; must not look beyond the node, but for
        the range of values that `qtransform_by_tree_min_max` reads.
      dirichlet_fraction, dirichlet_alpha: [] of the noise in the roots' priors.
      pb_c_init, pb_c_base: [] c1 and c2 of PUCT.
      temperature: [] 0 takes the most visited action.
      search_tree: of an earlier search as long, brought to this root by `advance`; its visits count
        among the `num_simulations`, so that only the rest is searched. Priors, value and embedding
        of the root come from `root`.

    Returns:
      Actions, shares of visits as weights, and trees.

    Raises:
      InputError: no simulation or action, shapes or dtypes that do not agree, or a transform that
        reads other nodes.
    """
    invalid = check(root, num_simulations, invalid_actions, max_depth)
    transform = transform_of(qtransform, invalid.shape[1])
    rng_key, dirichlet_key, search_key = jax.random.split(rng_key, 3)
    ties_key, search_key = jax.random.split(search_key)
    logits = noisy(dirichlet_key, logits_of(root, invalid), dirichlet_fraction, dirichlet_alpha)
    constants = pb_c_init, pb_c_base
    lanes = puct.lanes_of(
        ties_key, root, masked(logits, invalid), invalid, transform, constants, search_tree
    )
    rule, budget = partial(puct.rule_of, transform), Budget(num_simulations, max_depth, loop_fn)
    tree, value = puct.search(params, search_key, recurrent_fn, lanes, rule, transform, budget)
    weights = tree.summary().visit_probs
    action = jax.random.categorical(rng_key, tempered(weights, temperature))
    return advice(action, weights, tree, lanes, value)


def gumbel_muzero_policy(
    params: Params,
    rng_key: jax.Array,
    root: Any,
    recurrent_fn: RecurrentFn,
    num_simulations: int,
    invalid_actions: jax.Array | None = None,
    max_depth: int | None = None,
    loop_fn: LoopFn = jax.lax.fori_loop,
    *,
    qtransform: QTransform = qtransform_completed_by_mix_value,
    max_num_considered_actions: int = 16,
    gumbel_scale: Number = 1.0,
    halve_once: bool = False,
) -> PolicyOutput:
    """Gumbel MuZero's search: sequential halving at the root, the improved policy below.

    Danihelka et al. (2022), "Policy improvement by planning with Gumbel".

    Args:
      params, rng_key, root, num_simulations, invalid_actions, max_depth: as in `muzero_policy`.
      recurrent_fn: as there; called with several nodes of each root at once where batches are small
        (`schedule.plan`), and then with more nodes in all than there are simulations.
      loop_fn: runs the simulations, or the rounds of them; with a loop of Python ints alone, one
        simulation of every root after the other.
      qtransform: (tree, node index) -> sigma(completed Q) [A]; must not look beyond the node, and
        must give all actions that are not visited the same value.
      max_num_considered_actions: sampled without replacement at the root; more than there are
        actions means all of them.
      gumbel_scale: [] 0 for evaluation in games of perfect information.
      halve_once: considered actions are dropped once in a phase, by their values at its start, as
        in algorithm 2 of the paper; otherwise each visit chooses anew, as in mctx, which takes a
        few more calls of the network.

    Returns:
      Actions, softmax(logits + completed Q) as weights, and trees.

    Raises:
      InputError: as in `muzero_policy`; a transform that reads the range of the whole tree; and
        `halve_once` with a loop of Python ints alone.
    """
    invalid = check(root, num_simulations, invalid_actions, max_depth)
    transform = transform_of(qtransform, invalid.shape[1])
    rng_key, gumbel_key = jax.random.split(rng_key)
    with_masks = invalid_actions is not None
    lanes = gumbel.lanes_of(gumbel_key, root, invalid, transform, gumbel_scale, with_masks)
    budget = Budget(num_simulations, max_depth, loop_fn)
    tree, added, value = gumbel.search(
        params, rng_key, recurrent_fn, lanes, transform, budget, max_num_considered_actions,
        halve_once, with_masks,
    )  # fmt: skip
    weights = jax.nn.softmax(masked(lanes.prior_logits + added, invalid))
    return advice(candidates.final_action(lanes, tree, added), weights, tree, lanes, value)
