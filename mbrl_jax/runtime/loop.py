"""The compiled training loop: one pure function, the same whole, in chunks, and under vmap.

A run is a warm-up of random actions and then equal periods. A period is a scan over updates of
{ a scan over environment steps of { act, step, observe } ; update }, closed by an evaluation.
`make_train` scans over the periods; `runtime.train` calls them one by one from the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax import prng
from mbrl_jax.agents import AGENTS, AgentDef, make_agent
from mbrl_jax.envs.env import BatchState, Env, reset_batch, step_batch
from mbrl_jax.runtime import devices
from mbrl_jax.types import Agent, EnvSpec, InputError, Metrics, PyTree, Step, check_config

_MAX_STEPS = 2**31 - 1  # `t` is int32


class RunState(NamedTuple):
    """All that a run is between two periods; what a checkpoint holds."""

    train_key: jax.Array  # every stream is folded from these two with an index; they never change
    eval_key: jax.Array
    agent: PyTree
    memory: PyTree
    batch: BatchState
    returns: jax.Array  # [N] float32 so far in the running episodes
    lengths: jax.Array  # [N] int32


class Episodes(NamedTuple):
    """Sums over a period, reduced inside the scan so that memory does not grow with it."""

    finished: jax.Array  # float32 number of episodes that ended
    returns: jax.Array  # float32 sum of their returns
    lengths: jax.Array  # float32 sum of their lengths
    reward: jax.Array  # float32 sum of all rewards
    nonfinite: jax.Array  # float32 number of steps with a reward or observation that is not finite
    outside: jax.Array  # float32 number of actions outside the bounds, or no action's number


class Plan(NamedTuple):
    """How many of what; plain Python ints."""

    num_envs: int
    warmup: int  # batched steps of random actions
    updates: int  # per period
    steps_per_update: int  # batched steps
    periods: int

    @property
    def steps_per_period(self) -> int:
        """Batched steps."""
        return self.updates * self.steps_per_update

    def env_steps(self, period: int) -> int:
        """Environment steps taken when period `period` (from 0) has ended."""
        return self.num_envs * (self.warmup + (period + 1) * self.steps_per_period)


class Program(NamedTuple):
    """A training run as two pure functions."""

    plan: Plan
    init: Callable[[jax.Array, Any], RunState]  # (key, config); the warm-up included
    period: Callable[[RunState, Any, jax.Array], tuple[RunState, Metrics]]
    """(run, config, index) -> (run, metrics); `index` int32, never vmapped."""


def make_train(
    agent: str | AgentDef,
    env: Env,
    total_steps: int,
    eval_every: int | None = None,
    eval_episodes: int = 10,
    eval_max_steps: int | None = None,
) -> Callable[..., tuple[PyTree, Metrics]]:
    """A pure function that trains one agent: `train(key, config=default) -> (state, history)`.

    `jax.jit(jax.vmap(train))(keys)` trains a batch of seeds; a vmap over `(key, config)` also
    sweeps the fields of the config that are annotated float, in one compiled program.

    Args:
      agent: a name in `AGENTS`, or a definition of one's own.
      env: from `make_env`.
      total_steps: environment steps, the warm-up included; rounded up to whole periods.
      eval_every: environment steps of a period; a twentieth of `total_steps` by default.
      eval_episodes: greedy episodes after each period; 0 evaluates nothing.
      eval_max_steps: ends an evaluation episode early; the environment's limit by default.

    Returns:
      `train`, whose history maps names to arrays [periods]: `env_steps`; of the evaluation
      `eval_return` and `eval_length` (means over its episodes); of training `train_return` and
      `train_length` (means over the episodes that ended in the period, NaN without one),
      `train_episodes` (their number), `train_reward` (the sum of all rewards), `nonfinite_steps`
      (steps whose reward or observation is NaN or infinite), `actions_outside` (actions beyond
      the bounds, which the environment clips); and the means of the agent's own metrics over the
      period's updates. `state` is the agent's.

    Raises:
      InputError: for an unknown agent, one that cannot act in `env`, or counts that are not
        positive; `train` raises it while it is traced, before anything compiles, for a config out
        of its bounds, a warm-up that leaves no step, or a state that does not fit into memory.
    """
    definition = agent if isinstance(agent, AgentDef) else AGENTS[agent]
    default = definition.config_for(env.spec.id)

    def program(config: Any) -> Program:
        return make_program(
            definition, env, config, total_steps, eval_every, eval_episodes, eval_max_steps
        )

    make_agent(definition, env.spec, default)
    _check_counts(total_steps, eval_every, eval_episodes, eval_max_steps)

    def train(key: jax.Array, config: Any = default) -> tuple[PyTree, Metrics]:
        check_config(config)
        plan, init, period = program(config)
        devices.check_memory(jax.eval_shape(init, key, config), 1)
        run = init(key, config)

        def one(run: RunState, index: jax.Array) -> tuple[RunState, Metrics]:
            return period(run, config, index)

        run, history = jax.lax.scan(one, run, jnp.arange(plan.periods, dtype=jnp.int32))
        env_steps = jnp.asarray([plan.env_steps(i) for i in range(plan.periods)], jnp.int32)
        return run.agent, {"env_steps": env_steps, **history}

    return train


def make_program(
    definition: AgentDef,
    env: Env,
    config: Any,
    total_steps: int,
    eval_every: int | None = None,
    eval_episodes: int = 10,
    eval_max_steps: int | None = None,
) -> Program:
    """The parts of `make_train` for the static fields of `config`; arguments as there."""
    _check_counts(total_steps, eval_every, eval_episodes, eval_max_steps)
    schedule = make_agent(definition, env.spec, config).schedule
    if eval_every is None:
        eval_every = max(1, total_steps // 20)
    num_envs, steps_per_update = schedule.num_envs, schedule.steps_per_update
    warmup = -(-schedule.warmup_steps // num_envs)
    left = total_steps - warmup * num_envs
    if left < 1:
        raise InputError(
            f"total_steps = {total_steps}: expected more than the {schedule.warmup_steps} steps "
            f"of {definition.name}'s warm-up"
        )
    updates = -(-min(eval_every, left) // (num_envs * steps_per_update))
    periods = -(-left // (updates * num_envs * steps_per_update))
    plan = Plan(num_envs, warmup, updates, steps_per_update, periods)
    if warmup + periods * plan.steps_per_period > _MAX_STEPS:
        raise InputError(f"total_steps = {total_steps}: at most {_MAX_STEPS} batched steps fit")
    delayed = schedule.reset == "delayed"

    def init(key: jax.Array, config: Any) -> RunState:
        agent = definition.make(config, env.spec)
        init_key, reset_key, warmup_key, train_key, eval_key = jax.random.split(key, 5)
        run = RunState(
            train_key=train_key,
            eval_key=eval_key,
            agent=agent.init(init_key),
            memory=agent.init_memory(num_envs),
            batch=reset_batch(env, reset_key, num_envs, delayed),
            returns=jnp.zeros(num_envs),
            lengths=jnp.zeros(num_envs, jnp.int32),
        )
        if warmup == 0:
            return run

        def one(run: RunState, t: jax.Array) -> tuple[RunState, None]:
            keys = jax.random.split(jax.random.fold_in(warmup_key, t), 3)
            return _env_step(agent, env, run, keys[0], keys[1], t, keys[2])[0], None

        return jax.lax.scan(one, run, jnp.arange(warmup, dtype=jnp.int32))[0]

    def period(run: RunState, config: Any, index: jax.Array) -> tuple[RunState, Metrics]:
        agent = definition.make(config, env.spec)
        first = warmup + index * plan.steps_per_period
        run, episodes, metrics = _train_period(agent, env, plan, run, first, index)
        finished = jnp.where(episodes.finished > 0, episodes.finished, jnp.nan)
        history = {
            "train_return": episodes.returns / finished,
            "train_length": episodes.lengths / finished,
            "train_episodes": episodes.finished,
            "train_reward": episodes.reward,
            "nonfinite_steps": episodes.nonfinite,
            "actions_outside": episodes.outside,
        }
        if eval_episodes > 0:
            key = jax.random.fold_in(run.eval_key, index)
            origin = jax.tree.map(lambda x: x[0], run.batch.env)
            returns, lengths = evaluate(
                agent, env, run.agent, key, eval_episodes, eval_max_steps, origin
            )
            history = {
                "eval_return": jnp.mean(returns),
                "eval_length": jnp.mean(lengths.astype(jnp.float32)),
                **history,
            }
        return run, {**history, **metrics}

    return Program(plan, init, period)


def _check_counts(
    total_steps: int, eval_every: int | None, eval_episodes: int, eval_max_steps: int | None
) -> None:
    for name, value, least in (
        ("total_steps", total_steps, 1),
        ("eval_every", 1 if eval_every is None else eval_every, 1),
        ("eval_episodes", eval_episodes, 0),
        ("eval_max_steps", 1 if eval_max_steps is None else eval_max_steps, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} = {value!r}: expected a whole number, {least} or more")


def _train_period(
    agent: Agent, env: Env, plan: Plan, run: RunState, first: jax.Array, index: jax.Array
) -> tuple[RunState, Episodes, Metrics]:
    """All updates of a period, from batched step `first` on; metrics are means over updates."""

    period_key = jax.random.fold_in(run.train_key, index)

    def one_update(carry, number):
        run, episodes, sums = carry
        spu = plan.steps_per_update
        start = first + number * spu
        stream = number.astype(jnp.uint32) * (2 * spu + 1)  # two keys for each step, one to update

        def one_step(carry, i):
            run, episodes = carry
            counters = stream + 2 * i.astype(jnp.uint32) + jnp.arange(2, dtype=jnp.uint32)
            act_key, env_key = prng.fold_in(period_key, counters)
            run, ended = _env_step(agent, env, run, act_key, env_key, start + i)
            return (run, jax.tree.map(jnp.add, episodes, ended)), None

        (run, episodes), _ = jax.lax.scan(
            one_step, (run, episodes), jnp.arange(spu, dtype=jnp.int32)
        )
        update_key = prng.fold_in(period_key, stream[None] + 2 * spu)[0]
        learner, metrics = agent.update(run.agent, update_key, start + spu - 1)
        sums = jax.tree.map(jnp.add, sums, metrics)
        return (run._replace(agent=learner), episodes, sums), None

    shapes = jax.eval_shape(agent.update, run.agent, period_key, first)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    episodes = Episodes(*(jnp.float32(0),) * len(Episodes._fields))
    numbers = jnp.arange(plan.updates, dtype=jnp.int32)
    (run, episodes, sums), _ = jax.lax.scan(one_update, (run, episodes, zeros), numbers)
    return run, episodes, jax.tree.map(lambda x: x / plan.updates, sums)


def _env_step(
    agent: Agent,
    env: Env,
    run: RunState,
    act_key: jax.Array,
    env_key: jax.Array,
    t: jax.Array,
    random_key: jax.Array | None = None,
) -> tuple[RunState, Episodes]:
    """Act, step, observe; with `random_key` the action is uniformly random instead."""
    batch = run.batch
    action, memory, extras = agent.act(
        run.agent, run.memory, batch.obs, batch.is_first, act_key, True
    )
    if random_key is not None:
        keys = jax.random.split(random_key, batch.is_first.shape[0])
        action = jax.vmap(env.random_action)(keys)
    batch, step = step_batch(env, env_key, batch, action)
    learner = agent.observe(run.agent, step, extras, t)
    returns, lengths, episodes = _count(env.spec, run, step)
    run = run._replace(agent=learner, memory=memory, batch=batch, returns=returns, lengths=lengths)
    return run, episodes


def _count(spec: EnvSpec, run: RunState, step: Step) -> tuple[jax.Array, jax.Array, Episodes]:
    returns = run.returns + step.reward
    # the step out of a final observation (delayed resets) is nobody's
    idle = False if run.batch.ended is None else run.batch.ended
    lengths = run.lengths + jnp.where(idle, 0, 1)
    done = step.terminated | step.truncated
    finite = jnp.isfinite(step.reward)
    if jnp.issubdtype(step.next_obs.dtype, jnp.floating):
        finite &= jnp.all(jnp.isfinite(step.next_obs.reshape(finite.shape[0], -1)), axis=-1)
    count = spec.num_actions
    low, high = spec.bounds(step.action.ndim) if count is None else (0, count - 1)
    # so written that NaN counts as outside
    inside = (step.action >= low) & (step.action <= high)
    inside = jnp.all(inside.reshape(done.shape[0], -1), axis=-1)
    ended = Episodes(
        jnp.sum(done.astype(jnp.float32)),
        jnp.sum(jnp.where(done, returns, 0.0)),
        jnp.sum(jnp.where(done, lengths, 0).astype(jnp.float32)),
        jnp.sum(step.reward),
        jnp.sum((~finite).astype(jnp.float32)),
        jnp.sum((~inside).astype(jnp.float32)),
    )
    return jnp.where(done, 0.0, returns), jnp.where(done, 0, lengths), ended


def evaluate(
    agent: Agent,
    env: Env,
    state: PyTree,
    key: jax.Array,
    num_episodes: int,
    max_steps: int | None = None,
    origin: PyTree = None,
) -> tuple[jax.Array, jax.Array]:
    """Greedy episodes side by side: -> (returns [num_episodes] float32, lengths int32).

    Each ends at its termination, the environment's limit or `max_steps`. `origin` is a state of
    one environment whose run-long clock the episodes take over, so that a world that has changed
    is evaluated as it is now.
    """
    reset_key, act_key, env_key = jax.random.split(key, 3)
    keys = jax.random.split(reset_key, num_episodes)
    env_state, obs = jax.vmap(env.reset)(keys)
    if origin is not None:
        env_state = jax.vmap(env.carry_over, in_axes=(None, 0))(origin, env_state)

    def going(carry) -> jax.Array:
        count, done = carry[0], carry[1]
        unfinished = jnp.any(~done)
        return unfinished if max_steps is None else unfinished & (count < max_steps)

    def one(carry):
        count, done, env_state, obs, memory, returns, lengths = carry
        is_first = jnp.full(num_episodes, count == 0)
        action, memory, _ = agent.act(
            state, memory, obs, is_first, jax.random.fold_in(act_key, count), False
        )
        keys = jax.random.split(jax.random.fold_in(env_key, count), num_episodes)
        env_state, after = jax.vmap(env.step)(keys, env_state, action)
        returns = returns + jnp.where(done, 0.0, after.reward)
        lengths = lengths + jnp.where(done, 0, 1)
        done = done | after.terminated | after.truncated
        return count + 1, done, env_state, after.obs, memory, returns, lengths

    start = (
        jnp.int32(0),
        jnp.zeros(num_episodes, bool),
        env_state,
        obs,
        agent.init_memory(num_episodes),
        jnp.zeros(num_episodes),
        jnp.zeros(num_episodes, jnp.int32),
    )
    *_, returns, lengths = jax.lax.while_loop(going, one, start)
    return returns, lengths
