"""Players of games, and the true rules as a model for two of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import struct
from gymnax.environments import environment, spaces
from scipy import stats

from mbrl_jax import InputError, make_env, search
from mbrl_jax.envs import boards, tic_tac_toe
from mbrl_jax.envs.env import select
from mbrl_jax.models import latent
from mbrl_jax.models.oracle import MASKED, OracleParams, latent_oracle
from mbrl_jax.runtime import players, playouts
from mbrl_jax.runtime.matches import play_games, score

pytestmark = pytest.mark.skipif(not boards.available(), reason="needs pgx, of the extra `dev`")


@pytest.fixture(scope="module")
def env():
    return make_env("TicTacToe-pgx")


# minimax


def winner(board):
    for a, b, c in tic_tac_toe.LINES:
        if board[a] and board[a] == board[b] == board[c]:
            return board[a]
    return None


@functools.cache
def minimax(board, mark):
    """The value for the one who sets `mark` (X or O) next, and the moves that keep it."""
    if winner(board):
        return -1, frozenset()
    free = [i for i in range(9) if not board[i]]
    if not free:
        return 0, frozenset()
    other = "O" if mark == "X" else "X"
    values = {i: -minimax((*board[:i], mark, *board[i + 1 :]), other)[0] for i in free}
    best = max(values.values())
    return best, frozenset(i for i in free if values[i] == best)


def test_every_position_of_a_game_has_the_value_of_slow_minimax():
    solution = tic_tac_toe.solve()
    minimax(("",) * 9, "X")
    seen = 0
    for board in itertools.product(("", "X", "O"), repeat=9):
        count = {mark: board.count(mark) for mark in "XO"}
        if count["X"] - count["O"] not in (0, 1):
            continue
        mark = "X" if count["X"] == count["O"] else "O"
        other = "O" if mark == "X" else "X"
        if winner(board) == mark:  # whom the game would not ask
            continue
        value, best = minimax(board, mark)
        number = sum(3**i * {"": 0, mark: 1, other: 2}[cell] for i, cell in enumerate(board))
        planes = np.array([[[c == mark, c == other] for c in board]], np.float32)
        assert tic_tac_toe.position(planes.reshape(1, 3, 3, 2)) == number
        assert solution.values[number] == value
        assert set(np.flatnonzero(solution.best[number])) == best
        seen += 1
    assert seen > 5_478, "all positions that a game can reach, and more"


@functools.cache
def replay():
    """Compiled: moves [64, 9] int32, -1 for none -> the states and observations after them."""
    env, keys = make_env("TicTacToe-pgx"), jax.random.split(jax.random.key(0), 64)
    step_keys = jax.random.split(jax.random.key(1), 64)  # the rules draw nothing

    def move(carry, action):
        state, after = jax.vmap(env.step)(step_keys, carry[0], jnp.maximum(action, 0))
        return select(action >= 0, (state, after.obs), carry), None

    return jax.jit(lambda moves: jax.lax.scan(move, jax.vmap(env.reset)(keys), moves.T)[0])


def positions(rows):
    """States and observations of 64 games after the moves `rows`, which are repeated."""
    padded = [[*row, *[-1] * (9 - len(row))] for row in rows]
    return replay()(jnp.array([padded[i % len(rows)] for i in range(64)], jnp.int32))


def ask(player, state, obs, key):
    num = obs["to_play"].shape[0]

    @jax.jit
    def act(key, state, obs):
        return player.act(None, (), key, state, obs, jnp.zeros(num, bool))[0]

    action = act(key, state, obs)
    assert action.dtype == jnp.int32
    assert action.shape == (num,)
    return np.asarray(action)


def often(player, moves, key):
    """The actions of a player in one position, 3,200 times."""
    return ask(player, *jax.tree.map(lambda x: jnp.repeat(x, 50, axis=0), positions([moves])), key)


def test_the_perfect_player_takes_each_of_the_best_moves_as_often(env):
    for moves in ([], [0], [4, 1]):
        board = [""] * 9
        for i, cell in enumerate(moves):
            board[cell] = "XO"[i % 2]
        best = sorted(minimax(tuple(board), "XO"[len(moves) % 2])[1])
        drawn = often(players.perfect_tic_tac_toe(env), moves, jax.random.key(len(moves)))
        assert sorted(set(drawn)) == best
        if len(best) > 1:
            assert stats.chisquare(np.bincount(drawn, minlength=9)[best]).pvalue > 1e-4
        # all nine of an empty board draw, and a corner is answered by the middle alone
        assert len(best) == {0: 9, 1: 1}.get(len(moves), len(best))


def test_the_uniform_player_is_uniform_over_legal_moves(env):
    counts = np.bincount(often(players.uniform(env), [4, 1, 8], jax.random.key(2)), minlength=9)
    assert (counts[[4, 1, 8]] == 0).all()
    assert stats.chisquare(np.delete(counts, [4, 1, 8])).pvalue > 1e-4


# the true rules as a model


@struct.dataclass
class Turn(environment.EnvState):
    count: jax.Array
    mover: jax.Array


class Again(environment.Environment):
    """Action 1 keeps the turn, action 0 hands it over and action 2 is never legal.

    Each move earns one and its count in tenths; the fourth ends the game.
    """

    num_players = 2

    @property
    def default_params(self):
        return toys.Parameters(max_steps_in_episode=9)

    def get_obs(self, state):
        legal = jnp.array([True, True, False])
        return {"obs": state.count[None], "action_mask": legal, "to_play": state.mover}

    def reset_env(self, key, params):
        state = Turn(jnp.int32(0), jnp.int32(0), jax.random.randint(key, (), 0, 2))
        return self.get_obs(state), state

    def step_env(self, key, state, action, params):
        mover = jnp.where(action == 1, state.mover, 1 - state.mover)
        reward = 1.0 + 0.1 * state.count
        state = Turn(state.time + 1, state.count + 1, mover)
        return self.get_obs(state), state, reward, state.count >= 4, {}

    def is_truncated(self, state, params):
        return state.time >= params.max_steps_in_episode

    def observation_space(self, params):
        return spaces.Dict(
            {
                "obs": spaces.Box(0, 9, (1,)),
                "action_mask": spaces.Box(0, 1, (3,), jnp.bool_),
                "to_play": spaces.Discrete(2),
            }
        )

    def action_space(self, params=None):
        return spaces.Discrete(3)


def logits_and_values(_, obs):
    num = obs["to_play"].shape[0]
    return jnp.broadcast_to(jnp.array([0.5, -0.5, 3.0]), (num, 3)), jnp.full(num, 7.0)


def test_the_discount_is_negative_where_the_turn_changes_and_not_by_parity():
    env = toys.make(Again)
    model = latent_oracle(env, logits_and_values, 0.9)
    params = OracleParams(env.params)
    start = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 2))
    now = model.represent(params, start)
    expected = [(0, 1, 0, 1, 0), (1, 1, 0, 0, 1)]
    signs = [[-0.9, 0.9, -0.9, 0.0, 0.0], [0.9, 0.9, -0.9, 0.0, 0.0]]
    for i, actions in enumerate(zip(*expected, strict=True)):
        now, reward, discount = model.transition(params, now, jnp.array(actions), jax.random.key(i))
        np.testing.assert_allclose(discount, [row[i] for row in signs], rtol=1e-6)
        np.testing.assert_allclose(reward, 1.0 + 0.1 * i if i < 4 else 0.0, rtol=1e-6)
        logits, _ = model.evaluate(params, now)
        np.testing.assert_array_equal(logits, [[0.5, -0.5, MASKED]] * 2)
        assert now.over.all() == (i >= 3)


def test_one_player_keeps_discounts_and_masks_count():
    env = toys.make(toys.Doors)

    def evaluate(_, obs):
        return jnp.ones((obs["place"].shape[0], 3)), jnp.zeros(obs["place"].shape[0])

    model = latent_oracle(env, evaluate, 0.5)
    params = OracleParams(env.params)
    start = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 16))
    now = model.represent(params, start)
    logits, _ = model.evaluate(params, now)
    legal = np.asarray(now.obs["action_mask"])
    np.testing.assert_array_equal(logits, np.where(legal, 1.0, MASKED))
    assert not legal.all()
    _, reward, discount = model.transition(params, now, legal.argmax(axis=1), jax.random.key(1))
    assert set(np.asarray(discount)) <= {0.0, 0.5}
    assert (reward > -100).all()


def test_three_players_are_refused():
    class Three(Again):
        num_players = 3

    env = toys.make(Three)
    for build in (
        lambda: latent_oracle(env, logits_and_values, 1.0),
        lambda: playouts.playout_mcts(env, 8),
        lambda: play_games(env, *[players.uniform(env)] * 2, (None, None), jax.random.key(0), 2),
    ):
        with pytest.raises(InputError, match="Three-test has 3 player") as error:
            build()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("policy", ["muzero_policy", "gumbel_muzero_policy"])
def test_a_search_with_exact_values_finds_the_moves_of_minimax(env, policy):
    """From every position of a random game, decided ones too; values by the table at leaves."""
    values, best = (jnp.asarray(x) for x in tic_tac_toe.solve())

    def evaluate(_, obs):
        number = tic_tac_toe.position(obs["obs"])
        return jnp.zeros((number.shape[0], 9)), values[number].astype(jnp.float32)

    model = latent_oracle(env, evaluate, 1.0)
    params = OracleParams(env.params)
    options = {"dirichlet_fraction": 0.0, "temperature": 0.0, "qtransform": playouts.by_results}
    if policy == "gumbel_muzero_policy":
        options = {"gumbel_scale": 0.0}

    @jax.jit
    def plan(key, state, obs):
        root = latent.search_root(model, params, (state, obs))
        return getattr(search, policy)(
            params, key, root, latent.recurrent_fn(model), 32, ~obs["action_mask"], **options
        )

    rng = np.random.default_rng(0)
    rows = [rng.permutation(9)[: 1 + i % 6].tolist() for i in range(64)]
    state, obs = positions(rows)
    advised = plan(jax.random.key(1), state, obs)
    legal = np.asarray(obs["action_mask"])
    live = legal.any(axis=1)
    assert 32 < live.sum() < 64
    good = np.asarray(best)[tic_tac_toe.position(obs["obs"])]
    assert good[np.arange(64), advised.action][live].all()
    assert (np.asarray(advised.action_weights)[~legal & live[:, None]] == 0).all()


# playouts


def test_a_playout_is_seen_by_the_player_to_move(env):
    """Positions from which every game ends alike."""
    rows = [
        # X X O / O O X / X . .: nobody can win any more
        ([0, 2, 1, 3, 5, 4, 6], 0.0),
        ([0, 2, 1, 3, 5, 4, 6, 7], 0.0),
        # the game is over
        ([0, 3, 1, 4, 2], 0.0),
        # X X O / O X X / O O .: the last cell completes X's diagonal
        ([0, 2, 1, 3, 4, 6, 5, 7], 1.0),
    ]
    state, obs = positions([moves for moves, _ in rows])
    result = jax.jit(lambda *x: playouts.playout(env, jax.random.key(0), *x))(state, obs)
    expected = [rows[i % len(rows)][1] for i in range(64)]
    np.testing.assert_array_equal(result, expected)


def test_playouts_have_the_mean_of_all_random_games(env):
    """X wins 58.49 % and O 28.81 % of uniformly random games, seen by X and by O."""
    start = positions([[], [0]])
    state, obs = jax.tree.map(lambda x: jnp.repeat(x, 300, axis=0), start)
    run = jax.jit(lambda *x: playouts.playout(env, jax.random.key(1), *x))
    result = np.asarray(run(state, obs)).reshape(64, 300)
    empty, corner = result[::2], result[1::2]
    assert abs((empty == 1).mean() - 0.5849) < 0.02
    assert abs((empty == -1).mean() - 0.2881) < 0.02
    # a corner is better than most first moves
    assert (corner == -1).mean() > 0.58
    assert (corner == 1).mean() < 0.31


def test_a_playout_follows_the_turn_and_not_parity():
    """Rewards 1, 1.1, 1.2, 1.3 of whoever moves; a uniform move keeps the turn half the time."""
    env = toys.make(Again)
    num = 4_000
    state, obs = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), num))
    result = np.asarray(playouts.playout(env, jax.random.key(1), state, obs))
    exact = {
        round(1 + sum(s * r for s, r in zip(signs, (1.1, 1.2, 1.3), strict=True)), 4)
        for signs in itertools.product((1, -1), repeat=3)
    }
    assert {round(float(x), 4) for x in result} == exact
    assert abs(result.mean() - 1.0) < 0.15


TACTICS = [
    # the moves so far, and the one to find
    ([0, 3, 1, 4], 2),  # X completes a row
    ([0, 3, 8, 4], 5),  # X blocks a row
    ([8, 0, 5, 1], 2),  # X does both
    ([0, 3, 1, 4, 8], 5),  # O completes a row rather than blocking
    ([0, 4, 1], 2),  # O blocks a row
]


def test_monte_carlo_search_wins_at_once_and_blocks_at_once(env):
    """As either player, and several times each."""
    state, obs = positions([moves for moves, _ in TACTICS])
    assert set(np.asarray(obs["to_play"])) == {0, 1}
    action = ask(playouts.playout_mcts(env, 200), state, obs, jax.random.key(0))
    assert action.tolist() == [TACTICS[i % len(TACTICS)][1] for i in range(64)]


def test_monte_carlo_search_beats_the_uniform_player(env):
    pair = playouts.playout_mcts(env, 200), players.uniform(env)
    games = jax.jit(lambda key: play_games(env, *pair, (None, None), key, 200))(jax.random.key(1))
    won = score(games).wins
    assert won.sum() >= 180
    assert (won >= 80).all(), "from either side"


def test_monte_carlo_search_plays_alone_too():
    """What it finds is worth more than a shut door, which costs 100."""
    env = toys.make(toys.Doors)
    player = playouts.playout_mcts(env, 32)
    state, obs = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 32))
    action, _ = jax.jit(lambda key: player.act(None, (), key, state, obs, None))(jax.random.key(1))
    assert jnp.take_along_axis(obs["action_mask"], action[:, None], 1).all()


def test_bad_input_is_refused(env):
    for build, said in (
        (lambda: players.perfect_tic_tac_toe(make_env("ConnectFour-pgx")), "ConnectFour-pgx: exp"),
        (lambda: playouts.playout_mcts(make_env("Pendulum-v1"), 8), "expected discrete actions"),
        (lambda: playouts.playout_mcts(env, 0), "num_playouts = 0: expected 1 or more"),
    ):
        with pytest.raises(InputError, match=said) as error:
            build()
        assert "\n" not in str(error.value)
