"""Tabular Dyna: Q-learning, Dyna-Q, Dyna-Q+ and prioritised sweeping.

Sutton and Barto, Reinforcement Learning, 2nd edition (2018), Sections 6.5 and 8.2 to 8.4. One
environment step is followed by a direct update (not for prioritised sweeping, which queues the
pair instead) and by `planning_steps` updates from the learned model. Exploration by R-max follows
Brafman and Tennenholtz (2002), by MBIE-EB Strehl and Littman (2008).
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax import prng
from mbrl_jax.agents import AgentDef
from mbrl_jax.models import tabular
from mbrl_jax.models.tabular import Model, Outcome, Transition
from mbrl_jax.nn.schedules import linear
from mbrl_jax.types import (
    Agent,
    EnvSpec,
    InputError,
    Metrics,
    Mode,
    Scalar,
    Schedule,
    Step,
    config,
    ranged,
)


@config
class Config:
    """Fields annotated float may be vmapped and never recompile."""

    # discount factor
    gamma: float = ranged("[0, 1]", default=0.95)
    # probability of a random action, moving linearly to epsilon_final over epsilon_steps
    epsilon: float = ranged("[0, 1]", default=0.1)
    epsilon_final: float = ranged("[0, 1]", default=0.1)
    # environment steps of the epsilon schedule; 0 keeps epsilon constant
    epsilon_steps: float = ranged("[0, inf)", default=0.0)
    # step size alpha, moving linearly to step_size_final over step_size_steps
    step_size: float = ranged("(0, 1]", default=0.1)
    step_size_final: float = ranged("(0, 1]", default=0.1)
    # environment steps of the step-size schedule; 0 keeps the step size constant
    step_size_steps: float = ranged("[0, inf)", default=0.0)
    # initial value of every pair; above the reachable return it is optimistic
    q_init: float = 0.0
    # among equal values: a random one, or the first (which never reaches FrozenLake's goal)
    ties: Literal["random", "first"] = "random"
    # planning updates after each environment step; 0 is plain Q-learning
    planning_steps: int = ranged("[0, inf)", default=5)
    # sequential: one after another, as in the book. batched: all targets from one table, where
    # repeated pairs add up (unsafe with step sizes near 1). sweep: every visited pair, from one
    # table, planning_steps times. prioritised: the largest expected change first
    planning: Literal["sequential", "batched", "sweep", "prioritised"] = "sequential"
    # pairs: uniform over visited pairs. state_action: a visited state, then an action taken there.
    # any_action: a visited state, then any action, untried ones too (Dyna-Q+)
    sampler: Literal["pairs", "state_action", "any_action"] = "pairs"
    # last: the newest outcome of a pair (deterministic worlds). counts: expected updates from
    # counts of all outcomes (stochastic worlds)
    model: Literal["last", "counts"] = "last"
    # recency: kappa * sqrt(time since the last visit) in planning (Dyna-Q+). recency_action: the
    # same in the choice of actions instead (Exercise 8.4). mbie_eb: beta / sqrt(visits) in every
    # update, and a pair never tried is worth reward_max for ever. rmax: so is a pair visited fewer
    # than rmax_visits times
    bonus: Literal["none", "recency", "recency_action", "mbie_eb", "rmax"] = "none"
    # weight of the recency bonus
    kappa: float = ranged("[0, inf)", default=1e-3)
    # weight of the MBIE-EB bonus
    beta: float = ranged("[0, inf)", default=0.1)
    # visits after which R-max trusts a pair
    rmax_visits: int = ranged("[1, inf)", default=1)
    # the largest reward of the world, which R-max and MBIE-EB assume of unknown pairs
    reward_max: float = 1.0
    # priorities below this are not queued (prioritised planning)
    theta: float = ranged("[0, inf)", default=1e-4)


class State(NamedTuple):
    q: jax.Array  # [S*A] float32 action values; pair = state * A + action
    model: Model
    priority: jax.Array | None  # [S*A] float32, the queue; only with prioritised planning
    seen: Transition  # the newest transition


def select_action(
    values: jax.Array, epsilon: Scalar, key: jax.Array, ties: str = "random"
) -> jax.Array:
    """An epsilon-greedy action for `values` [A]; [] int32."""
    coin, pick = prng.uniform(key, 2)
    explore = coin < epsilon
    if ties == "first":
        greedy = jnp.argmax(values).astype(jnp.int32)
        return jnp.where(explore, (pick * values.shape[0]).astype(jnp.int32), greedy)
    return tabular.choose((values == jnp.max(values)) | explore, pick)


def target(cfg: Config, q: jax.Array, num_actions: int, outcome: Outcome) -> jax.Array:
    """What an update moves the value of pairs of any shape towards, given what follows them.

    The bonuses of R-max and MBIE-EB hold here, in direct and planned updates alike.
    """
    plain = tabular.bootstrapped(outcome, q, num_actions, cfg.gamma)
    if cfg.bonus == "mbie_eb":
        bonus = cfg.beta * jax.lax.rsqrt(jnp.maximum(outcome.tries, 1.0))
        return jnp.where(outcome.tries > 0, plain + bonus, optimistic(cfg))
    if cfg.bonus == "rmax":
        return jnp.where(outcome.tries >= cfg.rmax_visits, plain, optimistic(cfg))
    return plain


def optimistic(cfg: Config) -> Scalar:
    """The value of earning the largest reward for ever, r_max / (1 - gamma)."""
    return cfg.reward_max / jnp.maximum(1.0 - cfg.gamma, 1e-6)


def recall_with_bonus(cfg: Config, model: Model, pairs: jax.Array, t: jax.Array) -> Outcome:
    """What the model says of `pairs`; with Dyna-Q+'s bonus, kappa * sqrt(steps since a visit)."""
    outcome = tabular.recall(model, pairs)
    if cfg.bonus != "recency":
        return outcome
    idle = (t - model.visits.last[pairs]).astype(jnp.float32)
    return outcome._replace(reward=outcome.reward + cfg.kappa * jnp.sqrt(idle))


def plan_at_random(
    cfg: Config,
    q: jax.Array,
    model: Model,
    num_actions: int,
    key: jax.Array,
    t: jax.Array,
    alpha: Scalar,
) -> jax.Array:
    """`planning_steps` updates of `q` [S*A] from pairs drawn at random.

    What does not depend on the values is recalled before the first update, so that each of the
    sequential ones is a gather, a maximum and a write.
    """
    pairs = tabular.sample_pairs(model.visits, key, cfg.planning_steps, num_actions, cfg.sampler)
    outcomes = recall_with_bonus(cfg, model, pairs, t)
    if cfg.planning == "batched":
        return q.at[pairs].add(alpha * (target(cfg, q, num_actions, outcomes) - q[pairs]))

    def one(q: jax.Array, x: tuple[jax.Array, Outcome]) -> tuple[jax.Array, None]:
        pair, outcome = x
        old = q.at[pair].get(mode="promise_in_bounds")
        new = old + alpha * (target(cfg, q, num_actions, outcome) - old)
        return q.at[pair].set(new, mode="promise_in_bounds"), None

    return jax.lax.scan(one, q, (pairs, outcomes))[0]


def plan_by_sweeps(
    cfg: Config, q: jax.Array, model: Model, num_actions: int, t: jax.Array, alpha: Scalar
) -> jax.Array:
    """`planning_steps` sweeps, each of which updates every planned pair of `q` from one table."""
    planned = model.visits.counts > 0
    if cfg.sampler == "any_action":
        visited = jnp.any(planned.reshape(-1, num_actions), axis=-1)
        planned = jnp.repeat(visited, num_actions)
    outcomes = recall_with_bonus(cfg, model, jnp.arange(q.shape[0]), t)

    def one(_, q: jax.Array) -> jax.Array:
        return jnp.where(planned, q + alpha * (target(cfg, q, num_actions, outcomes) - q), q)

    return jax.lax.fori_loop(0, cfg.planning_steps, one, q)


def plan_by_priority(
    cfg: Config, q: jax.Array, priority: jax.Array, model: Model, num_actions: int, alpha: Scalar
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prioritised sweeping (Section 8.4): -> (q, priority, number of updates made).

    The queue is a dense table [S*A], so it never overflows; a pair keeps the larger of two
    priorities. Each update costs O(S*A).
    """
    outcomes = tabular.recall(model, jnp.arange(q.shape[0]))

    def one(_, carry):
        q, priority, made = carry
        pair = jnp.argmax(priority)
        due = priority[pair] > cfg.theta
        new = target(cfg, q, num_actions, jax.tree.map(lambda x: x[pair], outcomes))
        q = q.at[pair].add(jnp.where(due, alpha * (new - q[pair]), 0.0))
        priority = jnp.where(jnp.arange(q.shape[0]) == pair, 0.0, priority)
        error = jnp.abs(target(cfg, q, num_actions, outcomes) - q)
        queued = tabular.leads_to(model, pair // num_actions) & (error > cfg.theta) & due
        priority = jnp.where(queued, jnp.maximum(priority, error), priority)
        return q, priority, made + due

    return jax.lax.fori_loop(0, cfg.planning_steps, one, (q, priority, jnp.int32(0)))


def make(config: Config, spec: EnvSpec) -> Agent:
    """The agent of one tabular environment.

    Raises:
      InputError: observations that are not integers with a count, continuous actions, or options
        that exclude each other.
    """
    spec.check_usable("a tabular agent")
    if spec.num_obs is None:
        raise InputError(
            f"a tabular agent needs integer observations with a count; {spec.id} has "
            f"{spec.obs_dtype} observations of shape {spec.obs_shape}"
        )
    if spec.num_actions is None:
        raise InputError(f"a tabular agent needs discrete actions; {spec.id} has continuous ones")
    if config.planning == "prioritised" and config.bonus in ("recency", "recency_action"):
        raise InputError("planning='prioritised' has no recency bonus; use bonus='none'")
    cfg, num_states, num_actions = config, spec.num_obs, spec.num_actions
    learns_model = cfg.planning_steps > 0 or cfg.bonus != "none"

    def init(key: jax.Array) -> State:
        first = optimistic(cfg) if cfg.bonus in ("rmax", "mbie_eb") else cfg.q_init
        pairs = num_states * num_actions
        empty = tabular.init_counts if cfg.model == "counts" else tabular.init_last_outcome
        zero = jnp.int32(0)
        return State(
            q=jnp.full(pairs, first, jnp.float32),
            model=empty(num_states, num_actions),
            # None and not an empty array, at which XLA of JAX 0.11 fails with several devices
            priority=jnp.zeros(pairs) if cfg.planning == "prioritised" else None,
            seen=Transition(zero, zero, jnp.float32(0), zero, jnp.float32(0)),
        )

    def act(state: State, memory, obs, is_first, key, t: jax.Array, mode: Mode):
        if mode == "random":
            return spec.random_actions(key, obs), memory, ()
        explore = mode == "train"
        epsilon = linear(cfg.epsilon, cfg.epsilon_final, cfg.epsilon_steps, t)

        def one(obs: jax.Array, key: jax.Array) -> jax.Array:
            start = (obs * num_actions,)
            values = jax.lax.dynamic_slice(state.q, start, (num_actions,))
            if cfg.bonus == "recency_action" and explore:
                last = jax.lax.dynamic_slice(state.model.visits.last, start, (num_actions,))
                values += cfg.kappa * jnp.sqrt((t - last).astype(jnp.float32))
            return select_action(values, epsilon if explore else 0.0, key, cfg.ties)

        keys = prng.split(key, obs.shape[0])
        return jax.vmap(one)(obs, keys), memory, ()

    def observe(state: State, step: Step, extras, t: jax.Array) -> State:
        # the one environment of the schedule
        obs, action, reward, next_obs, terminated, *_ = jax.tree.map(lambda x: x[0], step)
        seen = Transition(obs, action, reward, next_obs, 1.0 - terminated)
        state = state._replace(seen=seen)
        if not learns_model:
            return state
        return state._replace(model=tabular.observe(state.model, seen, num_actions, t + 1))

    def update(state: State, key: jax.Array, t: jax.Array, n: jax.Array) -> tuple[State, Metrics]:
        q, model, seen, priority = state.q, state.model, state.seen, state.priority
        alpha = linear(cfg.step_size, cfg.step_size_final, cfg.step_size_steps, t + 1)
        pair = seen.state * num_actions + seen.action
        tries = model.visits.counts[pair]
        outcome = Outcome(seen.reward, seen.next_state, seen.continues, tries)
        if cfg.planning == "prioritised" and cfg.model == "counts":
            outcome = tabular.recall(model, pair)
        error = target(cfg, q, num_actions, outcome) - q[pair]
        if priority is not None:
            urgent = jnp.where(jnp.abs(error) > cfg.theta, jnp.abs(error), 0.0)
            priority = priority.at[pair].max(urgent)
            q, priority, made = plan_by_priority(cfg, q, priority, model, num_actions, alpha)
        else:
            q = q.at[pair].set(q[pair] + alpha * error, mode="promise_in_bounds")
            made = jnp.float32(1 + cfg.planning_steps)
            if cfg.planning == "sweep":
                q = plan_by_sweeps(cfg, q, model, num_actions, t + 1, alpha)
                made = 1.0 + cfg.planning_steps * model.visits.num_pairs
            elif cfg.planning_steps > 0:
                q = plan_at_random(cfg, q, model, num_actions, key, t + 1, alpha)
        metrics = {
            "td_error": jnp.abs(error),
            "backups": jnp.asarray(made, jnp.float32),
            "model_pairs": model.visits.num_pairs.astype(jnp.float32),
        }
        return state._replace(q=q, priority=priority), metrics

    return Agent(init, lambda num_envs: (), act, observe, update, Schedule())


_define = partial(AgentDef, make=make, presets={}, tabular=True)

AGENTS = {
    definition.name: definition
    for definition in (
        _define("q_learning", "Q-learning: no planning", Config(planning_steps=0)),
        _define("dyna_q", "Dyna-Q: planning from visited pairs", Config()),
        _define(
            "dyna_q_plus",
            "Dyna-Q+: planning with a bonus for what was not tried for long",
            Config(bonus="recency", sampler="any_action"),
        ),
        _define(
            "prioritised_sweeping",
            "Prioritised sweeping: planning where values change most",
            Config(planning="prioritised", step_size=0.5),
        ),
    )
}
