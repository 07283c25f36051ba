"""The experiments at a tiny size: their files are whole, their numbers are possible."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import gymnax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import dreamer_gymnax
import dreamer_predictions
import dreamer_sweep
import dyna_frozenlake
import dyna_mazes
import learning
import mbpo_ablation
import model_based
import model_error
import model_free
import muzero_ablation
import muzero_gymnax
import sample_efficiency
from common import per_episode

import mbrl_jax
from mbrl_jax import envs

nan = np.nan


def saved(out, name, figures):
    """The tables of `name`.json, once its figures and its record are checked."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for figure in figures:
        assert (out / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        for suffix in ("png", "svg"):
            assert 5_000 < (out / f"{figure}.{suffix}").stat().st_size < 200_000
    whole = json.loads((out / f"{name}.json").read_text(), parse_constant=refuse)
    assert {"versions", "device", "date", "command", "wall_seconds"} <= whole["made"].keys()
    assert whole["made"]["settings"]["seeds"] > 0
    for rows in whole["tables"].values():
        for row in rows.values():
            for cell in row.values():
                assert isinstance(cell, int | float) or cell["low"] <= cell["point"] <= cell["high"]
    return whole["tables"]


def test_episodes_from_steps():
    history = {
        "train_episodes": np.array([[0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1], [0] * 6], np.float32),
        "train_length": np.array(
            [[nan, 2, nan, nan, 3, 1], [nan, nan, nan, nan, nan, 6], [nan] * 6], np.float32
        ),
    }
    expected = [[2, 3], [6, nan], [nan, nan]]
    np.testing.assert_array_equal(per_episode(history, "train_length", 2), expected)
    assert per_episode(history, "train_length", 5)[0].tolist()[:3] == [2, 3, 1]


def test_episodes_after_the_first_goal():
    success = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]], float)
    after = dyna_frozenlake.after_first_goal(success, 3)
    np.testing.assert_array_equal(after, [[1, 0, 1], [nan, nan, nan], [0, nan, nan]])
    episodes, rates = dyna_frozenlake.binned(np.arange(8.0).reshape(2, 4), 2)
    assert episodes.tolist() == [2, 4]
    assert rates.tolist() == [[0.5, 2.5], [4.5, 6.5]]


def test_frozenlake_from_the_command_line(tmp_path):
    command = [sys.executable, dyna_frozenlake.__file__, "--seeds", "4", "--planning", "5"]
    done = subprocess.run(
        [*command, "--out", "results"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "first goal episode" in done.stdout
    figures = ["dyna_frozenlake", "dyna_frozenlake_after_goal"]
    tables = saved(tmp_path / "results", "dyna_frozenlake", figures)
    assert len(list((tmp_path / "results").iterdir())) == 5
    (row,) = tables["FrozenLake 4x4, not slippery"].values()
    assert row["success in the 10 episodes after it"]["point"] > 0.3
    assert row["success in the last 100 episodes"]["point"] > 0.8
    assert row["seeds with all these episodes"] == 4
    luck = tables["exact"]["random walk"]["success of an episode"]
    assert luck == pytest.approx(0.0139, abs=5e-5)


def test_too_few_steps_for_the_episodes(tmp_path):
    with pytest.raises(SystemExit, match=r"2 of 2 seeds had fewer than 500 episodes in 300 steps"):
        dyna_frozenlake.main(seeds=2, out=tmp_path, total_steps=300, planning=(0,))


def test_dyna_maze(tmp_path):
    dyna_mazes.fig8_2(tmp_path, seeds=4, planning={0: 14_000, 5: 8_000})
    tables = saved(tmp_path, "fig8_2", ["fig8_2"])
    plain, planned = tables["Figure 8.2, steps per episode"].values()
    assert planned["last 10"]["point"] == pytest.approx(16.7, abs=1.5)
    assert planned["episode 3"]["point"] < plain["episode 3"]["point"]
    assert plain["seeds with episodes missing"] == planned["seeds with episodes missing"] == 0
    exact = {name: row["steps per episode"] for name, row in tables["exact"].items()}
    assert exact["random walk"] == pytest.approx(869, abs=0.5)
    assert exact["ε-greedy optimum"] == pytest.approx(15.88, abs=5e-3)
    assert exact["optimum"] == pytest.approx(14)


@pytest.mark.slow
def test_prioritised_sweeping(tmp_path):
    dyna_mazes.sweeping(tmp_path, seeds=8, budgets={1: 3000})
    (row,) = saved(tmp_path, "sweeping", ["sweeping"]).popitem()[1].values()
    assert row["prioritised sweeping: seeds solved"]["point"] > 0.5
    updates, steps = (row[f"Dyna-Q: {what}"] for what in ("updates", "environment steps"))
    assert updates["point"] == pytest.approx(6 * steps)
    # no step makes more updates than it has planning steps
    sweeps = row["prioritised sweeping: updates"]["point"]
    assert 0 < sweeps <= 5 * row["prioritised sweeping: environment steps"]


@pytest.mark.slow
def test_moving_maze(tmp_path):
    dyna_mazes.fig8_4(tmp_path, seeds=8, agents=("Dyna-Q", "Dyna-Q+, κ = 1e-3"))
    tables = saved(tmp_path, "fig8_4", ["fig8_4"])
    for row in tables["Figure 8.4: blocking maze, cumulative reward"].values():
        assert 0 < row["reward at the switch"]["point"] < 89
        assert row["reward at the switch"]["point"] <= row["at the end"]["point"] < 201
    exact = tables["exact ε-greedy optimum"]
    assert exact["before"]["reward per 1000 steps"] == pytest.approx(88.8, abs=0.05)
    assert exact["after"]["reward per 1000 steps"] == pytest.approx(55.8, abs=0.05)


def test_model_free_rows_merge_and_redraw(tmp_path):
    first, second = "ppo Pendulum-v1 512", "sac Pendulum-v1 512 updates=4"
    file = tmp_path / "model_free_quick.json"
    quick = functools.partial(learning.Options, out=tmp_path, quick=True)
    learning.main("model_free", model_free.RUNS, quick(only=first))
    alone = json.loads(file.read_text())["runs"]
    assert list(alone) == [first]
    learning.main("model_free", model_free.RUNS, quick(only="Pendulum.*updates"))
    whole = json.loads(file.read_text())
    assert list(whole["runs"]) == [first, second]
    assert whole["runs"][first] == alone[first]
    (columns,) = whole["tables"].values()
    for record, column in zip(whole["runs"].values(), columns.values(), strict=True):
        assert np.shape(record["eval_return"]) == (2, 2)
        assert record["env_steps"][-1] <= 512
        curve, last = record["curve"], column["IQM at the end"]
        assert np.shape(list(curve.values())) == (3, 2)
        assert [last[name] for name in curve] == [values[-1] for values in curve.values()]
        assert -2000 < last["low"] <= last["point"] <= last["high"] < -200
        assert column["target met at the end"] is False
        assert column["target held from step"] is None
        assert record["made"]["settings"]["config"]["hidden"] == [16]
    assert whole["runs"][second]["made"]["settings"]["config"]["updates"] == 4
    figure = tmp_path / "model_free_quick.png"
    before = figure.read_bytes()
    figure.unlink()
    learning.main("model_free", model_free.RUNS, quick(redraw=True))
    assert figure.read_bytes() == before
    again = json.loads(file.read_text())
    assert (again["runs"], again["tables"]) == (whole["runs"], whole["tables"])


def test_model_free_runs_end_within_their_budgets():
    known = envs.list_envs()  # the robots need an extra
    scripts = (model_free, model_based, sample_efficiency, mbpo_ablation, muzero_ablation)
    everything = [run for script in scripts for run in script.RUNS if run.env in known]
    for script, agent in ((dreamer_gymnax, "dreamer"), (muzero_gymnax, "muzero")):
        everything += [run for run in script.RUNS if run.agent == agent]
    for run in everything:
        exact = learning.fitted(run, {})
        assert 0.97 * run.total_steps < exact.total_steps <= run.total_steps
        assert exact.eval_every <= 1.05 * run.eval_every
    with pytest.raises(SystemExit, match="matches no row; there are\n  dqn CartPole-v1 100000\n"):
        # without --long
        learning.main("model_free", model_free.RUNS, learning.Options(only="ppo Breakout"))
    short = model_free.RUNS[0]._replace(total_steps=1001)
    with pytest.raises(SystemExit, match="first update is at step 1016, past the budget"):
        learning.fitted(short, {"num_envs": 4, "warmup_steps": 1000, "steps_per_update": 4})


def test_dreamer_takes_part_in_all_of_gymnax():
    """With one configuration; only MNIST's bandit is left out, which downloads its pictures."""
    own = [run for run in dreamer_gymnax.RUNS if run.agent == "dreamer"]
    kinds = ("-bsuite", "-MinAtar", "-misc", "Pole-v1", "Pendulum-v1", "Acrobot-v1", "Car-v0")
    theirs = {name for name in gymnax.registered_envs if name.endswith(kinds)}
    assert theirs - {run.env for run in own} == {"MNISTBandit-bsuite"}
    assert all(run.overrides is learning.SMALL_DREAMER for run in own)
    for run in own:
        peers = [one for one in dreamer_gymnax.RUNS if one.env == run.env and one is not run]
        assert [one.total_steps for one in peers] == 2 * [run.total_steps]


def test_model_free_target_must_hold_to_the_end():
    steps = np.array([10, 20, 30])
    assert learning.held_from(steps, np.array([1.0, 2.0, 3.0]), 2.0) == 20
    assert learning.held_from(steps, np.array([2.0, 1.0, 3.0]), 2.0) == 30
    assert learning.held_from(steps, np.array([2.0, 2.0, 2.0]), 2.0) == 10
    assert learning.held_from(steps, np.array([3.0, 3.0, 1.0]), 2.0) == np.inf


@pytest.mark.slow
def test_model_error_at_a_tiny_size(tmp_path):
    model_error.main(out=tmp_path, only="Pendulum", quick=True)
    kinds = ("growth", "calibration", "disagreement", "returns")
    figures = [f"model_error_quick_pendulum_{kind}" for kind in kinds]
    tables = saved(tmp_path, "model_error_quick", figures)
    for column in tables["Pendulum-v1: quality"].values():
        errors = [column[f"MSE after {k}"]["point"] for k in model_error.DEPTHS]
        assert 0 < errors[0] < errors[-1]
        assert column["growth of the error a step"]["point"] > 1
        assert -1 <= column["rank correlation"]["point"] <= 1
        covered = [column[f"coverage of {level} %"]["point"] for level in (50, 90, 95)]
        assert 0 < covered[0] <= covered[1] <= covered[2] <= 1
    remedies = tables["Pendulum-v1: remedies"]
    kept = {name: row["transitions, of those without"] for name, row in remedies.items()}
    assert kept["none"]["point"] == 1
    assert kept["disagreement (M2AC)"]["high"] < 0.5
    error = {n: row["MSE of the transitions"]["point"] for n, row in remedies.items()}
    assert error["short rollouts (5)"] < error["none"]
    assert error["half real data"] == pytest.approx(error["none"] / 2)


@pytest.mark.slow
def test_sample_efficiency_at_a_tiny_size(tmp_path):
    rows = "Pendulum-v1 512 (SAC|MBPO)$"
    sample_efficiency.main(learning.Options(out=tmp_path, only=rows, quick=True))
    figures = [f"sample_efficiency_quick_pendulum{kind}" for kind in ("", "_seconds")]
    tables = saved(tmp_path, "sample_efficiency_quick_steps", figures)
    (columns,) = tables.values()
    assert list(columns) == ["SAC", "MBPO"]
    assert columns["SAC"]["seeds that reach it"] == "0 of 2"
    assert columns["SAC"]["median of the first step there"]["point"] is None, "never"


def test_steps_to_a_threshold_and_their_ratio():
    steps = np.array([100.0, 200.0, 300.0, 400.0])
    slow = np.array([[0, 0, 0, 1.0]] * 3)
    fast = np.array([[1.0, 0, 0, 0]] * 3)

    def row(sac, mbpo):
        curves = {"SAC": (steps, sac), "MBPO": (steps[:2], mbpo[:, :2])}
        return sample_efficiency.efficiency(curves, "SAC", 1.0)

    both = row(slow, fast)
    assert both["median of the first step there"].point == 400
    assert both["times MBPO's steps"] == (4.0, 4.0, 4.0)
    # a seed that never arrives counts as infinite on either side, not with its budget
    never = row(0 * slow, fast)
    assert never["median of the first step there"].point == np.inf
    assert never["times MBPO's steps"] == (np.inf, 4.0, np.inf)
    assert row(slow, 0 * fast)["times MBPO's steps"] == (0.0, 0.0, 2.0)
    assert row(0 * slow, 0 * fast)["times MBPO's steps"] == "undetermined"
    assert "times MBPO's steps" not in sample_efficiency.efficiency(
        {"MBPO": (steps, fast)}, "MBPO", 1.0
    )


def test_sac_takes_part_with_its_own_preset():
    for env in ("Pendulum-v1", "ContinuousCartPole-v0"):
        own = [run for run in sample_efficiency.arms(env) if run.title == "SAC, its own preset"]
        assert [(run.agent, dict(run.overrides)) for run in own] == [("sac", {})]


def test_dreamer_foretells_what_it_has_seen_the_start_of(tmp_path):
    options = dreamer_predictions.Options(out=tmp_path, quick=True)
    tables = dreamer_predictions.main(options)
    whole = json.loads((tmp_path / "dreamer_Catch-bsuite_quick.json").read_text())
    assert len(whole["made"]["settings"]["files"]) == 6
    assert all((tmp_path / name).stat().st_size for name in whole["made"]["settings"]["files"])
    # ten observations of an episode, of which two are seen
    rows = tables["Catch-bsuite"]
    assert list(rows) == [*(f"{n} steps ahead" for n in range(1, 9)), "returns"]
    assert all(0 <= row["numbers that are right"].point <= 1 for row in list(rows.values())[:8])
    assert -1 <= rows["returns"]["real"].point <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_dreamer_sees_the_ball_fall(tmp_path):
    """A trained model foretells the board for eight steps from two observations.

    A board of 50 places without its ball is 0.98 right.
    """
    options = dreamer_predictions.Options(out=tmp_path, seeds=1)
    rows = dreamer_predictions.main(options)["Catch-bsuite"]
    assert min(row["numbers that are right"].point for row in list(rows.values())[:8]) >= 0.995


def test_a_sweep_writes_every_evaluation_of_every_point(tmp_path):
    options = dreamer_sweep.Options(
        env="Catch-bsuite", out=tmp_path, quick=True, seeds=2,
        grid=("learning_rate=1e-4,1e-2", "entropy_scale=3e-4,1"),
        total_steps=60, eval_every=20, eval_episodes=2,
    )  # fmt: skip
    record = json.loads(dreamer_sweep.main(options).read_text())
    assert record["made"]["settings"]["points"] == [
        {"learning_rate": rate, "entropy_scale": scale} for rate in (1e-4, 1e-2)
        for scale in (3e-4, 1.0)
    ]  # fmt: skip
    for row in record["rows"]:
        assert np.shape(row["eval_return"]) == (4, 2)
        assert np.shape(row["total_loss"]) == (4,)
    # the points are told apart
    assert len({*record["rows"][-1]["total_loss"]}) == 4
    assert len(record["rows"]) >= 2


@pytest.mark.parametrize("text", ["learning_rate", "learning_rate=fast", "size=1", "=1"])
def test_a_grid_that_cannot_be_read_is_named(text):
    with pytest.raises(mbrl_jax.InputError, match=f"--grid {text}: expected"):
        dreamer_sweep.points((text,), ("learning_rate", "entropy_scale"))
    with pytest.raises(mbrl_jax.InputError, match="lam is there twice"):
        dreamer_sweep.points(("lam=0.5", "lam=0.9"), ("lam",))
