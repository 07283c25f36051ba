"""The record of MBPO's runs on robots: whole, as it comes, and after a stop; runs are played."""

import dataclasses
import json
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import mbrl_jax
from mbrl_jax.agents import mbpo
from mbrl_jax.runtime.logs import MetricsFile
from mbrl_jax.runtime.train import Stopped
from mbrl_jax.types import EnvSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import mbpo_locomotion as locomotion
import records


@pytest.fixture
def played(monkeypatch):
    """`train` that writes an evaluation every 0.1 s until it is told to stop; its calls."""
    calls = []

    def train(agent, env, total_steps, *, out, resume, **arguments):
        calls.append({"agent": agent, "env": env, "resume": resume, **arguments})
        received = []
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text("{}")
        metrics, done = MetricsFile(out), records.curve(out)
        metrics.cut(total_steps)
        first = done[-1]["env_steps"] + 2_500 if done else 2_500
        seeds = np.arange(arguments["seeds"], dtype=np.float32)
        try:
            for steps in range(first, total_steps + 1, 2_500):
                time.sleep(0.1)
                metrics.append(steps, steps / 100.0, {"eval_return": steps + seeds})
                if received:
                    raise Stopped(received[0], out, steps)
        finally:
            signal.signal(signal.SIGTERM, before)

    monkeypatch.setattr(mbrl_jax, "train", train)
    return calls


def options(tmp_path, **fields):
    folders = {"out": tmp_path, "run": tmp_path / "run"}
    return locomotion.Options("HalfCheetah-v5", **folders, **fields)


def test_a_run_stops_in_time_and_the_same_command_goes_on(tmp_path, played, capsys):
    stopped = locomotion.main(options(tmp_path, total_steps=100_000, seconds=1.0))
    assert stopped == 128 + signal.SIGTERM
    path = tmp_path / "mbpo_HalfCheetah-v5_preset.json"
    first = json.loads(path.read_text())
    assert 2 < len(first["rows"]) < 40
    assert first["published"] == {"50000": 7_900, "100000": 9_500}
    assert first["seconds_per_1000_steps"] == pytest.approx(10.0)
    row = first["rows"][1]
    assert row == {
        "env_steps": 5_000,
        "wall_seconds": 50.0,
        "eval_return": [5_000.0, 5_001.0, 5_002.0, 5_003.0, 5_004.0],
    }
    # the paper's settings
    config = first["made"]["settings"]["config"]
    assert (config["updates"], config["rollout_length"], config["num_members"]) == (40, [1, 1], 7)
    assert (config["rollouts_per_step"], config["model"]["hidden"]) == (400, [200] * 4)

    assert locomotion.main(options(tmp_path, total_steps=100_000)) == 0
    assert [call["resume"] for call in played] == [False, True]
    assert "rollout_length" not in played[0]
    whole = json.loads(path.read_text())
    assert [row["env_steps"] for row in whole["rows"]] == list(range(2_500, 100_001, 2_500))
    assert whole["rows"][: len(first["rows"])] == first["rows"]


def test_the_record_grows_while_the_run_does(tmp_path, played, monkeypatch):
    seen = []
    write = records.write_whole

    def note(path, text):
        seen.append(len(json.loads(text)["rows"]))
        write(path, text)

    monkeypatch.setattr(records, "write_whole", note)
    assert locomotion.main(options(tmp_path, total_steps=75_000, seeds=2, length=20)) == 0
    assert played[0]["rollout_length"] == (20, 20)
    assert seen == sorted(seen)
    assert len(set(seen)) >= 3
    assert seen[-1] == 30
    stored = json.loads((tmp_path / "mbpo_HalfCheetah-v5_length_20.json").read_text())
    assert stored["made"]["settings"]["config"]["rollout_length"] == [20, 20]


def test_the_tiny_networks_fit_every_preset(tmp_path, played):
    for env in ("HalfCheetah-v5", "Hopper-v5", "Pendulum-v1"):
        assert locomotion.main(locomotion.Options(env, 2_500, quick=True, out=tmp_path,
                                                  run=tmp_path / env)) == 0  # fmt: skip
        names = {field.name for field in dataclasses.fields(mbpo.Config)}
        fields = {name: value for name, value in played[-1].items() if name in names}
        ends = EnvSpec("", (3,), "float32", 9, action_low=(-1.0,), action_high=(1.0,),
                       termination_fn=lambda obs, act, after: after[..., 0] > 0)  # fmt: skip
        mbpo.models(mbrl_jax.AGENTS["mbpo"].config_for(env, **fields), ends)


def test_a_curve_leaves_out_what_is_being_written(tmp_path):
    assert records.curve(tmp_path) == []
    metrics = MetricsFile(tmp_path)
    metrics.append(100, 2.0, {"eval_return": np.array([1.0, 2.0])})
    metrics.append(300, 5.0, {"eval_return": np.array([3.0, np.nan])})
    rows = records.curve(tmp_path)
    assert [row["env_steps"] for row in rows] == [100, 300]
    assert records.pace(rows) == 15.0
    assert records.pace(rows[:1]) is None
    with metrics.path.open("a") as file:
        file.write("0,500,7.0")
    assert records.curve(tmp_path) == []  # the record stays as it was


def test_a_bad_environment_leaves_no_thread_and_no_record(tmp_path):
    before = threading.active_count()
    folders = {"out": tmp_path, "run": tmp_path / "run"}
    with pytest.raises(mbrl_jax.InputError, match="CartPole"):
        locomotion.main(locomotion.Options("CartPole-v1", seconds=60.0, **folders))
    assert not list(tmp_path.glob("*.json"))
    assert threading.active_count() == before
