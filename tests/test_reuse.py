"""A process compiles a kind of run once, and what it reuses has the bits of a program made anew."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, assert_same_results, train_until
from test_own_agents import counted

from mbrl_jax import AGENTS, make_env, train
from mbrl_jax.runtime.train import make_job, traced

RUN = {"total_steps": 60, "seeds": 2, "eval_every": 20, "eval_episodes": 1, "eval_max_steps": 9}
COMPILED, TRACED = (
    f"/jax/core/compile/{name}_duration" for name in ("backend_compile", "jaxpr_trace")
)


@pytest.fixture
def programs():
    """What was traced and compiled since it was last asked: (traces, programs)."""
    heard = []

    def listen(event, duration, **kwargs):
        heard.append(event)

    def since():
        counts = heard.count(TRACED), heard.count(COMPILED)
        heard.clear()
        return counts

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield since
    jax.monitoring.unregister_event_duration_listener(listen)


def test_another_run_of_the_kind_compiles_nothing(lake, programs, tmp_path):
    first = train("dyna_q", lake, **RUN)
    assert programs()[1] > 1
    results = []
    for changed in (
        {},
        {"seed": 5},
        {"step_size": 0.3, "q_init": 1.0},
        {"total_steps": 100},
        {"seed_mode": "vmap"},  # which auto takes
    ):
        results.append(train("dyna_q", lake, **{**RUN, **changed}))
        assert programs() == (0, 0), changed
    train("dyna_q", make_env("FrozenLake-misc", is_slippery=False), **RUN)
    assert programs() == (0, 0)
    assert_same(results[0].history, first.history)
    assert_same(results[0].state, first.state)
    for other in results[1:3]:
        assert any(
            not np.array_equal(other.history[name], column, equal_nan=True)
            for name, column in first.history.items()
        )
    np.testing.assert_array_equal(
        results[3].history["eval_length"][:, :3], first.history["eval_length"]
    )

    train("dyna_q", lake, **RUN, seed=3, q_init=1.0, out=tmp_path / "whole")
    programs()
    folder = {**RUN, "seed": 3, "q_init": 1.0, "out": tmp_path / "run"}
    train_until(2, "dyna_q", lake, **folder)
    result = train("dyna_q", lake, **folder, resume=True)
    assert programs()[1] == 0
    assert_same_results(tmp_path / "run", tmp_path / "whole")

    jax.clear_caches()
    anew = train("dyna_q", lake, **RUN, seed=3, q_init=1.0)
    assert programs()[1] > 1
    assert_same(result.state, anew.state)
    assert_same(train("dyna_q", lake, **RUN).state, first.state)


def judge(agent, state, key, t):
    return {"eval_return": jnp.mean(state.q)}


def job_of(changed, env, agent="dyna_q"):
    run = {"seed_mode": "auto", "evaluate": None, "seed": 0, **RUN, **changed}
    fields = {name: run.pop(name) for name in ("planning_steps", "planning") if name in run}
    return make_job(agent, env, overrides=fields, **run)


@pytest.mark.parametrize(
    "changed",
    [
        {"planning_steps": 3},
        {"planning": "batched"},
        {"eval_every": 30},
        {"eval_episodes": 2},
        {"eval_max_steps": 8},
        {"evaluate": judge},
        {"seeds": 8},
        {"seed_mode": "map"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_kind_is_another_program(changed, lake):
    ours, other = job_of({}, lake).functions()[1], job_of(changed, lake).functions()[1]
    assert ours is not other
    # neither takes the other's place
    assert ours is job_of({}, lake).functions()[1]
    assert other is job_of(changed, lake).functions()[1]


def test_worlds_and_agents_are_told_apart_by_identity(lake):
    """Worlds that differ in a number alone, or in nothing, and agents of one name."""
    ours = job_of({}, lake).functions()[1]
    short = dataclasses.replace(lake.params, max_steps_in_episode=3)
    assert ours is not job_of({}, dataclasses.replace(lake, params=short)).functions()[1]
    assert ours is not job_of({}, dataclasses.replace(lake)).functions()[1]
    definition = AGENTS["dyna_q"]
    assert ours is job_of({}, lake, definition._replace(presets={})).functions()[1]
    mine = definition._replace(make=lambda config, spec: definition.make(config, spec))
    assert ours is not job_of({}, lake, mine).functions()[1]


def test_flags_of_jax_are_another_program(lake):
    definition, traces = counted(AGENTS["dyna_q"])
    job = job_of({}, lake, definition)
    config, counts = traced(job.config), []

    def trace():
        job.functions()[1].eval_shape(job.like(), config, np.int32(0))
        counts.append(len(traces))

    trace()
    trace()
    with jax.default_matmul_precision("highest"):
        trace()
    assert 0 < counts[0] == counts[1] < counts[2]
    with jax.debug_nans(True):  # which `jax.jit` does not compare
        assert job.functions()[1] is not job_of({}, lake, definition).functions()[1]


def test_few_kinds_are_kept(lake):
    """Whoever goes through hundreds of worlds does not hold them all."""
    worlds = []
    for _ in range(20):
        env = dataclasses.replace(lake)
        job_of({}, env, "q_learning").functions()
        worlds.append(weakref.ref(env))
        del env
    gc.collect()
    assert 1 <= sum(world() is not None for world in worlds) <= 8
