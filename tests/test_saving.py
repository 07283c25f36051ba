"""When a run is saved, and what it loses in between: nothing but time, bit for bit."""

import itertools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CONTINUOUS,
    SHORT,
    SMALL,
    assert_same,
    assert_same_results,
    finish,
    rows,
    saved,
    start,
    steps,
    train_until,
)

from mbrl_jax import InputError, make_env, train
from mbrl_jax.__main__ import main
from mbrl_jax.runtime import folder
from mbrl_jax.runtime.evaluate import evaluate_run, evaluation_keys
from mbrl_jax.runtime.folder import default_spacing
from mbrl_jax.runtime.train import make_job

pytestmark = pytest.mark.usefixtures("no_curves")

MIB = 2**20


@pytest.fixture(scope="module")
def short(lake, tmp_path_factory):
    """A finished run of 6 periods."""
    out = tmp_path_factory.mktemp("short") / "run"
    train("dyna_q", lake, out=out, **SHORT)
    return out


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


@pytest.mark.parametrize(
    "agent", [pytest.param(name, marks=() if name == "sac" else pytest.mark.slow) for name in SMALL]
)
def test_periods_without_an_episode_under_jax_debug_nans(agent, tmp_path):
    """The flag stops at no number of ours, and changes none."""
    env = make_env("Pendulum-v1" if agent in CONTINUOUS else "CartPole-v1", max_steps_in_episode=40)
    fields = SMALL[agent]
    warmup = fields.get("warmup_steps", 0)
    run = {**fields, "eval_every": 8, "eval_episodes": 1, "seeds": 1}
    with jax.debug_nans(True):
        strict = train(agent, env, warmup + 80, out=tmp_path / "strict", **run)
    train(agent, env, warmup + 80, out=tmp_path / "run", **run)
    assert_same_results(tmp_path / "strict", tmp_path / "run")
    ended = strict.history["train_episodes"] > 0
    assert not ended.all()
    for name in ("train_return", "train_length"):
        np.testing.assert_array_equal(np.isnan(strict.history[name]), ~ended)


def test_divergence_names_the_newest_checkpoint(lake, tmp_path, monkeypatch):
    from mbrl_jax.runtime import train as driver

    calls = []
    monkeypatch.setattr(driver, "_fault", lambda _: calls.append(0) or (len(calls) == 6 or None))
    out = tmp_path / "run"
    with pytest.raises(driver.Diverged, match=rf"by step 300, .* {out}/checkpoints/4, of step 200"):
        train("dyna_q", lake, out=out, checkpoint_every=100, **SHORT)
    assert steps(out) == [2, 4]


def test_an_evaluation_of_ones_own(lake, tmp_path):
    """Its metrics are logged, it is one of what determine a run, and is told by its name."""

    def tour(agent, state, key, t):
        return {"eval_return": jnp.mean(state.q), "tour_steps": 1.0 * t}

    def other(agent, state, key, t):
        return {"eval_return": jnp.float32(0)}

    out = tmp_path / "run"
    train_until(3, "dyna_q", lake, out=out, evaluate=tour, **SHORT)
    for wrong in (None, other):
        with pytest.raises(InputError, match=r"evaluate is .*, but the run in .* has .*tour"):
            train("dyna_q", lake, out=out, resume=True, evaluate=wrong, **SHORT)
    result = train("dyna_q", lake, out=out, resume=True, evaluate=tour, **SHORT)
    assert result.history["tour_steps"][0].tolist() == list(range(50, 301, 50))
    np.testing.assert_allclose(
        result.history["eval_return"][:, -1], np.mean(np.asarray(result.state.q), axis=1), rtol=1e-6
    )
    assert evaluate_run(out, 2).env_steps == 300


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
        "mbrl_jax.runtime.evaluate.play_episodes",
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
