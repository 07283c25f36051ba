"""The compiled loop: counting, vmapping, chunks, evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mbrl_jax
from mbrl_jax.agents import AGENTS, AgentDef, make_agent
from mbrl_jax.runtime.loop import make_program, make_train, play_episodes
from mbrl_jax.types import Agent, InputError, Schedule, config

TABULAR = [
    ("q_learning", {}),
    ("dyna_q", {}),
    ("dyna_q", {"model": "counts"}),
    ("dyna_q", {"planning": "batched"}),
    ("dyna_q_plus", {}),
    ("prioritised_sweeping", {}),
]


def same(a, b):
    """Bit for bit, NaN included."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(_bits(x), _bits(y)), a, b)


def _bits(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


@pytest.fixture(
    scope="module", params=[pytest.param(False, marks=pytest.mark.slow), True], ids=["still", "ice"]
)
def slippery_lake(request):
    return mbrl_jax.make_env("FrozenLake-misc", is_slippery=request.param)


@pytest.fixture(scope="module", params=TABULAR, ids=str)
def whole(request, slippery_lake):
    """The uncut run of 4 vmapped seeds: agent, environment, config, state, history."""
    (name, fields), env = request.param, slippery_lake
    cfg = AGENTS[name].config_for(env.spec.id, **fields)
    train = make_train(name, env, 600, eval_every=100, eval_episodes=4)
    keys = jax.random.split(jax.random.key(3), 4)
    return name, env, cfg, *jax.jit(jax.vmap(train, in_axes=(0, None)))(keys, cfg)


def test_vmapped_seeds_equal_single_runs(whole):
    name, env, cfg, state, history = whole
    single = jax.jit(make_train(name, env, 600, eval_every=100, eval_episodes=4))
    for i, key in enumerate(jax.random.split(jax.random.key(3), 4)):
        alone, curve = single(key, cfg)
        same(alone, jax.tree.map(lambda x, i=i: x[i], state))
        same(curve, jax.tree.map(lambda x, i=i: x[i], history))


def test_chunks_equal_the_uncut_run(whole):
    name, env, cfg, state, history = whole
    program = make_program(AGENTS[name], env, cfg, 600, eval_every=100, eval_episodes=4)
    chunk = jax.jit(jax.vmap(program.period, in_axes=(0, None, None)), donate_argnums=0)
    run = jax.jit(jax.vmap(program.init, in_axes=(0, None)))(
        jax.random.split(jax.random.key(3), 4), cfg
    )
    rows = []
    for i in range(program.plan.periods):
        run, metrics = chunk(run, cfg, jnp.int32(i))
        rows.append(metrics)
    same(state, run.agent)
    history = dict(history)
    env_steps = history.pop("env_steps")
    same(history, jax.tree.map(lambda *x: jnp.stack(x, axis=1), *rows))
    assert env_steps[0].tolist() == [100, 200, 300, 400, 500, 600]


def test_a_grid_of_seeds_epsilons_and_step_sizes_is_one_compiled_call(lake):
    train = make_train("dyna_q", lake, 400, eval_every=200, eval_episodes=2)
    cfg = AGENTS["dyna_q"].config
    traces = []

    def cell(key, epsilon, step_size):
        traces.append(1)
        return train(key, dataclasses.replace(cfg, epsilon=epsilon, step_size=step_size))

    grid = jax.vmap(cell, in_axes=(0, None, None))  # seeds
    grid = jax.vmap(grid, in_axes=(None, 0, None))  # epsilon
    grid = jax.jit(jax.vmap(grid, in_axes=(None, None, 0)))  # step size
    epsilons, sizes = jnp.array([0.05, 0.5]), jnp.array([0.1, 0.5, 1.0])
    state, history = grid(jax.random.split(jax.random.key(0), 4), epsilons, sizes)
    assert state.q.shape == (3, 2, 4, 64)
    assert history["train_return"].shape == (3, 2, 4, 2)
    alone, _ = jax.jit(train)(
        jax.random.split(jax.random.key(0), 4)[1],
        dataclasses.replace(cfg, epsilon=epsilons[1], step_size=sizes[2]),
    )
    same(alone, jax.tree.map(lambda x: x[2, 1, 1], state))
    grid(jax.random.split(jax.random.key(1), 4), epsilons + 0.1, sizes - 0.05)
    assert len(traces) == 1, "new values recompile"


@config
class ProbeConfig:
    num_envs: int = 3
    warmup: int = 7
    steps_per_update: int = 2
    reset: str = "auto"


def probe(cfg, spec):
    """An agent that only writes down what the loop does: calls, times, random actions."""

    def act(state, memory, obs, is_first, key, t, mode):
        memory = jnp.where(is_first, 0, memory) + 1
        if mode == "random":
            return spec.random_actions(key, obs), memory, memory
        return jnp.zeros(obs.shape[0], jnp.int32), memory, memory

    def observe(state, step, extras, t):
        done = step.terminated | step.truncated
        return {
            **state,
            "observed": state["observed"].at[t].add(1),
            "moved": state["moved"].at[t].set(jnp.any(step.action != 0)),
            "memory": state["memory"].at[t].set(extras[0]),
            "first": state["first"].at[t].set(step.is_first[0]),
            "ends": state["ends"] + jnp.sum(done),
        }

    def update(state, key, t, n):
        state = {**state, "updated": state["updated"].at[t].add(1)}
        return state, {"time": t.astype(jnp.float32)}

    blank = {name: jnp.zeros(64, jnp.int32) for name in ("observed", "updated", "memory")}
    blank |= {name: jnp.zeros(64, bool) for name in ("moved", "first")} | {"ends": jnp.int32(0)}
    schedule = Schedule(cfg.num_envs, cfg.warmup, cfg.steps_per_update, cfg.reset)
    return Agent(
        lambda key: blank, lambda n: jnp.zeros(n, jnp.int32), act, observe, update, schedule
    )


PROBE = AgentDef("probe", "writes down what the loop does", ProbeConfig(), probe, {})


def test_steps_updates_and_warm_up_are_counted():
    env = mbrl_jax.make_env("DynaMaze-sutton", max_steps_in_episode=4)
    train = make_train(PROBE, env, 60, eval_every=13, eval_episodes=2)
    state, history = jax.jit(train)(jax.random.key(0))
    # 7 warm-up steps are 3 batched ones of 3 environments; a period is 3 updates of 2 * 3 steps
    assert history["env_steps"].tolist() == [27, 45, 63]
    batched = 63 // 3
    assert state["observed"].tolist() == [1] * batched + [0] * (64 - batched)
    updates = np.flatnonzero(state["updated"]).tolist()
    assert updates == list(range(4, batched, 2)), "after every second step, at its time"
    assert history["time"].tolist() == [6.0, 12.0, 18.0]
    assert not state["moved"][3:].any()
    assert state["moved"][:3].any(), "the warm-up acts at random"
    assert state["memory"][:9].tolist() == [1, 2, 3, 4] * 2 + [1]
    assert state["first"][:9].tolist() == [True, False, False, False] * 2 + [True]
    assert state["ends"] == 3 * (batched // 4)
    assert history["train_length"].tolist() == [4.0] * 3
    assert history["train_episodes"].sum() == 3 * (batched // 4) - 0
    assert history["eval_length"].tolist() == [4.0] * 3


def test_delayed_resets_give_the_final_observation_a_step_of_its_own():
    env = mbrl_jax.make_env("DynaMaze-sutton", max_steps_in_episode=4)
    cfg = ProbeConfig(num_envs=1, warmup=0, steps_per_update=1, reset="delayed")
    train = make_train(PROBE, env, 40, eval_every=40, eval_episodes=0)
    state, history = jax.jit(train)(jax.random.key(0), cfg)
    assert state["first"][:10].tolist() == [True, False, False, False, False] * 2
    assert history["train_episodes"].tolist() == [8.0]
    assert history["train_length"].tolist() == [4.0]


def test_greedy_evaluation_follows_the_values_and_stops_where_told(lake):
    agent = make_agent("q_learning", lake.spec)
    state = agent.init(jax.random.key(0))
    path = {0: 1, 4: 1, 8: 2, 9: 1, 13: 2, 14: 2}  # down, down, right, down, right, right
    for cell, action in path.items():
        state = state._replace(q=state.q.at[cell * 4 + action].set(1.0))
    returns, lengths = play_episodes(agent, lake, state, jax.random.key(1), jnp.int32(0), 5)
    assert returns.tolist() == [1.0] * 5
    assert lengths.tolist() == [6] * 5
    returns, lengths = play_episodes(
        agent, lake, state, jax.random.key(2), jnp.int32(0), 5, max_steps=4
    )
    assert returns.tolist() == [0.0] * 5
    assert lengths.tolist() == [4] * 5


def test_a_changed_world_is_evaluated_as_it_is_now():
    env = mbrl_jax.make_env("BlockingMaze-sutton", switch_step=100)
    agent = make_agent("q_learning", env.spec)
    state = agent.init(jax.random.key(0))
    path = [(48, 3)] * 5 + [(0, 0)] * 5  # right along the bottom, then up the right edge
    cells = [48, 49, 50, 51, 52, 53, 44, 35, 26, 17]
    for cell, (_, action) in zip(cells, path, strict=True):
        state = state._replace(q=state.q.at[cell * 4 + action].set(1.0))
    origin, _ = env.reset(jax.random.key(1))
    before, _ = play_episodes(agent, env, state, jax.random.key(2), jnp.int32(0), 3, 50, origin)
    late = dataclasses.replace(origin, clock=jnp.int32(100))
    after, _ = play_episodes(agent, env, state, jax.random.key(3), jnp.int32(0), 3, 50, late)
    assert before.tolist() == [1.0] * 3
    assert after.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"total_steps": 0}, "total_steps = 0"),
        ({"total_steps": 10.5}, "total_steps = 10.5"),
        ({"total_steps": 100, "eval_every": -5}, "eval_every = -5"),
        ({"total_steps": 100, "eval_episodes": -1}, "eval_episodes = -1"),
        ({"total_steps": 100, "eval_max_steps": 0}, "eval_max_steps"),
        ({"total_steps": 2**31}, "batched steps"),
        ({"total_steps": 100, "agent": "dyna"}, "unknown agent"),
    ],
)
def test_bad_counts_are_refused_before_anything_compiles(lake, arguments, said):
    def trace():  # some hang on the config
        jax.eval_shape(make_train(**{"agent": "dyna_q", "env": lake, **arguments}), key)

    key = jax.random.key(0)
    with pytest.raises(InputError, match=said):
        trace()


def test_a_period_is_never_longer_than_the_run(lake):
    plan = make_program(AGENTS["dyna_q"], lake, AGENTS["dyna_q"].config, 30, eval_every=100).plan
    assert (plan.periods, plan.env_steps(0)) == (1, 30)


def test_a_run_must_be_longer_than_its_warm_up(lake):
    train = make_train(PROBE, lake, 7)
    with pytest.raises(InputError, match="warm-up"):
        jax.eval_shape(train, jax.random.key(0))
    jax.eval_shape(train, jax.random.key(0), ProbeConfig(warmup=3))


def test_bad_floats_are_refused_and_traced_ones_pass(lake):
    train = make_train("dyna_q", lake, 100)
    with pytest.raises(InputError, match="step_size"):
        train(jax.random.key(0), dataclasses.replace(AGENTS["dyna_q"].config, step_size=0.0))
