"""The learner of soft actor-critic: networks, losses and gradient steps, without a replay.

SAC: Haarnoja et al. (2018), "Soft actor-critic algorithms and applications", with the automatic
temperature. REDQ: Chen et al. (2021), `num_critics=10, target_subset=2, actor_value="mean"`.
DroQ: Hiraoka et al. (2022), `critic="dropout", layer_norm=True, actor_value="mean"`. CrossQ:
Bhatt et al. (2024), `critic="batch_renorm", policy_period=3`, wide critics, no target network.

`sac` feeds it from a replay of real steps, MBPO with batches of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax import loops, prng
from mbrl_jax.nn.distributions import TanhNormal, tanh_normal
from mbrl_jax.nn.networks import ContinuousCritic, GaussianActor, polyak
from mbrl_jax.nn.optimiser import adam
from mbrl_jax.types import (
    EnvSpec,
    InputError,
    Metrics,
    Mode,
    NStep,
    PyTree,
    Scalar,
    config,
    ranged,
)


@config
class LearnerConfig:
    """Of the networks and losses. Fields annotated float may be vmapped and never recompile."""

    # widths of the hidden layers of the actor
    hidden: tuple[int, ...] = (256, 256)
    # widths of the hidden layers of each critic
    critic_hidden: tuple[int, ...] = (256, 256)
    # of the hidden layers
    activation: Literal["relu", "tanh", "swish", "elu", "gelu"] = "relu"
    # Adam's, for the actor
    learning_rate: float = ranged("(0, inf)", default=3e-4)
    # Adam's, for the critics
    critic_learning_rate: float = ranged("(0, inf)", default=3e-4)
    # Adam's, for the temperature
    temperature_learning_rate: float = ranged("(0, inf)", default=3e-4)
    # Adam's decay of the first moment; CrossQ takes 0.5
    adam_b1: float = ranged("[0, 1)", default=0.9)
    # discount factor
    gamma: float = ranged("[0, 1]", default=0.99)
    # rewards are multiplied by it in the critics' targets
    reward_scale: float = ranged("(0, inf)", default=1.0)
    # share of the new parameters in the target critics, after each gradient step
    tau: float = ranged("(0, 1]", default=0.005)
    # gradient steps of the critics for each one of the actor and the temperature
    policy_period: int = ranged("[1, inf)", default=1)
    # critics, and how many random ones of them make a target (REDQ: 10 and 2)
    num_critics: int = ranged("[1, inf)", default=2)
    # how many random critics make a target
    target_subset: int = ranged("[1, inf)", default=2)
    # what the actor maximises: the least of the critics, or their mean (REDQ, DroQ)
    actor_value: Literal["min", "mean"] = "min"
    # plain; dropout (DroQ); batch_renorm: batch renormalised and without target critics (CrossQ)
    critic: Literal["plain", "dropout", "batch_renorm"] = "plain"
    # LayerNorm in the critics
    layer_norm: bool = False
    # probability that a unit of a critic="dropout" is dropped
    dropout: float = ranged("[0, 1)", default=0.01)
    # the temperature at first, or for ever without learn_temperature
    temperature: float = ranged("(0, inf)", default=1.0)
    # whether the temperature is adjusted to the target entropy
    learn_temperature: bool = True
    # least learned temperature, exp(-10)
    temperature_min: float = ranged("(0, inf)", default=4.5399931e-05)
    # greatest learned temperature, exp(2)
    temperature_max: float = ranged("(0, inf)", default=7.3890562)
    # correlation of the exploration's noise from one step to the next: 0 draws it anew, as SAC
    # does; near 1 the actions sway slowly, while each alone still follows the policy
    noise_correlation: float = ranged("[0, 1)", default=0.0)
    # entropy that the temperature aims at, for each dimension of the action in [-1, 1]
    target_entropy: float = -1.0


class Params(NamedTuple):
    actor: PyTree
    critic: PyTree  # [num_critics, ...]
    log_temperature: jax.Array  # [] float32


class LearnerState(NamedTuple):
    params: Params
    target: PyTree | None  # critic parameters; None with batch_renorm
    stats: PyTree  # running statistics of the critics with batch_renorm, {} otherwise
    opt: Params  # the optimiser's state of each part


class Learner(NamedTuple):
    """SAC without environment and replay, as pure functions."""

    init: Callable[[jax.Array], LearnerState]
    policy: Callable[[PyTree, jax.Array], TanhNormal]
    """(params.actor, obs [B, *obs_shape]) -> distribution of actions in [-1, 1]^D."""
    init_memory: Callable[[int], jax.Array]
    """(num_envs) -> the noise that `act` carries from step to step."""
    act: Callable[..., tuple[jax.Array, jax.Array, tuple[()]]]
    """(params.actor, memory, obs, is_first, key, mode) -> as `Agent.act`."""
    update: Callable[..., tuple[LearnerState, Metrics]]
    """(state, batches, key, done) -> (state, metrics): one gradient step for each entry of the
    leading axis of `batches` (NStep, [G, B, ...], actions in [-1, 1]), after the `done` ones so
    far, int32, never vmapped."""


def critic_target(
    reward: jax.Array,
    discount: jax.Array,
    next_q: jax.Array,
    next_log_prob: jax.Array,
    temperature: Scalar,
) -> jax.Array:
    """r + discount (min_j Q_j(s', a') - alpha log pi(a' | s')), a' from the policy; [B].

    `next_q` [M, B] are the target critics, for REDQ a random subset of M (Chen et al. 2021, (1));
    `discount` [B] is gamma (1 - terminated), its n-th power for n-step returns.
    """
    return reward + discount * (jnp.min(next_q, axis=0) - temperature * next_log_prob)


def critic_loss(q: jax.Array, target: jax.Array) -> jax.Array:
    """Sum over critics of half the mean squared error of `q` [n, B] to `target` [B]."""
    return 0.5 * jnp.sum(jnp.mean(jnp.square(q - target[None]), axis=1))


def actor_loss(log_prob: jax.Array, q: jax.Array, temperature: Scalar) -> jax.Array:
    """Mean of alpha log pi - Q over [B] sampled actions (Haarnoja et al. 2018, (7))."""
    return jnp.mean(temperature * log_prob - q)


def temperature_loss(
    log_temperature: jax.Array, log_prob: jax.Array, target_entropy: Scalar
) -> jax.Array:
    """-log alpha (log pi + H) with the policy held fixed, averaged over [B].

    Haarnoja et al. (2018), (18), with log alpha in place of alpha, as their code has it.
    """
    error = jax.lax.stop_gradient(log_prob + target_entropy)
    return -log_temperature * jnp.mean(error)


def actor_network(cfg: LearnerConfig, spec: EnvSpec) -> GaussianActor:
    return GaussianActor(spec, cfg.hidden, cfg.activation)


def critic_network(cfg: LearnerConfig, spec: EnvSpec) -> ContinuousCritic:
    """One critic; the ensemble is a leading axis of its parameters."""
    return ContinuousCritic(spec, cfg.critic_hidden, cfg.activation, cfg.layer_norm, cfg.critic)


def optimisers(cfg: LearnerConfig) -> Any:
    """One Adam for each part of `Params`."""
    rates = (cfg.learning_rate, cfg.critic_learning_rate, cfg.temperature_learning_rate)
    return Params(*(adam(rate, b1=cfg.adam_b1) for rate in rates))


def policy(cfg: LearnerConfig, spec: EnvSpec, actor: PyTree, obs: PyTree) -> TanhNormal:
    """The distribution of actions in [-1, 1]^D of the parameters `actor` at `obs` [B, ...]."""
    return tanh_normal(*actor_network(cfg, spec).apply(actor, obs))


def critic_values(
    cfg: LearnerConfig,
    spec: EnvSpec,
    critic: PyTree,
    stats: PyTree,
    obs: PyTree,
    action: jax.Array,
    key: jax.Array,
    train: bool = False,
):
    """The value of each critic, [n, B] float32; with `train` also the statistics they move to.

    Args:
      cfg, spec: as in `make_learner`.
      critic: parameters, leaves [n, ...].
      stats: running statistics with batch_renorm, leaves [n, ...]; {} otherwise.
      obs: [B, ...].
      action: [B, D] in [-1, 1].
      key: of the dropout.
      train: normalise by the batch (batch_renorm).
    """
    net = critic_network(cfg, spec)

    def one(params: PyTree, stats: PyTree, key: jax.Array):
        return net.apply(
            {"params": params, **stats}, obs, action, cfg.dropout, train,
            rngs={"dropout": key}, mutable=["batch_stats"] if train else False,
        )  # fmt: skip

    keys = jax.random.split(key, jax.tree.leaves(critic)[0].shape[0])
    return jax.vmap(one)(critic, stats, keys)


def init_learner(cfg: LearnerConfig, spec: EnvSpec, key: jax.Array) -> LearnerState:
    """Fresh networks, the temperature, and their optimisers."""
    keys = jax.random.split(key, 1 + cfg.num_critics)
    obs, action = spec.zero_obs(1), jnp.zeros((1, *spec.action_shape), jnp.float32)
    init_critic = critic_network(cfg, spec).init
    critics = jax.vmap(init_critic, (0, None, None))(keys[1:], obs, action)
    log_temperature = jnp.log(jnp.float32(cfg.temperature))
    actor = actor_network(cfg, spec).init(keys[0], obs)
    params = Params(actor, critics.pop("params"), log_temperature)
    opt = Params(*(o.init(part) for o, part in zip(optimisers(cfg), params, strict=True)))
    # a copy, since the state is donated and two of its leaves must not be one buffer
    target = None if cfg.critic == "batch_renorm" else jax.tree.map(jnp.copy, params.critic)
    return LearnerState(params, target, critics, opt)


def act(
    cfg: LearnerConfig, spec: EnvSpec, actor: PyTree, memory: jax.Array, obs, is_first, key,
    mode: Mode,
):  # fmt: skip
    """As `Agent.act` with the parameters `actor`; the memory [N, D] is the noise of exploration."""
    if mode == "random":
        # as if the noise had just been drawn, of which the action tells nothing
        noise = jax.random.normal(jax.random.fold_in(key, 1), memory.shape, jnp.float32)
        return spec.random_actions(key, obs), noise, ()
    distribution = policy(cfg, spec, actor, obs)
    if mode == "eval":
        return spec.from_unit(distribution.mode()), memory, ()
    # a process whose every value is standard normal (Uhlenbeck and Ornstein's); memory holds it
    fresh = jax.random.normal(key, memory.shape, jnp.float32)
    rho = cfg.noise_correlation
    memory = jnp.where(is_first[:, None], fresh, rho * memory + jnp.sqrt(1 - rho**2) * fresh)
    return spec.from_unit(distribution.from_noise(memory)[0]), memory, ()


def critic_step(
    cfg: LearnerConfig,
    spec: EnvSpec,
    state: LearnerState,
    batch: NStep,
    noise: jax.Array,
    subset: jax.Array | None,
    key: jax.Array,
) -> tuple[LearnerState, Metrics]:
    """One gradient step of the critics; the target critics stay.

    Args:
      cfg, spec: as in `make_learner`.
      state: of the learner.
      batch: [B, ...], actions in [-1, 1].
      noise: [B, D] float32, standard normal, for the next actions.
      subset: [target_subset] int32, the critics that make the target; None for all.
      key: of the dropout.
    """
    params, target_key, key = state.params, *prng.split(key)
    temperature = jnp.exp(params.log_temperature)
    next_action, next_log_prob = policy(cfg, spec, params.actor, batch.next_obs).from_noise(noise)
    values = partial(critic_values, cfg, spec)

    def loss(critic: PyTree):
        if cfg.critic == "batch_renorm":  # both batches in one, normalised together
            obs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch.obs, batch.next_obs)
            action = jnp.concatenate([batch.action, next_action])
            q, stats = values(critic, state.stats, obs, action, key, train=True)
            q, next_q = jnp.split(q, 2, axis=1)
            next_q = next_q if subset is None else next_q[subset]
        else:
            pick = state.target
            if subset is not None:
                pick = jax.tree.map(lambda leaf: leaf[subset], pick)
            next_q = values(pick, {}, batch.next_obs, next_action, target_key)
            q, stats = values(critic, {}, batch.obs, batch.action, key), {}
        reward = cfg.reward_scale * batch.reward
        target = jax.lax.stop_gradient(
            critic_target(reward, batch.discount, next_q, next_log_prob, temperature)
        )
        return critic_loss(q, target), (stats, jnp.mean(q))

    (value, (stats, q)), grads = jax.value_and_grad(loss, has_aux=True)(params.critic)
    move, opt = optimisers(cfg).critic.update(grads, state.opt.critic, params.critic)
    critic = jax.tree.map(jnp.add, params.critic, move)
    params, opt = params._replace(critic=critic), state.opt._replace(critic=opt)
    metrics = {"critic_loss": value / cfg.num_critics, "q": q, "temperature": temperature}
    return state._replace(params=params, stats=stats, opt=opt), metrics


def actor_step(
    cfg: LearnerConfig,
    spec: EnvSpec,
    state: LearnerState,
    batch: NStep,
    noise: jax.Array,
    key: jax.Array,
) -> tuple[LearnerState, Metrics]:
    """One gradient step of the actor and the temperature; arguments as in `critic_step`."""
    params, opt = state.params, state.opt
    temperature = jnp.exp(params.log_temperature)

    def loss(actor: PyTree):
        action, log_prob = policy(cfg, spec, actor, batch.obs).from_noise(noise)
        q = critic_values(cfg, spec, params.critic, state.stats, batch.obs, action, key)
        q = jnp.min(q, axis=0) if cfg.actor_value == "min" else jnp.mean(q, axis=0)
        return actor_loss(log_prob, q, temperature), log_prob

    (value, log_prob), grads = jax.value_and_grad(loss, has_aux=True)(params.actor)
    move, actor_opt = optimisers(cfg).actor.update(grads, opt.actor, params.actor)
    params = params._replace(actor=jax.tree.map(jnp.add, params.actor, move))
    opt = opt._replace(actor=actor_opt)
    if cfg.learn_temperature:
        aim = cfg.target_entropy * spec.action_shape[0]
        grad = jax.grad(temperature_loss)(params.log_temperature, log_prob, aim)
        move, temperature_opt = optimisers(cfg).log_temperature.update(grad, opt.log_temperature)
        low, high = jnp.log(cfg.temperature_min), jnp.log(cfg.temperature_max)
        moved = jnp.clip(params.log_temperature + move, low, high)
        params = params._replace(log_temperature=moved)
        opt = opt._replace(log_temperature=temperature_opt)
    metrics = {"actor_loss": value, "entropy": -jnp.mean(log_prob)}
    return state._replace(params=params, opt=opt), metrics


def learn(
    cfg: LearnerConfig,
    spec: EnvSpec,
    state: LearnerState,
    batches: NStep,
    key: jax.Array,
    done: jax.Array,
) -> tuple[LearnerState, Metrics]:
    """One gradient step for each of the batches, and the moves of actor and target critics.

    Args:
      cfg, spec: as in `make_learner`.
      state: of the learner.
      batches: [G, B, ...], actions in [-1, 1].
      key: of all draws.
      done: [] int32, the gradient steps so far, never vmapped.

    Returns:
      The state, and the means of the metrics over the steps.
    """
    rounds, batch_size = batches.reward.shape
    noise_key, subset_key, dropout_key = prng.split(key, 3)
    shape = (rounds, 2, batch_size, *spec.action_shape)
    noise = jax.random.normal(noise_key, shape, jnp.float32)
    subsets = None
    if cfg.target_subset < cfg.num_critics:
        draws = jax.random.uniform(subset_key, (rounds, cfg.num_critics), jnp.float32)
        subsets = jnp.argsort(draws)[:, : cfg.target_subset]

    def move_actor(state: LearnerState, batch: NStep, noise, key: jax.Array):
        return actor_step(cfg, spec, state, batch, noise, key)

    def idle(state: LearnerState, batch: NStep, noise, key: jax.Array):
        return state, {"actor_loss": jnp.float32(0), "entropy": jnp.float32(0)}

    def one(state: LearnerState, x):
        number, batch, noise, subset = x
        keys = prng.fold_in(dropout_key, 2 * number + jnp.arange(2, dtype=jnp.int32))
        state, metrics = critic_step(cfg, spec, state, batch, noise[0], subset, keys[0])
        if cfg.policy_period == 1:
            state, more = move_actor(state, batch, noise[1], keys[1])
        else:
            due = number % cfg.policy_period == cfg.policy_period - 1
            state, more = jax.lax.cond(due, move_actor, idle, state, batch, noise[1], keys[1])
            # so that the mean over updates is the mean over the actor's own
            more = jax.tree.map(lambda value: value * cfg.policy_period, more)
        if state.target is not None:
            state = state._replace(target=polyak(state.params.critic, state.target, cfg.tau))
        return state, metrics | more

    numbers = done + jnp.arange(rounds, dtype=jnp.int32)
    state, metrics = loops.scan(one, state, (numbers, batches, noise, subsets))
    return state, jax.tree.map(jnp.mean, metrics)


def make_learner(config: LearnerConfig, spec: EnvSpec) -> Learner:
    """The networks and updates of one environment's SAC.

    Raises:
      InputError: discrete or unbounded actions, several players or an action mask, or a target
        subset larger than the ensemble.
    """
    spec.check_usable("SAC", dicts=True)
    if spec.discrete:
        raise InputError(
            f"SAC needs continuous actions; {spec.id} has {spec.num_actions} discrete ones; "
            "take dqn or ppo"
        )
    spec.check_bounded("SAC")
    if config.target_subset > config.num_critics:
        raise InputError(
            f"target_subset = {config.target_subset}: expected at most "
            f"num_critics = {config.num_critics}"
        )
    return Learner(
        init=partial(init_learner, config, spec),
        policy=partial(policy, config, spec),
        init_memory=lambda num_envs: jnp.zeros((num_envs, *spec.action_shape), jnp.float32),
        act=partial(act, config, spec),
        update=partial(learn, config, spec),
    )
