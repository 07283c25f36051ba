"""The record of Dreamer's and PPO's runs on Craftax, and their table; runs are played."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import mbrl_jax
from mbrl_jax.envs import craftax
from mbrl_jax.envs.env import Env
from mbrl_jax.runtime.logs import MetricsFile
from mbrl_jax.types import EnvSpec, check_config

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import dreamer_craftax as experiment


@pytest.fixture
def played(monkeypatch):
    """`train` and `make_env` that need no Craftax; their calls."""
    calls = []

    def make_env(env_id, **arguments):
        calls.append({"env": env_id, **arguments})
        limit = arguments.get("max_steps_in_episode", 10_000)
        return Env(None, None, EnvSpec(env_id, (1345,), "float32", limit, num_actions=17))

    def train(agent, env, total_steps, *, out, **arguments):
        calls.append({"agent": agent, "env": env.spec.id, **arguments})
        out.mkdir(parents=True)
        metrics, seeds = MetricsFile(out), arguments["seeds"]
        for steps in range(arguments["eval_every"], total_steps + 1, arguments["eval_every"]):
            greedy = steps / 100_000 + np.arange(seeds)
            learning = np.full(seeds, np.nan) if steps == arguments["eval_every"] else greedy / 2
            metrics.append(steps, steps / 1_000, {"eval_return": greedy, "train_return": learning})

    monkeypatch.setattr(mbrl_jax, "make_env", make_env)
    monkeypatch.setattr(mbrl_jax, "train", train)
    monkeypatch.setattr(craftax, "version", lambda: "1.6.1")
    return calls


def options(tmp_path, **fields):
    return experiment.Options(**{"out": tmp_path, "run": tmp_path / "run", **fields})


def test_the_record_has_the_version_and_both_returns(tmp_path, played, capsys):
    assert experiment.main(options(tmp_path, agent="ppo", seeds=4, total_steps=200_000)) == 0
    record = json.loads((tmp_path / "ppo_Craftax-Classic-Symbolic-v1.json").read_text())
    assert (record["craftax"], record["greatest_return"]) == ("1.6.1", 22)
    assert record["made"]["settings"]["config"]["hidden"] == [512] * 3
    assert record["made"]["settings"]["config"]["anneal_steps"] == 200_000
    assert [row["env_steps"] for row in record["rows"]] == [50_000, 100_000, 150_000, 200_000]
    assert record["rows"][0]["train_return"] == [None] * 4  # no episode had ended
    assert record["rows"][3]["eval_return"] == [2.0, 3.0, 4.0, 5.0]
    assert record["rows"][3]["train_return"] == [1.0, 1.5, 2.0, 2.5]
    assert record["seconds_per_1000_steps"] == pytest.approx(1.0)
    assert played[0] == {"env": "Craftax-Classic-Symbolic-v1"}
    shown = capsys.readouterr().out
    # the interquartile mean of four seeds is that of the middle two: 3.5 and 1.75 of 22
    assert "percent of 22 after 200,000 steps, craftax 1.6.1" in shown
    assert "15.9 [" in shown
    assert "8.0 [" in shown


def record(version, *rows):
    keys = ("env_steps", "eval_return", "train_return")
    return {"craftax": version, "rows": [dict(zip(keys, row, strict=True)) for row in rows]}


def test_agents_stand_beside_one_another_at_the_last_step_that_both_have_reached():
    long = record("1.6.1", (10, [1.0], [None]), (20, [11.0], [5.5]), (30, [22.0], [22.0]))
    early = record("1.7.0", (15, [2.2, 2.2], [1.1, None]), (25, [4.4, 4.4], [None, None]))
    table = experiment.compare({"dreamer": early, "ppo": long}, 22)
    assert "after 25 steps, craftax 1.6.1 and 1.7.0" in table.title
    assert [list(column.cells) for column in table.columns] == [
        ["dreamer", "ppo"],
        ["2", "1"],
        ["20.0 [20.0, 20.0]", "50.0 [50.0, 50.0]"],
        ["-", "25.0 [25.0, 25.0]"],
    ]
    # one that was stopped before the other's first evaluation
    stopped = record("1.6.1", (5, [1.1], [1.1]))
    table = experiment.compare({"dreamer": stopped, "ppo": long}, 22)
    assert list(table.columns[2].cells) == ["5.0 [5.0, 5.0]", "-"]


def test_settings(tmp_path):
    dreamer = options(tmp_path, size="25m", train_ratio=256, total_steps=300_000)
    fields = {"size": "25m", "train_ratio": 256, "buffer_size": 300_000}
    assert experiment.settings(dreamer) == fields
    held = experiment.settings(options(tmp_path, buffer_size=9_000))
    assert held["buffer_size"] == 9_000
    for agent in set(experiment.AGENTS) & set(mbrl_jax.AGENTS):
        for quick in (False, True):
            given = experiment.settings(options(tmp_path, agent=agent, quick=quick))
            config = mbrl_jax.AGENTS[agent].config_for(experiment.Options.env, **given)
            check_config(config)
            spec = EnvSpec(experiment.Options.env, (1345,), "float32", 10_000, num_actions=17)
            mbrl_jax.make_agent(agent, spec, config)


def test_a_quick_run_has_short_episodes_and_a_record_of_its_own(tmp_path, played):
    tiny = options(
        tmp_path, agent="ppo", quick=True, seeds=1, total_steps=256, eval_every=128,
        env="Craftax-Classic-Pixels-v1",
    )  # fmt: skip
    assert experiment.main(tiny) == 0
    assert played[0] == {"env": "Craftax-Classic-Pixels-v1", "max_steps_in_episode": 50}
    assert played[1]["hidden"] == (16,)
    assert [path.name for path in tmp_path.glob("*.json")] == [
        "ppo_Craftax-Classic-Pixels-v1_quick.json"
    ]


def test_without_craftax_there_is_one_line_and_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr(craftax, "version", lambda: None)
    with pytest.raises(mbrl_jax.InputError, match=r"need craftax 1\.6 or newer"):
        experiment.main(options(tmp_path, quick=True))
    assert not list(tmp_path.iterdir())
