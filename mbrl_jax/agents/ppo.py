"""PPO with clipping, for discrete and continuous actions.

Schulman et al. (2017), "Proximal policy optimization algorithms"; advantages by GAE (Schulman et
al. 2016); the details of Huang et al. (2022), "The 37 implementation details of PPO", as fields
of the config. A truncated episode is continued by the value of its true last observation.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mbrl_jax import loops, prng
from mbrl_jax.agents import AgentDef
from mbrl_jax.data import ring
from mbrl_jax.data.ring import Ring
from mbrl_jax.data.rows import Layout
from mbrl_jax.nn import normaliser
from mbrl_jax.nn.distributions import (
    categorical,
    diagonal_normal,
    masked_logits,
    sample_categorical,
)
from mbrl_jax.nn.networks import PolicyNetwork, ValueNetwork
from mbrl_jax.nn.normaliser import Stats
from mbrl_jax.nn.optimiser import adam
from mbrl_jax.nn.returns import discounted_returns, gae
from mbrl_jax.nn.schedules import linear
from mbrl_jax.types import (
    Agent,
    EnvSpec,
    InputError,
    Metrics,
    Mode,
    PyTree,
    Scalar,
    Schedule,
    Step,
    Transition,
    config,
    env_steps,
    num_rows,
    ranged,
)


@config
class Config:
    """Fields annotated float may be vmapped and never recompile."""

    # widths of the hidden layers of the actor and of the critic
    hidden: tuple[int, ...] = (64, 64)
    # of the hidden layers
    activation: Literal["relu", "tanh", "swish", "elu", "gelu"] = "tanh"
    # Adam's step size and epsilon, and the global norm to which the gradient of the actor and that
    # of the critic are clipped, each by itself: they share no weights, and the critic's would rule
    learning_rate: float = ranged("(0, inf)", default=3e-4)
    adam_eps: float = ranged("(0, inf)", default=1e-5)
    max_grad_norm: float = ranged("(0, inf)", default=0.5)
    # environment steps over which the step size falls linearly to zero; 0 keeps it constant
    anneal_steps: float = ranged("[0, inf)", default=0.0)
    # environments side by side, and steps of each between two updates
    num_envs: int = ranged("[1, inf)", default=16)
    num_steps: int = ranged("[1, inf)", default=128)
    # passes over the data of an update, and parts into which each pass is shuffled
    epochs: int = ranged("[1, inf)", default=4)
    minibatches: int = ranged("[1, inf)", default=4)
    # discount factor, and lambda of the advantages
    gamma: float = ranged("[0, 1]", default=0.99)
    gae_lambda: float = ranged("[0, 1]", default=0.95)
    # how far the probability ratio may move before its gradient stops
    clip_eps: float = ranged("(0, inf)", default=0.2)
    # the same clip around the old values in the critic's loss
    value_clip: bool = True
    # weights of the critic's loss and of the entropy bonus
    value_coef: float = ranged("[0, inf)", default=0.5)
    entropy_coef: float = ranged("[0, inf)", default=0.0)
    # zero mean and unit variance of the advantages in each minibatch
    normalise_advantage: bool = True
    # running normalisation of observations, and of rewards by the spread of discounted returns
    normalise_obs: bool = False
    normalise_reward: bool = False


class Record(NamedTuple):
    """One step of a rollout."""

    step: Transition  # its action, where continuous, in [-1, 1] or beyond it: before the clip
    log_prob: jax.Array


class Sample(NamedTuple):
    """What the loss needs of one step."""

    obs: jax.Array  # normalised
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    advantage: jax.Array
    target: jax.Array


class Params(NamedTuple):
    actor: PyTree
    critic: PyTree


class State(NamedTuple):
    params: Params
    opt: Params  # the optimiser's state of each part
    rollout: PyTree
    obs_stats: Stats | None
    return_stats: Stats | None
    returns: PyTree  # [N] discounted, running; None without normalised rewards


def policy_loss(
    log_prob: jax.Array, old_log_prob: jax.Array, advantage: jax.Array, clip_eps: Scalar
) -> jax.Array:
    """The clipped surrogate objective, negated; Schulman et al. (2017), (7); over [B]."""
    ratio = jnp.exp(log_prob - old_log_prob)
    clipped = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps)
    return -jnp.mean(jnp.minimum(ratio * advantage, clipped * advantage))


def value_loss(
    value: jax.Array, old_value: jax.Array, target: jax.Array, clip_eps: Scalar | None
) -> jax.Array:
    """Half the mean squared error over [B]; with `clip_eps` the worse of it and that of the
    value kept within `clip_eps` of the old one."""
    error = jnp.square(value - target)
    if clip_eps is not None:
        near = old_value + jnp.clip(value - old_value, -clip_eps, clip_eps)
        error = jnp.maximum(error, jnp.square(near - target))
    return 0.5 * jnp.mean(error)


def random_log_prob(spec: EnvSpec, obs: PyTree) -> jax.Array:
    """The log-probability of what `EnvSpec.random_actions` draws for `obs` [N, ...]: [N] float32.

    Of continuous actions it is the density of the action in [-1, 1], as `Record` keeps it.
    """
    legal = spec.legal(obs)
    if legal is None:
        choices = spec.num_actions or 2.0 ** spec.action_shape[0]
        return jnp.full(num_rows(obs), -math.log(choices))
    return -jnp.log(jnp.maximum(jnp.sum(legal, axis=-1), 1).astype(jnp.float32))


def rollout_buffer(cfg: Config, spec: EnvSpec) -> Ring:
    """A ring of `Record`s that one rollout fills."""
    step = Transition.example(spec)
    example = Record(step, step.reward)  # shapes and dtypes
    return ring.make(example, cfg.num_envs * cfg.num_steps, cfg.num_envs)


def optimiser(cfg: Config, steps: Scalar) -> optax.GradientTransformation:
    """Adam with the step size that holds after `steps` environment steps."""
    rate = linear(cfg.learning_rate, 0.0, cfg.anneal_steps, steps)
    return adam(rate, eps=cfg.adam_eps, max_grad_norm=cfg.max_grad_norm)


def policy(cfg: Config, spec: EnvSpec, actor: PyTree, obs: PyTree):
    """The distribution of actions of the parameters `actor` at `obs` [B, ...], normalised."""
    out = PolicyNetwork(spec, cfg.hidden, cfg.activation).apply(actor, obs)
    if not spec.discrete:
        return diagonal_normal(*out)
    legal = spec.legal(obs)
    return categorical(out if legal is None else masked_logits(out, legal))


def values(cfg: Config, spec: EnvSpec, critic: PyTree, obs: PyTree) -> jax.Array:
    """The values [B] of the parameters `critic` at `obs` [B, ...], normalised."""
    return ValueNetwork(spec, cfg.hidden, cfg.activation).apply(critic, obs)


def normalised(state: State, obs: PyTree) -> PyTree:
    """`obs` as the networks see it."""
    return obs if state.obs_stats is None else normaliser.normalise(state.obs_stats, obs)


def init(cfg: Config, spec: EnvSpec, key: jax.Array) -> State:
    """`Agent.init`."""
    keys = jax.random.split(key)
    obs = spec.zero_obs(1)
    if cfg.normalise_obs:
        obs = obs.astype(jnp.float32)
    actor, critic = (net(spec, cfg.hidden, cfg.activation) for net in (PolicyNetwork, ValueNetwork))
    params = Params(actor.init(keys[0], obs), critic.init(keys[1], obs))
    return State(
        params=params,
        opt=Params(*map(optimiser(cfg, 0).init, params)),
        rollout=rollout_buffer(cfg, spec).init(),
        obs_stats=normaliser.init(spec.obs_shape) if cfg.normalise_obs else None,
        return_stats=normaliser.init(()) if cfg.normalise_reward else None,
        returns=jnp.zeros(cfg.num_envs, jnp.float32) if cfg.normalise_reward else None,
    )


def act(
    cfg: Config, spec: EnvSpec, state: State, memory, obs, is_first, key, t: jax.Array, mode: Mode
):
    """`Agent.act`; the extras are the actions' log-probabilities [N]."""
    if mode == "random":
        return spec.random_actions(key, obs), memory, random_log_prob(spec, obs)
    distribution = policy(cfg, spec, state.params.actor, normalised(state, obs))
    if mode == "eval":
        action = distribution.mode()
    elif spec.discrete:
        draws = prng.uniform(key, num_rows(obs), fused=64)
        action = sample_categorical(distribution.logits, draws)
    else:
        noise = jax.random.normal(key, (num_rows(obs), *spec.action_shape), jnp.float32)
        action = distribution.loc + distribution.scale_diag * noise
    log_prob = distribution.log_prob(action)
    if spec.discrete:
        return action.astype(jnp.int32), memory, log_prob
    return spec.from_unit(action), memory, log_prob


def observe(cfg: Config, spec: EnvSpec, state: State, step: Step, extras, t: jax.Array) -> State:
    """`Agent.observe`."""
    action = step.action if spec.discrete else spec.to_unit(step.action)
    record = Record(Transition.of(step)._replace(action=action), extras)
    return state._replace(rollout=rollout_buffer(cfg, spec).add(state.rollout, record, t))


def make_samples(cfg: Config, spec: EnvSpec, state: State, record: Record) -> Sample:
    """Values, advantages and targets of a rollout's rows [T * N, ...], the steps first."""
    step = record.step
    obs, next_obs = normalised(state, step.obs), normalised(state, step.next_obs)
    value = values(cfg, spec, state.params.critic, obs)
    next_value = values(cfg, spec, state.params.critic, next_obs)
    reward = step.reward
    if state.return_stats is not None:
        reward = reward / jnp.sqrt(state.return_stats.var + 1e-8)

    shape = (cfg.num_steps, cfg.num_envs)
    advantage = gae(
        reward.reshape(shape),
        value.reshape(shape),
        next_value.reshape(shape),
        step.terminated.reshape(shape),
        step.truncated.reshape(shape),
        cfg.gamma,
        cfg.gae_lambda,
    ).reshape(-1)
    return Sample(obs, step.action, record.log_prob, value, advantage, advantage + value)


def move_statistics(cfg: Config, state: State, step: Transition) -> State:
    """The running statistics after a rollout's steps [T * N, ...].

    It comes after the targets, so that these and the log-probabilities belong together.
    """
    if state.obs_stats is not None:
        state = state._replace(obs_stats=normaliser.update(state.obs_stats, step.obs))
    if state.return_stats is not None:
        shape = (cfg.num_steps, cfg.num_envs)
        done = (step.terminated | step.truncated).reshape(shape)
        reward = step.reward.reshape(shape)
        last, returns = discounted_returns(reward, done, state.returns, cfg.gamma)
        stats = normaliser.update(state.return_stats, returns.reshape(-1))
        state = state._replace(return_stats=stats, returns=last)
    return state


def total_loss(
    cfg: Config, spec: EnvSpec, params: Params, sample: Sample
) -> tuple[jax.Array, Metrics]:
    """The weighted sum of the losses of a minibatch [B, ...], and the metrics."""
    distribution = policy(cfg, spec, params.actor, sample.obs)
    log_prob = distribution.log_prob(sample.action)
    entropy = jnp.mean(distribution.entropy())
    advantage = sample.advantage
    if cfg.normalise_advantage:
        advantage = (advantage - jnp.mean(advantage)) / (jnp.std(advantage) + 1e-8)
    actor_loss = policy_loss(log_prob, sample.log_prob, advantage, cfg.clip_eps)
    value = values(cfg, spec, params.critic, sample.obs)
    clip = cfg.clip_eps if cfg.value_clip else None
    critic_loss = value_loss(value, sample.value, sample.target, clip)
    total = actor_loss + cfg.value_coef * critic_loss - cfg.entropy_coef * entropy
    log_ratio = log_prob - sample.log_prob
    metrics = {
        "policy_loss": actor_loss,
        "value_loss": critic_loss,
        "entropy": entropy,
        # Schulman's low-variance estimator of the divergence from the old policy
        "kl": jnp.mean(jnp.expm1(log_ratio) - log_ratio),
        "clipped": jnp.mean((jnp.abs(jnp.expm1(log_ratio)) > cfg.clip_eps) * 1.0),
    }
    return total, metrics


def update(
    cfg: Config, spec: EnvSpec, state: State, key: jax.Array, t: jax.Array, n: jax.Array
) -> tuple[State, Metrics]:
    """`Agent.update`: `cfg.epochs` passes over the rollout, a gradient step for each minibatch."""
    record = rollout_buffer(cfg, spec).all(state.rollout)
    samples = make_samples(cfg, spec, state, record)
    state = move_statistics(cfg, state, record.step)
    layout = Layout.of(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), samples))
    rows = layout.pack(samples)
    batch = cfg.num_envs * cfg.num_steps
    order = prng.shuffles(key, cfg.epochs, batch).reshape(cfg.epochs * cfg.minibatches, -1)
    # at the step where the rollout began
    optimise = optimiser(cfg, env_steps(t + 1 - cfg.num_steps, cfg.num_envs))

    def gradient_step(carry: tuple[Params, Params], index: jax.Array):
        params, opt = carry
        chosen = layout.unpack({
            name: matrix.at[index].get(mode="promise_in_bounds")
            for name, matrix in rows.items()
        })  # fmt: skip
        loss = partial(total_loss, cfg, spec)
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, chosen)
        moved = map(optimise.update, grads, opt, params)
        moves, opt = (Params(*parts) for parts in zip(*moved, strict=True))
        return (jax.tree.map(jnp.add, params, moves), opt), metrics

    (params, opt), metrics = loops.scan(gradient_step, (state.params, state.opt), order)
    return state._replace(params=params, opt=opt), jax.tree.map(jnp.mean, metrics)


def make(config: Config, spec: EnvSpec) -> Agent:
    """The agent of one environment.

    Raises:
      InputError: a rollout that does not divide into the minibatches; minibatches of one step whose
        advantages should be normalised, which makes them 0; observations that cannot be normalised;
        unbounded continuous actions; several players.
    """
    cfg = config
    spec.check_usable("PPO", dicts=True, reserved=("action_mask",))
    batch = cfg.num_envs * cfg.num_steps
    if batch % cfg.minibatches:
        raise InputError(
            f"minibatches = {cfg.minibatches}: expected a divisor of num_envs * num_steps = {batch}"
        )
    if cfg.normalise_advantage and batch == cfg.minibatches:
        raise InputError(
            f"minibatches = {cfg.minibatches}: expected at most {batch // 2}, since the advantage "
            "of a single step is normalised to 0; or set normalise_advantage = False"
        )
    if cfg.normalise_obs and (spec.num_obs is not None or spec.obs_parts):
        kind = "a dict of observations" if spec.obs_parts else "integer observations"
        raise InputError(f"normalise_obs = True: {spec.id} has {kind}; leave it out")
    spec.check_bounded("PPO")
    return Agent(
        init=partial(init, cfg, spec),
        init_memory=lambda num_envs: (),
        act=partial(act, cfg, spec),
        observe=partial(observe, cfg, spec),
        update=partial(update, cfg, spec),
        schedule=Schedule(cfg.num_envs, 0, cfg.num_steps),
    )


_SMALL = {"learning_rate": 1e-3, "num_steps": 64, "anneal_steps": 500_000.0}
_CONTINUOUS = {
    "learning_rate": 1e-3,
    "anneal_steps": 500_000.0,
    "num_envs": 32,
    "epochs": 10,
    "minibatches": 8,
    "normalise_obs": True,
    "normalise_reward": True,
}
_MINATAR = {
    "hidden": (64,),
    "activation": "relu",
    "learning_rate": 5e-3,
    "anneal_steps": 10_000_000.0,
    "num_envs": 64,
    "minibatches": 8,
    "entropy_coef": 0.01,
}
PRESETS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {**_SMALL, "anneal_steps": 200_000.0},
    "Acrobot-v1": {**_SMALL, "entropy_coef": 0.01},
    "MountainCar-v0": {**_SMALL, "entropy_coef": 0.01, "normalise_obs": True},
    "Catch-bsuite": {**_SMALL, "entropy_coef": 0.01},
    "DeepSea-bsuite": {**_SMALL, "entropy_coef": 0.05},
    "Asterix-MinAtar": _MINATAR,
    "Breakout-MinAtar": _MINATAR,
    "Freeway-MinAtar": _MINATAR,
    "Seaquest-MinAtar": _MINATAR,
    "SpaceInvaders-MinAtar": _MINATAR,
    "Pendulum-v1": {**_CONTINUOUS, "gamma": 0.9},
    "MountainCarContinuous-v0": _CONTINUOUS
    | {"num_envs": 16, "num_steps": 256, "entropy_coef": 0.01},
    "ContinuousCartPole-v0": _CONTINUOUS,
    "Reacher-misc": _CONTINUOUS,
    "PointRobot-misc": _CONTINUOUS,
}

AGENTS = {"ppo": AgentDef("ppo", "PPO: clipped on-policy actor-critic", Config(), make, PRESETS)}
