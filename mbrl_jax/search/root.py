"""The roots of a search: what is asked of them, their noise, and the advice that comes back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mbrl_jax.search.base import Lanes, LoopFn, Number, PolicyOutput, Tree
from mbrl_jax.search.node import safe_log
from mbrl_jax.types import InputError


def check(
    root: Any, num_simulations: int, invalid_actions: jax.Array | None, max_depth: int | None
) -> jax.Array:
    """The actions that the roots may not take, [B, A] bool.

    Args:
      root, num_simulations, invalid_actions, max_depth: as in `muzero_policy`.

    Raises:
      InputError: no simulation or action, or shapes that do not agree.
    """
    for name, number in (("num_simulations", num_simulations), ("max_depth", max_depth)):
        if number is not None and number < 1:
            raise InputError(f"{name} = {number}: expected 1 or more")
    shape = jnp.shape(root.prior_logits)
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"root.prior_logits of shape {shape}: expected [B, A], neither of them 0")
    if jnp.shape(root.value) != shape[:1]:
        raise InputError(f"root.value of shape {jnp.shape(root.value)}: expected {shape[:1]}")
    for leaf in jax.tree.leaves(root.embedding):
        if jnp.shape(leaf)[:1] != shape[:1]:
            raise InputError(
                f"root.embedding of shape {jnp.shape(leaf)}: expected {shape[0]} rows, as in "
                "prior_logits"
            )
    if invalid_actions is None:
        return jnp.zeros(shape, bool)
    if jnp.shape(invalid_actions) != shape:
        raise InputError(f"invalid_actions of shape {jnp.shape(invalid_actions)}: expected {shape}")
    return jnp.asarray(invalid_actions).astype(bool)


def logits_of(root: Any, invalid: jax.Array) -> jax.Array:
    """The roots' prior logits, [B, A] float32; the lowest number for NaN where not allowed.

    Args:
      root: as in `muzero_policy`.
      invalid: [B, A] bool.
    """
    logits = jnp.asarray(root.prior_logits, jnp.float32)
    return jnp.where(invalid & ~(logits < jnp.inf), jnp.finfo(logits.dtype).min, logits)


def masked(logits: jax.Array, invalid: jax.Array) -> jax.Array:
    """Logits [B, A] whose greatest is 0, with the lowest number where an action is not allowed.

    Not infinity: a row may have no other action.

    Args:
      logits: [B, A] float32.
      invalid: [B, A] bool.
    """
    top = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(invalid, jnp.finfo(logits.dtype).min, logits - top)


def noisy(key: jax.Array, logits: jax.Array, fraction: Number, alpha: Number) -> jax.Array:
    """Logits of the priors mixed with Dirichlet noise, [B, A] float32.

    Args:
      key: consumed.
      logits: [B, A].
      fraction: [] of the noise in the mixture.
      alpha: [] of the Dirichlet distribution, the same for every action.
    """
    prior = jax.nn.softmax(logits)
    batch, num_actions = prior.shape
    concentration = jnp.full(num_actions, alpha, jnp.float32)
    noise = jax.random.dirichlet(key, concentration, (batch,), jnp.float32)
    return safe_log((1 - jnp.float32(fraction)) * prior + jnp.float32(fraction) * noise)


def tempered(weights: jax.Array, temperature: Number) -> jax.Array:
    """Logits of weights^(1 / temperature), [B, A] float32; 0 leaves the greatest alone.

    Args:
      weights: [B, A] float32, 0 or more.
      temperature: [], 0 or more.
    """
    scores = safe_log(weights)
    scores = scores - jnp.max(scores, axis=-1, keepdims=True)
    return scores / jnp.maximum(jnp.finfo(scores.dtype).tiny, jnp.float32(temperature))


def advice(
    action: jax.Array, weights: jax.Array, tree: Tree, lanes: Lanes, value: jax.Array
) -> PolicyOutput:
    """The output of a policy, with what `PolicyOutput` says of numbers that are none.

    Args:
      action: [B] int of the policy.
      weights: [B, A] float32 of the policy.
      tree: of the search.
      lanes: what the roots brought.
      value: [B] float32 of the roots after the search; not the tree's, which would be made for all
        of its nodes.
    """
    # not of one array with all of them, whose kernel on a GPU does not compile with JAX 0.10.2
    lost = jnp.any(jnp.isnan(lanes.prior_logits), axis=-1) | jnp.any(jnp.isnan(weights), axis=-1)
    lost = lost | jnp.isnan(value)
    allowed = jnp.argmax(~lanes.invalid, axis=-1)
    return PolicyOutput(
        action=jnp.where(lost, allowed, action).astype(jnp.int32),
        action_weights=jnp.where(lost[:, None], jnp.nan, weights), search_tree=tree,
    )  # fmt: skip


def takes_traced_bounds(loop_fn: LoopFn) -> bool:
    """Whether a loop runs a number of turns that only the device knows, as a Python loop cannot."""
    if loop_fn is jax.lax.fori_loop:
        return True
    zero = jax.ShapeDtypeStruct((), jnp.int32)
    try:
        jax.eval_shape(lambda end: loop_fn(0, end, lambda _, x: x, jnp.int32(0)), zero)
    except TypeError:  # of JAX, for a tracer where it needs a number
        return False
    return True
