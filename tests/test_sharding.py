"""Seeds spread over 8 devices and over 2 processes: bit for bit the unsharded runs."""

import re
import signal
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import COLLECTIVES, FULL_DISK, assert_same, finish, rows, saved, start, steps

from mbrl_jax import InputError, make_env, make_train, train
from mbrl_jax.runtime import devices
from mbrl_jax.runtime.train import make_job, traced

WORLDS = {
    "q_learning": ("FrozenLake-misc", {}),
    "dyna_q": ("FrozenLake-misc", {"is_slippery": False}),
    "dyna_q_plus": ("ShortcutMaze-sutton", {"switch_step": 100}),
    "prioritised_sweeping": ("DynaMaze-sutton", {}),
}
PLAN = {"eval_every": 50, "eval_episodes": 2, "eval_max_steps": 50}


@pytest.mark.parametrize(
    "agent",
    [
        pytest.param("q_learning", marks=pytest.mark.slow),
        pytest.param("dyna_q", marks=pytest.mark.slow),
        "dyna_q_plus",
        "prioritised_sweeping",
    ],
)
def test_eight_devices(agent):
    env_id, arguments = WORLDS[agent]
    env = make_env(env_id, **arguments)
    result = train(agent, env, 200, 16, **PLAN)
    spread = jax.tree.leaves(result.state)[0].sharding
    assert len(spread.device_set) == jax.device_count() == 8
    keys = jax.random.split(jax.random.key(0), 16)
    state, history = jax.jit(jax.vmap(make_train(agent, env, 200, **PLAN)))(keys)
    assert len(jax.tree.leaves(state)[0].sharding.device_set) == 1
    assert_same(result.state, state)
    np.testing.assert_array_equal(result.history.pop("env_steps"), history.pop("env_steps")[0])
    assert_same(result.history, history)


@pytest.mark.parametrize("mode", ["vmap", "map"])
@pytest.mark.parametrize("agent", WORLDS)
def test_no_collectives(agent, mode):
    env_id, arguments = WORLDS[agent]
    job = make_job(agent, make_env(env_id, **arguments), 200, 16, 0, 50, 2, None, mode, {})
    config = traced(job.config)
    init, chunk = job.functions()
    programs = (init.lower(job.keys(), config), chunk.lower(job.like(), config, jnp.int32(0)))
    for program in programs:
        text = program.compile().as_text()
        assert "num_partitions=8" in text
        assert not re.findall(COLLECTIVES, text)


def test_no_collectives_would_find_one():
    mesh = devices.seed_mesh(8)
    total = devices.over_seeds(lambda x: jax.lax.psum(x, "seed"), mesh, "vmap", shared=0)
    assert re.findall(COLLECTIVES, jax.jit(total).lower(jnp.ones(8)).compile().as_text())


@pytest.mark.parametrize(("seeds", "used"), [(1, 1), (3, 1), (4, 4), (6, 2), (8, 8), (12, 4)])
def test_devices_divide_the_seeds(seeds, used, monkeypatch):
    assert devices.seed_mesh(seeds).size == used
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    if seeds % 8:
        with pytest.raises(InputError, match=rf"seeds = {seeds}: expected a multiple of the 8"):
            devices.seed_mesh(seeds)


# two processes

COMMAND = (
    "train dyna_q --env FrozenLake-misc --env-args is_slippery=false --seeds 4 "
    "--total-steps 500 --eval-every 25 --eval-episodes 2 --out"
)


def two_processes(*args, **kwargs):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    joined = ("--coordinator", f"localhost:{port}", "--num-processes", 2, "--process-id")
    return [start(*args, *joined, number, **kwargs) for number in range(2)]


def finish_both(processes, seconds=120):
    try:
        return [finish(process, seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def single(lake, tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("single") / "run"
    train("dyna_q", lake, 500, 4, out, eval_every=25, eval_episodes=2)
    return out


def assert_equals_single(out, single):
    assert rows(out) == rows(single)
    assert steps(out) == steps(single)
    assert_same(saved(out), saved(single))


@pytest.mark.slow
def test_two_processes(single, tmp_path):
    out = tmp_path / "run"
    for code, _, err in finish_both(two_processes(*COMMAND.split(), out, "--cpu-devices", 2)):
        assert code == 0, err
    assert_equals_single(out, single)
    assert (out / "curve.png").exists()
    # the folder is taken now, which both processes must hear of
    ends = finish_both(two_processes(*COMMAND.split(), out, "--cpu-devices", 2))
    assert [code for code, _, _ in ends] == [2, 2]
    assert f"error: {out} holds a run" in ends[0][2]
    assert "error: process 0 has failed" in ends[1][2]
    assert_equals_single(out, single)


def test_full_disk_of_two_processes(single, tmp_path):
    out = tmp_path / "run"
    ends = finish_both(two_processes(2000, *COMMAND.split(), out, script=FULL_DISK))
    assert [code for code, _, _ in ends] == [2, 2]
    assert f"error: cannot write checkpoint {out}/checkpoints/6" in ends[0][2]
    assert "error: process 0 has failed" in ends[1][2]
    assert steps(out) == [3, 4, 5]


def test_stop_and_resume_of_two_processes(single, tmp_path):
    out = tmp_path / "run"
    processes = two_processes(*COMMAND.split(), out)
    deadline = time.monotonic() + 120
    while len(steps(out)) < 2 and all(process.poll() is None for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)  # either process stops both
    for code, _, err in finish_both(processes):
        assert code == 143, err
        assert "--resume" in err.splitlines()[-1]
    assert max(steps(out)) < 20
    for code, _, err in finish_both(two_processes(*COMMAND.split(), out, "--resume")):
        assert code == 0, err
    assert_equals_single(out, single)
