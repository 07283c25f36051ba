"""Dreamer's settings, the schedule of its updates, and what both make of an environment."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal, NamedTuple

import optax

from mbrl_jax.agents.dreamer_losses import KlForm
from mbrl_jax.models import rssm_actions, rssm_codec, rssm_params
from mbrl_jax.nn.optimiser import laprop
from mbrl_jax.nn.precision import compute_dtype
from mbrl_jax.nn.schedules import warm_up
from mbrl_jax.types import EnvSpec, InputError, Scalar, Schedule, config, ranged


@config
class Config:
    """The published constants; size and train ratio are what changes from task to task.

    Fields annotated float may be vmapped and never recompile.
    """

    # of all networks: `models.rssm_params.SIZES`
    size: Literal["nano", "1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "1m"
    # records that are trained on for each record of the environments
    train_ratio: int = ranged("[1, inf)", default=32)
    # environments side by side
    num_envs: int = ranged("[1, inf)", default=16)
    # windows of an update, and records of each that are trained on
    batch_size: int = ranged("[1, inf)", default=16)
    batch_length: int = ranged("[2, inf)", default=64)
    # records that the replay holds; the authors' holds 5,000,000
    buffer_size: int = ranged("[1, inf)", default=1_000_000)
    # windows in the replay before the first update
    start_windows: int = ranged("[1, inf)", default=1_024)
    # imagined steps
    horizon: int = ranged("[1, inf)", default=15)
    # hidden layers compute in it; auto is bfloat16 on an accelerator and float32 on a CPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # names of arrays whose numbers are all 0 or 1; a lone array is called obs
    binary_obs: tuple[str, ...] = ()

    # step size of LaProp and the updates of its warm-up, the first of which has a rate of 0
    learning_rate: float = ranged("(0, inf)", default=4e-5)
    warmup_updates: float = ranged("[0, inf)", default=1000.0)
    # decays of the first and second moment
    b1: float = ranged("[0, 1)", default=0.9)
    b2: float = ranged("[0, 1)", default=0.999)
    # longest gradient of a tensor in units of its norm
    clip: float = ranged("(0, inf)", default=0.3)

    # discount factor, and lambda of the returns
    gamma: float = ranged("[0, 1]", default=1 - 1 / 333)
    lam: float = ranged("[0, 1]", default=0.95)
    # weights of the losses of the prior, of the posterior and of the replayed critic
    dyn_scale: float = ranged("[0, inf)", default=1.0)
    rep_scale: float = ranged("[0, inf)", default=0.1)
    replay_critic_scale: float = ranged("[0, inf)", default=0.3)
    # a divergence below so many nats has no gradient
    free_nats: float = ranged("[0, inf)", default=1.0)
    # share of the uniform distribution in latents, and in the policy: the authors' paper says 0.01,
    # their code mixes none in
    unimix: float = ranged("[0, 1)", default=0.01)
    policy_unimix: float = ranged("[0, 1)", default=0.0)
    # what a nat of the policy's entropy is worth
    entropy_scale: float = ranged("[0, inf)", default=3e-4)
    # share of the new parameters in the slow critic, and the weight of its part of the losses
    slow_rate: float = ranged("(0, 1]", default=0.02)
    slow_scale: float = ranged("[0, inf)", default=1.0)
    # share of an update's percentiles in the running range of returns
    range_rate: float = ranged("(0, 1]", default=0.01)

    # balanced: prior and posterior are pulled apart, with weights of their own; joint: by one loss
    kl: KlForm = "balanced"
    # advantages in units of the range of returns
    normalise_returns: bool = True
    # whether the critic also learns from replayed rewards
    replay_critic: bool = True
    # whether returns take the values of the slow critic
    slow_target: bool = False
    # reinforce: log-probabilities times advantages; dynamics: returns through the model
    actor_gradient: Literal["reinforce", "dynamics"] = "reinforce"
    # the state before a window: stored with its first record, zeros, or after a burn-in
    replay_context: Literal["stored", "zero", "burn_in"] = "stored"
    # records of the burn-in
    burn_in: int = ranged("[1, inf)", default=16)
    # distribution of the random part of a latent state
    latents: Literal["categorical", "gaussian"] = "categorical"
    # whether the model reconstructs observations
    decoder: bool = True


class Model(NamedTuple):
    """What a config makes of an environment."""

    sizes: rssm_params.Sizes
    obs: tuple[rssm_codec.Part, ...]
    actions: tuple[rssm_actions.ActionPart, ...]
    gaussian: bool
    latent: dict[str, Any]  # arguments that the functions of `models.rssm` share

    @property
    def dtype(self) -> Any:
        """The one that hidden layers compute in."""
        return self.latent["dtype"]


def model_of(cfg: Config, spec: EnvSpec) -> Model:
    """The world model's sizes and kinds; InputError for observations that it cannot encode."""
    gaussian = cfg.latents == "gaussian"
    dtype = compute_dtype(None if cfg.dtype == "auto" else cfg.dtype)
    return Model(
        rssm_params.sizes_of(cfg.size),
        rssm_codec.parts_of(spec.obs, cfg.binary_obs),
        rssm_actions.action_parts(spec),
        gaussian,
        {"share": cfg.unimix, "gaussian": gaussian, "dtype": dtype},
    )


def optimiser(cfg: Config, number: Scalar) -> optax.GradientTransformation:
    """LaProp with the rate of the update `number`, from 0; the first one's is 0."""
    rate = warm_up(cfg.learning_rate, cfg.warmup_updates, number)
    return laprop(rate, b1=cfg.b1, b2=cfg.b2, clip=cfg.clip)


def window_length(cfg: Config) -> int:
    """Records of a window: those that are trained on, one for the context, and the burn-in."""
    return 1 + cfg.batch_length + (cfg.burn_in if cfg.replay_context == "burn_in" else 0)


def rounds(cfg: Config) -> tuple[int, int]:
    """(steps of every environment, updates) of a round; one of the two is 1.

    Raises:
      InputError: a train ratio that is no whole number of updates a step, nor of steps an update.
    """
    trained = cfg.batch_size * cfg.batch_length
    ratio = Fraction(cfg.train_ratio * cfg.num_envs, trained)
    if ratio.numerator > 1 and ratio.denominator > 1:
        # updates every step, or steps to an update, whose train ratio is a whole number
        whole = [n * trained // cfg.num_envs for n in _both_sides(ratio)
                 if n and n * trained % cfg.num_envs == 0]  # fmt: skip
        whole += [trained // (cfg.num_envs * k) for k in range(1, trained + 1)
                  if trained % (cfg.num_envs * k) == 0]  # fmt: skip
        near = min(whole or [trained], key=lambda other: abs(other - cfg.train_ratio))
        raise InputError(
            f"train_ratio = {cfg.train_ratio}: makes {ratio} updates for each step of the "
            f"{cfg.num_envs} environments with batches of {cfg.batch_size} x {cfg.batch_length}; "
            f"the nearest that makes whole updates is {near}"
        )
    return ratio.denominator, ratio.numerator


def _both_sides(ratio: Fraction) -> tuple[int, int]:
    return int(ratio), int(ratio) + 1


def schedule(cfg: Config) -> Schedule:
    """Acting and updates as the authors' code has them, in steps that are known beforehand.

    Theirs makes one update at the first record r at which `start_windows` windows exist, and then
    keeps 1 + floor((records - r) train_ratio / (batch_size batch_length)). So does this, but for
    rounds of several updates, which come at the end of a step of all environments and do without
    the first one.

    Raises:
      InputError: as `rounds`, or a replay that does not hold `start_windows` windows.
    """
    steps, updates = rounds(cfg)
    length, most = window_length(cfg), cfg.buffer_size // cfg.num_envs
    if length > most:
        raise InputError(
            f"buffer_size = {cfg.buffer_size}: holds {most} records of each of {cfg.num_envs} "
            f"environments; expected at least {length}, the records of a window"
        )
    first = length - 1 - (-cfg.start_windows // cfg.num_envs)
    if first > most:
        windows = (most - length + 1) * cfg.num_envs
        raise InputError(
            f"start_windows = {cfg.start_windows}: expected at most {windows}, the windows of "
            f"{length} records that buffer_size = {cfg.buffer_size} holds"
        )
    prefill = max(first - steps, 0) if updates == 1 else first
    return Schedule(cfg.num_envs, 0, steps, "delayed", prefill * cfg.num_envs)


# worlds whose numbers are all 0 or 1: marks on a board, and channels of MinAtar
_BOARDS = ("Catch-bsuite", "DeepSea-bsuite")
_GAMES = ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")
PRESETS: dict[str, dict[str, Any]] = {
    name: {"binary_obs": ("obs",)} for name in (*_BOARDS, *(f"{game}-MinAtar" for game in _GAMES))
}
