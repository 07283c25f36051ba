"""Exact tables against numbers solved elsewhere and against Gymnasium's own tables."""

import numpy as np
import pytest
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv

from mbrl_jax.envs import tables
from mbrl_jax.envs.registry import make_env
from mbrl_jax.envs.tables import hitting_time, policy_evaluation, tabular, value_iteration
from mbrl_jax.types import InputError

MAP = ("SFFH", "FFHF", "HFFG")


def uniform(model):
    return np.full(model.reward.shape, 1.0 / model.reward.shape[1])


def greedy(model, gamma):
    """Optimal actions, ties shared."""
    values, action_values = value_iteration(model, gamma)
    best = np.isclose(action_values, values[:, None], rtol=0, atol=1e-10)
    return best / best.sum(axis=1, keepdims=True)


def lake(**kwargs):
    return tabular(make_env("FrozenLake-misc", **kwargs))


def goal_chance(model, policy, steps=100):
    """The probability that an episode of at most `steps` steps earns the reward of 1."""
    onward = np.einsum("sa,sat->st", policy, model.transition - model.terminates)
    reached, here = 0.0, model.start
    for _ in range(steps):
        reached += here @ (policy * model.reward).sum(axis=1)
        here = here @ onward
    return reached


# id, clock, optimal steps, optimal value, steps of eps-greedy-optimal and of the random walk
MAZES = [
    ("DynaMaze-sutton", 0, 14, 0.5133, 15.88, 869),
    ("BlockingMaze-sutton", 0, 10, 0.6302, 11.26, 442),
    ("BlockingMaze-sutton", 999, 10, 0.6302, 11.26, 442),
    ("BlockingMaze-sutton", 1000, 16, 0.4633, 17.92, 684),
    ("ShortcutMaze-sutton", 2999, 16, 0.4633, 17.92, 684),
    ("ShortcutMaze-sutton", 3000, 10, 0.6302, 11.26, 344),
]


@pytest.mark.parametrize(("env_id", "clock", "steps", "value", "noisy", "walk"), MAZES)
def test_maze_numbers(env_id, clock, steps, value, noisy, walk):
    model = tabular(make_env(env_id), clock=clock)
    start = model.start.argmax()
    values, _ = value_iteration(model, 0.95)
    assert values[start] == pytest.approx(value, abs=5e-5)
    assert values[start] == pytest.approx(0.95 ** (steps - 1))
    best = greedy(model, 0.95)
    assert hitting_time(model, best)[start] == pytest.approx(steps)
    np.testing.assert_allclose(policy_evaluation(model, best, 0.95), values, atol=1e-10)
    explore = 0.9 * best + 0.1 * uniform(model)
    assert hitting_time(model, explore)[start] == pytest.approx(noisy, abs=5e-3)
    assert hitting_time(model, uniform(model))[start] == pytest.approx(walk, abs=0.5)


@pytest.mark.parametrize(("resolution", "steps"), [(2, 27), (3, 40), (4, 53)])
def test_enlarged_dyna_maze(resolution, steps):
    model = tabular(make_env("DynaMaze-sutton", resolution=resolution))
    values, _ = value_iteration(model, 0.95)
    assert values[model.start.argmax()] == pytest.approx(0.95 ** (steps - 1))


def test_frozen_lake_without_slipping():
    model = lake(is_slippery=False)
    assert value_iteration(model, 0.99)[0][0] == pytest.approx(0.95099, abs=5e-6)
    best = greedy(model, 0.99)
    assert hitting_time(model, best)[0] == pytest.approx(6)
    assert goal_chance(model, 0.9 * best + 0.1 * uniform(model)) == pytest.approx(0.895, abs=5e-4)
    assert goal_chance(model, uniform(model)) == pytest.approx(0.0139, abs=5e-5)


@pytest.mark.parametrize(
    ("map_name", "gamma", "value"),
    [("4x4", 0.99, 0.5420), ("8x8", 0.99, 0.4146), ("4x4", 1.0, 0.8235), ("8x8", 1.0, 1.0)],
)
def test_slippery_frozen_lake(map_name, gamma, value):
    values, _ = value_iteration(lake(map_name=map_name), gamma)
    assert values[0] == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"map_name": "4x4"},
        {"map_name": "8x8"},
        {"map_name": "4x4", "is_slippery": False},
        {"desc": MAP, "success_rate": 0.7},
        {"desc": MAP, "success_rate": 1.0},
        {"desc": MAP, "reward_schedule": (1.0, -1.0, -0.25)},
    ],
)
def test_frozen_lake_equals_gymnasiums_table(arguments):
    model, theirs = lake(**arguments), FrozenLakeEnv(**arguments)
    transition, terminates = np.zeros_like(model.transition), np.zeros_like(model.transition)
    reward = np.zeros_like(model.reward)
    for state, actions in theirs.P.items():
        for action, outcomes in actions.items():
            for chance, successor, earned, end in outcomes:
                transition[state, action, successor] += chance
                terminates[state, action, successor] += chance * end
                reward[state, action] += chance * earned
    np.testing.assert_allclose(model.transition, transition, atol=1e-12)
    np.testing.assert_allclose(model.terminates, terminates, atol=1e-12)
    np.testing.assert_allclose(model.reward, reward, atol=1e-12)
    np.testing.assert_array_equal(model.start, theirs.initial_state_distrib)


@pytest.mark.parametrize(
    "env_id", ["FrozenLake-misc", "DynaMaze-sutton", "BlockingMaze-sutton", "ShortcutMaze-sutton"]
)
def test_shapes_and_sums(env_id):
    env = make_env(env_id)
    model = tabular(env)
    S, A = env.spec.num_obs, env.spec.num_actions
    assert [part.shape for part in model] == [(S, A, S), (S, A, S), (S, A), (S,)]
    assert all(part.dtype == np.float64 for part in model)
    np.testing.assert_allclose(model.transition.sum(axis=2), 1.0, atol=1e-12)
    assert model.start.sum() == 1.0
    assert (model.terminates <= model.transition).all()


def test_other_environments_are_an_input_error():
    with pytest.raises(InputError, match=r"CartPole-v1.*FrozenLake-misc.*ShortcutMaze-sutton"):
        tabular(make_env("CartPole-v1"))


def test_a_policy_that_may_go_on_for_ever():
    model = lake(is_slippery=False)
    left, right, down = np.eye(4)[[0, 2, 1]]
    policy = np.tile(left, (16, 1))
    assert hitting_time(model, policy)[0] == np.inf
    assert hitting_time(model, policy)[6] == 1.0  # left of (1, 2) lies the hole at (1, 1)
    assert policy_evaluation(model, policy, 0.9)[0] == 0.0
    with pytest.raises(InputError, match="state 0"):
        policy_evaluation(model, policy, 1.0)
    policy[4] = (left + right) / 2  # (1, 0): stays, or falls into (1, 1): ends for sure
    assert hitting_time(model, policy)[4] == pytest.approx(2.0)
    policy[8] = (right + down) / 2  # (2, 0): down is a hole; right leads to (2, 1)
    policy[9] = left  # ... and back, so it ends for sure
    assert hitting_time(model, policy)[8] == pytest.approx(3.0)
    policy[9] = np.eye(4)[3]  # up, into the hole at (1, 1)
    assert hitting_time(model, policy)[8] == pytest.approx(1.5)


def test_half_a_chance_of_never_ending_is_inf():
    model = lake(is_slippery=False)
    policy = np.tile(np.eye(4)[0], (16, 1))
    policy[4] = (np.eye(4)[2] + np.eye(4)[3]) / 2  # (1, 0): into a hole, or up to state 0 for ever
    assert hitting_time(model, policy)[4] == np.inf


def test_a_float32_policy_still_never_ends():
    model = lake(is_slippery=False)
    policy = np.tile(np.float32([0.9999999, 0, 0, 0]), (16, 1))
    assert hitting_time(model, policy)[0] == np.inf


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_bad_discount_is_an_input_error(gamma):
    model = lake()
    with pytest.raises(InputError, match="gamma"):
        value_iteration(model, gamma)
    with pytest.raises(InputError, match="gamma"):
        policy_evaluation(model, uniform(model), gamma)


def test_bad_policy_is_an_input_error():
    model = lake()
    for policy in (uniform(model)[:3], 2 * uniform(model), np.tile([2.0, -1, 0, 0], (16, 1))):
        with pytest.raises(InputError, match="probabilities"):
            hitting_time(model, policy)


def test_values_without_limit_are_an_input_error(monkeypatch):
    monkeypatch.setattr(tables, "MAX_SWEEPS", 1000)
    model = lake(reward_schedule=(1.0, 0.0, 0.5))
    with pytest.raises(InputError, match="smaller gamma"):
        value_iteration(model, 1.0)
