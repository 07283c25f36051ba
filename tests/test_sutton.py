"""The mazes against the book's layouts and against a maze walker in plain Python."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl_jax.envs.classic import register_with_gymnax
from mbrl_jax.envs.sutton import BlockingMaze, DynaMaze, ShortcutMaze
from mbrl_jax.types import InputError

ROWS, COLS, GOAL = 6, 9, (0, 8)
UP, DOWN, LEFT, RIGHT = range(4)
DYNA_WALLS = {(1, 2), (2, 2), (3, 2), (4, 5), (0, 7), (1, 7), (2, 7)}
LEFT_BARRIER = {(3, col) for col in range(8)}
RIGHT_BARRIER = {(3, col) for col in range(1, 9)}
MIDDLE_BARRIER = {(3, col) for col in range(1, 8)}

# class, start, walls before and after the switch
MAZES = {
    "dyna": (DynaMaze, (2, 0), DYNA_WALLS, DYNA_WALLS),
    "blocking": (BlockingMaze, (5, 3), LEFT_BARRIER, RIGHT_BARRIER),
    "shortcut": (ShortcutMaze, (5, 3), RIGHT_BARRIER, MIDDLE_BARRIER),
}


def walk(actions, start, before, after, switch, limit):
    """Plain Python: (cell after the move, reward, terminated, truncated, next cell) per action."""
    moves = {UP: (-1, 0), DOWN: (1, 0), LEFT: (0, -1), RIGHT: (0, 1)}
    cell, steps, records = start, 0, []
    for count, action in enumerate(actions):
        walls = before if count < switch else after
        row, col = cell[0] + moves[action][0], cell[1] + moves[action][1]
        if 0 <= row < ROWS and 0 <= col < COLS and (row, col) not in walls:
            cell = (row, col)
        steps += 1
        terminated, truncated = cell == GOAL, steps >= limit
        landed = cell
        if terminated or truncated:
            cell, steps = start, 0
        index = [c[0] * COLS + c[1] for c in (landed, cell)]
        records.append((index[0], float(terminated), terminated, truncated, index[1]))
    return [np.array(column) for column in zip(*records, strict=True)]


def drive(env, state, actions, params):
    """The states and the moves along a row of actions, without reset."""

    def move(state, row):
        key, action = row
        obs, state, reward, terminated, _ = env.step_env(key, state, action, params)
        return state, (obs, reward, terminated)

    rows = jax.random.split(jax.random.key(1), len(actions)), jnp.array(actions)
    return jax.jit(lambda state, rows: jax.lax.scan(move, state, rows))(state, rows)


@pytest.mark.parametrize("name", MAZES)
def test_layout(name):
    maze, start, before, after = MAZES[name]
    env = maze()
    walls = [set(map(tuple, np.argwhere(layout).tolist())) for layout in env.walls]
    assert walls == ([before] if name == "dyna" else [before, after])
    assert env.start == start[0] * COLS + start[1]
    assert np.flatnonzero(env.goal).tolist() == [GOAL[0] * COLS + GOAL[1]]
    assert env.walls.shape[1:] == (ROWS, COLS)


@pytest.mark.parametrize("name", MAZES)
def test_random_walks_match_a_plain_walker(name):
    """Through gymnax.make, jit, vmap and scan, with automatic resets and the walls' switch."""
    register_with_gymnax()
    maze, start, before, after = MAZES[name]
    env, params = gymnax.make(f"{maze.__name__}-sutton")
    params = params.replace(max_steps_in_episode=400)
    if name != "dyna":
        params = params.replace(switch_step=1234)
    actions = np.random.default_rng(0).integers(0, 4, (3, 3000))

    def run(key, actions):
        key, reset_key = jax.random.split(key)
        obs, state = env.reset(reset_key, params)

        def step(carry, action):
            key, step_key = jax.random.split(carry[0])
            out = env.step(step_key, carry[1], action, params)
            obs, state, reward, terminated, truncated, info = out
            seen = (info["final_observation"], reward, terminated, truncated, obs)
            return (key, state), seen

        (_, last), seen = jax.lax.scan(step, (key, state), actions)
        return obs, last, seen

    keys = jax.random.split(jax.random.key(0), len(actions))
    first, last, seen = jax.jit(jax.vmap(run))(keys, jnp.array(actions))
    assert (first == start[0] * COLS + start[1]).all()
    for i, row in enumerate(actions):
        expected = walk(row.tolist(), start, before, after, switch=1234, limit=400)
        for got, want in zip(seen, expected, strict=True):
            np.testing.assert_array_equal(got[i], want)
    assert seen[2].any()
    assert seen[3].any()
    if name != "dyna":
        assert (last.clock == 3000).all()


@pytest.mark.parametrize(("maze", "switch"), [(BlockingMaze, 1000), (ShortcutMaze, 3000)])
def test_walls_move_after_exactly_switch_step_steps(maze, switch):
    env = maze()
    params = env.default_params
    assert params.switch_step == switch
    _, state = env.reset_env(jax.random.key(0), params)
    below_opening = state.replace(position=jnp.int32(4 * COLS + 8))  # (4, 8), under (3, 8)
    inside = []
    for clock in (switch - 1, switch):
        ready = below_opening.replace(clock=jnp.int32(clock))
        obs, after, *_ = env.step_env(jax.random.key(1), ready, UP, params)
        assert after.clock == clock + 1
        inside.append(int(obs) == 3 * COLS + 8)
    assert inside == ([True, False] if maze is BlockingMaze else [False, True])


def test_clock_runs_on_through_resets():
    env = BlockingMaze()
    params = env.default_params.replace(max_steps_in_episode=3, switch_step=7)
    _, state = env.reset(jax.random.key(0), params)
    clocks, times = [], []
    for key in jax.random.split(jax.random.key(1), 8):
        _, state, *_ = env.step(key, state, DOWN, params)
        clocks.append(int(state.clock))
        times.append(int(state.time))
    assert clocks == [1, 2, 3, 4, 5, 6, 7, 8]
    assert times == [1, 2, 0, 1, 2, 0, 1, 2]
    _, fresh = env.reset(jax.random.key(2), params)
    assert fresh.clock == 0
    carried = env.carry_over(state, fresh)
    assert (carried.clock, carried.time, carried.position) == (8, 0, env.start)


def test_switch_step_may_differ_under_vmap():
    env = ShortcutMaze()
    _, state = env.reset(jax.random.key(0), env.default_params)
    state = state.replace(position=jnp.int32(4 * COLS + 8), clock=jnp.int32(5))
    params = env.default_params.replace(switch_step=jnp.array([5, 6]))
    axes = env.default_params.replace(max_steps_in_episode=None, switch_step=0)
    obs, *_ = jax.vmap(env.step, (None, None, None, axes))(jax.random.key(1), state, UP, params)
    assert obs.tolist() == [3 * COLS + 8, 4 * COLS + 8]


def test_a_closing_wall_does_not_hold_the_agent():
    env = BlockingMaze()
    _, state = env.reset_env(jax.random.key(0), env.default_params)
    state = state.replace(position=jnp.int32(3 * COLS + 8), clock=jnp.int32(1000))
    landings = {
        action: int(env.step_env(jax.random.key(1), state, action, env.default_params)[0])
        for action in range(4)
    }
    here = 3 * COLS + 8
    assert landings == {UP: here - COLS, DOWN: here + COLS, LEFT: here, RIGHT: here}


@pytest.mark.parametrize(
    ("env", "path"),
    [
        (DynaMaze(), [DOWN, RIGHT, DOWN] + 3 * [RIGHT] + [UP] + 4 * [RIGHT] + 3 * [UP]),
        (BlockingMaze(), 5 * [RIGHT] + 5 * [UP]),
        (ShortcutMaze(), 3 * [LEFT] + 5 * [UP] + 8 * [RIGHT]),
    ],
)
def test_a_shortest_path_earns_one_at_the_goal(env, path):
    _, state = env.reset_env(jax.random.key(0), env.default_params)
    state, (obs, reward, terminated) = drive(env, state, path, env.default_params)
    assert reward.tolist() == [0.0] * (len(path) - 1) + [1.0]
    assert terminated.tolist() == [False] * (len(path) - 1) + [True]
    assert obs[-1] == 8
    assert state.time == len(path)
    assert not env.is_truncated(state, env.default_params)


def test_resolution_enlarges_every_cell():
    one, three = DynaMaze(), DynaMaze(resolution=3)
    np.testing.assert_array_equal(three.walls, np.kron(one.walls, np.ones((1, 3, 3), bool)))
    assert three.start == 6 * 27
    goal = three.goal.reshape(18, 27)
    assert goal[:3, 24:].all()
    assert goal.sum() == 9
    register_with_gymnax()
    env, params = gymnax.make("DynaMaze-sutton", resolution=2)
    assert env.observation_space(params).n == 4 * 54


@pytest.mark.parametrize("resolution", [0, -1, 1.5, "2"])
def test_bad_resolution_is_an_input_error(resolution):
    with pytest.raises(InputError, match="resolution"):
        DynaMaze(resolution)


@pytest.mark.parametrize("maze", [DynaMaze, BlockingMaze, ShortcutMaze])
def test_types_and_spaces(maze):
    env = maze()
    params = env.default_params
    assert env.name == f"{maze.__name__}-sutton"
    assert params.max_steps_in_episode == 2000
    assert env.action_space(params).n == env.num_actions == 4
    assert env.observation_space(params).n == 54
    obs, state = env.reset(jax.random.key(0), params)
    other_obs, _ = env.reset(jax.random.key(1), params)
    assert obs == other_obs
    next_obs, next_state, reward, terminated, truncated, info = env.step(
        jax.random.key(2), state, UP, params
    )
    assert (obs.shape, obs.dtype) == (next_obs.shape, next_obs.dtype) == ((), jnp.int32)
    assert (reward.shape, reward.dtype) == ((), jnp.float32)
    assert terminated.dtype == truncated.dtype == jnp.bool_
    assert info["discount"] == 1.0
    assert env.state_space(params).contains(next_state)
    kinds = [
        jax.tree.map(lambda leaf: (leaf.dtype, leaf.weak_type), s) for s in (state, next_state)
    ]
    assert kinds[0] == kinds[1]


def test_registering_twice_is_harmless():
    register_with_gymnax()
    register_with_gymnax()
    for name in ("DynaMaze", "BlockingMaze", "ShortcutMaze"):
        assert gymnax.registered_envs.count(f"{name}-sutton") == 1
        env, params = gymnax.make(f"{name}-sutton")
        assert env.reset(jax.random.key(0), params)[0] == env.start
