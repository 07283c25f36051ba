"""MuZero: three learned functions, searched to act and to make the targets they are trained on.

Schrittwieser et al. (2020), "Mastering Atari, Go, chess and shogi by planning with a learned
model", with Gumbel MuZero's search by default (Danihelka et al. 2022) and reanalysis in every
update (Schrittwieser et al. 2021, "Online and offline reinforcement learning by planning with a
learned model"). Switches: the paper's PUCT; n-step or lambda returns, or search values (Wang et al.
2024, "EfficientZero V2"); consistency loss and value prefix (Ye et al. 2021, "EfficientZero");
search among sampled actions (Hubert et al. 2021); chance nodes (Antonoglou et al. 2022);
prioritised replay; games of two players.

The networks are in `models.muzero_net`; beside this file `muzero_config` holds the settings,
`muzero_search` the searches, `muzero_targets` what is learned and `muzero_losses` how.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mbrl_jax import loops, prng
from mbrl_jax.agents import AgentDef
from mbrl_jax.agents import muzero_losses as losses
from mbrl_jax.agents import muzero_search as searches
from mbrl_jax.agents import muzero_targets as targets
from mbrl_jax.agents.muzero_config import (
    Config,
    check,
    net_of,
    num_fresh,
    schedule,
    support,
    window_length,
)
from mbrl_jax.agents.muzero_presets import PLAIN, PRESETS
from mbrl_jax.agents.muzero_search import Advice
from mbrl_jax.agents.muzero_targets import Record, Targets
from mbrl_jax.data import prioritised, sequence, windows
from mbrl_jax.data.sequence import Sequence
from mbrl_jax.data.windows import Windows
from mbrl_jax.models import muzero_net
from mbrl_jax.nn.optimiser import adam
from mbrl_jax.nn.schedules import linear
from mbrl_jax.types import (
    Agent,
    EnvSpec,
    Metrics,
    Mode,
    PyTree,
    Scalar,
    Step,
    env_steps,
)

_LEAST_PRIORITY = 1e-6  # added to errors, so that no sequence is lost for ever


class State(NamedTuple):
    params: PyTree
    target: PyTree  # parameters as they were at the last copy
    opt: PyTree
    replay: PyTree
    priorities: PyTree  # Priorities; None without prioritised replay


def optimiser(cfg: Config, number: Scalar) -> optax.GradientTransformation:
    """AdamW as it is at the gradient step `number`, [] from 0."""
    rate = linear(cfg.learning_rate, cfg.learning_rate_final, cfg.decay_updates, number)
    return adam(rate, weight_decay=cfg.weight_decay, max_grad_norm=cfg.max_grad_norm)


def temperature(cfg: Config, t: jax.Array) -> Scalar:
    """The temperature of actions at the batched step `t` ([] int32): [] float32."""
    steps = env_steps(t, cfg.num_envs)
    return linear(cfg.temperature, cfg.temperature_final, cfg.temperature_steps, steps)


def replay(cfg: Config, spec: EnvSpec) -> Sequence:
    """A replay of `Record`s, read in windows.

    Raises:
      InputError: a size that the environments do not divide.
    """

    def struct(dtype: str, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    flag, number = struct("bool"), struct("float32")
    if spec.num_actions is not None:
        action, weights, candidates = struct("int32"), struct("float32", spec.num_actions), ()
    else:
        num, size = cfg.num_candidates, spec.action_shape
        action, weights = struct("float32", *size), struct("float32", num)
        candidates = struct("float32", num, *size)
    example = Record(
        spec.example_obs(), action, number, flag, flag, flag, weights, candidates, number
    )
    return sequence.make(example, cfg.buffer_size, cfg.num_envs)


def queue(cfg: Config, spec: EnvSpec) -> Windows:
    """The priorities of the windows in the replay."""
    return windows.make(replay(cfg, spec).ring, window_length(cfg))


def init(cfg: Config, spec: EnvSpec, key: jax.Array) -> State:
    """`Agent.init`."""
    params = muzero_net.init(net_of(cfg, spec), key)
    return State(
        params=params,
        # a copy, since the state is donated and two of its leaves must not be one buffer
        target=jax.tree.map(jnp.copy, params),
        opt=optimiser(cfg, 0).init(params),
        replay=replay(cfg, spec).init(),
        priorities=queue(cfg, spec).init() if cfg.prioritised else None,
    )


def init_memory(spec: EnvSpec, num_envs: int) -> jax.Array:
    """`Agent.init_memory`: the actions of the step before, which a random one may repeat."""
    return jnp.zeros((num_envs, *spec.action_shape), "int32" if spec.discrete else "float32")


def act(
    cfg: Config, spec: EnvSpec, state: State, memory, obs, is_first, key, t: jax.Array, mode: Mode
):
    """`Agent.act`: by search; in mode "eval" without noise, and the most visited action."""
    if mode == "random":
        advice = searches.at_random(
            cfg, net_of(cfg, spec), support(cfg, spec), state.params, key, obs, memory, is_first
        )
    else:
        train = mode == "train"
        advice = searches.run(
            cfg, net_of(cfg, spec), support(cfg, spec), state.params, key, obs, noise=train,
            temperature=temperature(cfg, t) if train else 0.0,
        )  # fmt: skip
    unit = advice.action if spec.discrete else jnp.tanh(advice.action)
    action = unit if spec.discrete else spec.from_unit(unit)
    return action, action, advice._replace(action=unit)


def observe(
    cfg: Config, spec: EnvSpec, state: State, step: Step, extras: Advice, t: jax.Array
) -> State:
    """`Agent.observe`."""
    record = Record(
        obs=step.obs, action=extras.action, reward=step.reward, terminated=step.terminated,
        truncated=step.truncated, is_last=step.is_last, weights=extras.weights,
        candidates=extras.candidates, value=extras.value,
    )  # fmt: skip
    state = state._replace(replay=replay(cfg, spec).add(state.replay, record, t))
    if not cfg.prioritised:
        return state
    return state._replace(priorities=queue(cfg, spec).add(state.priorities, t))


def later_values(cfg: Config, spec: EnvSpec, target: PyTree, window: Record) -> jax.Array:
    """The values [B, L - 1] of the states after each step of a window.

    Of the first `reanalyse_values` share of sequences the target network says them, of the others
    the search did when it acted.
    """
    _, num = num_fresh(cfg)
    stored = window.value[num:, 1:]
    if not num:
        return stored
    net = net_of(cfg, spec)
    obs = jax.tree.map(lambda x: x[:num, 1:].reshape(-1, *x.shape[2:]), window.obs)
    prediction = muzero_net.predict(net, target, muzero_net.represent(net, target, obs))
    fresh = muzero_net.expected(prediction.value, support(cfg, spec).value)
    return jnp.concatenate([fresh.reshape(num, -1), stored])


def searched(
    cfg: Config, spec: EnvSpec, params: PyTree, window: Record, key: jax.Array
) -> tuple[jax.Array, PyTree, jax.Array]:
    """Policies, candidates and root values [B, K + 1, ...] of the states of an unroll.

    Those of the first `reanalyse_policies` share of sequences come from a fresh search with
    `params`, the others' from the search that acted.
    """
    (num, _), states = num_fresh(cfg), cfg.unroll + 1
    kept = window.weights, window.candidates, window.value
    if num < cfg.batch_size:
        stored = jax.tree.map(lambda x: x[num:, :states], kept)
    if not num:
        return stored
    obs = jax.tree.map(lambda x: x[:num, :states].reshape(-1, *x.shape[2:]), window.obs)
    advice = searches.run(
        cfg, net_of(cfg, spec), support(cfg, spec), params, key, obs, noise=cfg.reanalyse_noise
    )
    fresh = jax.tree.map(
        lambda x: x.reshape(num, states, *x.shape[1:]),
        (advice.weights, advice.candidates, advice.value),
    )
    if num == cfg.batch_size:
        return fresh
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), fresh, stored)


def value_targets(
    cfg: Config, spec: EnvSpec, window: Record, later: jax.Array, root: jax.Array, age: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Targets of the values [B, K + 1], and returns [B] that reach as far as the window.

    Args:
      cfg: the settings.
      spec: of the environment.
      window: [B, L, ...].
      later: [B, L - 1] from `later_values`.
      root: [B, K + 1] values that a search found at the states themselves.
      age: [B] float32, environment steps since the windows were made.
    """
    to_play = window.obs["to_play"] if spec.num_players > 1 else None
    discount = targets.discounts(window.terminated[:, :-1], to_play, cfg.gamma)
    given = window.reward[:, :-1], discount, later, window.truncated[:, :-1]
    whole = targets.mean_returns(*given, 1.0)[:, 0]
    if cfg.value_target == "search":
        return root, whole
    if cfg.value_target == "lambda":
        return targets.mean_returns(*given, cfg.lam)[:, : cfg.unroll + 1], whole
    value = targets.n_step_returns(*given, cfg.n_step)
    if cfg.value_target == "mixed":
        value = jnp.where((age <= cfg.mixed_age)[:, None], value, root)
    return value, whole


def make_targets(
    cfg: Config, spec: EnvSpec, state: State, window: Record, age: jax.Array, key: jax.Array
) -> tuple[Targets, Metrics]:
    """All targets of a window [B, L, ...], and what they tell; `age` as in `value_targets`."""
    states, bins = cfg.unroll + 1, support(cfg, spec)
    params = state.target if cfg.reanalyse_with == "target" else state.params
    policy, candidates, root = searched(cfg, spec, params, window, key)
    later = later_values(cfg, spec, state.target, window)
    value, whole = value_targets(cfg, spec, window, later, root, age)
    status = targets.status_of(window.terminated, window.truncated, window.is_last)
    status = jax.tree.map(lambda x: x[:, :states], status)
    made = targets.targets_of(window, status, policy, candidates, value, cfg.prefix_period)
    made = jax.lax.stop_gradient(made)
    clipped = muzero_net.is_clipped(made.value, bins.value)
    reward_clipped = muzero_net.is_clipped(made.reward, bins.reward)
    entropy = -jnp.sum(jax.scipy.special.xlogy(policy, policy), axis=-1)
    return made, {
        "value_clipped": _mean(clipped, made.value_mask),
        "value_largest": jnp.max(jnp.abs(made.value) * made.value_mask),
        "reward_clipped": _mean(reward_clipped, made.step_mask),
        "reward_largest": jnp.max(jnp.abs(made.reward) * made.step_mask),
        "value_target": _mean(made.value, made.value_mask),
        "search_entropy": _mean(entropy, made.policy_mask),
        "root_value_error": _mean(jnp.abs(window.value[:, 0] - whole), made.policy_mask[:, 0]),
        "age": jnp.mean(age),
    }


def learn(
    cfg: Config,
    spec: EnvSpec,
    state: State,
    window: Record,
    made: Targets,
    weight: Scalar,
    key: jax.Array,
    number: jax.Array,
) -> tuple[State, jax.Array, Metrics]:
    """One gradient step, and the copy to the target network where it is due.

    Args:
      cfg: the settings.
      spec: of the environment.
      state: before the step; its replay is not read.
      window: [B, L, ...], the records.
      made: its targets.
      weight: [B] float32, of the sequences; or one number.
      key: of the random actions after an end.
      number: [] int32, the gradient steps so far, never vmapped.

    Returns:
      The state, the errors [B] of the first values, and metrics.
    """
    net, bins = net_of(cfg, spec), support(cfg, spec)
    obs = jax.tree.map(lambda x: x[:, 0], window.obs)
    later = jax.tree.map(lambda x: x[:, 1 : cfg.unroll + 1], window.obs)
    action = padded_actions(spec, window.action[:, : cfg.unroll], made.policy_mask, key)
    coefs = {
        "value": cfg.value_coef, "entropy": -cfg.entropy_coef, "consistency": cfg.consistency_coef,
        "afterstate_value": cfg.value_coef, "commitment": cfg.commitment_coef,
    }  # fmt: skip

    def loss(params: PyTree):
        parts, predictions = losses.unrolled_losses(net, params, bins, obs, action, made, later)
        return losses.total_loss(parts, coefs, weight), (parts, predictions)

    (total, (parts, predictions)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    moves, opt = optimiser(cfg, number).update(grads, state.opt, state.params)
    params = jax.tree.map(jnp.add, state.params, moves)
    due = number % cfg.target_period == cfg.target_period - 1
    target = loops.cond(due, lambda new, old: new, lambda new, old: old, params, state.target)
    first = jax.tree.map(lambda x: x[0], predictions)
    value, running = muzero_net.expected(first.value, bins.value), made.policy_mask[:, 0]
    error = jnp.abs(value - made.value[:, 0]) * running
    names = {"entropy": "policy_entropy"}
    metrics = {names.get(name, f"{name}_loss"): jnp.mean(x) for name, x in parts.items()}
    metrics |= {
        "loss": total,
        "value_error": _mean(error, running),
        "grad_norm": optax.tree.norm(grads),
    }
    if spec.discrete:
        same = jnp.argmax(first.policy, axis=-1) == jnp.argmax(made.policy[:, 0], axis=-1)
        metrics["policy_agreement"] = _mean(same, running)
    return state._replace(params=params, target=target, opt=opt), error, metrics


def padded_actions(
    spec: EnvSpec, action: jax.Array, running: jax.Array, key: jax.Array
) -> jax.Array:
    """Actions [B, K, V] as the dynamics take them, random ones after the end of an episode.

    Args:
      spec: of the environment.
      action: [B, K] int32, or [B, K, D] float32 in [-1, 1].
      running: [B, K + 1] float32, 1 where the episode still runs.
      key: of the draws.
    """
    if spec.num_actions is not None:
        other = jax.random.randint(key, action.shape, 0, spec.num_actions, action.dtype)
    else:
        other = jax.random.uniform(key, action.shape, action.dtype, -1.0, 1.0)
    keeps = running[:, : action.shape[1]].reshape(action.shape[:2] + (1,) * (action.ndim - 2)) > 0
    return muzero_net.action_vector(spec, jnp.where(keeps, action, other))


def update(
    cfg: Config, spec: EnvSpec, state: State, key: jax.Array, t: jax.Array, n: jax.Array
) -> tuple[State, Metrics]:
    """`Agent.update`: `cfg.updates` gradient steps, each on targets that are made for it."""
    buffer, length = replay(cfg, spec), window_length(cfg)

    def one(state: State, i: jax.Array) -> tuple[State, Metrics]:
        draw_key, search_key, action_key = prng.fold_in(key, 3 * i + jnp.arange(3, dtype=jnp.int32))
        weight: Scalar = 1.0
        if cfg.prioritised:
            index, chance = queue(cfg, spec).sample(state.priorities, draw_key, cfg.batch_size)
            count = jnp.minimum(env_steps(t + 1, cfg.num_envs), cfg.buffer_size)
            weight = prioritised.importance_weights(chance, count, cfg.importance_exponent)
        else:
            index = buffer.ring.sample_index(draw_key, cfg.batch_size, t + 1, length)
        window, _ = buffer.read(state.replay, index, length)
        age = env_steps((t - index // cfg.num_envs) % buffer.ring.steps, cfg.num_envs)
        made, about = make_targets(cfg, spec, state, window, age, search_key)
        number = n * cfg.updates + i
        state, error, metrics = learn(cfg, spec, state, window, made, weight, action_key, number)
        if cfg.prioritised:
            value = (error + _LEAST_PRIORITY) ** cfg.priority_exponent
            # only open windows are drawn, so there is none to keep closed
            priorities = queue(cfg, spec).tree.set(state.priorities, index, value)
            state = state._replace(priorities=priorities)
        return state, metrics | about

    state, metrics = loops.scan(one, state, jnp.arange(cfg.updates, dtype=jnp.int32))
    return state, jax.tree.map(jnp.mean, metrics)


def _mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def make(config: Config, spec: EnvSpec) -> Agent:
    """The agent of one environment.

    Raises:
      InputError: observations that no torso fits, more than two players, a search that does not fit
        the actions, windows that replay or warm-up do not hold, an unroll longer than an episode.
    """
    check(config, spec)
    replay(config, spec)  # refuses what does not divide
    net_of(config, spec)  # and what no torso fits
    return Agent(
        init=partial(init, config, spec),
        init_memory=partial(init_memory, spec),
        act=partial(act, config, spec),
        observe=partial(observe, config, spec),
        update=partial(update, config, spec),
        schedule=schedule(config),
    )


AGENTS = {
    "muzero": AgentDef(
        "muzero", "MuZero: Gumbel search in a learned model, reanalysed", Config(), make, PRESETS,
        dynamic_loops=True,
    ),
    "muzero_plain": AgentDef(
        "muzero_plain", "MuZero as first published: PUCT, n-step returns, no reanalysis",
        PLAIN, make, {},
    ),
}  # fmt: skip
