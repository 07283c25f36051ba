"""Networks as flax modules: `init(key, x) -> params`, `apply(params, x)`.

An ensemble of n is `jax.vmap(net.init, (0, None))(keys, x)`; there is no module for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen

from mbrl_jax.nn.precision import FULL
from mbrl_jax.types import RESERVED, ArraySpec, EnvSpec, PyTree, Scalar, unknown

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "swish": jax.nn.swish,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
}
INITIALISERS: dict[str, Callable[[float], linen.initializers.Initializer]] = {
    "orthogonal": lambda scale: _orthogonal(scale),
    "lecun": lambda scale: linen.initializers.variance_scaling(
        scale**2, "fan_in", "truncated_normal"
    ),
    # Chua et al. (2018): a normal with standard deviation scale / (2 sqrt(fan_in)), cut at two
    "truncated_normal": lambda scale: _truncated_normal(scale),
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function `name` of ACTIVATIONS; InputError for an unknown one."""
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


class MLP(linen.Module):
    """Hidden layers, and a linear head where `out` is given: [..., in] -> [..., out] float32.

    With `dropout` and `layer_norm` a hidden layer is linear, dropout, LayerNorm, activation, as in
    DroQ (Hiraoka et al. 2022). With `batch_renorm` there is a BatchRenorm before the first layer
    and after each activation, as in CrossQ (Bhatt et al. 2024).

    `apply` takes `dropout_rate` with `rngs={"dropout": key}`, and for `batch_renorm` `train=True`
    with `mutable=["batch_stats"]` to normalise by the batch and move the statistics.
    """

    hidden: tuple[int, ...]
    out: int | None = None
    activation: str = "relu"
    kernel_init: str = "lecun"  # of INITIALISERS
    scale: float = 1.0  # of the hidden layers' initial weights
    out_scale: float = 1.0  # of the head's
    layer_norm: bool = False
    dropout: bool = False
    batch_renorm: bool = False

    @linen.compact
    def __call__(self, x: jax.Array, dropout_rate: Scalar = 0.0, train: bool = False) -> jax.Array:
        act, init = activation(self.activation), INITIALISERS[self.kernel_init]
        if self.batch_renorm:
            x = BatchRenorm()(x, train)
        for width in self.hidden:
            x = linen.Dense(width, kernel_init=init(self.scale))(x)
            if self.dropout:
                x = _dropout(x, dropout_rate, self.make_rng("dropout"))
            if self.layer_norm:
                x = linen.LayerNorm()(x)
            x = act(x)
            if self.batch_renorm:
                x = BatchRenorm()(x, train)
        if self.out is not None:
            x = linen.Dense(self.out, kernel_init=init(self.out_scale), precision=FULL)(x)
        return x


class Torso(linen.Module):
    """Observations of any kind as flat float32 features: [B, *obs_shape] -> [B, features].

    Integers with a count become one-hot, images (see `is_image`) pass one convolution (3 x 3, 16
    filters, ReLU; Young and Tian 2019, MinAtar), all else is flattened. An image of uint8 has
    brightnesses from 0 to 255 and is divided by 255. Of a dict the features of all arrays but the
    reserved ones stand side by side, sorted by name.
    """

    spec: EnvSpec

    @linen.compact
    def __call__(self, obs: PyTree) -> jax.Array:
        if not self.spec.obs_parts:
            return _features(obs, self.spec.obs)
        parts = [
            _features(obs[name], part) for name, part in self.spec.obs_parts if name not in RESERVED
        ]
        return jnp.concatenate(parts, axis=-1)


def is_image(part: ArraySpec) -> bool:
    """Whether an array of an observation is an image: [height, width, channels].

    It has three axes, the channels last, and height and width of at least 3, which a 3 x 3
    convolution needs; every other array, such as a table of 3 x 2 x 5 numbers, is none.
    """
    return len(part.shape) == 3 and min(part.shape[:2]) >= 3


def _features(obs: jax.Array, part: ArraySpec) -> jax.Array:
    """One array of an observation, [B, *shape] -> [B, features]; called within a module."""
    if part.num is not None:
        return jax.nn.one_hot(obs, part.num, dtype=jnp.float32)
    # told from the array itself: a normalised image is float32 whatever its spec says
    brightness = is_image(part) and obs.dtype == jnp.uint8
    obs = jnp.asarray(obs, jnp.float32)
    if brightness:
        obs = obs / 255.0
    if is_image(part):
        obs = jax.nn.relu(Conv3x3(16)(obs))
    return obs.reshape(obs.shape[0], -1)


class PolicyNetwork(linen.Module):
    """Observations [B, ...] to logits [B, A], or to mean and standard deviation [B, D] each.

    The standard deviation is a parameter of its own. Small first logits and means, as in PPO.
    """

    spec: EnvSpec
    hidden: tuple[int, ...]
    activation: str

    @linen.compact
    def __call__(self, obs: PyTree):
        size = self.spec.num_actions or self.spec.action_shape[0]
        net = MLP(self.hidden, size, self.activation, "orthogonal", 2**0.5, 0.01)
        out = net(Torso(self.spec)(obs))
        if self.spec.discrete:
            return out
        log_std = self.param("log_std", linen.initializers.zeros, (size,), jnp.float32)
        return out, jnp.broadcast_to(jnp.exp(log_std)[None], out.shape)


class ValueNetwork(linen.Module):
    """Observations [B, ...] to values [B]."""

    spec: EnvSpec
    hidden: tuple[int, ...]
    activation: str

    @linen.compact
    def __call__(self, obs: PyTree) -> jax.Array:
        net = MLP(self.hidden, 1, self.activation, "orthogonal", 2**0.5, 1.0)
        return net(Torso(self.spec)(obs))[..., 0]


class GaussianActor(linen.Module):
    """Observations [B, ...] to mean and log deviation before the squashing, [B, D] each."""

    spec: EnvSpec
    hidden: tuple[int, ...]
    activation: str

    @linen.compact
    def __call__(self, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = self.spec.action_shape[0]
        x = MLP(self.hidden, None, self.activation)(Torso(self.spec)(obs))
        log_std = linen.Dense(size, name="log_std", precision=FULL)(x)
        return linen.Dense(size, name="mean", precision=FULL)(x), jnp.clip(log_std, -20.0, 2.0)


class ContinuousCritic(linen.Module):
    """Observations [B, ...] and actions [B, D] in [-1, 1] to action values [B]."""

    spec: EnvSpec
    hidden: tuple[int, ...]
    activation: str
    layer_norm: bool
    kind: str

    @linen.compact
    def __call__(self, obs, action, dropout_rate: Scalar = 0.0, train: bool = False) -> jax.Array:
        x = jnp.concatenate([Torso(self.spec)(obs), action], axis=-1)
        net = MLP(
            self.hidden,
            1,
            self.activation,
            layer_norm=self.layer_norm,
            dropout=self.kind == "dropout",
            batch_renorm=self.kind == "batch_renorm",
        )
        return net(x, dropout_rate, train)[..., 0]


class Conv3x3(linen.Module):
    """A convolution without padding: [B, h, w, c] -> [B, h - 2, w - 2, features].

    It is one matrix product over the nine shifted images: on a CPU the gradient of XLA's
    convolution of a 10 x 10 grid takes 10 to 28 times as long (batches of 32 to 1024).
    """

    features: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        height, width = x.shape[1] - 2, x.shape[2] - 2
        patches = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return linen.Dense(self.features)(jnp.concatenate(patches, axis=-1))


class BatchRenorm(linen.Module):
    """Batch renormalisation over all axes but the last (Ioffe 2017), as CrossQ uses it.

    With `train` it normalises by the batch, corrected towards the running statistics once
    `warmup` batches were seen, and moves them; otherwise it normalises by the running ones.
    """

    momentum: float = 0.99
    warmup: int = 100_000
    epsilon: float = 1e-3

    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1]
        mean = self.variable("batch_stats", "mean", jnp.zeros, width, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, width, jnp.float32)
        steps = self.variable("batch_stats", "steps", lambda: jnp.float32(0))
        scale = self.param("scale", linen.initializers.ones, (width,), jnp.float32)
        bias = self.param("bias", linen.initializers.zeros, (width,), jnp.float32)
        centre, spread = mean.value, jnp.sqrt(var.value + self.epsilon)
        if train:
            axes = tuple(range(x.ndim - 1))
            batch_mean, batch_var = jnp.mean(x, axes), jnp.var(x, axes)
            batch_std = jnp.sqrt(batch_var + self.epsilon)
            warm = steps.value >= self.warmup
            r = jnp.where(warm, jnp.clip(batch_std / spread, 1 / 3, 3.0), 1.0)
            d = jnp.where(warm, jnp.clip((batch_mean - centre) / spread, -5.0, 5.0), 0.0)
            r, d = jax.lax.stop_gradient((r, d))
            spread = batch_std / r
            centre = batch_mean - d * spread
            if not self.is_initializing():
                mix = 1.0 - self.momentum
                mean.value = mean.value + mix * (jax.lax.stop_gradient(batch_mean) - mean.value)
                var.value = var.value + mix * (jax.lax.stop_gradient(batch_var) - var.value)
                steps.value = steps.value + 1.0
        shape = (1,) * (x.ndim - 1) + (width,)
        inverse = (scale / spread).reshape(shape)
        return (x - centre.reshape(shape)) * inverse + bias.reshape(shape)


def polyak(new: PyTree, old: PyTree, tau: Scalar) -> PyTree:
    """The moving average `tau * new + (1 - tau) * old` of two parameter trees."""
    return jax.tree.map(lambda a, b: b + tau * (a - b), new, old)


def _dropout(x: jax.Array, rate: Scalar, key: jax.Array) -> jax.Array:
    # flax's own Dropout asks for a rate that is no tracer
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def _orthogonal(scale: float) -> linen.initializers.Initializer:
    """Uniform over matrices with orthonormal rows or columns, whichever are fewer, times `scale`.

    By Gram and Schmidt: XLA's QR, a call of LAPACK, waits for ever on a CPU of few cores that runs
    a batch of it on several devices (jaxlib 0.10.2).
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        rows, columns = math.prod(shape[:-1]), shape[-1]
        few, many = min(rows, columns), max(rows, columns)
        start = jax.random.normal(key, (few, many), dtype)

        def one(i: jax.Array, basis: jax.Array) -> jax.Array:
            vector = basis[i]
            done = jnp.arange(few) < i
            for _ in range(2):  # once is not orthogonal to rounding
                along = jnp.where(done, jnp.matmul(basis, vector, precision=FULL), 0.0)
                vector = vector - jnp.matmul(along, basis, precision=FULL)
            return basis.at[i].set(vector / jnp.linalg.norm(vector))

        basis = jax.lax.fori_loop(0, few, one, start)
        return scale * (basis if rows <= columns else basis.T).reshape(shape)

    return init


def _truncated_normal(scale: float) -> linen.initializers.Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        std = scale / (2.0 * math.sqrt(shape[-2]))
        return std * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)

    return init
