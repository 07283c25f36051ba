"""The losses of DreamerV3 as functions of plain arrays, without networks, replay or environment.

Hafner et al. (2025), "Mastering diverse control tasks through world models"; numbers in brackets
are its equations. Time comes first: T steps of a replayed sequence, H steps of an imagined one.
Every loss comes with one number for each state, so that means and weights are taken elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from mbrl_jax.nn.returns import lambda_returns
from mbrl_jax.nn.two_hot import two_hot_loss
from mbrl_jax.types import PyTree, Scalar

KlForm = Literal["balanced", "joint"]


def dynamics_losses(
    posterior: PyTree,
    prior: PyTree,
    kl: Callable[[PyTree, PyTree], jax.Array],
    free_nats: Scalar = 1.0,
    form: KlForm = "balanced",
) -> dict[str, jax.Array]:
    """The losses that pull prior and posterior together, (3) and (4), each [...].

    "balanced" gives `dyn`, which moves the prior alone, and `rep`, which moves the posterior alone,
    to be weighted apart; "joint" gives `dyn` alone, which moves both, as before DreamerV2.

    Args:
      posterior, prior: the distributions, as `kl` takes them.
      kl: the divergence of two of them, [...] in nats, such as `models.rssm_latents.kl`.
      free_nats: a divergence below it counts as this many nats and has no gradient.
      form: how the gradient is divided.
    """

    def clipped(p: PyTree, q: PyTree) -> jax.Array:
        return jnp.maximum(kl(p, q), free_nats)

    if form == "joint":
        return {"dyn": clipped(posterior, prior)}
    fixed = jax.lax.stop_gradient
    return {"dyn": clipped(fixed(posterior), prior), "rep": clipped(posterior, fixed(prior))}


def continue_loss(logit: jax.Array, terminal: jax.Array, gamma: Scalar) -> jax.Array:
    """The cross-entropy of the target (1 - terminal) gamma under sigmoid(logit), [...].

    The discount is part of what is learnt, so that the probability of going on is the discount of
    an imagined return.

    Args:
      logit: [...] float32.
      terminal: [...] bool, the task has ended in this state; a truncated one has not.
      gamma: the discount factor.
    """
    target = gamma * (1.0 - terminal)
    return -target * jax.nn.log_sigmoid(logit) - (1.0 - target) * jax.nn.log_sigmoid(-logit)


def imagined_returns(
    reward: jax.Array, cont: jax.Array, value: jax.Array, lam: Scalar
) -> tuple[jax.Array, jax.Array]:
    """Lambda-returns (6) of imagined states 0 to H, and the weights of their losses.

    Reward and discount are those of the state that is arrived in. A weight is the chance that the
    episode has gone on so far; it starts with the discount of state 0, so that imagination from a
    terminal state counts next to nothing.

    Args:
      reward: [H + 1, N] float32, the predicted rewards of the states.
      cont: [H + 1, N] float32, the predicted chances of going on, discount included.
      value: [H + 1, N] float32, the critic's values.
      lam: of the returns.

    Returns:
      (returns [H, N], weights [H, N]) of states 0 to H - 1.
    """
    returns = lambda_returns(reward[1:], cont[1:], value[1:], lam)
    return returns, jnp.cumprod(cont, axis=0)[:-1]


def actor_loss(
    log_prob: jax.Array,
    entropy: jax.Array,
    advantage: jax.Array,
    weight: jax.Array,
    entropy_scale: Scalar,
) -> jax.Array:
    """-weight (advantage log pi + entropy_scale entropy): REINFORCE (7), [H, N].

    No gradient goes to the advantage and the weight.

    Args:
      log_prob: [H, N] float32, of the actions that were taken, which are data to it.
      entropy: [H, N] float32, of the policy.
      advantage: [H, N] float32, return minus value, both in units of the range of returns.
      weight: [H, N] float32, from `imagined_returns`.
      entropy_scale: what a nat of entropy is worth.
    """
    advantage, weight = jax.lax.stop_gradient((advantage, weight))
    return -weight * (advantage * log_prob + entropy_scale * entropy)


def climbing_loss(
    score: jax.Array, entropy: jax.Array, weight: jax.Array, entropy_scale: Scalar
) -> jax.Array:
    """-weight (score + entropy_scale entropy), [H, N]: the actor climbs the returns themselves.

    Hafner et al. (2020), "Dream to Control". The gradient goes through the score to the actions; no
    gradient goes to the weight.

    Args:
      score: [H, N] float32, returns in units of their range, differentiable in the actions.
      entropy, weight, entropy_scale: as in `actor_loss`.
    """
    return -jax.lax.stop_gradient(weight) * (score + entropy_scale * entropy)


def critic_loss(
    logits: jax.Array,
    returns: jax.Array,
    slow_value: jax.Array,
    weight: jax.Array,
    bins: jax.Array,
    slow_scale: Scalar = 1.0,
) -> jax.Array:
    """The weighted cross-entropy of the returns, and of a slow critic's values: (5), [...].

    No gradient goes to returns, slow values and weights.

    Args:
      logits: [..., K] float32, the critic's over the bins.
      returns: [...] float32.
      slow_value: [...] float32, of the slow critic, which keeps the critic near where it was.
      weight: [...] float32.
      bins: [K] float32, as in `nn.two_hot`.
      slow_scale: the weight of the slow critic's part.
    """
    near = two_hot_loss(logits, slow_value, bins)
    loss = two_hot_loss(logits, returns, bins) + slow_scale * near
    return jax.lax.stop_gradient(weight) * loss


def replay_returns(
    reward: jax.Array,
    is_last: jax.Array,
    is_terminal: jax.Array,
    boot: jax.Array,
    gamma: Scalar,
    lam: Scalar,
) -> jax.Array:
    """Lambda-returns of a replayed sequence, which go on with imagined ones: [T - 1, B] float32.

    An episode ends in its last state: what comes after it belongs to another one, so that the
    return goes on with `boot` alone there, and with nothing where the task has ended.

    Args:
      reward: [T, B] float32, that came with each state.
      is_last: [T, B] bool, the state ends its episode.
      is_terminal: [T, B] bool, the task has ended there.
      boot: [T, B] float32, an estimate of the return from each state: the imagined one.
      gamma: discount factor.
      lam: of the returns.
    """
    discount = gamma * (1.0 - is_terminal)
    return lambda_returns(reward[1:], discount[1:], boot[1:], lam * (1.0 - is_last[1:]))
