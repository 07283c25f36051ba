"""DQN and the parts of Rainbow that are not about distributions, each a switch.

DQN: Mnih et al. (2015). Double Q-learning: van Hasselt et al. (2016). Duelling heads: Wang et al.
(2016). Prioritised replay: Schaul et al. (2016). n-step returns and the defaults of all of these:
Hessel et al. (2018), "Rainbow".
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen

from mbrl_jax import loops, prng
from mbrl_jax.agents import AgentDef
from mbrl_jax.data import prioritised, ring, windows
from mbrl_jax.data.ring import Ring
from mbrl_jax.data.windows import Windows
from mbrl_jax.nn.networks import MLP, Torso, polyak
from mbrl_jax.nn.optimiser import adam
from mbrl_jax.nn.schedules import linear
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
    env_steps,
    nth_legal,
    num_rows,
    ranged,
)

_LEAST_PRIORITY = 1e-6  # added to errors, so that no transition is lost for ever


@config
class Config:
    """Fields annotated float may be vmapped and never recompile."""

    # widths of the hidden layers; with duelling heads each head has a last one of its own
    hidden: tuple[int, ...] = (128, 128)
    # of the hidden layers
    activation: Literal["relu", "tanh", "swish", "elu", "gelu"] = "relu"
    # Adam's step size and epsilon, and the global norm to which gradients are clipped
    learning_rate: float = ranged("(0, inf)", default=6.25e-5)
    adam_eps: float = ranged("(0, inf)", default=1.5e-4)
    max_grad_norm: float = ranged("(0, inf)", default=10.0)
    # discount factor
    gamma: float = ranged("[0, 1]", default=0.99)
    # environments side by side
    num_envs: int = ranged("[1, inf)", default=1)
    # environment steps that the replay holds
    buffer_size: int = ranged("[1, inf)", default=100_000)
    # environment steps of random actions before the first update
    warmup_steps: int = ranged("[1, inf)", default=5_000)
    # transitions of a gradient step
    batch_size: int = ranged("[1, inf)", default=32)
    # steps of every environment between two rounds of updates, and gradient steps of a round
    steps_per_update: int = ranged("[1, inf)", default=4)
    updates: int = ranged("[1, inf)", default=1)
    # gradient steps between two moves of the target network, and how far it moves (1 copies)
    target_period: int = ranged("[1, inf)", default=2_000)
    tau: float = ranged("(0, 1]", default=1.0)
    # probability of a random action, moving linearly to epsilon_final over epsilon_steps
    # environment steps, the warm-up included
    epsilon: float = ranged("[0, 1]", default=1.0)
    epsilon_final: float = ranged("[0, 1]", default=0.01)
    epsilon_steps: float = ranged("[0, inf)", default=62_500.0)
    # the online network chooses the action that the target network values
    double: bool = True
    # a head for the value and one for the advantages
    duelling: bool = True
    # rewards summed before the bootstrap
    n_step: int = ranged("[1, inf)", default=3)
    # sampling in proportion to the error to the power of priority_exponent
    prioritised: bool = True
    priority_exponent: float = ranged("[0, inf)", default=0.5)
    # exponent of the importance weights, moving linearly to 1 over importance_steps
    importance_exponent: float = ranged("[0, 1]", default=0.4)
    importance_steps: float = ranged("[0, inf)", default=1_000_000.0)
    # of the error: Huber's with threshold 1, or half the square
    loss: Literal["huber", "square"] = "huber"


class State(NamedTuple):
    params: PyTree
    target: PyTree
    opt: PyTree
    replay: PyTree
    priorities: PyTree  # Priorities; None without prioritised replay


class QNetwork(linen.Module):
    """Observations [B, ...], one array or a dict, to action values [B, A]."""

    spec: EnvSpec
    hidden: tuple[int, ...]
    activation: str
    duelling: bool

    @linen.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        x = Torso(self.spec)(obs)
        num_actions = self.spec.num_actions
        if not self.duelling:
            return MLP(self.hidden, num_actions, self.activation)(x)
        x = MLP(self.hidden[:-1], None, self.activation)(x)
        value = MLP(self.hidden[-1:], 1, self.activation)(x)
        advantage = MLP(self.hidden[-1:], num_actions, self.activation)(x)
        return value + advantage - jnp.mean(advantage, axis=-1, keepdims=True)


def greedy_actions(q: jax.Array, legal: jax.Array | None = None) -> jax.Array:
    """The legal action of the greatest value in `q` [B, A], the first among equals: [B] int32.

    `legal` [B, A] bool; None for all. Where none is legal it is action 0.
    """
    if legal is not None:
        q = jnp.where(legal, q, -jnp.inf)
    return jnp.argmax(q, axis=-1).astype(jnp.int32)


def values_of(q: jax.Array, action: jax.Array) -> jax.Array:
    """The entries of `q` [B, A] at the columns `action` [B] int32: [B].

    A sum of one term, since the gradient of a gather is a scatter: two more kernels.
    """
    chosen = jnp.arange(q.shape[-1], dtype=action.dtype)[None] == action[:, None]
    return jnp.sum(jnp.where(chosen, q, 0.0), axis=-1)


def q_target(
    reward: jax.Array,
    discount: jax.Array,
    next_q: jax.Array,
    next_q_choice: jax.Array,
    legal: jax.Array | None = None,
) -> jax.Array:
    """The target r + discount Q(s', argmax_a Q_choice(s', a)), [B].

    Args:
      reward: [B], the sum of n discounted rewards.
      discount: [B], gamma^n (1 - terminated).
      next_q: [B, A], the target network's.
      next_q_choice: [B, A], the online network's for double Q-learning (van Hasselt et al. 2016,
        (4)), the target network's for plain DQN.
      legal: [B, A] bool, the actions among which the argmax is taken; None for all.
    """
    return reward + discount * values_of(next_q, greedy_actions(next_q_choice, legal))


def q_loss(
    q: jax.Array, action: jax.Array, target: jax.Array, weight: Scalar, kind: str
) -> tuple[jax.Array, jax.Array]:
    """(mean of `weight` [B] times the loss, errors [B]) of `q` [B, A] at `action` [B]."""
    error = values_of(q, action) - target
    each = optax.huber_loss(error) if kind == "huber" else 0.5 * jnp.square(error)
    return jnp.mean(weight * each), error


def network(cfg: Config, spec: EnvSpec) -> QNetwork:
    return QNetwork(spec, cfg.hidden, cfg.activation, cfg.duelling)


def optimiser(cfg: Config) -> optax.GradientTransformation:
    return adam(cfg.learning_rate, eps=cfg.adam_eps, max_grad_norm=cfg.max_grad_norm)


def replay(cfg: Config, spec: EnvSpec) -> Ring:
    return ring.make(Transition.example(spec), cfg.buffer_size, cfg.num_envs)


def queue(cfg: Config, spec: EnvSpec) -> Windows:
    """The priorities of the n-step windows in the replay."""
    return windows.make(replay(cfg, spec), cfg.n_step)


def epsilon(cfg: Config, t: jax.Array) -> Scalar:
    """The chance of a random action at the batched step `t` ([] int32): [] float32."""
    steps = env_steps(t, cfg.num_envs)
    return linear(cfg.epsilon, cfg.epsilon_final, cfg.epsilon_steps, steps)


def init(cfg: Config, spec: EnvSpec, key: jax.Array) -> State:
    """`Agent.init`."""
    params = network(cfg, spec).init(key, spec.zero_obs(1))
    return State(
        params=params,
        # a copy, since the state is donated and two of its leaves must not be one buffer
        target=jax.tree.map(jnp.copy, params),
        opt=optimiser(cfg).init(params),
        replay=replay(cfg, spec).init(),
        priorities=queue(cfg, spec).init() if cfg.prioritised else None,
    )


def act(
    cfg: Config, spec: EnvSpec, state: State, memory, obs, is_first, key, t: jax.Array, mode: Mode
):
    """`Agent.act`: epsilon-greedy in mode "train", greedy in "eval"."""
    if mode == "random":
        return spec.random_actions(key, obs), memory, ()
    legal = spec.legal(obs)
    action = greedy_actions(network(cfg, spec).apply(state.params, obs), legal)
    if mode == "train":
        coin, pick = prng.uniform(key, 2 * num_rows(obs), fused=64).reshape(2, -1)
        if legal is None:
            anything = (pick * spec.num_actions).astype(jnp.int32)
        else:
            anything = nth_legal(legal, (pick * jnp.sum(legal, axis=-1)).astype(jnp.int32))
        action = jnp.where(coin < epsilon(cfg, t), anything, action)
    return action, memory, ()


def observe(cfg: Config, spec: EnvSpec, state: State, step: Step, extras, t: jax.Array) -> State:
    """`Agent.observe`."""
    rows = replay(cfg, spec).add(state.replay, Transition.of(step), t)
    state = state._replace(replay=rows)
    if not cfg.prioritised:
        return state
    return state._replace(priorities=queue(cfg, spec).add(state.priorities, t))


def gradient_step(
    cfg: Config, spec: EnvSpec, state: State, batch: NStep, weight: Scalar, number: jax.Array
) -> tuple[State, jax.Array, Metrics]:
    """One gradient step, and the move of the target network where it is due.

    Args:
      cfg: the settings.
      spec: of the environment.
      state: before the step; its replay is not read.
      batch: [B, ...], with `discount` gamma^n (1 - terminated).
      weight: [B] float32, importance weights of the loss; or one number.
      number: [] int32, the gradient steps so far, never vmapped.

    Returns:
      The state, the errors [B] float32, and the metrics `loss` and `q`.
    """
    net = network(cfg, spec)
    next_q = net.apply(state.target, batch.next_obs)
    choice = net.apply(state.params, batch.next_obs) if cfg.double else next_q
    legal = spec.legal(batch.next_obs)
    target = q_target(batch.reward, batch.discount, next_q, choice, legal)

    def loss(params: PyTree):
        q = net.apply(params, batch.obs)
        value, error = q_loss(q, batch.action, target, weight, cfg.loss)
        return value, (error, jnp.mean(q))

    (value, (error, q)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    move, opt = optimiser(cfg).update(grads, state.opt, state.params)
    params = jax.tree.map(jnp.add, state.params, move)
    if cfg.target_period == 1:
        moved = polyak(params, state.target, cfg.tau)
    else:
        due = number % cfg.target_period == cfg.target_period - 1
        moved = loops.cond(
            due, lambda new, old: polyak(new, old, cfg.tau), lambda new, old: old,
            params, state.target,
        )  # fmt: skip
    state = state._replace(params=params, target=moved, opt=opt)
    return state, error, {"loss": value, "q": q}


def prioritised_step(
    cfg: Config, spec: EnvSpec, state: State, key: jax.Array, steps: jax.Array, number: jax.Array
) -> tuple[State, Metrics]:
    """A gradient step on rows drawn by priority, which then take the priority of their errors.

    Args:
      cfg, spec, state, number: as in `gradient_step`.
      key: of the draw.
      steps: [] float32, environment steps so far.
    """
    index, probability = queue(cfg, spec).sample(state.priorities, key, cfg.batch_size)
    batch = replay(cfg, spec).n_step(state.replay, index, cfg.n_step, cfg.gamma)
    beta = linear(cfg.importance_exponent, 1.0, cfg.importance_steps, steps)
    count = jnp.minimum(steps, cfg.buffer_size)
    weight = prioritised.importance_weights(probability, count, beta)
    state, error, metrics = gradient_step(cfg, spec, state, batch, weight, number)
    value = (jnp.abs(error) + _LEAST_PRIORITY) ** cfg.priority_exponent
    # only open windows are drawn, so there is none to keep closed
    priorities = queue(cfg, spec).tree.set(state.priorities, index, value)
    return state._replace(priorities=priorities), metrics


def update(
    cfg: Config, spec: EnvSpec, state: State, key: jax.Array, t: jax.Array, n: jax.Array
) -> tuple[State, Metrics]:
    """`Agent.update`: `cfg.updates` gradient steps."""
    numbers = n * cfg.updates + jnp.arange(cfg.updates, dtype=jnp.int32)

    def uniform(state: State, x):
        number, batch = x
        state, _, metrics = gradient_step(cfg, spec, state, batch, 1.0, number)
        return state, metrics

    def by_priority(state: State, x):
        number, key = x
        steps = env_steps(t + 1, cfg.num_envs)
        return prioritised_step(cfg, spec, state, key, steps, number)

    if cfg.prioritised:
        keys = prng.split(key, cfg.updates)
        state, metrics = loops.scan(by_priority, state, (numbers, keys))
    else:
        buffer = replay(cfg, spec)
        index = buffer.sample_index(key, cfg.updates * cfg.batch_size, t + 1, cfg.n_step)
        index = index.reshape(cfg.updates, cfg.batch_size)
        batches = buffer.n_step(state.replay, index, cfg.n_step, cfg.gamma)
        state, metrics = loops.scan(uniform, state, (numbers, batches))
    return state, {**jax.tree.map(jnp.mean, metrics), "epsilon": epsilon(cfg, t + 1)}


def make(config: Config, spec: EnvSpec) -> Agent:
    """The agent of one environment with discrete actions.

    Raises:
      InputError: continuous actions; several players; a batch or an n-step window larger than the
        replay; a warm-up that does not fill a window; a replay that does not divide by the
        environments.
    """
    cfg = config
    spec.check_usable("DQN", dicts=True, reserved=("action_mask",))
    if spec.num_actions is None:
        raise InputError(
            f"DQN needs discrete actions; {spec.id} has continuous ones; take sac or ppo"
        )
    if cfg.duelling and not cfg.hidden:
        raise InputError("hidden = (): expected a width, or duelling = False")
    if cfg.batch_size > cfg.buffer_size:
        raise InputError(
            f"batch_size = {cfg.batch_size}: expected at most buffer_size = {cfg.buffer_size}"
        )
    window = cfg.n_step * cfg.num_envs
    for name, value in (("buffer_size", cfg.buffer_size), ("warmup_steps", cfg.warmup_steps)):
        if value < window:
            raise InputError(f"{name} = {value}: expected at least n_step * num_envs = {window}")
    replay(cfg, spec)  # refuses what does not divide
    return Agent(
        init=partial(init, cfg, spec),
        init_memory=lambda num_envs: (),
        act=partial(act, cfg, spec),
        observe=partial(observe, cfg, spec),
        update=partial(update, cfg, spec),
        schedule=Schedule(cfg.num_envs, cfg.warmup_steps, cfg.steps_per_update),
    )


_SMALL = {
    "hidden": (64, 64),
    "learning_rate": 5e-4,
    "adam_eps": 1e-8,
    "batch_size": 64,
    "warmup_steps": 1_000,
    "steps_per_update": 1,
    "target_period": 200,
    "epsilon_steps": 10_000.0,
    "importance_steps": 100_000.0,
}
# replay, batch and target period of Young and Tian (2019)
_MINATAR = {
    "hidden": (128,),
    "learning_rate": 2.5e-4,
    "target_period": 1_000,
    "epsilon_steps": 100_000.0,
}
PRESETS = {
    # a target that copies at once lets the returns fall again late in the run
    "CartPole-v1": {**_SMALL, "target_period": 1, "tau": 0.01},
    "Acrobot-v1": _SMALL,
    "MountainCar-v0": {**_SMALL, "epsilon_steps": 50_000.0},
    "Catch-bsuite": {**_SMALL, "target_period": 100, "epsilon_steps": 5_000.0},
    "DeepSea-bsuite": {**_SMALL, "target_period": 100, "epsilon_steps": 50_000.0},
    "Asterix-MinAtar": _MINATAR,
    "Breakout-MinAtar": _MINATAR,
    "Freeway-MinAtar": _MINATAR,
    "Seaquest-MinAtar": _MINATAR,
    "SpaceInvaders-MinAtar": _MINATAR,
}

AGENTS = {
    "dqn": AgentDef("dqn", "DQN with the parts of Rainbow as switches", Config(), make, PRESETS)
}
