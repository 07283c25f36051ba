"""MuZero's three learned functions: representation, dynamics and prediction.

Schrittwieser et al. (2020), "Mastering Atari, Go, chess and shogi by planning with a learned
model". A latent state is a vector, or a grid as large as the observation's; it is scaled to [0, 1]
in each sample. Rewards and values are distributions over fixed bins in the transformed scale of
`nn.scaling`. Two things go beyond the paper: the dynamics also say whether the task goes on, so
that a search knows where episodes end, and as a switch they predict sums of rewards instead of each
(the value prefix of Ye et al. 2021, "Mastering Atari games with limited data").
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax.models.latent import LatentModel
from mbrl_jax.models.muzero_layers import (
    MODULES,
    Latent,
    Net,
    Outcome,
    Prediction,
    Prefix,
    Support,
    empty_prefix,
)
from mbrl_jax.nn.networks import is_image
from mbrl_jax.nn.scaling import signed_hyperbolic, signed_parabolic
from mbrl_jax.nn.two_hot import two_hot_loss, two_hot_mean
from mbrl_jax.types import RESERVED, ArraySpec, EnvSpec, InputError, PyTree, Scalar

LARGEST_GRID = 24  # cells on a side; beyond it a grid of latents is dearer than it is worth


def part_of(spec: EnvSpec) -> ArraySpec | None:
    """The one array that an observation has beside reserved names; None where there are several."""
    if not spec.obs_parts:
        return spec.obs
    parts = [part for name, part in spec.obs_parts if name not in RESERVED]
    return parts[0] if len(parts) == 1 else None


def takes_grid(spec: EnvSpec) -> bool:
    """Whether observations are one grid [H, W, C] of a size that latents can have."""
    part = part_of(spec)
    return part is not None and is_image(part) and max(part.shape[:2]) <= LARGEST_GRID


def check_observations(spec: EnvSpec, grid: bool) -> None:
    """Raises InputError for observations that no torso fits.

    Args:
      spec: of the environment.
      grid: whether latents are to be grids.
    """
    fits = f"[height, width, channels] of 3 to {LARGEST_GRID} cells a side"
    parts = dict(spec.obs_parts) or {"obs": spec.obs}
    for name, part in parts.items():
        if name not in RESERVED and is_image(part) and max(part.shape[:2]) > LARGEST_GRID:
            raise InputError(
                f"observation {name!r} of {spec.id} has shape {part.shape}: expected a vector, or "
                f"a grid {fits}; take dreamer, or wrap the environment so that it gives one"
            )
    if grid and not takes_grid(spec):
        raise InputError(
            f"torso = 'grid' with {spec.id}: expected one observation {fits}; take torso = 'vector'"
        )


def init(net: Net, key: jax.Array) -> PyTree:
    """Parameters of all functions."""
    keys = jax.random.split(key, len(MODULES))
    obs, action = net.spec.zero_obs(1), jnp.zeros((1, action_width(net.spec)), jnp.float32)
    made: PyTree = {}

    def made_of(name: str, *given: Any) -> Any:
        module = MODULES[name](net)
        made[name] = module.init(keys[len(made)], *given)
        return module.apply(made[name], *given)

    features = made_of("representation", obs)
    if net.chance:
        _, seen = made_of("afterstate", features, action)
        made_of("chance", seen)
        action = jax.nn.softmax(made_of("encoder", obs))
    _, seen = made_of("dynamics", features, action)
    made_of("outcome", seen, empty_prefix(net, 1))
    made_of("prediction", features)
    if net.projection:
        made_of("projection", features)
    return made


def represent(net: Net, params: PyTree, obs: PyTree) -> Latent:
    """The latent states behind observations [B, ...], with a fresh prefix."""
    features = _apply(net, params, "representation", obs)
    return Latent(features, empty_prefix(net, features.shape[0]))


def move(
    net: Net, params: PyTree, features: jax.Array, action: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The features [B, ...] after an action, and [B, F] what `outcome` reads of the transition.

    Args:
      net, params: of the functions.
      features: [B, ...] before.
      action: [B, V] float32, as `action_vector` makes it.
    """
    return _apply(net, params, "dynamics", features, action)


def outcome(
    net: Net, params: PyTree, support: Support, seen: jax.Array, prefix: Prefix | tuple[()]
) -> tuple[Outcome, Prefix | tuple[()]]:
    """What comes of transitions, and the prefix after them.

    Rewards are read from state and action, so that an action may earn something and leave the state
    as it is.

    Args:
      net, params, support: of the functions.
      seen: [B, F] from `move`.
      prefix: before the transitions; () without a value prefix.
    """
    found, hidden = _apply(net, params, "outcome", seen, prefix)
    if not isinstance(prefix, Prefix):
        return found, ()
    steps = prefix.steps + 1
    over = steps == net.prefix_period
    total = expected(found.reward, support.reward)
    hidden = jax.tree.map(lambda x: jnp.where(over[:, None], 0.0, x), hidden)
    return found, Prefix(hidden, jnp.where(over, 0.0, total), jnp.where(over, 0, steps))


def transition(
    net: Net, params: PyTree, support: Support, latent: Latent, action: jax.Array
) -> tuple[Latent, Outcome]:
    """The latents after actions [B, V], as `action_vector` makes them, and what came of it."""
    features, seen = move(net, params, latent.features, action)
    found, prefix = outcome(net, params, support, seen, latent.prefix)
    return Latent(features, prefix), found


def predict(net: Net, params: PyTree, latent: Latent) -> Prediction:
    """Policy and value of latent states."""
    return _apply(net, params, "prediction", latent.features)


def project(net: Net, params: PyTree, latent: Latent, through: bool) -> jax.Array:
    """Projections [B, P] of latents, whose likeness the consistency loss asks for.

    Chen and He (2021), "Exploring simple Siamese representation learning", as Ye et al. (2021) use
    it.

    Args:
      net, params: with a projection.
      latent: the states.
      through: pass the predictor too, as the side does that learns.
    """
    return _apply(net, params, "projection", latent.features, through)


def action_width(spec: EnvSpec) -> int:
    """Numbers of an action as the dynamics take it: one for each action, or its dimension."""
    return spec.num_actions or spec.action_shape[0]


def action_vector(spec: EnvSpec, action: jax.Array) -> jax.Array:
    """Actions as the dynamics take them, [*lead, V] float32.

    Args:
      spec: of the environment.
      action: [*lead] int32, which become one-hot, or [*lead, D] float32 in [-1, 1].
    """
    if spec.num_actions is not None:
        return jax.nn.one_hot(action, spec.num_actions, dtype=jnp.float32)
    return action


def support_of(num: int, reward_limit: Scalar, value_limit: Scalar) -> Support:
    """`num` bins each, even in the transformed scale and symmetric, up to h of the limits.

    Args:
      num: how many, at least 2; with an odd number one is exactly 0.
      reward_limit, value_limit: [] the largest magnitudes that they hold, in units of reward.
    """
    grid = np.linspace(-1.0, 1.0, num, dtype=np.float32)
    grid = 0.5 * (grid - grid[::-1])  # exactly symmetric
    return Support(*(signed_hyperbolic(jnp.float32(x)) * grid for x in (reward_limit, value_limit)))


def expected(logits: jax.Array, bins: jax.Array) -> jax.Array:
    """The scalar [...] in units of reward that logits [..., K] over transformed bins stand for."""
    return signed_parabolic(two_hot_mean(logits, bins))


def distribution_loss(logits: jax.Array, target: jax.Array, bins: jax.Array) -> jax.Array:
    """The cross-entropy [...] of the two-hot code of h(target) under logits [..., K].

    Args:
      logits: [..., K] float32.
      target: [...] float32, in units of reward; beyond the last bin it counts as that.
      bins: [K] float32, of a `Support`.
    """
    return two_hot_loss(logits, signed_hyperbolic(target), bins)


def is_clipped(target: jax.Array, bins: jax.Array) -> jax.Array:
    """Whether targets [...], in units of reward, lie beyond the bins [K]: [...] bool.

    Up to a hundredth beyond, in the transformed scale, counts as within: a reward and the largest
    value after it.
    """
    return jnp.abs(signed_hyperbolic(target)) > 1.01 * bins[-1]


def reward_of(support: Support, latent: Latent, found: Outcome) -> jax.Array:
    """The reward [B] of a transition out of `latent`: what it adds to the prefix, if there is one.

    Args:
      support: of the functions.
      latent: before the transition.
      found: of the transition.
    """
    said = expected(found.reward, support.reward)
    return said - latent.prefix.total if latent.prefix else said


def discount_of(net: Net, found: Outcome, gamma: Scalar) -> jax.Array:
    """The discount [B] of what comes after a transition: gamma times the chance that it goes on.

    Negative where two players take turns, since what is good for one is bad for the other.
    """
    sign = -1.0 if net.spec.num_players == 2 else 1.0
    return sign * gamma * jax.nn.sigmoid(found.continues)


def latent_model(net: Net, support: Support, gamma: Scalar) -> LatentModel:
    """The net with discrete actions as search meets it.

    Args:
      net, support: of the functions.
      gamma: [] discount factor.
    """

    def step(params: PyTree, latent: Latent, action: jax.Array, key: jax.Array):
        vector = action_vector(net.spec, action)
        after, found = transition(net, params, support, latent, vector)
        return after, reward_of(support, latent, found), discount_of(net, found, gamma)

    def evaluate(params: PyTree, latent: Latent) -> tuple[jax.Array, jax.Array]:
        prediction = predict(net, params, latent)
        return prediction.policy, expected(prediction.value, support.value)

    return LatentModel(lambda params, obs: represent(net, params, obs), step, evaluate)


def halve_gradient(tree: PyTree) -> PyTree:
    """The same numbers, through which half of a gradient flows (Schrittwieser et al. 2020, G)."""
    return jax.tree.map(
        lambda x: (
            x
            if not jnp.issubdtype(x.dtype, jnp.floating)
            else 0.5 * x + 0.5 * jax.lax.stop_gradient(x)
        ),
        tree,
    )


def _apply(net: Net, params: PyTree, name: str, *given: Any) -> Any:
    return MODULES[name](net).apply(params[name], *given)
