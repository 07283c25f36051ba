"""Search policies with the signatures, defaults and results that users of mctx know.

What differs: a search does not slow down as its trees grow (`forest.py`), Gumbel MuZero's rounds
are batches (`halving.py`), both under vmap too (`seeds.py`). PUCT breaks ties by a tiny noise on
the priors that is drawn once for each root, instead of one at every visit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mbrl_jax.search import forest as forests
from mbrl_jax.search import gumbel as halved
from mbrl_jax.search import halving, puct, trees
from mbrl_jax.search.base import LoopFn, Params, PolicyOutput, QTransform, RecurrentFn, Tree, record
from mbrl_jax.search.forest import Rule
from mbrl_jax.search.qtransforms import (
    is_local,
    qtransform_by_parent_and_siblings,
    qtransform_completed_by_mix_value,
)
from mbrl_jax.search.seeds import Model, over_seeds

TIE_NOISE = 1e-6  # relative, on PUCT's priors

Number = jax.Array | float
Constants = Sequence[Any]
"""Of a rule; numbers, or arrays [B]."""


@record
class GumbelMuZeroExtraData:
    """The noise of a Gumbel search, in its tree's `extra_data`."""

    root_gumbel: chex.Array  # [B, A]


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
    model", appendix B.

    Args:
      params: handed to `recurrent_fn`; what seeds do not share must come through it under vmap.
      rng_key: consumed.
      root: prior_logits [B, A], value [B] and embedding [B, ...], as in `RootFnOutput`.
      recurrent_fn: (params, key, action [B] int32, embedding) -> (`RecurrentFnOutput`, embedding);
        called once for each simulation with a batch of B.
      num_simulations: new nodes of each tree.
      invalid_actions: [B, A], true or 1 where the root may not act; a row without any other action
        gets action 0. Below the root, logits of -1e9 do that.
      max_depth: edges from the root down to a leaf at most; a node as deep is evaluated again.
      loop_fn: runs the simulations.
      qtransform: (tree, node index) -> values [A] in [0, 1]; must not look beyond the node, but for
        `qtransform_by_tree_min_max`.
      dirichlet_fraction, dirichlet_alpha: of the noise in the roots' priors.
      pb_c_init, pb_c_base: c1 and c2 of PUCT.
      temperature: 0 takes the most visited action.
      search_tree: of an earlier search as long, brought to this root by `advance`; its visits count
        among the `num_simulations`, so that only the rest is searched. Priors, value and embedding
        of the root come from `root`.

    Returns:
      Actions, shares of visits as weights, and trees.

    Raises:
      ValueError: no simulation or action, or shapes that do not agree.
    """
    invalid = check(root, num_simulations, invalid_actions, max_depth)
    rng_key, dirichlet_key, search_key = jax.random.split(rng_key, 3)
    logits = noisy(dirichlet_key, root.prior_logits, dirichlet_fraction, dirichlet_alpha)

    def rule(constants: Constants) -> Rule:
        return puct.puct(qtransform, *constants)

    tree = puct_search(
        params, search_key, masked(logits, invalid), root, recurrent_fn, rule,
        (pb_c_init, pb_c_base), is_local(qtransform), num_simulations, invalid, max_depth, loop_fn,
        search_tree,
    )  # fmt: skip
    weights = tree.summary().visit_probs
    action = jax.random.categorical(rng_key, tempered(weights, temperature))
    return PolicyOutput(action=action, action_weights=weights, search_tree=tree)


def puct_search(
    params: Params,
    key: jax.Array,
    logits: jax.Array,
    root: Any,
    recurrent_fn: RecurrentFn,
    rule: Callable[[Constants], Rule],
    constants: Constants,
    local: bool,
    num_simulations: int,
    invalid: jax.Array,
    max_depth: int | None,
    loop_fn: LoopFn,
    before: Tree | None = None,
) -> Tree:
    """The trees of simulations one after the other, by a rule of some constants.

    The roots' logits [B, A] are in place of their own; `constants` may be mapped by vmap; `local`:
    the rule sees a node alone.
    """
    if before is not None:
        expected = (logits.shape[0], num_simulations + 1, logits.shape[1])
        if before.children_index.shape != expected:
            raise ValueError(
                f"search_tree of {before.children_index.shape} roots, nodes and actions: expected "
                f"{expected}; a search goes on from one with as many simulations"
            )
    ties_key, key = jax.random.split(key)
    lanes = {
        "logits": logits,
        "value": jnp.asarray(root.value, jnp.float32),
        "embedding": root.embedding,
        "invalid": invalid,
        "ties": 1.0 + TIE_NOISE * jax.random.uniform(ties_key, logits.shape),
        "constants": [jnp.broadcast_to(jnp.float32(c), logits.shape[:1]) for c in constants],
        "before": before,
    }

    def search(model: Model, lanes: dict[str, Any]) -> Tree:
        limit = _limit(max_depth, num_simulations)
        prior = jax.nn.softmax(lanes["logits"]) * lanes["ties"]
        forest = forests.plant(
            jnp.where(lanes["invalid"], -jnp.inf, prior), lanes["value"], lanes["embedding"],
            num_simulations + 1, local and limit is not None, local,
        )  # fmt: skip
        deepest, choice, kept = limit or num_simulations, rule(lanes["constants"]), None
        if lanes["before"] is not None:
            forest = trees.restore(forest, lanes["before"], choice, deepest)
            kept = jnp.sum(lanes["before"].children_visits[:, 0], axis=-1)
        forest = puct.simulate(
            forest, model, choice, num_simulations, deepest, lanes["ties"], loop_fn, kept
        )
        return trees.export(forest, num_simulations, lanes["logits"], lanes["invalid"])

    return over_seeds(search, recurrent_fn)(params, key, lanes)


def tempered(weights: jax.Array, temperature: Number) -> jax.Array:
    """Logits of weights^(1 / temperature), [B, A]; 0 leaves the greatest alone."""
    scores = forests.safe_log(weights)
    scores = scores - jnp.max(scores, axis=-1, keepdims=True)
    return scores / jnp.maximum(jnp.finfo(scores.dtype).tiny, temperature)


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
        (`halving.plan`), and then with more nodes in all than there are simulations.
      loop_fn: runs the simulations, or the rounds of them.
      qtransform: (tree, node index) -> sigma(completed Q) [A]; must not look beyond the node.
      max_num_considered_actions: sampled without replacement at the root; more than there are
        actions means all of them.
      gumbel_scale: 0 for evaluation in games of perfect information.
      halve_once: considered actions are dropped once in a phase, by their values at its start, as
        in algorithm 2 of the paper; otherwise each visit chooses anew, as in mctx, which takes a
        few more calls of the network.

    Returns:
      Actions, softmax(logits + completed Q) as weights, and trees.

    Raises:
      ValueError: no simulation or action, or shapes that do not agree.
    """
    invalid = check(root, num_simulations, invalid_actions, max_depth)
    if max_num_considered_actions < 1:
        raise ValueError(
            f"max_num_considered_actions = {max_num_considered_actions}: expected 1 or more"
        )
    if not is_local(qtransform):
        raise ValueError(
            "qtransform_by_tree_min_max: expected a transform that sees one node alone, such as "
            "qtransform_completed_by_mix_value; the tree's is for muzero_policy"
        )
    rng_key, gumbel_key = jax.random.split(rng_key)
    logits = jnp.asarray(root.prior_logits, jnp.float32)
    if invalid_actions is not None:
        logits = masked(logits, invalid)
    gumbel = gumbel_scale * jax.random.gumbel(gumbel_key, logits.shape)
    most = min(max_num_considered_actions, logits.shape[1])
    rounds = halving.schedule(most, num_simulations, halve_once)
    among = range(most, most + 1) if invalid_actions is None else range(most + 1)
    lanes = {
        "logits": logits,
        "value": jnp.asarray(root.value, jnp.float32),
        "embedding": root.embedding,
        "invalid": invalid,
        "gumbel": gumbel,
    }

    def search(model: Model, lanes: dict[str, Any]) -> tuple[Tree, jax.Array]:
        logits, invalid = lanes["logits"], lanes["invalid"]
        considered = jnp.full(logits.shape[0], most)
        if invalid_actions is not None:
            considered = jnp.minimum(most, jnp.sum(~invalid, axis=-1))
        machine = halving.CPU if jax.default_backend() == "cpu" else halving.ACCELERATOR
        groups = halving.plan(rounds, among, logits.shape[0], machine)
        one_by_one = halving.one_by_one(groups)
        limit = _limit(max_depth, num_simulations)
        num_nodes = num_simulations + 1 if one_by_one else halving.peak(rounds, among, groups)
        forest = forests.plant(
            jax.nn.softmax(logits), lanes["value"], lanes["embedding"], num_nodes,
            limit is not None,
        )  # fmt: skip
        start = halved.Root(halved.noisy(lanes["gumbel"], logits), invalid.T, considered)
        common = forest, model, start, qtransform, rounds
        if one_by_one:
            forest = halved.in_sequence(*common, limit or 0, loop_fn)
        else:
            forest = halved.in_rounds(*common, groups, halve_once, limit or 0, loop_fn)
        made = None
        if invalid_actions is not None and not one_by_one:
            made = halved.made(rounds, considered, forest.table.shape[0] // forest.batch)
        extra = GumbelMuZeroExtraData(root_gumbel=lanes["gumbel"])
        # of the forest, since a tree's values would be made for all of its nodes
        added = forests.transformed(qtransform, forests.roots(forest)).T
        return trees.export(forest, num_simulations, logits, invalid, extra, made), added

    tree, added = over_seeds(search, recurrent_fn)(params, rng_key, lanes)
    visits = tree.children_visits[:, 0]
    top = jnp.max(visits, axis=-1)[None]
    score = halved.considered_score(top, halved.noisy(gumbel, logits), added.T, visits.T)
    action = jnp.argmax(jnp.where(invalid.T, -jnp.inf, score), axis=0)
    weights = jax.nn.softmax(masked(logits + added, invalid))
    return PolicyOutput(action=action, action_weights=weights, search_tree=tree)


def noisy(key: jax.Array, logits: jax.Array, fraction: Number, alpha: Number) -> jax.Array:
    """Logits of the priors mixed with Dirichlet noise, [B, A]."""
    prior = jax.nn.softmax(jnp.asarray(logits, jnp.float32))
    batch, num_actions = prior.shape
    noise = jax.random.dirichlet(key, jnp.full(num_actions, alpha, jnp.float32), (batch,))
    return forests.safe_log((1 - fraction) * prior + fraction * noise)


def masked(logits: jax.Array, invalid: jax.Array) -> jax.Array:
    """The lowest number, not infinity, where invalid: a row may have no other action."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(invalid, jnp.finfo(logits.dtype).min, logits - top)


def _limit(max_depth: int | None, num_simulations: int) -> int | None:
    """The depth limit, if it can ever be met."""
    return max_depth if max_depth is not None and max_depth < num_simulations else None


def check(
    root: Any, num_simulations: int, invalid_actions: jax.Array | None, max_depth: int | None
) -> jax.Array:
    """-> the invalid actions as bool [B, A]."""
    for name, number in (("num_simulations", num_simulations), ("max_depth", max_depth)):
        if number is not None and number < 1:
            raise ValueError(f"{name} = {number}: expected 1 or more")
    shape = jnp.shape(root.prior_logits)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"root.prior_logits of shape {shape}: expected [B, A], neither of them 0")
    if jnp.shape(root.value) != shape[:1]:
        raise ValueError(f"root.value of shape {jnp.shape(root.value)}: expected {shape[:1]}")
    for leaf in jax.tree.leaves(root.embedding):
        if jnp.shape(leaf)[:1] != shape[:1]:
            raise ValueError(
                f"root.embedding of shape {jnp.shape(leaf)}: expected {shape[0]} rows, as in "
                "prior_logits"
            )
    if invalid_actions is None:
        return jnp.zeros(shape, bool)
    if jnp.shape(invalid_actions) != shape:
        raise ValueError(f"invalid_actions of shape {jnp.shape(invalid_actions)}: expected {shape}")
    return jnp.asarray(invalid_actions).astype(bool)
