"""Run folders: what they hold, interruption and resume bit for bit, damage, full disks."""

import csv
import errno
import json
import os
import shutil
import signal
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    FULL_DISK,
    SHORT,
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
from mbrl_jax.runtime import logs
from mbrl_jax.runtime.checkpoint import Checkpoints
from mbrl_jax.runtime.train import make_job, traced

COLUMNS = ["seed", "env_steps", "wall_seconds", "eval_return", "train_return"]


@pytest.fixture(scope="module")
def whole(lake, tmp_path_factory):
    """An uninterrupted run and its result."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, train("dyna_q", lake, out=out, **SHORT)


@pytest.fixture(scope="module")
def halves(lake, tmp_path_factory):
    """The same run, stopped after 3 of its 6 periods."""
    out = tmp_path_factory.mktemp("halves") / "run"
    train_until(3, "dyna_q", lake, out=out, **SHORT)
    return out


@pytest.fixture
def half(halves, tmp_path):
    """A copy of it to go on with, or to damage."""
    return shutil.copytree(halves, tmp_path / "run")


def resumed(out, lake):
    return train("dyna_q", lake, out=out, resume=True, **SHORT)


def assert_same_runs(a, b):
    assert rows(a) == rows(b)
    assert steps(a) == steps(b)
    assert_same(saved(a), saved(b))


# what a run folder holds


def test_layout(whole):
    out, result = whole
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "metrics.csv", "checkpoints", "curve.png", "curve.svg"}
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert steps(out) == [4, 5, 6]
    assert len(list((out / "checkpoints").iterdir())) == 3
    assert_same(result.state, saved(out).agent)


def test_metrics(whole):
    out, result = whole
    with (out / "metrics.csv").open() as lines:
        header, *table = csv.reader(lines)
    assert header[:5] == COLUMNS
    assert {"td_error", "backups", "eval_length", "train_episodes"} < set(header)
    assert [(int(r[0]), int(r[1])) for r in table] == [
        (seed, 50 * period) for period in range(1, 7) for seed in range(2)
    ]
    wall = [float(row[2]) for row in table]
    assert wall == sorted(wall)
    assert wall[0] > 0
    np.testing.assert_array_equal(result.history["env_steps"], 50 * np.arange(1, 7))
    for i, name in enumerate(header[3:], start=3):
        column = np.array([float(row[i] or "nan") for row in table]).reshape(6, 2).T
        np.testing.assert_array_equal(result.history[name], column)


def test_config(whole):
    out, _ = whole
    config = json.loads((out / "config.json").read_text())
    assert config["run"] == {
        "agent": "dyna_q",
        "env": "FrozenLake-misc",
        "env_args": {"cached_resets": 0, "is_slippery": False, "rescale_actions": True},
        "seed": 0,
        "eval_max_steps": None,
        "seed_mode": "auto",
        "config": logs.config_fields(AGENTS["dyna_q"].config),
        **SHORT,
    }
    for package in ("jax", "jaxlib", "gymnax", "numpy", "orbax-checkpoint"):
        assert config["made"]["versions"][package] == version(package)
    assert config["made"]["device"] == "8 x cpu"
    assert config["made"]["command"]


def test_config_holds_what_was_resolved(lake, tmp_path):
    train("dyna_q", lake, 90, out=tmp_path / "run", eval_episodes=0, step_size=1, planning_steps=0)
    run = json.loads((tmp_path / "run" / "config.json").read_text())["run"]
    assert run["eval_every"] == 4
    assert run["config"]["step_size"] == 1.0
    assert run["config"]["planning_steps"] == 0


def test_without_out(lake, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train("dyna_q", lake, **SHORT)
    assert not list(tmp_path.iterdir())
    _, other = whole
    assert_same(result.state, other.state)
    assert result.history.keys() | {"wall_seconds"} == other.history.keys()
    for name, column in result.history.items():
        np.testing.assert_array_equal(column, other.history[name])


def test_resume_needs_out(lake):
    with pytest.raises(InputError, match="resume = True: expected `out`"):
        train("dyna_q", lake, resume=True, **SHORT)


# interruption and resume

RUNS = {
    "q_learning": ("FrozenLake-misc", {"is_slippery": True}, {}),
    "dyna_q": ("FrozenLake-misc", {"is_slippery": True}, {"model": "counts"}),
    # the wall moves on both sides of the interruption: a clock that resets do not reset
    "dyna_q_plus": ("ShortcutMaze-sutton", {"switch_step": 160}, {}),
    "prioritised_sweeping": ("DynaMaze-sutton", {}, {}),
}


@pytest.mark.parametrize(
    "agent",
    [
        pytest.param("q_learning", marks=pytest.mark.slow),
        "dyna_q",
        "dyna_q_plus",
        "prioritised_sweeping",
    ],
)
def test_interrupted_and_resumed(agent, tmp_path):
    env_id, arguments, fields = RUNS[agent]
    env = make_env(env_id, **arguments)
    run = {**SHORT, "eval_max_steps": 50, **fields}
    train(agent, env, out=tmp_path / "whole", **run)
    run_on = {"out": tmp_path / "cut", "resume": True, **run}
    train_until(1, agent, env, **run_on)
    train_until(3, agent, env, signum=signal.SIGTERM, **run_on)
    assert steps(tmp_path / "cut") == [2, 3, 4]
    assert not (tmp_path / "cut" / "curve.png").exists()
    result = train(agent, env, **run_on)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    assert_same(result.state, saved(tmp_path / "whole").agent)
    assert (tmp_path / "cut" / "curve.png").exists()


def test_wall_seconds_go_on(half, lake):
    before = float((half / "metrics.csv").read_text().splitlines()[-1].split(",")[2])
    wall = resumed(half, lake).history["wall_seconds"][0]
    assert wall[2] == before
    assert np.all(np.diff(wall) >= 0)


def test_finished_run_gives_its_history(lake, whole, tmp_path, monkeypatch):
    out, result = whole
    copy = shutil.copytree(out, tmp_path / "run")
    monkeypatch.setattr(logs.Display, "update", lambda *args: pytest.fail("it trained again"))
    again = resumed(copy, lake)
    assert_same(again, result)
    assert_same_runs(copy, out)


def test_signal_handlers_come_back(lake, tmp_path):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    train_until(1, "q_learning", lake, 20, out=tmp_path / "run", eval_every=10, eval_episodes=0)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("tail", ["", "0,200,9.9,0.5", "0,200,9.9,0.5,0.", "0,2"])
def test_rows_past_the_checkpoint(tail, half, whole, lake):
    metrics = half / "metrics.csv"
    *_, last = metrics.read_text().splitlines()
    row = last.split(",")
    row[:2] = "0", "200"
    with metrics.open("a") as file:
        file.write(",".join(row) + "\n" + tail)
    resumed(half, lake)
    assert_same_runs(half, whole[0])


@pytest.mark.parametrize("text", ["", "seed,env_st", ",".join(COLUMNS) + "\n0,50,"])
def test_killed_in_the_first_rows(text, half, whole, lake):
    shutil.rmtree(half / "checkpoints")
    (half / "metrics.csv").write_text(text)
    resumed(half, lake)
    assert_same_runs(half, whole[0])


@pytest.mark.parametrize("text", ["seed,env_steps,wall_seconds\n0,fifty,0.1\n", "a\nb\n"])
def test_damaged_metrics(text, half, lake):
    (half / "metrics.csv").write_text(text)
    before = contents(half)
    with pytest.raises(InputError, match=r"metrics\.csv is damaged"):
        resumed(half, lake)
    assert contents(half) == before


# damaged, partial and foreign checkpoints


def largest(folder):
    return max(folder.rglob("*/d/*"), key=lambda path: path.stat().st_size)


def truncate(folder):
    data = largest(folder).read_bytes()
    largest(folder).write_bytes(data[: len(data) // 2])


def flip(folder):
    data = bytearray(largest(folder).read_bytes())
    data[len(data) // 2] ^= 1
    largest(folder).write_bytes(data)


def garble(name):
    return lambda folder: (folder / name).write_text("{garbage")


DAMAGE = {
    "truncated data": truncate,
    "flipped bit": flip,
    "missing data": lambda folder: largest(folder).unlink(),
    "missing folder": lambda folder: shutil.rmtree(folder / "state"),
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "metadata": garble("_CHECKPOINT_METADATA"),
    "array metadata": garble("state/_METADATA"),
    "about": garble("about/metadata"),
    "digests": garble("sha256.json"),
    "no digests": lambda folder: [
        (folder / "sha256.json").unlink(),
        garble("about/metadata")(folder),
    ],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoint(name, half, whole, lake, capfd):
    newest = half / "checkpoints" / "3"
    DAMAGE[name](newest)
    before = contents(half)
    with pytest.raises(InputError) as error:
        resumed(half, lake)
    message = str(error.value)
    assert f"checkpoint {newest} is damaged: " in message
    assert f"remove {newest} to go on from the checkpoint before it" in message
    assert "\n" not in message
    assert contents(half) == before
    assert capfd.readouterr().err == ""
    if name == "flipped bit":
        shutil.rmtree(newest)
        resumed(half, lake)
        assert_same_runs(half, whole[0])


def test_killed_before_the_digests(half, whole, lake):
    (half / "checkpoints" / "3" / "sha256.json").unlink()
    resumed(half, lake)
    assert_same_runs(half, whole[0])


def test_partial_checkpoint(half, whole, lake):
    partial = half / "checkpoints" / "4.orbax-checkpoint-tmp"
    shutil.copytree(half / "checkpoints" / "3", partial)
    truncate(partial)
    (partial / "commit_success.txt").unlink()
    resumed(half, lake)
    assert not partial.exists()
    assert_same_runs(half, whole[0])


FOREIGN = {
    "agent": ("q_learning", {"is_slippery": False}, 0),  # the shapes are the same
    "env": ("dyna_q", {"is_slippery": True}, 0),
    "seed": ("dyna_q", {"is_slippery": False}, 1),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_checkpoint(name, half, lake, tmp_path):
    agent, arguments, seed = FOREIGN[name]
    other = make_job(
        agent, make_env("FrozenLake-misc", **arguments), 300, 2, seed, 50, 2, None, "auto", {}
    )
    checkpoints = Checkpoints(half / "checkpoints", other.run)
    checkpoints.save(4, other.functions()[0](other.keys(), traced(other.config)))
    checkpoints.close()
    before = contents(half)
    with pytest.raises(InputError, match=rf"{half}/checkpoints/4 is of another run"):
        resumed(half, lake)
    assert contents(half) == before


def test_checkpoint_of_another_version(half, lake):
    state = saved(half)
    other = state._replace(agent=state.agent._replace(q=jnp.zeros((2, 65))))
    run = json.loads((half / "config.json").read_text())["run"]
    checkpoints = Checkpoints(half / "checkpoints", run)
    checkpoints.save(4, other)
    checkpoints.close()
    with pytest.raises(InputError, match=rf"{half}/checkpoints/4 is of another run"):
        resumed(half, lake)


# full disks


@pytest.mark.parametrize(("limit", "path"), [(100, "run"), (2000, "run/checkpoints/3")])
def test_full_disk(limit, path, whole, lake, tmp_path):
    out = tmp_path / "run"
    command = "train dyna_q --env FrozenLake-misc --env-args is_slippery=false --seeds 2"
    sizes = "--total-steps 300 --eval-every 50 --eval-episodes 2 --out"
    process = start(limit, *command.split(), *sizes.split(), out, script=FULL_DISK)
    code, _, err = finish(process)
    assert code == 2
    assert err.startswith(f"error: cannot write {'checkpoint ' * (limit > 100)}{tmp_path}/{path}")
    assert err.count("\n") == 1
    assert "--resume" in err
    assert steps(out) == [1, 2]
    for step in (1, 2):
        saved(out, step)
    resumed(out, lake)
    assert_same_runs(out, whole[0])


def test_full_disk_when_old_checkpoints_go(half, whole, lake, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.save", full)
        with pytest.raises(InputError, match=r"checkpoints/4: .*No space left.*--resume"):
            resumed(half, lake)
    assert steps(half) == [1, 2, 3]
    resumed(half, lake)
    assert_same_runs(half, whole[0])


def test_full_disk_at_the_start(lake, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        with pytest.raises(InputError, match=rf"cannot write {out}: No space left"):
            train("dyna_q", lake, out=out, **SHORT)
    train("dyna_q", lake, 20, out=out, eval_every=20, eval_episodes=0)


# seeds


def test_keys_do_not_depend_on_the_number_of_seeds(lake):
    jobs = {n: make_job("dyna_q", lake, 9, n, 3, 9, 0, None, "auto", {}) for n in (1, 2, 5, 16)}
    words = {n: np.asarray(jax.random.key_data(job.keys())) for n, job in jobs.items()}
    for n in (1, 2, 5):
        np.testing.assert_array_equal(words[n], words[16][:n])
    assert len(np.unique(words[16], axis=0)) == 16


def test_seed_modes_agree(lake, whole):
    _, batch = whole
    turns = train("dyna_q", lake, seed_mode="map", **{**SHORT, "seeds": 3})
    assert_same(jax.tree.map(lambda x: x[:2], turns.state), batch.state)
    for name, column in turns.history.items():
        expected = batch.history[name]
        np.testing.assert_array_equal(column if name == "env_steps" else column[:2], expected)
