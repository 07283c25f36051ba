"""The layers of MuZero's functions, and the arrays that pass between them.

Latents are vectors or grids; see `muzero_net`, which has the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen

from mbrl_jax.nn.networks import MLP, Conv3x3, Torso
from mbrl_jax.nn.precision import FULL
from mbrl_jax.types import RESERVED, EnvSpec, PyTree

_HEAD_CHANNELS = 8  # of a grid, before a head flattens it
_GOES_ON = 3.0  # logit with which the continuation starts, a probability of 0.95
_STD = (0.05, 0.7, 1.5)  # least, first and largest deviation of a continuous policy


class Net(NamedTuple):
    """Sizes and switches of the three functions; static and hashable."""

    spec: EnvSpec
    grid: bool  # latents are grids; otherwise vectors
    width: int  # features of a latent, or channels of a grid
    blocks: int  # residual blocks of representation and dynamics each
    hidden: tuple[int, ...]  # widths of the hidden layers of each head
    bins: int  # of rewards and of values
    prefix_period: int = 0  # steps after which sums of rewards start anew; 0 predicts each reward
    projection: int = 0  # width of the projection of the consistency loss; 0 for none
    chance: int = 0  # codes of what the world may answer to an action; 0 where it has no choice


class Support(NamedTuple):
    """The bins over which rewards and values are distributions, in the transformed scale."""

    reward: jax.Array  # [K] float32, ascending; of the sums of rewards with a value prefix
    value: jax.Array  # [K] float32, ascending


class Prefix(NamedTuple):
    """What the value prefix remembers of the steps since it began, a sum of rewards."""

    hidden: tuple[jax.Array, jax.Array]  # [B, H] each, of an LSTM
    total: jax.Array  # [B] float32, the sum of rewards as predicted so far
    steps: jax.Array  # [B] int32 that it holds


class Latent(NamedTuple):
    """A batch of latent states."""

    features: jax.Array  # [B, D], or [B, H, W, D] of a grid; in [0, 1]
    prefix: Prefix | tuple[()] = ()


class Outcome(NamedTuple):
    """What the dynamics say of a transition."""

    reward: jax.Array  # [B, K] logits of the reward, or of the sum since the prefix began
    continues: jax.Array  # [B] logit of the task going on


class Prediction(NamedTuple):
    """What the prediction function says of a state."""

    policy: PyTree  # [B, A] logits; (mean [B, D], deviation [B, D]) of continuous actions
    value: jax.Array  # [B, K] logits


class Chance(NamedTuple):
    """What is said of an afterstate, where an action was taken and the world's answer is open."""

    codes: jax.Array  # [B, C] logits of the answers
    value: jax.Array  # [B, K] logits of the value


def empty_prefix(net: Net, batch: int) -> Prefix | tuple[()]:
    """The prefix of `batch` roots: no step yet; () without a value prefix."""
    if not net.prefix_period:
        return ()
    zero = jnp.zeros((batch, net.hidden[-1]), jnp.float32)
    return Prefix((zero, zero), jnp.zeros(batch, jnp.float32), jnp.zeros(batch, jnp.int32))


def unit_scaled(features: jax.Array) -> jax.Array:
    """Features [B, ...] moved and stretched to [0, 1] in each sample; 0 where all are equal."""
    axes = tuple(range(1, features.ndim))
    low = jnp.min(features, axis=axes, keepdims=True)
    high = jnp.max(features, axis=axes, keepdims=True)
    return (features - low) / jnp.maximum(high - low, 1e-5)


def _linear(grid: bool, width: int) -> Callable[[jax.Array], jax.Array]:
    """A dense layer, or a convolution that keeps the size of the grid; called within a module."""
    if not grid:
        return linen.Dense(width)
    conv = Conv3x3(width)
    return lambda x: conv(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))


class _Blocks(linen.Module):
    """Residual blocks of two layers, each after LayerNorm and ReLU (He et al. 2016)."""

    net: Net

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.net.blocks):
            y = x
            for _ in range(2):
                y = jax.nn.relu(linen.LayerNorm()(y))
                y = _linear(self.net.grid, self.net.width)(y)
            x = x + y
        return x


class _Representation(linen.Module):
    net: Net

    @linen.compact
    def __call__(self, obs: PyTree) -> jax.Array:
        net = self.net
        if net.grid:
            x = obs if not net.spec.obs_parts else next(
                obs[name] for name, _ in net.spec.obs_parts if name not in RESERVED
            )  # fmt: skip
            x = jnp.asarray(x, jnp.float32) / (255.0 if x.dtype == jnp.uint8 else 1.0)
        else:
            x = Torso(net.spec)(obs)
        return unit_scaled(_Blocks(net)(_linear(net.grid, net.width)(x)))


class _Dynamics(linen.Module):
    net: Net

    @linen.compact
    def __call__(self, features: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        net = self.net
        if net.grid:
            action = action_planes(action, features)
        given = jnp.concatenate([features, action], axis=-1)
        moved = _Blocks(net)(features + _linear(net.grid, net.width)(given))
        return unit_scaled(moved), _flat(moved)


class _Outcome(linen.Module):
    net: Net

    @linen.compact
    def __call__(self, seen: jax.Array, prefix: Prefix | tuple[()]) -> tuple[Outcome, Any]:
        net, hidden, so_far = self.net, (), seen
        if isinstance(prefix, Prefix):
            hidden, so_far = linen.OptimizedLSTMCell(net.hidden[-1])(prefix.hidden, seen)
        reward = _head(net, so_far, net.bins)
        return Outcome(reward, _head(net, seen, 1, _GOES_ON)[:, 0]), hidden


class _Prediction(linen.Module):
    net: Net

    @linen.compact
    def __call__(self, features: jax.Array) -> Prediction:
        net, seen = self.net, _flat(features)
        value = _head(net, seen, net.bins)
        if net.spec.num_actions is not None:
            return Prediction(_head(net, _flat(features), net.spec.num_actions), value)
        size = net.spec.action_shape[0]
        raw = _head(net, seen, 2 * size)
        least, first, most = _STD
        std = jnp.clip(first * jnp.exp(raw[:, size:]), least, most)
        # before the squashing, where 5 is as good as any more
        return Prediction((5.0 * jnp.tanh(raw[:, :size] / 5.0), std), value)


class _Projection(linen.Module):
    net: Net

    @linen.compact
    def __call__(self, features: jax.Array, through: bool = True) -> jax.Array:
        width = self.net.projection
        x = MLP((width,), width, layer_norm=True)(features.reshape(features.shape[0], -1))
        predictor = MLP((width // 2,), width, layer_norm=True)
        learns = predictor(x)  # always called, so that its parameters are always made
        return learns if through else x


class _Chance(linen.Module):
    net: Net

    @linen.compact
    def __call__(self, seen: jax.Array) -> Chance:
        return Chance(_head(self.net, seen, self.net.chance), _head(self.net, seen, self.net.bins))


class _Encoder(linen.Module):
    net: Net

    @linen.compact
    def __call__(self, obs: PyTree) -> jax.Array:
        seen = _flat(_Representation(self.net)(obs))
        return linen.Dense(self.net.chance)(MLP(self.net.hidden, None, layer_norm=True)(seen))


MODULES: dict[str, Any] = {
    "representation": _Representation,
    "afterstate": _Dynamics,
    "dynamics": _Dynamics,
    "chance": _Chance,
    "encoder": _Encoder,
    "outcome": _Outcome,
    "prediction": _Prediction,
    "projection": _Projection,
}


def action_planes(action: jax.Array, grid: jax.Array) -> jax.Array:
    """Actions [B, V] as planes [B, H, W, P] beside a grid.

    An action for each cell (and one more, such as a pass) marks its cell; one for each column marks
    its column; of other actions each has a plane, full of its number.

    Args:
      action: [B, V] as `action_vector` makes it.
      grid: [B, H, W, ...].
    """
    (_, height, width, *_), num = grid.shape, action.shape[1]
    if num in (height * width, height * width + 1):
        return action[:, : height * width].reshape(-1, height, width, 1)
    if num == width:
        return jnp.broadcast_to(action[:, None, :, None], (action.shape[0], height, width, 1))
    shape = (action.shape[0], height, width, action.shape[1])
    return jnp.broadcast_to(action[:, None, None, :], shape)


def _flat(x: jax.Array) -> jax.Array:
    """[B, D] of a vector; of a grid a few channels, side by side; called within a module."""
    if x.ndim == 2:
        return x
    return jax.nn.relu(linen.Dense(_HEAD_CHANNELS)(x)).reshape(x.shape[0], -1)


def _head(net: Net, x: jax.Array, out: int, bias: float = 0.0) -> jax.Array:
    """[B, out] of hidden layers and a linear one that starts at `bias`; called within a module."""
    x = MLP(net.hidden, None, layer_norm=True)(x)
    zeros, start = linen.initializers.zeros, linen.initializers.constant(bias)
    return linen.Dense(out, kernel_init=zeros, bias_init=start, precision=FULL)(x)
