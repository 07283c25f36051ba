"""The recurrent state-space model (RSSM) of DreamerV3, on plain arrays.

A state has a deterministic part `deter` [D], which the core carries on, and a random part `stoch`
[S, C]. `observe` follows real data: at each step the posterior draws `stoch` from `deter` and the
tokens of the observation. `imagine` follows a policy: `stoch` comes from the prior. After Hafner et
al. (2025), "Mastering diverse control tasks through world models".

    params = rssm_params.init(key, sizes, obs_parts, action_parts)
    tokens = rssm_codec.encode(params["enc"], obs, obs_parts, dtype)
    posterior = rssm.observe(params, tokens, actions, is_first, noise)
    dreamt = rssm.imagine(params, start, policy, noise, horizon)

Everywhere `share` is that of the uniform distribution in categorical latents and `gaussian` makes
latents normal (see `rssm_latents`); `dtype` is computed in, by default that of `compute_dtype`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.models import rssm_cell as cell
from mbrl_jax.models import rssm_latents as latents
from mbrl_jax.models import rssm_layers as layers
from mbrl_jax.models import rssm_scan
from mbrl_jax.nn.precision import compute_dtype
from mbrl_jax.types import PyTree, Scalar


class State(NamedTuple):
    """A latent state, or many."""

    deter: jax.Array  # [*lead, D]
    stoch: jax.Array  # [*lead, S, C]


class Posterior(NamedTuple):
    """What `observe` gives, for each of B sequences of T steps."""

    deter: jax.Array  # [B, T, D] of the dtype that is computed in
    stoch: jax.Array  # [B, T, S, C] likewise
    logits: jax.Array  # [B, T, S, K] float32, outputs of the posterior, before any mixture


class Dreamt(NamedTuple):
    """What `imagine` gives: H + 1 states of N trajectories, and the action taken in each.

    The first states are the starts; the last action leads nowhere.
    """

    deter: jax.Array  # [H + 1, N, D]
    stoch: jax.Array  # [H + 1, N, S, C]
    actions: jax.Array  # [H + 1, N, A] float32, as the policy gave them


def zero_state(
    lead: tuple[int, ...], deter: int, stoch: int, classes: int, dtype: Any = None
) -> State:
    """The state before an episode: zeros of [*lead, deter] and [*lead, stoch, classes]."""
    dtype = compute_dtype(dtype)
    return State(jnp.zeros((*lead, deter), dtype), jnp.zeros((*lead, stoch, classes), dtype))


def core(params: PyTree, state: State, action: jax.Array, dtype: Any = None) -> jax.Array:
    """The next deterministic states [N, D].

    Args:
      params: of the whole model, of which `core` is used.
      state: [N, ...].
      action: [N, A] float32 vectors, of any size.
    """
    how = cell.settings(dtype, False)
    weights, bias, _ = cell.cut(params["core"], with_action=True)
    weights = cell.prepared(how, weights)
    before = cell.packed(
        how, cell.to_blocks(how, state.deter, weights.blocks.shape[0]), state.stoch
    )
    made = cell.core(how, weights, before, bias[None], action=cell.limited(action))
    return cell.from_blocks(how, made.deter).astype(how.dtype)


def prior_logits(params: PyTree, deter: jax.Array, stoch: int, dtype: Any = None) -> jax.Array:
    """Outputs [*lead, S, K] float32 of the prior, S = `stoch`, before any mixture.

    Args:
      params: of the whole model, of which `prior` is used.
      deter: [*lead, D].
      stoch: S.
    """
    dtype = compute_dtype(dtype)
    params = params["prior"]
    x = layers.output(params["out"], layers.mlp(params, deter, dtype), dtype)
    return x.reshape(*deter.shape[:-1], stoch, -1)


def observe(
    params: PyTree,
    tokens: jax.Array,
    actions: jax.Array,
    is_first: jax.Array,
    noise: jax.Array,
    start: State | None = None,
    *,
    share: Scalar = latents.UNIMIX,
    gaussian: bool = False,
    dtype: Any = None,
) -> Posterior:
    """The posterior states of sequences, each step from the one before, its action and its tokens.

    Args:
      params: of the whole model, of which `core` and `post` are used.
      tokens: [B, T, E] of the observations.
      actions: [B, T, A] float32 vectors of the actions BEFORE the observations.
      is_first: [B, T] bool, the observation opens an episode: the state before it and the action
        are set to zero.
      noise: [B, T, S, C] from `rssm_latents.draw_noise`.
      start: the states before the first step [B, ...]; None is zeros.
    """
    how = cell.settings(dtype, gaussian)
    batch, _, stoch, classes = noise.shape
    # in the order of time first, so that a step reads one slice
    tokens, actions, noise, keep = jax.tree.map(
        lambda x: jnp.swapaxes(x, 0, 1), (tokens, actions, noise, _kept(is_first))
    )
    weights, drive, tokens = rssm_scan.hoisted(how, params, tokens, actions, keep)
    if start is None:
        start = zero_state((batch,), drive.shape[-1], stoch, classes, how.dtype)
    given = rssm_scan.Given(keep, noise, share)
    made = rssm_scan.states(how, weights, drive, tokens, (start.deter, start.stoch), given)
    return Posterior(*(jnp.swapaxes(x, 0, 1) for x in made))


def step(
    params: PyTree,
    state: State,
    tokens: jax.Array,
    action: jax.Array,
    is_first: jax.Array,
    noise: jax.Array,
    *,
    share: Scalar = latents.UNIMIX,
    gaussian: bool = False,
    dtype: Any = None,
) -> Posterior:
    """One step of `observe`, such as a policy takes; arguments as there, [N, ...] without T."""
    how, keep = cell.settings(dtype, gaussian), _kept(is_first)
    weights, drive, tokens = rssm_scan.hoisted(how, params, tokens, action, keep)
    weights = rssm_scan.prepared(how, weights)
    deter = cell.to_blocks(how, state.deter, weights.core.blocks.shape[0])
    before = cell.masked(how, cell.packed(how, deter, state.stoch), keep)
    made = rssm_scan.trace(how, weights, before, drive, tokens, noise.shape[-2])
    stoch = latents.sample(made.logits, noise, share, gaussian).astype(how.dtype)
    deter = cell.from_blocks(how, made.core.deter).astype(how.dtype)
    return Posterior(deter, stoch, made.logits)


def _kept(is_first: jax.Array) -> jax.Array:
    """1 where the state before is kept, and 0 where an episode begins; float32."""
    return (~is_first).astype(jnp.float32)


def imagine(
    params: PyTree,
    start: State,
    policy: Callable[[jax.Array, jax.Array, PyTree], jax.Array],
    noise: tuple[jax.Array, PyTree],
    horizon: int,
    *,
    share: Scalar = latents.UNIMIX,
    gaussian: bool = False,
    dtype: Any = None,
) -> Dreamt:
    """Trajectories of `horizon` steps under a policy, with latents from the prior.

    Differentiable, also through the dynamics; a step is computed anew in the backward pass.

    Args:
      params: of the whole model, of which `core` and `prior` are used.
      start: states [N, ...].
      policy: (deter [N, D], stoch [N, S, C], noise) -> action vectors [N, A] float32.
      noise: of the latents [H, N, S, C], from `rssm_latents.draw_noise`, and of the policy, a tree
        of arrays [H + 1, N, ...].
      horizon: H.

    A policy that casts its own parameters does so at each step: on an accelerator give it those of
    `rssm_layers.cast_kernels`.
    """
    how = cell.settings(dtype, gaussian)
    weights, bias, _ = cell.cut(params["core"], with_action=True)
    weights = cell.prepared(how, weights)
    blocks, size = weights.blocks.shape[:2]
    prior = {"prior": layers.cast_kernels(params["prior"], how.dtype)}
    latent_noise, policy_noise = noise
    shape = start.stoch.shape

    def split(features: jax.Array) -> tuple[jax.Array, jax.Array]:
        deter, stoch = jnp.split(features, [blocks * size], -1)
        return deter, stoch.reshape(*stoch.shape[:-1], *shape[-2:])

    @jax.checkpoint
    def turn(state: cell.Packed, x: tuple) -> tuple[cell.Packed, jax.Array, jax.Array]:
        action = policy(*split(cell.features(how, state)), x[1])
        made = cell.core(how, weights, state, bias[None], action=cell.limited(action))
        logits = prior_logits(prior, cell.from_blocks(how, made.deter), shape[-2], how.dtype)
        drawn = latents.sample(logits, x[0], share, gaussian)
        after = cell.packed(how, made.deter, drawn)
        return after, cell.features(how, after), action

    def advance(carry: tuple, x: tuple) -> tuple[tuple, jax.Array]:
        state, visited = carry
        after, features, action = turn(state, x[1:])
        return (after, jax.lax.dynamic_update_index_in_dim(visited, features, x[0], 0)), action

    # states are written where they stay, deter and stoch in one array as all heads take them: what
    # a scan gives would be copied to join the first state, and once more by the heads
    first = cell.packed(how, cell.to_blocks(how, start.deter, blocks), start.stoch)
    visited = jnp.pad(cell.features(how, first)[None], ((0, horizon), (0, 0), (0, 0)))
    steps = jnp.arange(1, horizon + 1, dtype=jnp.int32)
    before = jax.tree.map(lambda x: x[:horizon], policy_noise)
    (end, visited), actions = jax.lax.scan(advance, (first, visited), (steps, latent_noise, before))
    last = jax.tree.map(lambda x: x[horizon], policy_noise)
    action = policy(*split(cell.features(how, end)), last)
    return Dreamt(*split(visited), jnp.concatenate([actions, action[None]]))
