"""When a run is saved, and runs that go on to another total; both bit for bit."""

import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import (
    CONTINUOUS,
    SHORT,
    SMALL,
    assert_same,
    contents,
    finish,
    rows,
    saved,
    start,
    steps,
    train_until,
)

from mbrl_jax import AGENTS, InputError, make_env, train
from mbrl_jax.__main__ import main
from mbrl_jax.runtime import folder
from mbrl_jax.runtime.evaluate import evaluate_run, evaluation_keys
from mbrl_jax.runtime.folder import default_spacing, other_periods
from mbrl_jax.runtime.loop import make_program
from mbrl_jax.runtime.plan import make_plan
from mbrl_jax.runtime.train import make_job
from mbrl_jax.types import Schedule

LONG = {**SHORT, "total_steps": 500}  # 10 periods instead of 6
MIB = 2**20


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


def assert_same_results(a, b):
    assert rows(a) == rows(b)
    assert_same(saved(a), saved(b))
    config = [json.loads((out / "config.json").read_text())["run"] for out in (a, b)]
    assert config[0] == config[1]


# how often, and how many stay


@pytest.mark.parametrize(
    ("every", "keep", "left"),
    [
        (None, 3, [4, 5, 6]),
        (1, 99, [1, 2, 3, 4, 5, 6]),
        (50, 1, [6]),
        (51, 3, [2, 4, 6]),  # rounded up to two periods
        (100, 2, [4, 6]),
        (200, 3, [4, 6]),  # the end is always saved
        (10**12, 3, [6]),
    ],
)
def test_checkpoint_every_and_keep_checkpoints(every, keep, left, lake, short, tmp_path):
    out = tmp_path / "run"
    result = train("dyna_q", lake, out=out, checkpoint_every=every, keep_checkpoints=keep, **SHORT)
    assert steps(out) == left
    assert_same_results(out, short)
    assert_same(result.state, saved(short).agent)


def test_a_large_state_is_written_rarely_by_default():
    assert default_spacing(0, 20) == 1
    assert default_spacing(64 * MIB, 20) == 1
    assert default_spacing(64 * MIB + 1, 20) == 2
    assert default_spacing(640 * MIB, 100) == 10
    assert default_spacing(6400 * MIB, 100) == 25
    assert default_spacing(6400 * MIB, 3) == 1
    for size, periods in itertools.product((1, 100, 1000, 10**5), range(1, 200)):
        spacing = default_spacing(size * MIB, periods)
        written = sum(n % spacing == 0 or n == periods for n in range(1, periods + 1))
        assert written >= min(periods, 4)
        # beyond what the quarters ask for: 64 MiB for an evaluation
        assert written <= max(7, periods * 64 / size + 1)


def test_the_default_counts_the_state_of_all_seeds(lake, tmp_path, monkeypatch):
    job = make_job("dyna_q", lake, 400, 2, 0, 50, 2, None, "auto", {})
    size = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(job.like()))
    for free, left in ((size, [6, 7, 8]), (size - 1, [4, 6, 8])):
        monkeypatch.setattr(folder, "FREE_BYTES", int(free))
        out = tmp_path / str(free)
        train("dyna_q", lake, out=out, **{**SHORT, "total_steps": 400})
        assert steps(out) == left


@pytest.mark.parametrize("name", ["checkpoint_every", "keep_checkpoints"])
@pytest.mark.parametrize("value", [0, -5, 2.0, True, "9"])
def test_bad_numbers(name, value, lake, tmp_path):
    with pytest.raises(InputError, match=rf"{name} = {value!r}: expected a whole number, 1"):
        train("dyna_q", lake, out=tmp_path / "run", **{name: value}, **SHORT)
    assert not list(tmp_path.iterdir())


def test_command_line(lake, short, tmp_path):
    command = "train dyna_q --env FrozenLake-misc --env-args is_slippery=false --seeds 2"
    sizes = "--total-steps 300 --eval-every 50 --eval-episodes 2"
    saving = "--checkpoint-every 100 --keep-checkpoints 2"
    out = ["--out", str(tmp_path / "run")]
    assert main([*f"{command} {sizes} {saving}".split(), *out]) == 0
    assert steps(tmp_path / "run") == [4, 6]
    assert_same_results(tmp_path / "run", short)


# between two checkpoints

# kills itself when the metrics of a period have come, before they are written
KILLED = """
import os, signal, sys
from mbrl_jax.__main__ import main
from mbrl_jax.runtime import logs

def update(self, env_steps, *args):
    if env_steps == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

logs.Display.update = update
sys.exit(main(sys.argv[2:]))
"""


def test_killed_between_two_checkpoints(lake, short, tmp_path):
    out = tmp_path / "run"
    command = "train dyna_q --env FrozenLake-misc --env-args is_slippery=false --seeds 2"
    sizes = "--total-steps 300 --eval-every 50 --eval-episodes 2 --checkpoint-every 150 --out"
    killed = start(250, *command.split(), *sizes.split(), out, script=("-c", KILLED))
    assert finish(killed)[0] == -signal.SIGKILL
    assert steps(out) == [3]
    assert rows(out)[-1][1] == "200"  # a period past the checkpoint
    # how often to save is nobody's but this process's
    train("dyna_q", lake, out=out, resume=True, checkpoint_every=100, keep_checkpoints=1, **SHORT)
    assert steps(out) == [6]
    assert_same_results(out, short)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_two_checkpoints_saves(signum, lake, short, tmp_path):
    out = tmp_path / "run"
    train_until(4, "dyna_q", lake, out=out, checkpoint_every=150, signum=signum, **SHORT)
    assert steps(out) == [3, 4]
    train("dyna_q", lake, out=out, resume=True, checkpoint_every=150, **SHORT)
    assert steps(out) == [3, 4, 6]
    assert_same_results(out, short)


def test_divergence_names_the_newest_checkpoint(lake, tmp_path, monkeypatch):
    from mbrl_jax.runtime import train as driver

    calls = []
    monkeypatch.setattr(driver, "_fault", lambda _: calls.append(0) or (len(calls) == 6 or None))
    out = tmp_path / "run"
    with pytest.raises(driver.Diverged, match=rf"by step 300, .* {out}/checkpoints/4, of step 200"):
        train("dyna_q", lake, out=out, checkpoint_every=100, **SHORT)
    assert steps(out) == [2, 4]


# another total


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
    "dqn": ("CartPole-v1", {}, {**SMALL["dqn"], "exploration_steps": 150}),
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


@pytest.mark.parametrize("agent", AGENTS)
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


# keys of an evaluation


def test_an_evaluation_repeats_no_key_of_training(short, monkeypatch):
    """Whatever the seeds: the keys of runs, and all that a run splits from its own."""
    job = make_job("dyna_q", make_env("FrozenLake-misc"), 9, 16, 0, 9, 0, None, "auto", {})
    training = set()
    for seed in range(50):
        keys = job._replace(run={"seed": seed, "seeds": 16}).keys()
        inner = jax.vmap(lambda key: jax.random.split(key, 5))(keys)
        for words in (jax.random.key_data(keys), jax.random.key_data(inner)):
            training |= {tuple(row) for row in np.asarray(words).reshape(-1, 2).tolist()}

    monkeypatch.setattr(
        "mbrl_jax.runtime.evaluate.evaluate",
        lambda *args: (jax.random.key_data(args[3]), jax.random.key_data(args[3])),
    )
    evaluating = set()
    for seed in range(20):
        words = evaluate_run(short, 2, seed).returns
        evaluating |= {tuple(row) for row in words.tolist()}
        np.testing.assert_array_equal(words, jax.random.key_data(evaluation_keys(seed, 2)))
        inner = jax.vmap(lambda key: jax.random.split(key, 3))(evaluation_keys(seed, 16))
        evaluating |= {
            tuple(r) for r in np.asarray(jax.random.key_data(inner)).reshape(-1, 2).tolist()
        }
    assert len(evaluating) == 20 * (2 + 48)
    assert not evaluating & training
