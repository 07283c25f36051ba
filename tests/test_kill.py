"""Signals to a training process: what a checkpoint has finished is never lost."""

import random
import re
import signal
import time

import numpy as np
import pytest
from helpers import assert_same, finish, rows, saved, start, steps

from mbrl_jax import train
from mbrl_jax.runtime.checkpoint import Checkpoints
from mbrl_jax.runtime.train import load_job

PERIODS, EVERY, SEEDS = 36, 25, 2
COMMAND = (
    f"train dyna_q --env FrozenLake-misc --env-args is_slippery=false --seeds {SEEDS} "
    f"--total-steps {PERIODS * EVERY} --eval-every {EVERY} --eval-episodes 2 --resume --out"
)


@pytest.fixture(scope="module")
def whole(lake, tmp_path_factory):
    """The uninterrupted run, by the program of another one."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run = {"seeds": SEEDS, "eval_every": EVERY, "eval_episodes": 2}
    train("dyna_q", lake, EVERY, seed=1, q_init=1.0, **run)
    train("dyna_q", lake, PERIODS * EVERY, out=out, checkpoint_every=PERIODS * EVERY, **run)
    return out


def newest(out):
    return max(steps(out), default=0)


def wait_for(out, period, process):
    """Returns when the checkpoint of `period` is there, or the process has ended."""
    deadline = time.monotonic() + 120
    while newest(out) < period and process.poll() is None:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.002)


def assert_whole(out):
    """The newest checkpoint restores, and metrics.csv has all rows up to it."""
    step = newest(out)
    job = load_job(out)
    checkpoints = Checkpoints(out / "checkpoints", job.run, write=False)
    assert checkpoints.newest() == step
    state = checkpoints.restore(step, job.like())
    checkpoints.close()
    assert np.isfinite(state.agent.q).all()
    header, *table = rows(out)
    until = [row for row in table if int(row[1]) <= step * EVERY]
    assert [(int(row[0]), int(row[1])) for row in until] == [
        (seed, EVERY * (period + 1)) for period in range(step) for seed in range(SEEDS)
    ]
    assert {len(row) for row in until} == {len(header)}


@pytest.mark.parametrize(
    ("kills", "periods"),
    # with checkpoints at every evaluation, and at every fourth
    [(3, 1), (3, 4), *(pytest.param(20, n, marks=pytest.mark.slow) for n in (1, 4))],
)
def test_sigkill(kills, periods, whole, tmp_path, monkeypatch):
    # JAX writes its cache in place, so a kill may leave a broken entry
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    out, dice = tmp_path / "run", random.Random(kills)
    command = [*COMMAND.split(), out, "--checkpoint-every", periods * EVERY]
    for kill in range(kills):
        process = start(*command)
        # the first while it starts, the others spread over the run, in chunks and in saves
        wait_for(out, 24 * kill // kills, process)
        time.sleep(dice.uniform(0, 0.2 / periods if kill else 3.0))
        finished = newest(out)
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
        assert newest(out) >= finished
        if finished:
            assert_whole(out)
    code, _, err = finish(start(*command))
    assert code == 0, err
    assert rows(out) == rows(whole)
    assert steps(out) == [PERIODS - 2 * periods, PERIODS - periods, PERIODS]
    assert_same(saved(out), saved(whole))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_by_a_signal(signum, code, whole, tmp_path):
    out = tmp_path / "run"
    process = start(*COMMAND.split(), out)
    wait_for(out, 2, process)
    process.send_signal(signum)
    returned, _, err = finish(process)
    assert returned == code, err
    done = newest(out)
    assert 2 <= done < PERIODS
    last = err.splitlines()[-1]
    assert last == (
        f"stopped by {signal.Signals(signum).name} at step {done * EVERY:,}, saved in {out}; "
        "go on with the same command and --resume"
    )
    assert all(re.match(r"step [\d,]+ of 900 \| ", line) for line in err.splitlines()[:-1])
    assert_whole(out)
    assert rows(out) == rows(whole)[: 1 + SEEDS * done]
