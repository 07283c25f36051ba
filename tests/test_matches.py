"""Games between players: results by side, agents as players, evaluations of runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from mbrl_jax import InputError, make_env, make_train, train
from mbrl_jax.__main__ import main
from mbrl_jax.agents import AgentDef
from mbrl_jax.envs import boards, tic_tac_toe
from mbrl_jax.runtime import matches, players
from mbrl_jax.runtime.evaluate import evaluate_run
from mbrl_jax.types import Agent, Schedule, config

needs_pgx = pytest.mark.skipif(not boards.available(), reason="needs pgx, of the extra `dev`")
NOTHING = (None, None)


@pytest.fixture(scope="module")
def env():
    return make_env("TicTacToe-pgx")


def play(env, pair, num, key=0, params=NOTHING, **options):
    """Games and their score, as numpy."""

    @jax.jit
    def run(key):
        games = matches.play_games(env, *pair, params, key, num, **options)
        return games, matches.score(games)

    return jax.tree.map(np.asarray, run(jax.random.key(key)))


@needs_pgx
def test_the_perfect_player_never_loses_and_draws_against_itself(env):
    perfect, uniform = players.perfect_tic_tac_toe(env), players.uniform(env)
    games, score = play(env, (perfect, perfect), 500)
    assert score.draws.tolist() == [250, 250]
    assert (games.lengths == 9).all()
    for pair, never, often in (
        ((perfect, uniform), "losses", "wins"), ((uniform, perfect), "wins", "losses")
    ):  # fmt: skip
        games, score = play(env, pair, 1_000)
        assert getattr(score, never).tolist() == [0, 0]
        by_side = getattr(score, often)
        # the perfect player wins more often where it begins
        begun, answered = by_side if pair[0] is perfect else by_side[::-1]
        assert 500 >= begun > answered > 300
        assert sum(map(sum, score)) == 1_000
        decided = games.results != 0
        # who makes the last move has won: at an odd length whoever began
        first_won = (games.lengths % 2 == 1) == (np.arange(1_000) % 2 == 0)
        np.testing.assert_array_equal(games.results[decided] > 0, first_won[decided])


@needs_pgx
def test_uniform_players_win_as_often_as_all_games_say(env):
    """The one who begins wins 58.49 % of random games, the other one 28.81 %."""
    uniform = players.uniform(env)
    games, score = play(env, (uniform, uniform), 8_000)
    shares = np.stack(score) / 4_000  # wins, draws, losses by side
    expected = [[0.5849, 0.2881], [0.1270, 0.1270], [0.2881, 0.5849]]
    np.testing.assert_allclose(shares, expected, atol=0.03)
    np.testing.assert_allclose(games.lengths.mean(), 7.6, atol=0.1)


def first_legal(env):
    return players.without_memory(lambda key, state, obs: jnp.argmax(obs["action_mask"], axis=-1))


@needs_pgx
def test_a_game_that_is_known(env):
    """Both take the first free cell: 0 1 2 3 4 5 6 ends with the diagonal 2 4 6 of who began."""
    games, score = play(env, [first_legal(env)] * 2, 5)
    assert games.lengths.tolist() == [7] * 5
    assert games.results.tolist() == [1, -1, 1, -1, 1]
    assert jax.tree.map(np.ndarray.tolist, score) == ([3, 0], [0, 0], [0, 2])
    told = jax.tree.map(float, matches.metrics(games))
    assert told == {
        "eval_return": pytest.approx(0.2), "eval_length": 7.0, "win_rate": pytest.approx(0.6),
        "loss_rate": pytest.approx(0.4),
    }  # fmt: skip
    short, score = play(env, [first_legal(env)] * 2, 4, max_moves=6)
    assert short.lengths.tolist() == [6] * 4
    assert score.draws.tolist() == [2, 2]
    truncated = make_env("TicTacToe-pgx", max_steps_in_episode=6)
    assert play(truncated, [first_legal(env)] * 2, 4)[1].draws.tolist() == [2, 2]


@needs_pgx
@pytest.mark.parametrize("id", ["ConnectFour-pgx", "Othello-pgx", "Go9x9-pgx"])
def test_every_game_is_played(id):
    env = make_env(id)
    games, score = play(env, [players.uniform(env)] * 2, 6)
    assert sum(map(sum, score)) == 6
    assert (games.lengths <= env.spec.episode_limit).all()
    assert (games.lengths >= {"ConnectFour-pgx": 7, "Othello-pgx": 9, "Go9x9-pgx": 2}[id]).all()


@config
class ScriptConfig:
    skill: float = 1.0  # probability of a perfect move
    num_envs: int = 4


def make_script(cfg, spec):
    """Plays tic-tac-toe by the table with probability `skill`, else the first legal move.

    Its memory counts its own moves of a game, which have to fit to the marks on the board.
    """
    best = tic_tac_toe.solve().best

    def act(state, memory, obs, is_first, key, t, mode):
        memory = jnp.where(is_first, 0, memory) + 1
        if mode == "random":
            return spec.random_actions(key, obs), memory, ()
        skill_key, key = jax.random.split(key)
        keys = jax.random.split(key, memory.shape[0])
        good = jax.vmap(spec.random_action)(
            keys, jnp.asarray(best)[tic_tac_toe.position(obs["obs"])]
        )
        plain = jnp.argmax(obs["action_mask"], axis=-1).astype(jnp.int32)
        skilled = jax.random.uniform(skill_key, memory.shape) < state["skill"]
        if mode == "eval":
            # what does not remember its own moves plays badly
            own = jnp.sum(obs["obs"][..., 0], axis=(1, 2)).astype(jnp.int32)
            skilled &= memory == own + 1
        return jnp.where(skilled, good, plain), memory, ()

    def update(state, key, t, n):
        return state, {"updates": n.astype(jnp.float32)}

    return Agent(
        init=lambda key: {"skill": jnp.float32(cfg.skill)},
        init_memory=lambda num: jnp.zeros(num, jnp.int32),
        act=act,
        observe=lambda state, step, extras, t: state,
        update=update,
        schedule=Schedule(cfg.num_envs, reset="delayed"),
    )


SCRIPT = AgentDef("script", "plays tic-tac-toe by its table", ScriptConfig(), make_script, {})


@needs_pgx
def test_an_agent_is_a_player_with_a_memory_of_its_own(env):
    agent = make_script(ScriptConfig(), env.spec)
    player, state = players.of_agent(agent, 0), {"skill": jnp.float32(1.0)}
    perfect = players.perfect_tic_tac_toe(env)
    for pair, params in (((player, perfect), (state, None)), ((perfect, player), (None, state))):
        _, score = play(env, pair, 100, params=params)
        assert score.draws.tolist() == [50, 50]
    _, score = play(env, (player, player), 100, params=(state, state))
    assert score.draws.tolist() == [50, 50]
    _, score = play(env, (player, player), 100, params=(state, {"skill": jnp.float32(0.0)}))
    assert score.losses.tolist() == [0, 0]
    assert (score.wins > 10).all()


RUN = {"total_steps": 64, "eval_every": 32, "eval_episodes": 40}


@needs_pgx
def test_a_run_is_evaluated_against_the_uniform_player(env, tmp_path, no_curves):
    out = tmp_path / "run"
    result = train(SCRIPT, env, seeds=2, out=out, **RUN)
    history = result.history
    for name in ("eval_return", "eval_length", "win_rate", "loss_rate", "train_return"):
        assert history[name].shape == (2, 2)
    assert (history["loss_rate"] == 0).all()
    assert (history["win_rate"] > 0.7).all()
    np.testing.assert_allclose(history["eval_return"], history["win_rate"], rtol=1e-6)
    assert ((history["eval_length"] >= 5) & (history["eval_length"] <= 9)).all()
    # the script plays itself well, and so every game is drawn
    np.testing.assert_array_equal(history["train_return"][:, 1], 0.0)
    keys = jax.random.split(jax.random.key(0), 2)
    _, same = jax.jit(jax.vmap(make_train(SCRIPT, env, **RUN)))(keys)
    np.testing.assert_array_equal(history["eval_return"], same["eval_return"])
    # a fool loses
    fool = train(SCRIPT, env, skill=0.0, **RUN).history
    assert (fool["loss_rate"] > 0.1).all()
    np.testing.assert_allclose(fool["eval_return"], fool["win_rate"] - fool["loss_rate"], atol=1e-6)


@needs_pgx
def test_an_evaluation_against_another_player(env):
    evaluate = matches.against(env, players.perfect_tic_tac_toe(env), 20)
    history = train(SCRIPT, env, evaluate=evaluate, **RUN).history
    np.testing.assert_array_equal(history["eval_return"], 0.0)
    np.testing.assert_array_equal(history["eval_length"], 9.0)
    history = train(SCRIPT, env, evaluate=evaluate, skill=0.0, **RUN).history
    assert (history["eval_return"] < -0.3).all()
    assert (history["win_rate"] == 0).all()
    agent = players.of_agent(make_script(ScriptConfig(), env.spec), 0)
    fool = {"skill": jnp.float32(0.0)}
    evaluate = matches.against(env, agent, 20, params=fool)
    history = train(SCRIPT, env, evaluate=evaluate, **RUN).history
    assert (history["eval_return"] > 0.2).all()


@needs_pgx
def test_a_folder_is_evaluated_and_listed_by_the_command_line(
    env, tmp_path, no_curves, monkeypatch, capsys
):
    out = tmp_path / "run"
    train(SCRIPT, env, out=out, **RUN)
    from mbrl_jax.agents import _MODULES, AGENTS

    monkeypatch.setitem(_MODULES, "script", "script")
    monkeypatch.setattr(type(AGENTS), "__getitem__", lambda self, name: SCRIPT)
    found = evaluate_run(out, 30)
    assert found.returns.shape == found.lengths.shape == (1, 30)
    assert set(found.returns.ravel()) <= {0.0, 1.0}
    assert found.returns.mean() > 0.7, "by results against the uniform player"
    assert main(["evaluate", str(out), "--episodes", "4"]) == 0
    assert "script on TicTacToe-pgx after 64 steps" in capsys.readouterr().out
    monkeypatch.setattr("mbrl_jax.envs.list_envs", lambda: ["CartPole-v1", "TicTacToe-pgx"])
    assert main(["list", "envs"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["TicTacToe-pgx", "(3,", "3,", "2)", "9", "actions", "limit", "9"]
    assert lines[0][:2] == ["CartPole-v1", "(4,)"]


def test_bad_input_is_refused():
    env = toys.make(toys.Doors)
    uniform = players.uniform(env)
    with pytest.raises(InputError, match=r"Doors-test has 1 player\(s\): expected a world of two"):
        matches.play_games(env, uniform, uniform, NOTHING, jax.random.key(0), 4)
    pieces = toys.make(toys.Pieces)
    with pytest.raises(InputError, match="num_games = 0: expected 1 or more"):
        matches.play_games(pieces, uniform, uniform, NOTHING, jax.random.key(0), 0)
