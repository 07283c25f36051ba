"""Rollouts against the true environment and against slow loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl_jax import make_env
from mbrl_jax.data import ring
from mbrl_jax.models import dynamics, ensemble, rollout
from mbrl_jax.models.dynamics import DynamicsModel, Prediction
from mbrl_jax.models.oracle import oracle
from mbrl_jax.models.rollout import Rules
from mbrl_jax.types import EnvSpec, InputError, Transition

CLASSIC = (
    "CartPole-v1", "ContinuousCartPole-v0", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0",
    "MountainCarContinuous-v0",
)  # fmt: skip


def walk(params, obs, action, key):
    """s' = s + a; the reward is s', the end lies beyond 3, and |s| is the disagreement."""
    next_obs = obs + action
    return Prediction(next_obs, next_obs[:, 0], next_obs[:, 0] > 3.0, jnp.abs(obs[:, 0]))


WALK = DynamicsModel(walk)


def always(action):
    return lambda obs, key, depth: jnp.full((obs.shape[0], 1), action)


@pytest.mark.parametrize("env_id", CLASSIC)
def test_an_oracle_rollout_is_the_true_trajectory(env_id):
    env = make_env(env_id)
    keys = jax.random.split(jax.random.key(0), 4)
    state, obs = jax.jit(jax.vmap(env.reset))(keys)
    depth = 30
    draws = jax.random.split(jax.random.key(1), depth * 4).reshape(depth, 4)
    actions = np.asarray(jax.jit(jax.vmap(jax.vmap(env.spec.random_action)))(draws))
    model = oracle(env)
    rolled = jax.jit(lambda *x: rollout.rollout(model, env.params, *x))
    got = jax.tree.map(np.asarray, rolled(obs, actions, jax.random.key(2)))
    advance = jax.jit(jax.vmap(env.step))
    alive = np.ones(4, bool)
    for t in range(depth):
        before = obs
        now = jax.random.split(jax.random.key(100 + t), 4)
        state, step = advance(now, state, actions[t])
        step = jax.tree.map(np.asarray, step)
        obs = step.obs
        np.testing.assert_array_equal(got.mask[t], alive)
        row = jax.tree.map(lambda leaf, t=t, alive=alive: leaf[t][alive], got.transition)
        np.testing.assert_allclose(row.obs, np.asarray(before)[alive], rtol=1e-3, atol=2e-3)
        np.testing.assert_allclose(row.next_obs, obs[alive], rtol=1e-3, atol=2e-3)
        np.testing.assert_allclose(row.reward, step.reward[alive], rtol=1e-3, atol=2e-3)
        np.testing.assert_array_equal(row.terminated, step.terminated[alive])
        alive = alive & ~np.asarray(step.terminated)
    returns = jax.jit(lambda *x: rollout.returns(model, env.params, *x))
    total = returns(got.transition.obs[0], actions, jax.random.key(3))
    expected = np.sum(np.where(got.mask, got.transition.reward, 0.0), axis=0)
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_an_oracle_is_refused_where_observations_do_not_tell_the_state():
    with pytest.raises(InputError, match="Catch-bsuite has no oracle: its state does not follow"):
        oracle(make_env("Catch-bsuite"))


def test_rows_end_with_the_task_and_stay_ended():
    obs = jnp.array([[0.0], [2.5], [-9.0]])
    got = rollout.rollout(WALK, (), obs, always(1.0), jax.random.key(0), 6)
    assert got.mask.T.tolist() == [[True] * 4 + [False] * 2, [True] + [False] * 5, [True] * 6]
    assert got.transition.terminated[3, 0]
    assert not got.transition.truncated.any()
    assert got.transition.next_obs[:, 2, 0].tolist() == [-8, -7, -6, -5, -4, -3]
    assert got.transition.obs[0].tolist() == obs.tolist()


def test_the_length_is_traced_and_later_depths_are_masked():
    traces = []

    @jax.jit
    def run(length):
        traces.append(0)
        start = jnp.full((2, 1), -9.0)
        return rollout.rollout(WALK, (), start, always(1.0), jax.random.key(0), 5, length)

    for length in (1, 3, 5):
        assert run(jnp.int32(length)).mask.sum() == 2 * length
    assert len(traces) == 1


def test_a_threshold_cuts_a_row_before_the_uncertain_transition_for_good():
    obs = jnp.array([[-2.0], [-1.0], [0.5]])
    # disagreement |s| of row 0: 2 (cut at once), though it would fall later
    got = rollout.rollout(WALK, (), obs, always(0.5), jax.random.key(0), 5,
                          rules=Rules(threshold=1.5))  # fmt: skip
    assert got.mask.T.tolist() == [[False] * 5, [True] * 5, [True, True, False, False, False]]
    nothing = rollout.rollout(WALK, (), obs, always(0.5), jax.random.key(0), 3,
                              rules=Rules(threshold=0.0))  # fmt: skip
    assert not nothing.mask.any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nothing))


def test_a_threshold_may_come_from_the_first_depth():
    obs = jnp.linspace(-1.0, 0.0, 11)[:, None]

    def first(scores):
        return 1.5 * jnp.percentile(scores, 50.0)  # 0.75

    _, ending = rollout.unroll(
        WALK, (), obs, always(-0.2), jax.random.key(0), 3, lambda c, *rest: c, (),
        Rules(threshold=first),
    )  # fmt: skip
    assert ending.threshold == pytest.approx(0.75)
    # |s| grows by 0.2 at each depth and was below 0.75 at the last of three: s > -0.35
    assert ending.going.tolist() == (np.asarray(obs[:, 0]) > -0.35 + 1e-6).tolist()


def test_the_most_certain_share_is_kept_and_the_others_go_on():
    obs = jnp.array([[-1.0], [-4.0], [-2.0], [-3.0]])
    rules = Rules(keep=lambda depth: jnp.where(depth == 0, 0.5, 1.0), penalty=0.1)
    got = rollout.rollout(WALK, (), obs, always(0.0), jax.random.key(0), 2, rules=rules)
    assert got.mask.tolist() == [[True, False, True, False], [True] * 4]
    np.testing.assert_allclose(got.transition.reward[0], [-1.1, -4.4, -2.2, -3.3], rtol=1e-6)


def test_numbers_that_are_not_finite_end_a_row_and_touch_no_other():
    def explode(params, obs, action, key):
        step = walk(params, obs, action, key)
        return step._replace(
            next_obs=jnp.where(obs == -7.0, jnp.inf, step.next_obs),
            reward=jnp.where(obs[:, 0] == -5.0, jnp.nan, step.reward),
        )

    obs = jnp.array([[-8.0], [-6.0], [-30.0]])
    carry, ending = rollout.unroll(
        DynamicsModel(explode), (), obs, always(1.0), jax.random.key(0), 4,
        lambda sums, depth, row, score, mask: sums + jnp.where(mask, row.reward, 0.0), jnp.zeros(3),
    )  # fmt: skip
    assert ending.faults == 2
    assert ending.going.tolist() == [False, False, True]
    assert carry.tolist() == [-7.0, -5.0, -29 - 28 - 27 - 26]
    assert np.isfinite(ending.obs).all()
    actions = jnp.ones((4, 3, 1))
    total = rollout.returns(DynamicsModel(explode), (), obs, actions, jax.random.key(0))
    assert np.isnan(total).tolist() == [True, True, False]


def test_a_rollout_writes_its_rows_one_behind_the_other_into_a_ring():
    spec = EnvSpec("walk", (1,), "float32", 9, action_low=(-1.0,), action_high=(1.0,))
    store = ring.make(Transition.example(spec), 64)

    def write(carry, depth, row, score, mask):
        return store.add_masked(*carry[:1], row, mask, carry[1])

    obs = jnp.array([[0.0], [2.5], [-9.0]])
    start = (store.init(), ring.empty_cursor())
    (rows, cursor), _ = rollout.unroll(
        WALK, (), obs, always(1.0), jax.random.key(0), 6, write, start
    )
    assert cursor.size == 4 + 1 + 6
    got = store.get(rows, jnp.arange(11))
    whole = rollout.rollout(WALK, (), obs, always(1.0), jax.random.key(0), 6)
    expected = jax.tree.map(lambda leaf: leaf[whole.mask], whole.transition)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_memory_is_linear_in_rows_and_depth():
    def temporary(num, depth):
        def run(obs):
            return rollout.rollout(WALK, (), obs, always(1.0), jax.random.key(0), depth)

        stats = jax.jit(run).lower(jnp.zeros((num, 1))).compile().memory_analysis()
        return stats.temp_size_in_bytes + stats.output_size_in_bytes

    row = 4 * (1 + 1 + 1 + 1 + 1) + 3  # obs, action, reward, next_obs, disagreement, three flags
    base, deep, wide = temporary(1_000, 10), temporary(1_000, 40), temporary(4_000, 10)
    assert deep - base == pytest.approx(30 * 1_000 * row, rel=0.02)
    assert wide < 4.05 * base


def test_memory_of_an_ensembles_rollout_is_that_of_its_rows_and_of_one_step():
    spec = EnvSpec("toy", (17,), "float32", 100, action_low=(-1.0,) * 6, action_high=(1.0,) * 6)
    many = ensemble.make(dynamics.Config(hidden=(64, 64), weight_decay=(0.0,)), spec)
    params = many.init(jax.random.key(0))

    def needed(num, depth):
        def run(obs, actions):
            key = jax.random.key(1)
            return rollout.rollout(many.model("ts1"), params, obs, actions, key)

        shapes = jnp.zeros((num, 17)), jnp.zeros((depth, num, 6))
        stats = jax.jit(run).lower(*shapes).compile().memory_analysis()
        return stats.temp_size_in_bytes + stats.output_size_in_bytes

    row = 4 * (2 * 17 + 6 + 2) + 3  # two observations, action, reward, disagreement, three flags
    base, deep, wide = needed(1_000, 10), needed(1_000, 40), needed(4_000, 10)
    assert deep - base == pytest.approx(30 * 1_000 * row, rel=0.02)
    assert wide < 4.05 * base


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_length": 0}, "max_length = 0: expected 1 or more"),
        ({"max_length": 3, "length": 4}, "length = 4: expected at most max_length = 3"),
        ({"max_length": 3, "length": 0}, "length = 0: expected 1 or more"),
    ],
)
def test_bad_lengths_are_refused(arguments, words):
    with pytest.raises(InputError) as error:
        rollout.rollout(WALK, (), jnp.zeros((1, 1)), always(1.0), jax.random.key(0), **arguments)
    assert words in str(error.value)
