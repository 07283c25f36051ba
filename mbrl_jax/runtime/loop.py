"""The compiled training loop: one pure function, the same whole, in chunks, and under vmap.

A run is a warm-up of random actions, a prefill by the policy, and then equal periods. A period is a
scan over updates of { a scan over environment steps of { act, step, observe } ; update }, closed by
an evaluation. `make_train` scans over the periods; `runtime.train` calls them one by one from the
host. The life of one step is `env_step`: read it first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax import loops, prng
from mbrl_jax.agents import AGENTS, AgentDef, make_agent
from mbrl_jax.envs.env import BatchState, Env, reset_batch, step_batch
from mbrl_jax.runtime import devices, matches
from mbrl_jax.runtime.plan import Plan, check_counts, make_plan
from mbrl_jax.types import (
    Agent,
    EnvSpec,
    Metrics,
    Mode,
    PyTree,
    Step,
    check_config,
)
from mbrl_jax.x64 import in_32_bits

Evaluate = Callable[[Agent, PyTree, jax.Array, jax.Array], Metrics]


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
    """Sums over the steps of each environment, [N] float32; those over N come after a period."""

    finished: jax.Array  # number of episodes that ended
    returns: jax.Array  # sum of their returns
    lengths: jax.Array  # sum of their lengths
    reward: jax.Array  # sum of all rewards
    nonfinite: jax.Array  # number of steps with a reward or observation that is not finite
    outside: jax.Array  # number of actions outside the bounds, or no action's number


class Program(NamedTuple):
    """A training run as two pure functions."""

    plan: Plan
    init: Callable[[jax.Array, Any], RunState]  # (key, config); warm-up and prefill included
    period: Callable[[RunState, Any, jax.Array], tuple[RunState, Metrics]]
    """(run, config, index) -> (run, metrics); `index` int32, never vmapped."""


def make_train(
    agent: str | AgentDef,
    env: Env,
    total_steps: int,
    eval_every: int | None = None,
    eval_episodes: int = 10,
    eval_max_steps: int | None = None,
    evaluate: Evaluate | None = None,
) -> Callable[..., tuple[PyTree, Metrics]]:
    """A pure function that trains one agent: `train(key, config=default) -> (state, history)`.

    `jax.jit(jax.vmap(train))(keys)` trains a batch of seeds; a vmap over `(key, config)` also
    sweeps the fields of the config that are annotated float, in one compiled program.

    Args:
      agent: a name in `AGENTS`, or a definition of one's own.
      env: from `make_env`.
      total_steps: environment steps, warm-up and prefill included; rounded up until each period is
        a whole number of updates.
      eval_every: environment steps of a period at most, rounded up to whole updates; the periods
        are of equal length. A twentieth of `total_steps` by default.
      eval_episodes: greedy episodes after each period; 0 evaluates nothing. In a world of two
        players they are games against the uniform player (`runtime.matches`), half of which the
        agent begins, and their returns are 1 for a win, 0 for a draw and -1 for a loss.
      eval_max_steps: ends an evaluation episode early; the environment's limit by default.
      evaluate: an evaluation of one's own after each period, compiled into the program, in place
        of greedy episodes: `(agent, state, key, t) -> metrics`, where `agent` is the `Agent`,
        `state` its state, `t` [] int32 the batched steps so far, and the metrics are a dict of
        scalars, of which `eval_return` is what logs and curves show.

    Returns:
      `train`, whose history maps names to arrays [periods]: `env_steps` (int32, float32 for a run
      beyond 2**31); of the evaluation `eval_return` and `eval_length` (means over its episodes),
      with two players `win_rate` and `loss_rate` too, or what `evaluate` gives; of training
      `train_return` and `train_length` (means over the episodes that ended in the period, NaN
      without one), `train_episodes` (their number), `train_reward` (the sum of all rewards),
      `nonfinite_steps` (steps whose reward or observation is NaN or infinite), `actions_outside`
      (actions beyond the bounds, which the environment clips); and the means of the agent's own
      metrics over the period's updates. `state` is the agent's.

    Raises:
      InputError: for an unknown agent, one that cannot act in `env`, or counts that are not
        positive; `train` raises it while it is traced, before anything compiles, for a config out
        of its bounds, a warm-up that leaves no step, or a state that does not fit into memory.
    """
    definition = agent if isinstance(agent, AgentDef) else AGENTS[agent]
    default = definition.config_for(env.spec)
    make_agent(definition, env.spec, default)
    check_counts(total_steps, eval_every, eval_episodes, eval_max_steps)

    @in_32_bits
    def train(key: jax.Array, config: Any = default) -> tuple[PyTree, Metrics]:
        check_config(config)
        plan, init, period = make_program(
            definition, env, config, total_steps, eval_every, eval_episodes, eval_max_steps,
            evaluate,
        )  # fmt: skip
        # XLA would fold the default's numbers into the program, whose bits are then others
        config = _apart(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), config))
        init = jax.jit(init, inline=True)  # traced once for its shapes and for the run
        devices.check_memory(jax.eval_shape(init, key, config), 1)
        run = _apart(devices.with_seed_axis(init(key, config)))

        def one(run: RunState, index: jax.Array) -> tuple[RunState, Metrics]:
            return _apart(period(run, config, index))

        run, history = jax.lax.scan(one, run, jnp.arange(plan.periods, dtype=jnp.int32))
        taken = [plan.env_steps(i) for i in range(plan.periods)]
        counted = jnp.int32 if taken[-1] < 2**31 else jnp.float32
        return run.agent, {"env_steps": jnp.asarray(taken, counted), **history}

    return train


def _apart(tree: PyTree) -> PyTree:
    """`tree`, made whole before XLA fuses what comes after; keys pass, whose use JAX follows."""
    leaves, structure = jax.tree.flatten(tree)
    numbers = [i for i, x in enumerate(leaves) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    # one barrier for all: leaf by leaf, XLA still mixes what makes one with what uses another
    made = jax.lax.optimization_barrier([leaves[i] for i in numbers])
    for i, x in zip(numbers, made, strict=True):
        leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


def make_program(
    definition: AgentDef,
    env: Env,
    config: Any,
    total_steps: int,
    eval_every: int | None = None,
    eval_episodes: int = 10,
    eval_max_steps: int | None = None,
    evaluate: Evaluate | None = None,
) -> Program:
    """The parts of `make_train` for the static fields of `config`; arguments as there."""
    check_counts(total_steps, eval_every, eval_episodes, eval_max_steps)
    schedule = make_agent(definition, env.spec, config).schedule
    plan = make_plan(definition.name, schedule, total_steps, eval_every)

    @in_32_bits
    def init(key: jax.Array, config: Any) -> RunState:
        agent = definition.make(config, env.spec)
        init_key, reset_key, fill_key, train_key, eval_key = jax.random.split(key, 5)
        run = RunState(
            train_key=train_key,
            eval_key=eval_key,
            agent=agent.init(init_key),
            memory=agent.init_memory(plan.num_envs),
            batch=reset_batch(env, reset_key, plan.num_envs, schedule.reset == "delayed"),
            returns=jnp.zeros(plan.num_envs),
            lengths=jnp.zeros(plan.num_envs, jnp.int32),
        )
        run = _fill(agent, env, run, fill_key, 0, plan.warmup, "random")
        return _fill(agent, env, run, fill_key, plan.warmup, plan.prefill, "train")

    @in_32_bits
    def period(run: RunState, config: Any, index: jax.Array) -> tuple[RunState, Metrics]:
        agent = definition.make(config, env.spec)
        run, episodes, metrics = _train_period(agent, env, plan, run, index)
        # the flag would stop at this NaN, which is no fault
        nothing = 0.0 if jax.config.jax_debug_nans else jnp.nan  # type: ignore[attr-defined]
        finished = jnp.maximum(episodes.finished, 1.0)
        history = {
            "train_return": jnp.where(episodes.finished > 0, episodes.returns / finished, nothing),
            "train_length": jnp.where(episodes.finished > 0, episodes.lengths / finished, nothing),
            "train_episodes": episodes.finished,
            "train_reward": episodes.reward,
            "nonfinite_steps": episodes.nonfinite,
            "actions_outside": episodes.outside,
        }
        key = jax.random.fold_in(run.eval_key, index)
        t = plan.start + (index + 1) * plan.steps_per_period
        if evaluate is not None:
            history = {**evaluate(agent, run.agent, key, t), **history}
        elif eval_episodes > 0:
            origin = jax.tree.map(lambda x: x[0], run.batch.env)
            played = agent, env, run.agent, key, t, eval_episodes, eval_max_steps, origin
            if env.spec.num_players > 1:
                evaluated = matches.metrics(matches.play_uniform(*played))
            else:
                returns, lengths = play_episodes(*played)
                evaluated = {
                    "eval_return": jnp.mean(returns),
                    "eval_length": jnp.mean(lengths.astype(jnp.float32)),
                }
            history = {**evaluated, **history}
        return run, {**history, **metrics}

    return Program(plan, init, period)


def env_step(
    agent: Agent,
    env: Env,
    run: RunState,
    act_key: jax.Array,
    env_key: jax.Array,
    t: jax.Array,
    mode: Mode,
) -> tuple[RunState, Episodes]:
    """The life of one batched step: act, step, observe; an update comes after some of them.

    `act` answers the observations in `run.batch` and moves the policy's memory. `step_batch` steps
    every environment and starts the next episode where one has ended; the `Step` that it records
    holds the true successor, while `run.batch` holds what the next action answers. `observe`
    records the step in the agent's state, with the extras that `act` gave (log-probabilities,
    latents, search policies). The agent's `update` is called by `_train_period` after each
    `steps_per_update` of these.

    Args:
      agent: built from the config.
      env: where it acts.
      run: before the step.
      act_key, env_key: one for the agent and one for the environments.
      t: [] int32, the index of the step, the same for all seeds.
      mode: of `Agent.act`.

    Returns:
      The run after the step, and the counts of the episodes that ended in it.
    """
    batch = run.batch
    action, memory, extras = agent.act(
        run.agent, run.memory, batch.obs, batch.is_first, act_key, t, mode
    )
    batch, step = step_batch(env, env_key, batch, action)
    learner = agent.observe(run.agent, step, extras, t)
    returns, lengths, episodes = _count(env.spec, run, step)
    run = run._replace(agent=learner, memory=memory, batch=batch, returns=returns, lengths=lengths)
    return run, episodes


def _fill(
    agent: Agent, env: Env, run: RunState, key: jax.Array, start: int, steps: int, mode: Mode
) -> RunState:
    """`steps` batched steps from step `start` on, without an update."""

    def one(run: RunState, t: jax.Array) -> tuple[RunState, None]:
        _, env_key, act_key = jax.random.split(jax.random.fold_in(key, t), 3)
        return env_step(agent, env, run, act_key, env_key, t, mode)[0], None

    if steps == 0:
        return run
    return jax.lax.scan(one, run, start + jnp.arange(steps, dtype=jnp.int32))[0]


def _train_period(
    agent: Agent, env: Env, plan: Plan, run: RunState, index: jax.Array
) -> tuple[RunState, Episodes, Metrics]:
    """All updates of the period number `index`; episodes [], metrics are means over updates."""
    period_key = jax.random.fold_in(run.train_key, index)
    first_step = plan.start + index * plan.steps_per_period
    first_update = index * plan.updates

    def one_update(carry, number):
        run, episodes, sums = carry
        spu = plan.steps_per_update
        start = first_step + number * spu
        stream = number.astype(jnp.uint32) * (2 * spu + 1)  # two keys for each step, one to update

        def one_step(carry, i):
            run, episodes = carry
            counters = stream + 2 * i.astype(jnp.uint32) + jnp.arange(2, dtype=jnp.uint32)
            act_key, env_key = prng.fold_in(period_key, counters)
            run, ended = env_step(agent, env, run, act_key, env_key, start + i, "train")
            return (run, jax.tree.map(jnp.add, episodes, ended)), None

        (run, episodes), _ = loops.scan(one_step, (run, episodes), jnp.arange(spu, dtype=jnp.int32))
        update_key = prng.fold_in(period_key, stream[None] + 2 * spu)[0]
        n = first_update + number
        learner, metrics = update(run.agent, update_key, start + spu - 1, n)
        sums = jax.tree.map(jnp.add, sums, metrics)
        return (run._replace(agent=learner), episodes, sums), None

    update = jax.jit(agent.update, inline=True)  # traced once for its shapes and for the loop
    shapes = jax.eval_shape(update, run.agent, period_key, first_step, first_update)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    episodes = Episodes(*(jnp.zeros(plan.num_envs),) * len(Episodes._fields))
    numbers = jnp.arange(plan.updates, dtype=jnp.int32)
    (run, episodes, sums), _ = loops.scan(one_update, (run, episodes, zeros), numbers)
    episodes = jax.tree.map(jnp.sum, episodes)
    return run, episodes, jax.tree.map(lambda x: x / plan.updates, sums)


def _count(spec: EnvSpec, run: RunState, step: Step) -> tuple[jax.Array, jax.Array, Episodes]:
    returns = run.returns + step.reward
    # the step out of a final observation (delayed resets) is nobody's
    idle = False if run.batch.ended is None else run.batch.ended
    lengths = run.lengths + jnp.where(idle, 0, 1)
    done = step.terminated | step.truncated
    finite = jnp.isfinite(step.reward)
    for part in jax.tree.leaves(step.next_obs):
        if jnp.issubdtype(part.dtype, jnp.floating):
            finite &= jnp.all(jnp.isfinite(part.reshape(finite.shape[0], -1)), axis=-1)
    count = spec.num_actions
    low, high = spec.bounds(step.action.ndim) if count is None else (0, count - 1)
    # so written that NaN counts as outside
    inside = (step.action >= low) & (step.action <= high)
    inside = jnp.all(inside.reshape(done.shape[0], -1), axis=-1)
    ended = Episodes(
        done.astype(jnp.float32),
        jnp.where(done, returns, 0.0),
        jnp.where(done, lengths, 0).astype(jnp.float32),
        step.reward,
        (~finite).astype(jnp.float32),
        (~inside).astype(jnp.float32),
    )
    return jnp.where(done, 0.0, returns), jnp.where(done, 0, lengths), ended


@in_32_bits
def play_episodes(
    agent: Agent,
    env: Env,
    state: PyTree,
    key: jax.Array,
    t: jax.Array,
    num_episodes: int,
    max_steps: int | None = None,
    origin: PyTree = None,
) -> tuple[jax.Array, jax.Array]:
    """Episodes in mode "eval", side by side: -> (returns [num_episodes] float32, lengths int32).

    Each ends at its termination, the environment's limit or `max_steps`.

    Args:
      agent: built from the config.
      env: where it acts.
      state: the agent's.
      key: of all draws.
      t: [] int32, the batched steps of training behind `state`.
      num_episodes: how many.
      max_steps: ends an episode early; None leaves it to the environment.
      origin: a state of one environment whose run-long clock the episodes take over, so that a
        world that has changed is evaluated as it is now.
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
            state, memory, obs, is_first, jax.random.fold_in(act_key, count), t, "eval"
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
