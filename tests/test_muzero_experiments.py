"""The experiments of MuZero: their rows, and runs at a tiny size."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import learning
import muzero_ablation
import muzero_boards
import muzero_gymnax

import mbrl_jax
from mbrl_jax import envs
from mbrl_jax.envs import boards


def test_muzero_has_its_peers_at_equal_steps():
    rows = {}
    for run in muzero_gymnax.RUNS:
        rows.setdefault(run.env, []).append(run)
    games = [f"{game}-MinAtar" for game in ("Breakout", "SpaceInvaders", "Freeway", "Asterix")]
    games.append("Seaquest-MinAtar")
    assert [env for env, (own, *_) in rows.items() if own.long] == games
    for env, (own, *peers) in rows.items():
        assert own.agent == own.name == "muzero"
        assert [run.agent for run in peers] == ["ppo", "sac" if env == "Pendulum-v1" else "dqn"]
        for run in peers:
            exact = learning.fitted(run, {})
            assert exact.total_steps <= run.total_steps == own.total_steps
            assert (run.target, run.overrides) == (None, {})
    targets = {run.env: run.target for run in muzero_gymnax.RUNS if run.target is not None}
    assert {env: targets[env] for env in ("CartPole-v1", "Catch-bsuite", "Acrobot-v1")} == {
        "CartPole-v1": 475, "Catch-bsuite": 0.95, "Acrobot-v1": -100,
    }  # fmt: skip
    # what is still to come within the time limit, backwards from its end
    env = mbrl_jax.make_env("FrozenLake-misc")
    model, values = envs.tabular(env), np.zeros(16)
    for _ in range(env.spec.episode_limit):
        values = (model.reward + (model.transition - model.terminates) @ values).max(axis=1)
    best = model.start @ values
    assert pytest.approx(best, abs=5e-5) == muzero_gymnax.FROZEN_LAKE
    assert targets["FrozenLake-misc"] == pytest.approx(0.95 * best, abs=1e-3)


def test_every_part_of_muzeros_ablation_is_another_run():
    for env in muzero_ablation.WORLDS:
        own = [run for run in muzero_ablation.RUNS if run.env == env]
        assert len({run.key for run in own}) == len(own) == len(muzero_ablation.PARTS)
        found = [mbrl_jax.AGENTS["muzero"].config_for(env, **run.overrides) for run in own]
        assert len({str(config) for config in found}) == len(found)
        assert {config.num_simulations for config in found} == {2, 8, 16, 50}
        assert {config.reanalyse_policies for config in found} == {0.0, 0.5, 1.0}
        assert all(config.reanalyse_policies == config.reanalyse_values for config in found)


@pytest.mark.slow
def test_muzeros_ablation_of_one_world_at_a_tiny_size(tmp_path):
    chosen = muzero_ablation.Options(
        out=tmp_path, quick=True, env="DeepSea-bsuite", only="(base|puct)$"
    )
    path = muzero_ablation.main(chosen)
    assert path.name == "muzero_ablation_DeepSea-bsuite_quick.json"
    runs = json.loads(path.read_text())["runs"]
    assert list(runs) == [f"muzero DeepSea-bsuite 512 {title}" for title in ("base", "puct")]
    searches = [run["made"]["settings"]["config"]["search"] for run in runs.values()]
    assert searches == ["gumbel", "puct"]
    assert all(np.shape(run["eval_return"]) == (2, 2) for run in runs.values())
    saved_figure = path.with_suffix(".png")
    assert saved_figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("env", ["Pendulum-v1", "FrozenLake-misc", "Breakout-MinAtar"])
def test_muzero_on_gymnax_at_a_tiny_size(tmp_path, env):
    options = learning.Options(out=tmp_path, only=f"muzero {env}", quick=True, long=True)
    path = learning.main("muzero_gymnax", muzero_gymnax.RUNS, options)
    (record,) = json.loads(path.read_text())["runs"].values()
    assert np.shape(record["eval_return"]) == (2, 2)
    assert record["failed_seeds"] == 0


@pytest.mark.parametrize("env", boards.GAMES)
def test_the_settings_of_the_boards_fit_them(env):
    world = mbrl_jax.make_env(env)
    config = mbrl_jax.AGENTS["muzero"].config_for(world.spec)
    mbrl_jax.make_agent("muzero", world.spec, config)
    # returns reach from the first move to the last but for games of many passes, undiscounted
    passes = 2 if env in ("Othello-pgx", "Go9x9-pgx") else 1
    assert config.n_step * passes >= world.spec.episode_limit
    assert config.gamma == config.lam == 1.0
    found = [*muzero_boards.opponents(world, 4)]
    assert found == ["uniform", "playouts", "perfect"][: 3 if env == "TicTacToe-pgx" else 2]
    rates = [f"{name}_{rate}" for name in found for rate in ("win_rate", "loss_rate")]
    assert muzero_boards.measures(world) == ("eval_return", *rates)


@pytest.mark.slow
def test_muzero_plays_matches_and_tells_them_by_side(tmp_path):
    options = muzero_boards.Options(
        env="TicTacToe-pgx", out=tmp_path, run=tmp_path / "run", quick=True, seeds=2,
        total_steps=132, eval_every=66,
    )  # fmt: skip
    assert muzero_boards.main(options) == 0
    record = json.loads((tmp_path / "muzero_TicTacToe-pgx_quick.json").read_text())
    names = muzero_boards.measures(mbrl_jax.make_env(options.env))
    for row in record["rows"]:
        for win, loss in zip(names[1::2], names[2::2], strict=True):
            pairs = zip(row[win], row[loss], strict=True)
            assert all(min(pair) >= 0 and sum(pair) <= 1 for pair in pairs)
        results = np.subtract(row["perfect_win_rate"], row["perfect_loss_rate"])
        np.testing.assert_allclose(row["eval_return"], results, atol=1e-6)
    match = record["match"]
    assert match["opponent"] == "perfect"
    assert match["env_steps"] == record["rows"][-1]["env_steps"]
    assert np.shape(match["wins"]) == (2, 2)
    assert not np.any(match["wins"])
    games = np.sum([match[name] for name in ("wins", "draws", "losses")], axis=0)
    np.testing.assert_array_equal(games, np.full((2, 2), 2))
