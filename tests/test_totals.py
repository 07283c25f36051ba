"""Runs that go on to another total, bit for bit as the longer run would have gone."""

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import (
    CONTINUOUS,
    SHORT,
    SMALL,
    assert_same,
    assert_same_results,
    contents,
    saved,
    steps,
    train_until,
)

from mbrl_jax import AGENTS, InputError, make_env, train
from mbrl_jax.runtime.evaluate import evaluate_run
from mbrl_jax.runtime.folder import other_periods
from mbrl_jax.runtime.loop import make_program
from mbrl_jax.runtime.plan import make_plan
from mbrl_jax.types import Schedule

pytestmark = pytest.mark.usefixtures("no_curves")

LONG = {**SHORT, "total_steps": 500}  # 10 periods instead of 6


@pytest.fixture(scope="module")
def short(lake, tmp_path_factory):
    """A finished run of 6 periods."""
    out = tmp_path_factory.mktemp("short") / "run"
    train("dyna_q", lake, out=out, **SHORT)
    return out


@pytest.fixture(scope="module")
def long(lake, tmp_path_factory):
    """The same run, of 10 periods from the start."""
    out = tmp_path_factory.mktemp("long") / "run"
    train("dyna_q", lake, out=out, **LONG)
    return out


@pytest.fixture
def run(short, tmp_path):
    return shutil.copytree(short, tmp_path / "run")


@pytest.mark.parametrize(("cut", "eval_every"), [(None, None), (None, 50), (4, None)])
def test_a_larger_total(cut, eval_every, lake, short, long, tmp_path):
    out = tmp_path / "run"
    if cut is None:
        shutil.copytree(short, out)
    else:
        train_until(cut, "dyna_q", lake, out=out, **SHORT)
    made = json.loads((out / "config.json").read_text())["made"]
    result = train("dyna_q", lake, out=out, resume=True, **{**LONG, "eval_every": eval_every})
    assert_same_results(out, long)
    assert_same(result.state, saved(long).agent)
    assert steps(out) == [8, 9, 10]
    assert result.history["env_steps"].tolist() == list(range(50, 501, 50))
    assert json.loads((out / "config.json").read_text())["made"] == made
    assert evaluate_run(out, 3).env_steps == 500


def test_a_larger_total_twice_and_stopped_in_between(lake, long, tmp_path):
    out, run = tmp_path / "run", {**SHORT, "eval_every": None}
    train("dyna_q", lake, out=out, **{**SHORT, "total_steps": 100})
    train_until(1, "dyna_q", lake, out=out, resume=True, **{**run, "total_steps": 250})
    assert steps(out) == [1, 2, 3]
    train("dyna_q", lake, out=out, resume=True, **{**run, "total_steps": 500})
    assert_same_results(out, long)


OTHERS = {
    "q_learning": ("FrozenLake-misc", {"is_slippery": True}, {}),
    # the wall moves after the first total
    "dyna_q_plus": ("ShortcutMaze-sutton", {"switch_step": 160}, {}),
    "prioritised_sweeping": ("DynaMaze-sutton", {}, {}),
    # epsilon falls over steps that both totals cut, and there is a warm-up
    "dqn": ("CartPole-v1", {}, {**SMALL["dqn"], "epsilon_steps": 150}),
    "ppo": ("CartPole-v1", {}, SMALL["ppo"]),
}


@pytest.mark.parametrize(
    "agent",
    [
        pytest.param(name, marks=() if name in ("dyna_q_plus", "dqn") else pytest.mark.slow)
        for name in OTHERS
    ],
)
def test_a_larger_total_with_every_kind_of_agent(agent, tmp_path):
    env_id, arguments, fields = OTHERS[agent]
    env = make_env(env_id, **arguments)
    run = {"seeds": 2, "eval_episodes": 1, "eval_max_steps": 30, **fields}
    warmup = fields.get("warmup_steps", 0)
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(agent, env, 192 + warmup, out=whole, eval_every=32, **run)
    train(agent, env, 96 + warmup, out=out, eval_every=32, **run)
    train(agent, env, 192 + warmup, out=out, resume=True, **run)
    assert_same_results(out, whole)


@pytest.mark.parametrize(
    "agent",
    [
        pytest.param(name, marks=() if name in ("dyna_q", "dqn") else pytest.mark.slow)
        for name in AGENTS
    ],
)
def test_no_agent_knows_the_total(agent):
    env = make_env("Pendulum-v1" if agent in CONTINUOUS else "FrozenLake-misc")
    if agent in SMALL and agent not in CONTINUOUS:
        env = make_env("CartPole-v1")
    definition = AGENTS[agent]
    config = definition.config_for(env.spec, **SMALL.get(agent, {}))
    programs = []
    for total in (64, 6400):
        warmup = config.warmup_steps if hasattr(config, "warmup_steps") else 0
        program = make_program(definition, env, config, total + warmup, 64, 1, 5)
        run = jax.eval_shape(program.init, jax.random.key(0), config)
        args = run, config, jax.ShapeDtypeStruct((), np.int32)
        programs.append(
            [
                program.plan._replace(periods=0),
                str(jax.make_jaxpr(program.init)(jax.random.key(0), config)),
                str(jax.make_jaxpr(program.period)(*args)),
            ]
        )
        programs[-1] = [str(part).split(" at 0x")[0] for part in programs[-1]]
    assert programs[0] == programs[1]


def test_a_smaller_total_than_the_folder_names_but_more_than_it_has_done(lake, tmp_path):
    out, four = tmp_path / "run", {**SHORT, "total_steps": 200}
    train_until(3, "dyna_q", lake, out=out, **SHORT)
    train("dyna_q", lake, out=out, resume=True, **four)
    train("dyna_q", lake, out=tmp_path / "four", **four)
    assert_same_results(out, tmp_path / "four")


@pytest.mark.parametrize("total", [250, 1])
def test_a_total_that_is_done_already(total, lake, run):
    before = contents(run)
    with pytest.raises(InputError) as error:
        train("dyna_q", lake, out=run, resume=True, **{**SHORT, "total_steps": total})
    said = str(error.value)
    assert f"total_steps = {total}" in said
    assert contents(run) == before
    if total == 250:
        assert said == (
            f"total_steps = 250: the run in {run} has done 300 steps; expected at least as many, "
            "or another --out"
        )


def test_a_total_with_other_periods(lake, run, long):
    before = contents(run)
    for changed, periods in (
        ({"total_steps": 520, "eval_every": None}, 48),  # 11 periods
        ({"total_steps": 520, "eval_every": 50}, 48),
        ({"total_steps": 520, "eval_every": 260}, 260),
    ):
        with pytest.raises(InputError) as error:
            train("dyna_q", lake, out=run, resume=True, **{**SHORT, **changed})
        assert str(error.value) == (
            f"--resume: total_steps = 520 has periods of {periods} steps, but the run in {run} has "
            "evaluated every 50; expected a total with the same periods, such as 500 or 550, and "
            "no other eval_every"
        )
        assert contents(run) == before
    train("dyna_q", lake, out=run, resume=True, **{**SHORT, "total_steps": 500})
    assert_same_results(run, long)


def test_the_totals_named_fit():
    """Whatever the agent's schedule: with a warm-up, a prefill, several environments."""
    refused = 0
    for num_envs, warmup, prefill, spu in itertools.product((1, 3), (0, 7), (0, 5), (1, 4)):
        schedule = Schedule(num_envs, warmup, spu, prefill_steps=prefill)
        for first, total in itertools.product((90, 130), range(131, 400, 9)):
            old = make_plan("agent", schedule, first, 30)
            period = num_envs * old.steps_per_period
            new = make_plan("agent", schedule, total, period)
            if new.steps_per_period == old.steps_per_period:
                continue
            refused += 1
            run = {"total_steps": total, "eval_every": num_envs * new.steps_per_period}
            said = other_periods(run, new, period, Path("run"))
            near = [int(number) for number in re.search(r"such as (\d+) or (\d+),", said).groups()]
            assert near[0] < total < near[1] == near[0] + period
            for fits in near:
                plan = make_plan("agent", schedule, fits, period)
                assert plan.steps_per_period == old.steps_per_period
                assert plan.env_steps(plan.periods - 1) == fits
    assert refused > 100


def test_checkpoints_that_bear_their_total_still_restore(lake, long, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("mbrl_jax.runtime.checkpoint._identity", lambda run: run)
        train("dyna_q", lake, out=out, **SHORT)
    about = json.loads((out / "checkpoints" / "6" / "about" / "metadata").read_text())
    assert about["run"]["total_steps"] == 300
    train("dyna_q", lake, out=out, resume=True, **LONG)
    assert_same_results(out, long)


def test_the_new_total_is_written_whole_or_not_at_all(lake, run, long, monkeypatch):
    before = (run / "config.json").read_text()

    def fails(partial, path):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fails)
        with pytest.raises(InputError, match="No space left"):
            train("dyna_q", lake, out=run, resume=True, **LONG)
    assert (run / "config.json").read_text() == before
    train("dyna_q", lake, out=run, resume=True, **LONG)
    assert_same_results(run, long)


def test_a_damaged_checkpoint_leaves_the_total(lake, run):
    shutil.rmtree(run / "checkpoints" / "6" / "state")
    before = contents(run)
    with pytest.raises(InputError, match="damaged"):
        train("dyna_q", lake, out=run, resume=True, **LONG)
    assert contents(run) == before
