"""Actions of the world model and its actor: vectors for the core, distributions of the policy.

An action is one array, named "action" here, or a dict of arrays, each discrete (a class) or
continuous (numbers). The core and the imagination see one vector of numbers: all names, sorted, a
class as its one-hot vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax.models.rssm_latents import one_hot_sample, unimix
from mbrl_jax.types import EnvSpec, PyTree, Scalar

ONE_ARRAY = "action"  # the name of an action that is no dict
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class ActionPart(NamedTuple):
    """One array of an action; static and hashable."""

    name: str
    size: int  # classes of a discrete action, numbers of a continuous one
    discrete: bool


def action_parts(spec: EnvSpec) -> tuple[ActionPart, ...]:
    """The one part of an action in an environment like `spec`."""
    size = spec.num_actions or spec.action_shape[0]
    return (ActionPart(ONE_ARRAY, size, spec.discrete),)


def action_width(parts: tuple[ActionPart, ...]) -> int:
    """The length of an action's vector."""
    return sum(part.size for part in parts)


def action_vector(actions: PyTree, parts: tuple[ActionPart, ...]) -> jax.Array:
    """Actions, a dict by name or one array, as vectors [*lead, A] float32.

    Args:
      actions: [*lead] integers of a discrete part, [*lead, size] numbers of a continuous one.
      parts: sorted by name.
    """
    named = actions if isinstance(actions, Mapping) else {ONE_ARRAY: actions}
    vectors = [
        jax.nn.one_hot(named[part.name], part.size, dtype=jnp.float32)
        if part.discrete
        else named[part.name]
        for part in parts
    ]
    return jnp.concatenate(vectors, -1)


def split_actions(vector: jax.Array, parts: tuple[ActionPart, ...]) -> PyTree:
    """The inverse of `action_vector`; one array where the only part is named "action"."""
    pieces = _pieces(vector, parts)
    named = {
        part.name: jnp.argmax(pieces[part.name], -1).astype(jnp.int32)
        if part.discrete
        else pieces[part.name]
        for part in parts
    }
    return named[ONE_ARRAY] if list(named) == [ONE_ARRAY] else named


class Policy(NamedTuple):
    """The distribution of an action, by the name of its part."""

    log_probs: dict[str, jax.Array]  # [*lead, size] float32 of each discrete part
    mean: dict[str, jax.Array]  # [*lead, size] float32 of each continuous part
    std: dict[str, jax.Array]  # likewise


def policy(outputs: PyTree, share: Scalar = 0.0) -> Policy:
    """The distribution behind the outputs of `rssm_heads.actor`.

    Continuous: normal, mean = tanh(m) and std = 0.1 + 0.9 sigmoid(s + 2); samples are not squashed.

    Args:
      outputs: {name: {"logits"} or {"mean", "std"}}, [*lead, size] each.
      share: of the uniform distribution in a discrete action; the published code mixes none in.
    """
    discrete = {name: x["logits"] for name, x in outputs.items() if "logits" in x}
    continuous = {name: x for name, x in outputs.items() if "logits" not in x}
    return Policy(
        {name: unimix(x, share) for name, x in discrete.items()},
        {name: jnp.tanh(x["mean"]) for name, x in continuous.items()},
        {name: 0.1 + 0.9 * jax.nn.sigmoid(x["std"] + 2.0) for name, x in continuous.items()},
    )


def draw_action_noise(
    key: jax.Array, lead: tuple[int, ...], parts: tuple[ActionPart, ...]
) -> jax.Array:
    """The noise of samples [*lead, A] float32: Gumbel for classes, standard normal for numbers."""
    keys = jax.random.split(key, len(parts))
    pieces = [
        (jax.random.gumbel if part.discrete else jax.random.normal)(
            keys[i], (*lead, part.size), jnp.float32
        )
        for i, part in enumerate(parts)
    ]
    return jnp.concatenate(pieces, -1)


def sample_action(policy: Policy, noise: jax.Array, parts: tuple[ActionPart, ...]) -> jax.Array:
    """Action vectors [*lead, A] float32; numbers and one-hots differentiate through the sample.

    Args:
      policy: from `policy`.
      noise: [*lead, A] from `draw_action_noise`; zeros give the mode.
      parts: sorted by name.
    """
    pieces = _pieces(noise, parts)
    vectors = []
    for part in parts:
        if part.discrete:
            vectors.append(one_hot_sample(policy.log_probs[part.name], pieces[part.name]))
        else:
            mean, std = policy.mean[part.name], policy.std[part.name]
            vectors.append(mean + std * pieces[part.name])
    return jnp.concatenate(vectors, -1)


def log_prob(policy: Policy, vector: jax.Array, parts: tuple[ActionPart, ...]) -> jax.Array:
    """Log-probability or log-density [*lead] of action vectors [*lead, A], summed over parts."""
    pieces = _pieces(vector, parts)
    total = jnp.zeros(vector.shape[:-1], vector.dtype)
    for part in parts:
        x = pieces[part.name]
        if part.discrete:
            total += jnp.sum(x * policy.log_probs[part.name], -1)
        else:
            std = policy.std[part.name]
            distance = (x - policy.mean[part.name]) / std
            total += jnp.sum(-0.5 * distance**2 - jnp.log(std) - _HALF_LOG_2PI, -1)
    return total


def policy_entropy(policy: Policy) -> jax.Array:
    """Entropy [*lead] in nats, summed over parts and over the numbers of each."""
    terms = [-jnp.sum(jnp.exp(x) * x, -1) for x in policy.log_probs.values()]
    terms += [jnp.sum(jnp.log(x) + _HALF_LOG_2PI + 0.5, -1) for x in policy.std.values()]
    return sum(terms[1:], terms[0])


def _pieces(vector: jax.Array, parts: tuple[ActionPart, ...]) -> dict[str, jax.Array]:
    ends = np.cumsum([part.size for part in parts])[:-1].tolist()
    return dict(zip([part.name for part in parts], jnp.split(vector, ends, -1), strict=True))
