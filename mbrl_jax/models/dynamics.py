"""A network that predicts one step of a world: next observation, reward, end of the task.

The probabilistic network of Chua et al. (2018), "Deep reinforcement learning in a handful of
trials" (PETS), as Janner et al. (2019), "When to trust your model" (MBPO), train it: a diagonal
Gaussian whose log-variance has soft bounds. With `probabilistic=False` it predicts the mean alone,
by least squares.

Inputs x are the observation and the action, targets y the change of the observation and the reward,
each standardised by dimension over the training data. The functions here are of one member on plain
arrays; `ensemble` stacks members, `fit` trains them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax.nn.networks import MLP, activation
from mbrl_jax.nn.precision import FULL
from mbrl_jax.types import EnvSpec, InputError, PyTree, Scalar, check_config, config, ranged
from mbrl_jax.x64 import in_32_bits

LOGVAR_RANGE = (-12.0, 2.0)  # wherein learned bounds of the log-variance stay


class Prediction(NamedTuple):
    """One step of B states."""

    next_obs: jax.Array  # [B, D] float32
    reward: jax.Array  # [B] float32
    terminated: jax.Array  # [B] bool, `next_obs` ends the task
    disagreement: jax.Array  # [B] float32, 0 where there is one member alone


class DynamicsModel(NamedTuple):
    """What rollouts, planners and diagnostics ask of a model, learned or true."""

    predict: Callable[[PyTree, jax.Array, jax.Array, jax.Array], Prediction]
    """(params, obs [B, D], action [B] int32 or [B, A], key) -> Prediction."""


class Gaussian(NamedTuple):
    """Of the targets, one number for each state and dimension."""

    mean: jax.Array  # [*lead, K]
    var: jax.Array  # [*lead, K], 0 of a network without variance
    end: jax.Array  # [*lead] logit of the task's end; nan where it is not learned


class Bounds(NamedTuple):
    """Soft bounds of the standardised targets' log-variance, shared by all members."""

    low: jax.Array  # [K]
    high: jax.Array  # [K]


class Scaling(NamedTuple):
    """What inputs and targets are standardised by, and the range of observations that was seen."""

    x_mean: jax.Array  # [F]
    x_std: jax.Array  # [F]
    y_mean: jax.Array  # [K]
    y_std: jax.Array  # [K]
    obs_low: jax.Array  # [D]
    obs_high: jax.Array  # [D]


@config
class Config:
    """Fields annotated float may be vmapped and never recompile."""

    # widths of the hidden layers
    hidden: tuple[int, ...] = (200, 200, 200, 200)
    # of the hidden layers
    activation: Literal["relu", "tanh", "swish", "elu", "gelu"] = "swish"
    # a Gaussian fitted by likelihood; otherwise its mean alone, by least squares
    probabilistic: bool = True
    # lower soft bound of the log-variance at first, in units of the standardised target
    logvar_min: float = -10.0
    # the upper one
    logvar_max: float = 0.5
    # whether the bounds are trained; they stay within -12 and 2
    learn_bounds: bool = True
    # how strongly trained bounds are drawn together
    bounds_weight: float = ranged("[0, inf)", default=0.01)
    # L2 penalty of each layer's weights, the head's last; one number is for all layers
    weight_decay: tuple[float, ...] = ranged(
        "[0, inf)", default=(2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    )
    # predict the change of the observation, not the next observation itself
    residual: bool = True
    # dimensions of the observation that are predicted directly all the same
    direct: tuple[int, ...] = ranged("[0, inf)", default=())
    # dimensions that are angles in radians: the network sees their sine and cosine
    angles: tuple[int, ...] = ranged("[0, inf)", default=())
    # standardise inputs by their mean and deviation over the training rows
    normalise_inputs: bool = True
    # standardise targets, each dimension and the reward by its own
    normalise_targets: bool = True
    # learned beside the observation, or the function that the environment is known to have
    reward: Literal["learned", "known"] = "learned"
    # learned as a probability, cut at one half; known; or a task without end
    termination: Literal["learned", "known", "never"] = "learned"


PRESETS = {
    # two hidden layers of 256 with ReLU, a residual state and a reward by least squares
    "mse": {
        "hidden": (256, 256),
        "activation": "relu",
        "probabilistic": False,
        "weight_decay": (0.0,),
    },
}


class Dynamics(NamedTuple):
    """The static description of a network and the pure functions of one member."""

    config: Config
    spec: EnvSpec

    @property
    def obs_dim(self) -> int:
        return self.spec.obs_shape[0]

    @property
    def num_inputs(self) -> int:
        """F: each angle counts twice, each discrete action once."""
        actions = self.spec.num_actions or self.spec.action_shape[0]
        return self.obs_dim + len(self.config.angles) + actions

    @property
    def num_targets(self) -> int:
        """K: the observation's dimensions, and the reward where it is learned."""
        return self.obs_dim + (self.config.reward == "learned")

    @in_32_bits
    def init(self, key: jax.Array) -> PyTree:
        """Weights of one member: a truncated normal of deviation 1 / (2 sqrt(fan_in)), biases 0."""
        return self._net.init(key, jnp.zeros((1, self.num_inputs)))

    @in_32_bits
    def bounds(self) -> Bounds:
        """The bounds at first."""
        ones = jnp.ones(self.num_targets)
        return Bounds(self.config.logvar_min * ones, self.config.logvar_max * ones)

    @in_32_bits
    def scaling(self) -> Scaling:
        """Scaling that changes nothing, and no limit of the range."""
        x, y, obs = (jnp.zeros(n) for n in (self.num_inputs, self.num_targets, self.obs_dim))
        return Scaling(x, x + 1.0, y, y + 1.0, obs - jnp.inf, obs + jnp.inf)

    def inputs(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        """x [*lead, F] before it is standardised: other dimensions, sines, cosines, action."""
        angles = list(self.config.angles)
        rest = [i for i in range(self.obs_dim) if i not in angles]
        if self.spec.num_actions is not None:
            action = jax.nn.one_hot(action, self.spec.num_actions)
        if not angles:
            return jnp.concatenate([obs, action], axis=-1)
        angle = obs[..., np.array(angles)]
        parts = (obs[..., np.array(rest, int)], jnp.sin(angle), jnp.cos(angle), action)
        return jnp.concatenate(parts, axis=-1)

    def targets(self, obs: jax.Array, reward: jax.Array, next_obs: jax.Array) -> jax.Array:
        """y [*lead, K] before it is standardised: change of each dimension, then the reward."""
        rows = [next_obs, reward[..., None]][: 1 + (self.config.reward == "learned")]
        return jnp.concatenate(rows, axis=-1) - self.base(obs)

    def base(self, obs: jax.Array) -> jax.Array:
        """[*lead, K] what targets are added to: `obs` where its change is predicted, else 0."""
        keep = np.full(self.obs_dim, float(self.config.residual), np.float32)
        keep[list(self.config.direct)] = 0.0
        spare = [(0, 0)] * (obs.ndim - 1) + [(0, self.num_targets - self.obs_dim)]
        return jnp.pad(wide(jnp.array(keep), obs) * obs, spare)

    def outputs(self, net: PyTree, x: jax.Array) -> jax.Array:
        """What the network gives for standardised x [B, F]: [B, outputs], `gaussian_of` reads it.

        Computed on columns: on a CPU stacked members take 0.7 to 0.9 of the time that rows take.
        """
        columns, act = x.T, activation(self.config.activation)
        *hidden, head = self._layers(net)
        for layer in hidden:
            columns = act(layer["kernel"].T @ columns + layer["bias"][:, None])
        out = jnp.matmul(head["kernel"].T, columns, precision=FULL)
        return (out + head["bias"][:, None]).T

    def gaussian_of(self, out: jax.Array, bounds: Bounds) -> Gaussian:
        """`Gaussian` of the standardised y, [*lead, K], from outputs [*lead, outputs]."""
        k = self.num_targets
        mean, end = out[..., :k], jnp.full(out.shape[:-1], jnp.nan)
        if self.config.termination == "learned":
            end = out[..., -1]
        var = jnp.zeros_like(mean)
        if self.config.probabilistic:
            var = jnp.exp(soft_bounded(out[..., k : 2 * k], bounds))
        return Gaussian(mean, var, end)

    def apply(self, net: PyTree, bounds: Bounds, x: jax.Array) -> Gaussian:
        """Standardised x [B, F] -> `Gaussian` of the standardised y, [B, K]."""
        return self.gaussian_of(self.outputs(net, x), bounds)

    def scaled_inputs(self, scaling: Scaling, obs: jax.Array, action: jax.Array) -> jax.Array:
        """Standardised x [*lead, F] for obs [*lead, D] and action [*lead] or [*lead, A]."""
        return standardised(self.inputs(obs, action), scaling.x_mean, scaling.x_std)

    def in_own_units(self, out: Gaussian, scaling: Scaling) -> Gaussian:
        """`out` of the standardised y as that of y itself."""
        unit = wide(scaling.y_std, out.mean)
        mean = out.mean * unit + wide(scaling.y_mean, out.mean)
        return Gaussian(mean, out.var * jnp.square(unit), out.end)

    @in_32_bits
    def gaussian(
        self, net: PyTree, bounds: Bounds, scaling: Scaling, obs: jax.Array, action: jax.Array
    ) -> Gaussian:
        """`Gaussian` of y in its own units, [B, K], for obs [B, D] and action [B] or [B, A]."""
        out = self.apply(net, bounds, self.scaled_inputs(scaling, obs, action))
        return self.in_own_units(out, scaling)

    @in_32_bits
    def outcome(
        self,
        obs: jax.Array,
        action: jax.Array,
        y: jax.Array,
        end: jax.Array,
        limits: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """next_obs [*lead, D], reward [*lead] and terminated [*lead] that targets y stand for.

        Args:
          obs, action: [*lead, D], and [*lead] int32 or [*lead, A].
          y: [*lead, K] targets in their own units.
          end: [*lead] logit of the task's end; nan where it is not learned.
          limits: the lowest and the highest next observation, [D] each, to which finite numbers are
            clipped; a known reward and termination judge what is left.
        """
        y = self.base(obs) + y
        next_obs = y[..., : self.obs_dim]
        if limits is not None:
            low, high = (wide(limit, next_obs) for limit in limits)
            # an infinity stays one, so that it ends a rollout
            clipped = jnp.clip(next_obs, low, high)
            next_obs = jnp.where(jnp.isfinite(next_obs), clipped, next_obs)
        if self.config.reward == "known":
            reward = self.spec.reward_fn(obs, action, next_obs)  # type: ignore[misc]
        else:
            reward = y[..., -1]
        if self.config.termination == "known":
            terminated = self.spec.termination_fn(obs, action, next_obs)  # type: ignore[misc]
        else:
            terminated = end > 0.0  # never where it is not learned, since that is nan
        return next_obs, reward, terminated

    @in_32_bits
    def loss(
        self, net: PyTree, bounds: Bounds, x: jax.Array, y: jax.Array, terminated: jax.Array
    ) -> jax.Array:
        """What one member minimises on standardised rows [B, ...], penalties included.

        The mean over rows and dimensions of (mu - y)^2 / var + log var, without the half of the
        likelihood (Chua et al. 2018, appendix A.1), or of (mu - y)^2; the cross entropy of a
        learned end; and half the squared weights times each layer's decay.
        """
        out = self.apply(net, bounds, x)
        error = jnp.square(out.mean - y)
        if self.config.probabilistic:
            error = error / out.var + jnp.log(out.var)
        loss = jnp.mean(error)
        if self.config.termination == "learned":
            loss += jnp.mean(jax.nn.softplus(out.end) - terminated * out.end)
        return loss + self._decay(net)

    def _decay(self, net: PyTree) -> jax.Array:
        layers, decay = self._layers(net), self.config.weight_decay
        rates = decay * len(layers) if len(decay) == 1 else decay
        parts = [
            0.5 * rate * jnp.sum(jnp.square(layer["kernel"]))
            for rate, layer in zip(rates, layers, strict=True)
            if rate
        ]
        return sum(parts, start=jnp.float32(0))

    def _layers(self, net: PyTree) -> list[PyTree]:
        return [net["params"][f"Dense_{i}"] for i in range(len(self.config.hidden) + 1)]

    @property
    def _net(self) -> MLP:
        cfg = self.config
        out = (1 + cfg.probabilistic) * self.num_targets + (cfg.termination == "learned")
        return MLP(cfg.hidden, out, cfg.activation, kernel_init="truncated_normal")


def make(config: Config, spec: EnvSpec) -> Dynamics:
    """The network for worlds of `spec`, whose observations are flat float32 vectors.

    Raises:
      InputError: observations of another kind, dimensions that do not exist, decays that do not
        match the layers, or a known function that `spec` lacks.
    """
    check_config(config)
    if len(spec.obs_shape) != 1 or spec.obs_dtype != "float32":
        raise InputError(
            f"a dynamics model needs observations that are float32 vectors; {spec.id} has shape "
            f"{spec.obs_shape} of {spec.obs_dtype}"
        )
    for name in ("direct", "angles"):
        dims = getattr(config, name)
        if max(dims, default=-1) >= spec.obs_shape[0] or len(set(dims)) < len(dims):
            raise InputError(
                f"{name} = {dims}: expected different dimensions of the observation of {spec.id}, "
                f"0 to {spec.obs_shape[0] - 1}"
            )
    layers = len(config.hidden) + 1
    if len(config.weight_decay) not in (1, layers):
        raise InputError(
            f"weight_decay = {config.weight_decay}: expected one number, or one for each of the "
            f"{layers} layers"
        )
    for name in ("reward", "termination"):
        if getattr(config, name) == "known" and getattr(spec, f"{name}_fn") is None:
            raise InputError(
                f"{name} = 'known': {spec.id} has no known {name} function; take {name}='learned'"
            )
    return Dynamics(config, spec)


def soft_bounded(raw: jax.Array, bounds: Bounds) -> jax.Array:
    """`raw` [*lead, K] drawn smoothly into the bounds (Chua et al. 2018, appendix A.1)."""
    low, high = wide(bounds.low, raw), wide(bounds.high, raw)
    below = high - _softplus(high - raw)
    return low + _softplus(below - low)


def _softplus(x: jax.Array) -> jax.Array:
    """log(1 + e^x) to an absolute 1e-7: `jax.nn.softplus` without its slow `log1p`."""
    return jnp.maximum(x, 0.0) + jnp.log(1.0 + jnp.exp(-jnp.abs(x)))


def standardised(rows: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """(rows - mean) / std for rows [*lead, K], mean and std [K]."""
    return (rows - wide(mean, rows)) / wide(std, rows)


def wide(vector: jax.Array, rows: jax.Array) -> jax.Array:
    """`vector` [K] with the leading axes of `rows` [*lead, K], each of size 1."""
    return vector.reshape((1,) * (rows.ndim - 1) + vector.shape)


def obs_limits(scaling: Scaling, margin: Scalar = 1.0) -> tuple[jax.Array, jax.Array]:
    """Lowest and highest observation, [D] each: the range of the rows that a model was trained on,
    wider by `margin` times itself on both sides; infinite before a training."""
    extent = scaling.obs_high - scaling.obs_low
    wider = jnp.where(jnp.isfinite(extent), margin * extent, jnp.inf)
    return scaling.obs_low - wider, scaling.obs_high + wider


@in_32_bits
def fit_scaling(
    model: Dynamics, obs: jax.Array, x: jax.Array, y: jax.Array, weight: jax.Array
) -> Scaling:
    """Scaling over the rows [N, ...] of positive `weight` [N].

    A dimension that is constant over the data, up to rounding, is centred and not scaled.
    """
    share = weight / jnp.sum(weight)

    def moments(rows: jax.Array, wanted: bool) -> tuple[jax.Array, jax.Array]:
        mean = jnp.matmul(share, rows, precision=FULL)
        # of centred rows: the difference of two float32 squares would lose small variances
        std = jnp.sqrt(jnp.matmul(share, jnp.square(rows - mean[None]), precision=FULL))
        std = jnp.where(std > 1e-6 * jnp.maximum(jnp.abs(mean), 1.0), std, 1.0)
        return (mean, std) if wanted else (jnp.zeros_like(mean), jnp.ones_like(std))

    seen = (weight > 0)[:, None]
    low = jnp.min(jnp.where(seen, obs, jnp.inf), axis=0)
    high = jnp.max(jnp.where(seen, obs, -jnp.inf), axis=0)
    cfg = model.config
    x_moments, y_moments = moments(x, cfg.normalise_inputs), moments(y, cfg.normalise_targets)
    return Scaling(*x_moments, *y_moments, low, high)
