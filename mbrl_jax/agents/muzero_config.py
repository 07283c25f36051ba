"""MuZero's settings, what they make of an environment, and its schedule."""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp

from mbrl_jax import memory
from mbrl_jax.models import muzero_net
from mbrl_jax.models.muzero_net import Net, Support
from mbrl_jax.types import EnvSpec, InputError, Schedule, StaticFloat, config, ranged


@config
class Config:
    """Fields annotated float may be vmapped and never recompile."""

    # latents are vectors or grids; auto takes grids where the observation is a small one
    torso: Literal["auto", "vector", "grid"] = "auto"
    # features of a latent vector, or channels of a grid
    width: int = ranged("[1, inf)", default=64)
    # residual blocks of the representation and of the dynamics
    blocks: int = ranged("[0, inf)", default=1)
    # hidden layers of the heads
    hidden: tuple[int, ...] = (64,)
    # bins of rewards and of values; least and greatest reward of a step, from which the bins'
    # limits follow with the discount and the episode limit; another limit of values than that
    bins: int = ranged("[2, inf)", default=51)
    reward_range: tuple[float, ...] = (-1.0, 1.0)
    value_limit: StaticFloat = ranged("[0, inf)", default=0)
    # discount factor; of games it is mostly 1
    gamma: float = ranged("[0, 1]", default=0.997)

    # gumbel: sequential halving; puct: the paper's, with noise at the root and a temperature;
    # sampled: gumbel among sampled actions, for continuous ones
    search: Literal["gumbel", "puct", "sampled"] = "gumbel"
    num_simulations: int = ranged("[1, inf)", default=16)
    # actions that a root considers at most (gumbel, sampled)
    max_considered: int = ranged("[1, inf)", default=16)
    # scale of completed values against priors, and visits that count beforehand (gumbel, sampled)
    value_scale: float = ranged("[0, inf)", default=0.1)
    visit_offset: float = ranged("[0, inf)", default=50.0)
    # difference of a node's least and greatest value, in units of reward, from which on they are
    # stretched to [0, 1]; below it they count less, so that rounding is not taken for advice
    least_range: float = ranged("(0, inf)", default=0.01)
    # share and concentration of the noise at the root, and constant of exploration (puct)
    dirichlet_fraction: float = ranged("[0, 1]", default=0.25)
    dirichlet_alpha: float = ranged("(0, inf)", default=0.3)
    pb_c_init: float = ranged("[0, inf)", default=1.25)
    # actions are drawn by visits^(1 / temperature), which moves linearly to temperature_final over
    # temperature_steps environment steps (puct)
    temperature: float = ranged("[0, inf)", default=1.0)
    temperature_final: float = ranged("[0, inf)", default=0.25)
    temperature_steps: float = ranged("[0, inf)", default=100_000.0)
    # candidates of a node, and how many of a root's are drawn from a policy as many times as wide
    # (sampled)
    num_candidates: int = ranged("[2, inf)", default=16)
    wide_candidates: int = ranged("[0, inf)", default=8)
    wide_factor: float = ranged("[1, inf)", default=3.0)

    # codes of what the world may answer to an action; 0 for a world without chance (puct)
    chance_codes: int = ranged("[0, inf)", default=0)

    # environments side by side
    num_envs: int = ranged("[1, inf)", default=8)
    # records that the replay holds
    buffer_size: int = ranged("[1, inf)", default=100_000)
    # environment steps of random actions before the first update
    warmup_steps: int = ranged("[1, inf)", default=1_000)
    # chance that such an action is that of the step before, which goes further where one must swing
    # up (Dabney et al. 2021, "Temporally-extended epsilon-greedy exploration")
    warmup_repeat: float = ranged("[0, 1)", default=0.0)
    # steps of every environment between two rounds of updates, and gradient steps of a round
    steps_per_update: int = ranged("[1, inf)", default=1)
    updates: int = ranged("[1, inf)", default=8)
    # sequences of a gradient step, and steps that each is unrolled
    batch_size: int = ranged("[1, inf)", default=256)
    unroll: int = ranged("[1, inf)", default=5)
    # sampling in proportion to the error of the first value to the power of priority_exponent;
    # exponent of the importance weights
    prioritised: bool = False
    priority_exponent: float = ranged("[0, inf)", default=1.0)
    importance_exponent: float = ranged("[0, 1]", default=1.0)

    # targets of the values: n-step returns, their mean by lambda, the value that a search found at
    # the state itself, or mixed: n-step for sequences of the newest mixed_age steps, else search
    value_target: Literal["n_step", "lambda", "search", "mixed"] = "lambda"
    n_step: int = ranged("[1, inf)", default=10)
    lam: float = ranged("[0, 1]", default=0.95)
    mixed_age: float = ranged("[0, inf)", default=20_000.0)
    # share of a batch whose policies come from a fresh search, the others' from the one that acted;
    # and share whose returns end in fresh values of the target network, the others' in the values
    # that the searches found which acted
    reanalyse_policies: StaticFloat = ranged("[0, 1]", default=1.0)
    reanalyse_values: StaticFloat = ranged("[0, 1]", default=1.0)
    # parameters and noise of the fresh search
    reanalyse_with: Literal["target", "newest"] = "target"
    reanalyse_noise: bool = True
    # gradient steps between two copies to the target network
    target_period: int = ranged("[1, inf)", default=100)

    # weights of the losses: of values, of consistency (0 leaves its network out), and of entropy
    value_coef: float = ranged("[0, inf)", default=0.25)
    consistency: bool = False
    consistency_coef: float = ranged("[0, inf)", default=2.0)
    entropy_coef: float = ranged("[0, inf)", default=0.0)
    # and of the distance between an observation's code and the encoder's shares (chance)
    commitment_coef: float = ranged("[0, inf)", default=0.25)
    # predict sums of rewards, which start anew after so many steps; 0 predicts each reward
    prefix_period: int = ranged("[0, inf)", default=0)
    # Adam's step size, which moves linearly to learning_rate_final over decay_updates gradient
    # steps; decoupled decay; the global norm to which gradients are clipped
    learning_rate: float = ranged("(0, inf)", default=3e-3)
    learning_rate_final: float = ranged("(0, inf)", default=3e-4)
    decay_updates: float = ranged("[0, inf)", default=20_000.0)
    weight_decay: float = ranged("[0, inf)", default=1e-4)
    max_grad_norm: float = ranged("(0, inf)", default=10.0)


def support(cfg: Config, spec: EnvSpec) -> Support:
    """The bins of rewards and values.

    A value is at most the largest reward at each step that an episode may last, discounted; a game
    of two players is won or lost once, by the largest reward.
    """
    reward = max(abs(end) for end in cfg.reward_range)
    steps = 1 if spec.num_players > 1 else spec.episode_limit
    # the sum of gamma^i, also where gamma is 1
    total = jnp.where(
        cfg.gamma < 1.0, (1.0 - cfg.gamma**steps) / jnp.maximum(1.0 - cfg.gamma, 1e-7), steps
    )
    value = cfg.value_limit or reward * jnp.maximum(total, 1.0)
    return muzero_net.support_of(cfg.bins, reward * max(cfg.prefix_period, 1), value)


def net_of(cfg: Config, spec: EnvSpec) -> Net:
    """The networks of an environment like `spec`.

    Raises:
      InputError: observations that no torso fits.
    """
    grid = muzero_net.takes_grid(spec) if cfg.torso == "auto" else cfg.torso == "grid"
    muzero_net.check_observations(spec, grid)
    projection = (2 * cfg.hidden[-1] if cfg.hidden else cfg.width) if cfg.consistency else 0
    return Net(
        spec, grid, cfg.width, cfg.blocks, cfg.hidden, cfg.bins, cfg.prefix_period, projection,
        cfg.chance_codes,
    )  # fmt: skip


def window_length(cfg: Config) -> int:
    """Records of a sequence: those unrolled, and those that the last value target needs."""
    return cfg.unroll + cfg.n_step + 1


def num_fresh(cfg: Config) -> tuple[int, int]:
    """Sequences of a batch whose policies, and whose values, are made anew."""
    shares = cfg.reanalyse_policies, cfg.reanalyse_values
    policies, values = (round(share * cfg.batch_size) for share in shares)
    return policies, values


def search_bytes(cfg: Config, spec: EnvSpec) -> int:
    """About how many bytes the trees of one seed's largest search take, with their latents."""
    net, choices = net_of(cfg, spec), spec.num_actions or cfg.num_candidates
    part = muzero_net.part_of(spec)
    cells = math.prod(part.shape[:2]) if net.grid and part is not None else 1
    embedding = cells * net.width + (2 * cfg.hidden[-1] if cfg.prefix_period else 0)
    if not spec.discrete:
        embedding += choices * spec.action_shape[0]
    roots = max(cfg.num_envs, num_fresh(cfg)[0] * (cfg.unroll + 1))
    # of each edge value, visits, target and prior; of each node its own few
    return 4 * roots * (cfg.num_simulations + 1) * (5 * choices + 12 + embedding)


def check(cfg: Config, spec: EnvSpec) -> None:
    """Raises InputError for settings that do not fit each other or the environment."""
    spec.check_usable("MuZero", dicts=True, reserved=("action_mask", "to_play"))
    if spec.num_players > 2:
        raise InputError(f"MuZero plays games of two players; {spec.id} has {spec.num_players}")
    if not spec.discrete:
        spec.check_bounded("MuZero")
        if cfg.search != "sampled":
            raise InputError(
                f"search = {cfg.search!r}: {spec.id} has continuous actions; expected 'sampled'"
            )
        if cfg.wide_candidates > cfg.num_candidates:
            raise InputError(
                f"wide_candidates = {cfg.wide_candidates}: expected at most num_candidates = "
                f"{cfg.num_candidates}"
            )
    elif cfg.search == "sampled":
        raise InputError(
            f"search = 'sampled': {spec.id} has discrete actions; expected 'gumbel' or 'puct'"
        )
    if cfg.chance_codes == 1:
        raise InputError("chance_codes = 1: expected 0, or 2 and more that differ")
    if cfg.chance_codes and cfg.search != "puct":
        raise InputError(
            f"search = {cfg.search!r} with chance_codes = {cfg.chance_codes}: expected 'puct', "
            "whose search knows chance nodes"
        )
    if cfg.chance_codes and cfg.prefix_period:
        raise InputError(
            f"prefix_period = {cfg.prefix_period} with chance_codes = {cfg.chance_codes}: expected "
            "one of them to be 0"
        )
    if len(cfg.reward_range) != 2 or not cfg.reward_range[0] <= cfg.reward_range[1]:
        raise InputError(f"reward_range = {cfg.reward_range}: expected (least, greatest)")
    if not any(cfg.reward_range):
        raise InputError(f"reward_range = {cfg.reward_range}: expected a reward other than 0")
    if cfg.prefix_period and not cfg.hidden:
        raise InputError("hidden = (): expected a width, or prefix_period = 0")
    if cfg.unroll > spec.episode_limit:
        raise InputError(
            f"unroll = {cfg.unroll}: expected at most {spec.episode_limit}, the steps of an "
            f"episode of {spec.id}"
        )
    needed, free = search_bytes(cfg, spec), memory.available()
    if free is not None and needed > free:
        raise InputError(
            f"num_simulations = {cfg.num_simulations}: the trees of a search take "
            f"{needed / 2**30:.1f} GiB, expected at most {free / 2**30:.1f} GiB, the memory there "
            "is; lower num_simulations, batch_size, unroll or reanalyse_policies"
        )
    window = window_length(cfg) * cfg.num_envs
    for name, value in (("buffer_size", cfg.buffer_size), ("warmup_steps", cfg.warmup_steps)):
        if value < window:
            raise InputError(
                f"{name} = {value}: expected at least (unroll + n_step + 1) * num_envs = {window}, "
                "the records of a sequence of each environment"
            )


def schedule(cfg: Config) -> Schedule:
    """Delayed resets: the final observation of an episode is a record of its own."""
    return Schedule(cfg.num_envs, cfg.warmup_steps, cfg.steps_per_update, "delayed")
