"""Soft actor-critic with its high update-to-data variants as switches.

SAC: Haarnoja et al. (2018), "Soft actor-critic algorithms and applications", with the automatic
temperature. REDQ: Chen et al. (2021), `num_critics=10, target_subset=2, actor_value="mean"`.
DroQ: Hiraoka et al. (2022), `critic="dropout", layer_norm=True, actor_value="mean"`. CrossQ:
Bhatt et al. (2024), `critic="batch_renorm", policy_period=3`, wide critics, no target network.

`make_learner` is the agent without its replay; MBPO feeds it batches of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax import prng
from mbrl_jax.agents import AgentDef
from mbrl_jax.data import ring
from mbrl_jax.nn.distributions import TanhNormal, tanh_normal
from mbrl_jax.nn.networks import ContinuousCritic, GaussianActor, polyak
from mbrl_jax.nn.optimiser import adam
from mbrl_jax.types import (
    Agent,
    EnvSpec,
    InputError,
    Metrics,
    Mode,
    NStep,
    PyTree,
    Scalar,
    Schedule,
    Step,
    Transition,
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


@config
class Config(LearnerConfig):
    """The learner's fields and those of the replay."""

    # environments side by side
    num_envs: int = ranged("[1, inf)", default=1)
    # environment steps that the replay holds
    buffer_size: int = ranged("[1, inf)", default=1_000_000)
    # environment steps of random actions before the first update
    warmup_steps: int = ranged("[1, inf)", default=5_000)
    # transitions of a gradient step
    batch_size: int = ranged("[1, inf)", default=256)
    # steps of every environment between two rounds of updates
    steps_per_update: int = ranged("[1, inf)", default=1)
    # gradient steps of a round; the update-to-data ratio is updates / (num_envs * steps_per_update)
    updates: int = ranged("[1, inf)", default=1)


class Params(NamedTuple):
    actor: PyTree
    critic: PyTree  # [num_critics, ...]
    log_temperature: jax.Array  # [] float32


class LearnerState(NamedTuple):
    params: Params
    target: PyTree | None  # critic parameters; None with batch_renorm
    stats: PyTree  # running statistics of the critics with batch_renorm, {} otherwise
    opt: Params  # the optimiser's state of each part


class State(NamedTuple):
    learner: LearnerState
    replay: PyTree


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


def make_learner(config: LearnerConfig, spec: EnvSpec) -> Learner:
    """The losses, networks and optimisers of one environment's SAC.

    Raises:
      InputError: discrete or unbounded actions, or a target subset larger than the ensemble.
    """
    if spec.discrete:
        raise InputError(
            f"SAC needs continuous actions; {spec.id} has {spec.num_actions} discrete ones; "
            "take dqn or ppo"
        )
    spec.check_usable("SAC", dicts=True)
    spec.check_bounded("SAC")
    if config.target_subset > config.num_critics:
        raise InputError(
            f"target_subset = {config.target_subset}: expected at most "
            f"num_critics = {config.num_critics}"
        )
    cfg, num_critics, size = config, config.num_critics, spec.action_shape[0]
    renorm = cfg.critic == "batch_renorm"
    actor_net = GaussianActor(spec, cfg.hidden, cfg.activation)
    critic_net = ContinuousCritic(
        spec, cfg.critic_hidden, cfg.activation, cfg.layer_norm, cfg.critic
    )
    rates = (cfg.learning_rate, cfg.critic_learning_rate, cfg.temperature_learning_rate)
    optimisers: Any = Params(*(adam(rate, b1=cfg.adam_b1) for rate in rates))

    def init(key: jax.Array) -> LearnerState:
        keys = jax.random.split(key, 1 + num_critics)
        obs, action = spec.zero_obs(1), jnp.zeros((1, size))
        critics = jax.vmap(critic_net.init, (0, None, None))(keys[1:], obs, action)
        log_temperature = jnp.log(jnp.float32(cfg.temperature))
        params = Params(actor_net.init(keys[0], obs), critics.pop("params"), log_temperature)
        opt = Params(*(o.init(part) for o, part in zip(optimisers, params, strict=True)))
        # a copy, since the state is donated and two of its leaves must not be one buffer
        target = None if renorm else jax.tree.map(jnp.copy, params.critic)
        return LearnerState(params, target, critics, opt)

    def policy(actor: PyTree, obs: jax.Array) -> TanhNormal:
        return tanh_normal(*actor_net.apply(actor, obs))

    def init_memory(num_envs: int) -> jax.Array:
        return jnp.zeros((num_envs, size))

    def act(actor: PyTree, memory: jax.Array, obs, is_first, key, mode: Mode):
        if mode == "random":
            action_key, key = jax.random.split(key)
            # as if the noise had just been drawn, of which the action tells nothing
            noise = jax.random.normal(key, memory.shape)
            return spec.random_actions(action_key, obs), noise, ()
        distribution = policy(actor, obs)
        if mode == "eval":
            return spec.from_unit(distribution.mode()), memory, ()
        # a process whose every value is standard normal (Uhlenbeck and Ornstein's); memory holds it
        fresh = jax.random.normal(key, memory.shape)
        rho = cfg.noise_correlation
        memory = jnp.where(is_first[:, None], fresh, rho * memory + jnp.sqrt(1 - rho**2) * fresh)
        return spec.from_unit(distribution.from_noise(memory)[0]), memory, ()

    def values(critic: PyTree, stats: PyTree, obs, action, key: jax.Array, train: bool = False):
        """Of each critic in the ensemble, [n, B]; with `train` also the new statistics."""

        def one(params: PyTree, stats: PyTree, key: jax.Array):
            return critic_net.apply(
                {"params": params, **stats}, obs, action, cfg.dropout, train,
                rngs={"dropout": key}, mutable=["batch_stats"] if train else False,
            )  # fmt: skip

        keys = jax.random.split(key, jax.tree.leaves(critic)[0].shape[0])
        return jax.vmap(one)(critic, stats, keys)

    def update_critic(state: LearnerState, batch: NStep, noise, subset, key: jax.Array):
        params, target_key, key = state.params, *prng.split(key)
        temperature = jnp.exp(params.log_temperature)
        next_action, next_log_prob = policy(params.actor, batch.next_obs).from_noise(noise)

        def loss(critic: PyTree):
            if renorm:  # both batches in one, normalised together
                obs = jnp.concatenate([batch.obs, batch.next_obs])
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
        step, opt = optimisers.critic.update(grads, state.opt.critic, params.critic)
        critic = jax.tree.map(jnp.add, params.critic, step)
        params, opt = params._replace(critic=critic), state.opt._replace(critic=opt)
        metrics = {"critic_loss": value / num_critics, "q": q, "temperature": temperature}
        return state._replace(params=params, stats=stats, opt=opt), metrics

    def update_actor(state: LearnerState, batch: NStep, noise, key: jax.Array):
        params, opt = state.params, state.opt
        temperature = jnp.exp(params.log_temperature)

        def loss(actor: PyTree):
            action, log_prob = policy(actor, batch.obs).from_noise(noise)
            q = values(params.critic, state.stats, batch.obs, action, key)
            q = jnp.min(q, axis=0) if cfg.actor_value == "min" else jnp.mean(q, axis=0)
            return actor_loss(log_prob, q, temperature), log_prob

        (value, log_prob), grads = jax.value_and_grad(loss, has_aux=True)(params.actor)
        step, actor_state = optimisers.actor.update(grads, opt.actor, params.actor)
        params = params._replace(actor=jax.tree.map(jnp.add, params.actor, step))
        opt = opt._replace(actor=actor_state)
        if cfg.learn_temperature:
            grad = jax.grad(temperature_loss)(
                params.log_temperature, log_prob, cfg.target_entropy * size
            )
            step, temperature_state = optimisers.log_temperature.update(grad, opt.log_temperature)
            low, high = jnp.log(cfg.temperature_min), jnp.log(cfg.temperature_max)
            moved = jnp.clip(params.log_temperature + step, low, high)
            params = params._replace(log_temperature=moved)
            opt = opt._replace(log_temperature=temperature_state)
        metrics = {"actor_loss": value, "entropy": -jnp.mean(log_prob)}
        return state._replace(params=params, opt=opt), metrics

    def idle(state: LearnerState, batch: NStep, noise, key: jax.Array):
        return state, {"actor_loss": jnp.float32(0), "entropy": jnp.float32(0)}

    def update(state: LearnerState, batches: NStep, key: jax.Array, done: jax.Array):
        rounds, batch_size = batches.reward.shape
        noise_key, subset_key, dropout_key = prng.split(key, 3)
        noise = jax.random.normal(noise_key, (rounds, 2, batch_size, size))
        subsets = None
        if cfg.target_subset < num_critics:
            order = jnp.argsort(jax.random.uniform(subset_key, (rounds, num_critics)))
            subsets = order[:, : cfg.target_subset]

        def one(state: LearnerState, x):
            number, batch, noise, subset = x
            keys = prng.fold_in(dropout_key, 2 * number + jnp.arange(2))
            state, metrics = update_critic(state, batch, noise[0], subset, keys[0])
            if cfg.policy_period == 1:
                state, more = update_actor(state, batch, noise[1], keys[1])
            else:
                due = number % cfg.policy_period == cfg.policy_period - 1
                state, more = jax.lax.cond(due, update_actor, idle, state, batch, noise[1], keys[1])
                # so that the mean over updates is the mean over the actor's own
                more = jax.tree.map(lambda value: value * cfg.policy_period, more)
            if not renorm:
                state = state._replace(target=polyak(state.params.critic, state.target, cfg.tau))
            return state, metrics | more

        numbers = done + jnp.arange(rounds, dtype=jnp.int32)
        state, metrics = jax.lax.scan(one, state, (numbers, batches, noise, subsets))
        return state, jax.tree.map(jnp.mean, metrics)

    return Learner(init, policy, init_memory, act, update)


def make(config: Config, spec: EnvSpec) -> Agent:
    """The agent of one environment with continuous actions.

    Raises:
      InputError: as `make_learner`; a batch larger than the replay, or a replay that does not
        divide by the environments.
    """
    cfg, learner = config, make_learner(config, spec)
    if cfg.batch_size > cfg.buffer_size:
        raise InputError(
            f"batch_size = {cfg.batch_size}: expected at most buffer_size = {cfg.buffer_size}"
        )
    replay = ring.make(Transition.example(spec), cfg.buffer_size, cfg.num_envs)

    def init(key: jax.Array) -> State:
        return State(learner.init(key), replay.init())

    def act(state: State, memory, obs, is_first, key, t: jax.Array, mode: Mode):
        return learner.act(state.learner.params.actor, memory, obs, is_first, key, mode)

    def observe(state: State, step: Step, extras, t: jax.Array) -> State:
        row = Transition.of(step)._replace(action=spec.to_unit(step.action))
        return state._replace(replay=replay.add(state.replay, row, t))

    def update(state: State, key: jax.Array, t: jax.Array, n: jax.Array) -> tuple[State, Metrics]:
        index_key, key = prng.split(key)
        shape = (cfg.updates, cfg.batch_size)
        index = replay.sample_index(index_key, cfg.updates * cfg.batch_size, t + 1)
        batches = replay.n_step(state.replay, index.reshape(shape), 1, cfg.gamma)
        moved, metrics = learner.update(state.learner, batches, key, n * cfg.updates)
        return state._replace(learner=moved), metrics

    schedule = Schedule(cfg.num_envs, cfg.warmup_steps, cfg.steps_per_update)
    return Agent(init, learner.init_memory, act, observe, update, schedule)


_SMALL = {
    "hidden": (64, 64),
    "critic_hidden": (64, 64),
    "learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "temperature_learning_rate": 1e-3,
    "buffer_size": 100_000,
    "warmup_steps": 1_000,
}
_NORMED = {**_SMALL, "tau": 0.02, "layer_norm": True}
PRESETS = {
    "Pendulum-v1": _SMALL,
    "ContinuousCartPole-v0": {
        **_NORMED,
        "learning_rate": 3e-4,
        "gamma": 0.995,
        "reward_scale": 0.1,
    },
    "MountainCarContinuous-v0": {**_NORMED, "noise_correlation": 0.99},
    "Reacher-misc": _SMALL,
    "PointRobot-misc": _SMALL,
}

AGENTS = {
    "sac": AgentDef(
        "sac", "SAC: off-policy actor-critic with maximum entropy", Config(), make, PRESETS
    )
}
