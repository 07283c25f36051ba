"""Search among sampled actions, for continuous or very large sets of them.

Hubert et al. (2021), "Learning and planning in complex action spaces": every node has K candidates
drawn from a proposal, and the priors of the search are corrected for having been drawn. On top of
that Gumbel MuZero's search, as in Wang et al. (2024), "EfficientZero V2".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mbrl_jax.search.base import (
    LoopFn,
    Number,
    Params,
    QTransform,
    RecurrentFnOutput,
    RecurrentState,
    RootFnOutput,
    Tree,
    record,
)
from mbrl_jax.search.policies import gumbel_muzero_policy
from mbrl_jax.search.qtransforms import qtransform_completed_by_mix_value
from mbrl_jax.types import InputError


@record
class SampledRootFnOutput:
    """A batch of states with their candidates."""

    actions: jax.Array  # [B, K, ...] drawn from the proposal
    prior_logits: jax.Array  # [B, K], see `sampled_logits`
    value: jax.Array  # [B]
    embedding: RecurrentState  # [B, ...]


@record
class SampledRecurrentFnOutput:
    """One step of the model from a batch of nodes, with the successors' candidates."""

    reward: jax.Array  # [B]
    discount: jax.Array  # [B]
    actions: jax.Array  # [B, K, ...]
    prior_logits: jax.Array  # [B, K]
    value: jax.Array  # [B]


@record
class SampledPolicyOutput:
    """What a search among samples advises."""

    action: jax.Array  # [B, ...]
    action_index: jax.Array  # [B] int32, its number among the candidates
    actions: jax.Array  # [B, K, ...] the candidates of the roots
    action_weights: jax.Array  # [B, K] target of the policy at the candidates; sums to one
    search_tree: Tree  # whose actions are numbers of candidates


def sampled_logits(log_policy: jax.Array, log_proposal: jax.Array) -> jax.Array:
    """The prior of candidates, up to a constant: the policy's weight over the proposal's, [..., K].

    Hubert et al. (2021), section 4.1, with each draw a candidate of its own, so that the empirical
    proposal is uniform. Draws from the policy itself have equal priors.

    Args:
      log_policy, log_proposal: [..., K] log densities of the candidates.
    """
    return log_policy - log_proposal


def sampled_policy(
    params: Params,
    rng_key: jax.Array,
    root: Any,
    recurrent_fn: Callable[..., tuple[Any, RecurrentState]],
    num_simulations: int,
    invalid_actions: jax.Array | None = None,
    max_depth: int | None = None,
    loop_fn: LoopFn = jax.lax.fori_loop,
    *,
    qtransform: QTransform = qtransform_completed_by_mix_value,
    max_num_considered_actions: int = 16,
    gumbel_scale: Number = 1.0,
) -> SampledPolicyOutput:
    """Gumbel MuZero's search, with actions that are candidates of their node.

    Args:
      params, rng_key, num_simulations, max_depth, loop_fn, qtransform, max_num_considered_actions,
        gumbel_scale: as in `gumbel_muzero_policy`.
      root: as `SampledRootFnOutput`.
      recurrent_fn: (params, key, action [B, ...], embedding) -> (`SampledRecurrentFnOutput`,
        embedding); the key is there to draw the successors' candidates.
      invalid_actions: [B, K] candidates that the root may not take.

    Returns:
      The action of each root and all its candidates, their weights, and trees whose actions are
      numbers of candidates.

    Raises:
      InputError: as there; candidates whose shapes do not agree.
    """
    shape = jnp.shape(root.actions)
    if len(shape) < 2 or shape[:2] != jnp.shape(root.prior_logits):
        raise InputError(
            f"root.actions of shape {shape}: expected {jnp.shape(root.prior_logits)} candidates, "
            "as in prior_logits"
        )

    def step(params: Params, key: jax.Array, index: jax.Array, node: Any) -> Any:
        embedding, actions = node
        out, embedding = recurrent_fn(params, key, candidate(actions, index), embedding)
        known = RecurrentFnOutput(
            reward=out.reward, discount=out.discount, prior_logits=out.prior_logits,
            value=out.value,
        )  # fmt: skip
        return known, (embedding, out.actions)

    inner = RootFnOutput(
        prior_logits=root.prior_logits, value=root.value, embedding=(root.embedding, root.actions)
    )
    found = gumbel_muzero_policy(
        params, rng_key, inner, step, num_simulations, invalid_actions, max_depth, loop_fn,
        qtransform=qtransform, max_num_considered_actions=max_num_considered_actions,
        gumbel_scale=gumbel_scale,
    )  # fmt: skip
    return SampledPolicyOutput(
        action=candidate(root.actions, found.action), action_index=found.action,
        actions=root.actions, action_weights=found.action_weights, search_tree=found.search_tree,
    )  # fmt: skip


def candidate(actions: jax.Array, index: jax.Array) -> jax.Array:
    """The chosen candidates, [B, ...].

    Args:
      actions: [B, K, ...].
      index: [B] int32 number of the chosen one.
    """
    place = index.reshape(-1, *[1] * (actions.ndim - 1))
    return jnp.take_along_axis(actions, place, axis=1)[:, 0]
