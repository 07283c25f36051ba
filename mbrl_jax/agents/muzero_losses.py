"""MuZero's loss: the model unrolled along replayed actions, and what it says at each step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.agents.muzero_targets import Targets
from mbrl_jax.models import muzero_chance, muzero_net
from mbrl_jax.models.muzero_chance import Code
from mbrl_jax.models.muzero_layers import Chance, Latent, Net, Outcome, Prediction, Support
from mbrl_jax.nn.distributions import diagonal_normal
from mbrl_jax.types import PyTree


class Unrolled(NamedTuple):
    """The model along K actions."""

    features: jax.Array  # [K + 1, B, ...] of the latents
    outcome: Outcome  # [K, B, ...] of the steps between them
    afterstate: Chance | tuple[()]  # [K, B, ...] of the actions, in worlds with chance


def unroll(
    net: Net, params: PyTree, support: Support, obs: PyTree, action: jax.Array,
    code: jax.Array | None = None,
) -> Unrolled:  # fmt: skip
    """The latents from observations on, along actions.

    Half of the gradient flows back through each step's first input (Schrittwieser et al. 2020,
    appendix G).

    Args:
      net, params, support: of the functions.
      obs: [B, ...] of the first records.
      action: [B, K, V] float32, as `muzero_net.action_vector` makes them.
      code: [B, K, C] of the answers to the actions; None in worlds without chance.
    """
    first = muzero_net.represent(net, params, obs)

    def step(features: jax.Array, given: tuple[jax.Array, ...]):
        before, answer, answered = muzero_net.halve_gradient(features), given[-1], jnp.zeros(())
        if net.chance:
            before, answered = muzero_chance.afterstate(net, params, before, given[0])
        features, seen = muzero_net.move(net, params, before, answer)
        return features, (features, seen, answered)

    given = (action,) if code is None else (action, code)
    given = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), given)
    _, (after, seen, answered) = jax.lax.scan(step, first.features, given)

    def at_once(function: Callable[[jax.Array], PyTree], x: jax.Array) -> PyTree:
        out = function(x.reshape(-1, x.shape[-1]))
        return jax.tree.map(lambda leaf: leaf.reshape(*x.shape[:2], *leaf.shape[1:]), out)

    def outcome(prefix: PyTree, seen: jax.Array):
        found, prefix = muzero_net.outcome(net, params, support, seen, prefix)
        return prefix, found

    if net.prefix_period:
        _, outcomes = jax.lax.scan(outcome, first.prefix, seen)
    else:
        outcomes = at_once(lambda x: outcome((), x)[1], seen)
    said: Any = ()
    if net.chance:
        said = at_once(partial(muzero_chance.chance, net, params), answered)
    return Unrolled(jnp.concatenate([first.features[None], after]), outcomes, said)


def policy_loss(prediction: Prediction, weights: jax.Array, candidates: PyTree) -> jax.Array:
    """The cross-entropy of the search's weights under the policy, [...].

    Of candidates it is their weighted log-density: whatever number a candidate had in another
    search, its weight goes to its own slot. The density is taken before the squashing, whose part
    no parameter moves.

    Args:
      prediction: [..., A] logits, or the Gaussian's mean and deviation [..., D].
      weights: [..., A], or [..., K] of the candidates; 0 where an action is not legal.
      candidates: [..., K, D]; or () of discrete actions.
    """
    if isinstance(candidates, tuple):
        return -jnp.sum(weights * jax.nn.log_softmax(prediction.policy), axis=-1)
    mean, std = (x[..., None, :] for x in prediction.policy)
    return -jnp.sum(weights * diagonal_normal(mean, std).log_prob(candidates), axis=-1)


def entropy_of(prediction: Prediction) -> jax.Array:
    """The entropy of the policies in nats, [...]; of continuous ones before the squashing."""
    if isinstance(prediction.policy, tuple):
        return diagonal_normal(*prediction.policy).entropy()
    log = jax.nn.log_softmax(prediction.policy)
    return -jnp.sum(jnp.exp(log) * log, axis=-1)


def likeness_loss(made: jax.Array, seen: jax.Array) -> jax.Array:
    """1 minus the cosine of the angle between projections [..., P]; no gradient goes to `seen`."""
    made, seen = (x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
                  for x in (made, jax.lax.stop_gradient(seen)))  # fmt: skip
    return 1.0 - jnp.sum(made * seen, axis=-1)


def chance_losses(
    said: Chance, code: Code, targets: Targets, support: Support
) -> dict[str, jax.Array]:
    """What the afterstates of an unroll are trained towards (Antonoglou et al. 2022, section 4).

    Args:
      said: [K, B, ...] of the afterstates.
      code: [K, B, C] of the observations that came.
      targets: of the unroll; an afterstate is worth what its state and action earned.
      support: of the functions.

    Returns:
      `chance`, `afterstate_value` and `commitment`, [B, K].
    """
    fixed = jax.lax.stop_gradient(code.chosen)
    value = muzero_net.distribution_loss(said.value, targets.value[:, :-1].T, support.value)
    losses = {
        "chance": -jnp.sum(fixed * jax.nn.log_softmax(said.codes), axis=-1),
        "commitment": jnp.sum(jnp.square(code.shares - fixed), axis=-1),
    }
    # past an end there is no observation to encode
    known = {name: x.T * targets.likeness_mask for name, x in losses.items()}
    return known | {"afterstate_value": value.T * targets.step_mask}


def unrolled_losses(
    net: Net,
    params: PyTree,
    support: Support,
    obs: PyTree,
    action: jax.Array,
    targets: Targets,
    later_obs: PyTree,
) -> tuple[dict[str, jax.Array], Prediction]:
    """The masked losses of each step, unscaled, and the predictions [K + 1, B, ...].

    There is no reward loss at the first state, which no action led to.

    Args:
      net, params, support: of the functions.
      obs, action: as in `unroll`.
      targets: of the unroll.
      later_obs: [B, K, ...] of the states after the steps; read for consistency and chance alone.

    Returns:
      `policy`, `value` and `entropy` [B, K + 1], `reward`, `continues`, with a projection
      `consistency`, and with codes those of `chance_losses`, [B, K].
    """
    steps, batch = action.shape[1], action.shape[0]

    def by_step(x: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), x)

    rows = jax.tree.map(lambda x: by_step(x).reshape(-1, *x.shape[2:]), later_obs)
    code = None
    if net.chance:
        code = jax.tree.map(
            lambda x: x.reshape(steps, batch, -1), muzero_chance.encode(net, params, rows)
        )
    made = unroll(
        net, params, support, obs, action,
        None if code is None else jnp.moveaxis(code.chosen, 0, 1),
    )  # fmt: skip
    flat = Latent(made.features.reshape(-1, *made.features.shape[2:]))
    predictions = muzero_net.predict(net, params, flat)
    predictions = jax.tree.map(lambda x: x.reshape(steps + 1, batch, *x.shape[1:]), predictions)

    candidates = by_step(targets.candidates)
    policy = policy_loss(predictions, by_step(targets.policy), candidates)
    value = muzero_net.distribution_loss(predictions.value, targets.value.T, support.value)
    reward = muzero_net.distribution_loss(made.outcome.reward, targets.reward.T, support.reward)
    logit = made.outcome.continues
    continues = jax.nn.softplus(logit) - targets.continues.T * logit
    losses = {
        "policy": policy.T * targets.policy_mask,
        "value": value.T * targets.value_mask,
        "entropy": entropy_of(predictions).T * targets.policy_mask,
        "reward": reward.T * targets.step_mask,
        "continues": continues.T * targets.step_mask,
    }
    if isinstance(made.afterstate, Chance) and code is not None:
        losses |= chance_losses(made.afterstate, code, targets, support)
    if net.projection:
        after = Latent(made.features[1:].reshape(-1, *made.features.shape[2:]))
        seen = jax.lax.stop_gradient(muzero_net.represent(net, params, rows))
        likeness = likeness_loss(
            muzero_net.project(net, params, after, through=True),
            muzero_net.project(net, params, seen, through=False),
        )
        losses["consistency"] = likeness.reshape(steps, batch).T * targets.likeness_mask
    return losses, predictions


def total_loss(
    losses: dict[str, jax.Array], coefs: dict[str, PyTree], weight: jax.Array | float
) -> jax.Array:
    """The mean over sequences of the sum of all losses, each times its coefficient.

    The first state counts whole, and each later step one K-th (Schrittwieser et al. 2020,
    appendix G).

    Args:
      losses: from `unrolled_losses`.
      coefs: of each loss; 1 where it is missing.
      weight: [B] of the sequences, or one number.
    """
    steps = losses["reward"].shape[1]
    total = jnp.zeros(losses["reward"].shape[0], jnp.float32)
    for name, loss in losses.items():
        first = loss.shape[1] - steps  # 1 where the loss has a first state
        share = jnp.concatenate([jnp.ones(first), jnp.full(steps, 1.0 / steps)])
        total += coefs.get(name, 1.0) * jnp.sum(loss * share[None], axis=1)
    return jnp.mean(weight * total)
