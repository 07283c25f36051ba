"""Board games against pgx itself, move by move, and against results that are known."""

import functools
import importlib.util

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from mbrl_jax import InputError, make_agent, make_env
from mbrl_jax.envs import boards, list_envs
from mbrl_jax.envs.env import reset_batch, step_batch
from mbrl_jax.envs.tic_tac_toe import LINES
from mbrl_jax.types import ArraySpec

needs_pgx = pytest.mark.skipif(not boards.available(), reason="needs pgx, of the extra `dev`")
BEYOND = 3  # moves after every game has ended
# games, planes, actions
SHAPES = {
    "TicTacToe-pgx": (64, (3, 3, 2), 9),
    "ConnectFour-pgx": (16, (6, 7, 2), 7),
    "Othello-pgx": (8, (8, 8, 2), 65),
    "Go9x9-pgx": (4, (9, 9, 17), 82),
}


@functools.cache
def random_games(id):
    """Uniformly random games without resets: first observations, and moves [steps, games, ...]."""
    env, num = make_env(id), SHAPES[id][0]

    def move(carry, key):
        state, obs = carry
        act_key, step_key = jax.random.split(key)
        action = env.spec.random_actions(act_key, obs)
        state, after = jax.vmap(env.step)(jax.random.split(step_key, num), state, action)
        return (state, after.obs), (action, after, state)

    @jax.jit
    def play(key):
        start_key, key = jax.random.split(key)
        keys = jax.random.split(start_key, num)
        state, obs = jax.vmap(env.reset)(keys)
        steps = env.spec.episode_limit + BEYOND
        return keys, obs, jax.lax.scan(move, (state, obs), jax.random.split(key, steps))[1]

    keys, *played = play(jax.random.key(0))
    return keys, *jax.tree.map(np.asarray, played)


@functools.cache
def by_pgx(id):
    """pgx's own states of the same games: the starts, and after each move."""
    import pgx

    keys, _, (actions, _, _) = random_games(id)
    world = pgx.make(boards.GAMES[id].pgx_id)

    def move(state, action):
        state = jax.vmap(world.step)(state, action)
        return state, state

    @jax.jit
    def play(keys, actions):
        start = jax.vmap(world.init)(keys)
        return start, jax.lax.scan(move, start, actions)[1]

    with jax.numpy_rank_promotion("allow"):
        return jax.tree.map(np.asarray, play(keys, actions))


@needs_pgx
@pytest.mark.parametrize("id", boards.GAMES)
def test_every_move_is_pgxs_own(id):
    _, first, (actions, after, states) = random_games(id)
    start, own = by_pgx(id)
    before = jax.tree.map(lambda x, y: np.concatenate([x[None], y[:-1]]), start, own)
    for obs, state in ((first, start), (after.obs, own)):
        assert obs["obs"].dtype == np.float32
        np.testing.assert_array_equal(obs["obs"], state.observation)
        np.testing.assert_array_equal(obs["to_play"], state.current_player)
        legal = state.legal_action_mask & ~state.terminated[..., None]
        np.testing.assert_array_equal(obs["action_mask"], legal)
    # the player who has just moved, whose reward it is; what he wins the other one loses
    mover = before.current_player[..., None]
    np.testing.assert_array_equal(after.reward, np.take_along_axis(own.rewards, mover, -1)[..., 0])
    np.testing.assert_array_equal(own.rewards.sum(axis=-1), 0.0)
    np.testing.assert_array_equal(after.terminated, own.terminated)
    jax.tree.map(np.testing.assert_array_equal, states, own)
    assert set(start.current_player) == {0, 1}, "either player begins"
    live = ~before.terminated
    legal = np.take_along_axis(before.legal_action_mask, actions[..., None], -1)[..., 0]
    assert legal[live].all()
    alternates = own.current_player != before.current_player
    assert alternates[live].all()


@needs_pgx
@pytest.mark.parametrize("id", boards.GAMES)
def test_games_end_by_their_rules_and_nothing_happens_afterwards(id):
    _, _, (_, after, states) = random_games(id)
    limit = make_env(id).spec.episode_limit
    assert limit == boards.GAMES[id].most_moves
    assert not after.truncated.any()
    assert after.terminated[limit - 1].all()
    ends = after.terminated.argmax(axis=0)
    games = np.arange(len(ends))
    gone = np.arange(len(after.reward))[:, None] > ends
    assert after.terminated[gone].all()
    assert (after.reward[gone] == 0).all()
    assert not after.obs["action_mask"][gone].any()
    assert np.count_nonzero(after.reward) <= len(games), "one reward a game, at its end"
    assert (after.reward[~gone & ~after.terminated] == 0).all()
    last = jax.tree.map(lambda x: x[ends, games], after.obs)
    very_last = jax.tree.map(lambda x: x[-1], after.obs)
    jax.tree.map(np.testing.assert_array_equal, last, very_last)
    assert (states._step_count[-1] == ends + 1).all()


def marks_in_line(planes, lines):
    """Whether a row of marks is full, [...]; planes [..., cells]."""
    return planes[..., lines].all(axis=-1).any(axis=-1)


def fours():
    lines = []
    for row in range(6):
        for column in range(7):
            for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
                cells = [(row + i * down, column + i * right) for i in range(4)]
                if all(0 <= r < 6 and 0 <= c < 7 for r, c in cells):
                    lines.append([7 * r + c for r, c in cells])
    return np.array(lines)


@needs_pgx
@pytest.mark.parametrize(("id", "lines"), [("TicTacToe-pgx", LINES), ("ConnectFour-pgx", fours())])
def test_who_completes_a_line_has_won(id, lines):
    """Told from the planes alone: after a move the mover's marks are the other one's."""
    _, first, (_, after, _) = random_games(id)
    ends = after.terminated.argmax(axis=0)
    games = np.arange(len(ends))
    planes = after.obs["obs"][ends, games].reshape(len(games), -1, 2) > 0
    won = marks_in_line(planes[..., 1], lines)
    assert not marks_in_line(planes[..., 0], lines).any()
    full = planes.any(axis=-1).all(axis=-1)
    assert (won | full).all()
    np.testing.assert_array_equal(after.reward[ends, games], won.astype(np.float32))
    # decided games of even and of odd length, each with either player as the first one
    kinds = {(int(ends[i]) % 2, int(first["to_play"][i])) for i in games[won]}
    assert len(kinds) == 4
    if id == "TicTacToe-pgx":
        assert (won & full).any(), "a win on the last cell is among them"
        assert (~won).any()


def play(id, moves, key):
    """The rewards and ends of a sequence of moves, and the last observation."""
    env = make_env(id)
    step = jax.jit(env.step)
    state, obs = jax.jit(env.reset)(key)
    first, rewards, ends = int(obs["to_play"]), [], []
    for move in moves:
        state, after = step(jax.random.key(0), state, jnp.int32(move))
        rewards.append(float(after.reward))
        ends.append(bool(after.terminated))
    return first, rewards, ends, after.obs


KNOWN = [
    ("TicTacToe-pgx", [0, 3, 1, 4, 2], 1.0),  # the first player's row
    ("TicTacToe-pgx", [0, 3, 1, 4, 8, 5], 1.0),  # the second player's
    ("TicTacToe-pgx", [0, 1, 2, 4, 3, 5, 7, 6, 8], 0.0),
    ("TicTacToe-pgx", [0, 0], -1.0),  # the cell is taken
    ("ConnectFour-pgx", [0, 1, 0, 1, 0, 1, 0], 1.0),
    ("ConnectFour-pgx", [0, 1, 0, 1, 0, 1, 2, 1], 1.0),
    ("ConnectFour-pgx", [0] * 7, -1.0),  # the column is full
    ("Othello-pgx", [64], -1.0),  # to pass where a move is legal
    ("Go9x9-pgx", [81, 81], 1.0),  # an empty board is white's by the komi, who moved last
    ("Go9x9-pgx", [0, 1, 81, 9, 0], -1.0),  # no liberty
]


@needs_pgx
@pytest.mark.parametrize(("id", "moves", "reward"), KNOWN)
def test_known_games_for_either_first_player(id, moves, reward):
    begun = set()
    for seed in range(6):
        first, rewards, ends, obs = play(id, moves, jax.random.key(seed))
        assert rewards == [0.0] * (len(moves) - 1) + [reward]
        assert ends == [False] * (len(moves) - 1) + [True]
        assert not obs["action_mask"].any()
        begun.add(first)
        if len(begun) == 2:
            return
    raise AssertionError("one player alone has begun")


@needs_pgx
@pytest.mark.parametrize("delayed", [False, True])
def test_games_follow_each_other_in_a_batch(delayed):
    env, num, steps = make_env("TicTacToe-pgx"), 6, 60

    def move(batch, key):
        act_key, key = jax.random.split(key)
        return step_batch(env, key, batch, env.spec.random_actions(act_key, batch.obs))

    @jax.jit
    def run(key):
        batch = reset_batch(env, key, num, delayed)
        return jax.lax.scan(move, batch, jax.random.split(key, steps))[1]

    step = jax.tree.map(np.asarray, run(jax.random.key(3)))
    over = step.terminated
    assert over.any(axis=0).all()
    assert not step.truncated.any()
    # a first observation is an empty board, and either player begins
    assert (step.obs["obs"][step.is_first] == 0).all()
    assert step.obs["action_mask"][step.is_first].all()
    assert set(step.obs["to_play"][step.is_first]) == {0, 1}
    assert (step.obs["obs"][~step.is_first].sum(axis=(1, 2, 3)) > 0).all()
    # the true successor of the last move is seen, and nothing is legal in it
    assert not step.next_obs["action_mask"][over].any()
    marks = (step.obs["obs"] > 0).sum(axis=(2, 3, 4))
    live = ~step.is_last
    assert ((step.next_obs["obs"] > 0).sum(axis=(2, 3, 4)) == marks + 1)[live].all()
    assert (step.next_obs["to_play"] == 1 - step.obs["to_play"])[live].all()
    assert (step.reward[over] >= 0).all(), "who moves last has won or drawn"
    assert (step.reward[over] == 1).any()
    assert (step.reward[~over] == 0).all()
    if not delayed:
        assert not step.is_last.any()
        np.testing.assert_array_equal(step.is_first[1:], over[:-1])
        return
    np.testing.assert_array_equal(step.is_last[1:], over[:-1])
    np.testing.assert_array_equal(step.is_first[1:], step.is_last[:-1])
    assert not step.obs["action_mask"][step.is_last].any()
    assert (step.action[step.is_last] == 0).all()
    assert (step.next_obs["obs"][step.is_last] == 0).all()


@needs_pgx
def test_a_smaller_limit_truncates_without_a_result():
    env = make_env("TicTacToe-pgx", max_steps_in_episode=4)
    assert env.spec.episode_limit == 4
    step = jax.jit(env.step)
    state, _ = env.reset(jax.random.key(0))
    for i, move in enumerate([0, 3, 1, 4]):
        state, after = step(jax.random.key(1), state, jnp.int32(move))
        assert bool(after.truncated) == (i == 3)
        assert not after.terminated
        assert after.reward == 0
    assert after.obs["action_mask"].tolist() == [False, False, True, False, False] + [True] * 4


@needs_pgx
@pytest.mark.parametrize("id", boards.GAMES)
def test_a_spec_describes_the_observations_and_the_moves(id):
    spec, (_, planes, actions) = make_env(id).spec, SHAPES[id]
    assert (spec.id, spec.num_actions, spec.num_players) == (id, actions, 2)
    assert dict(spec.obs_parts) == {
        "action_mask": ArraySpec((actions,), "bool"),
        "obs": ArraySpec(planes, "float32"),
        "to_play": ArraySpec((), "int32", 2),
    }
    assert id in list_envs()
    make_env(id)
    base, _ = gymnax.make(id)
    assert base.name == id


@needs_pgx
@pytest.mark.parametrize("id", boards.GAMES)
@pytest.mark.parametrize(
    "name",
    ["q_learning", "dyna_q", "prioritised_sweeping", "dqn", "ppo", "sac", "pets", "mbpo",
     "dreamer"],
)  # fmt: skip
def test_agents_that_play_alone_refuse_in_one_line(id, name):
    said = f"{id} has 2 players; take another agent"
    with pytest.raises(InputError, match=said) as error:
        make_agent(name, make_env(id).spec)
    assert "\n" not in str(error.value)


def test_without_pgx_the_error_says_what_to_install(monkeypatch):
    def find_spec(name):
        assert name == "pgx"

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr("mbrl_jax.envs.locomotion.available", lambda: True)
    assert not boards.available()
    assert not set(boards.GAMES) & set(list_envs())
    for id in boards.GAMES:
        with pytest.raises(InputError) as error:
            make_env(id, max_steps_in_episode=77)
        for part in (id, "pgx", "not installed", "pip install 'mbrl-jax[envs]'"):
            assert part in str(error.value)
        assert "\n" not in str(error.value)


class Turnless(toys.Doors):
    num_players = 2


def test_two_players_without_turns_are_refused():
    with pytest.raises(InputError, match="2 players: expected a dict of observations with to_play"):
        toys.make(Turnless)
