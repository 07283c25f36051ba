"""Planners on problems whose best plan is known, and on the true Pendulum."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import planner_reference as reference
import pytest

from mbrl_jax import make_env, planning
from mbrl_jax.models.dynamics import DynamicsModel, Prediction
from mbrl_jax.models.oracle import oracle
from mbrl_jax.planning.noise import colored_noise
from mbrl_jax.planning.planners import kept_elites
from mbrl_jax.types import InputError

LOW, HIGH = jnp.array([-1.0, -2.0]), jnp.array([1.0, 3.0])
HORIZON = 3
GOAL = jnp.array([[0.5, -1.0], [-0.25, 2.0], [0.0, 0.5]])


def quadratic(actions, key, goal=GOAL):
    return -jnp.sum(jnp.square(actions - goal[None]), axis=(1, 2))


def start(name):
    if name == "icem":
        return planning.start_icem(HORIZON, LOW, HIGH, kept_elites(30))
    if name == "mppi":
        return planning.start_mppi(HORIZON, LOW, HIGH)
    return planning.start_cem(HORIZON, LOW, HIGH)


PLANNERS = {
    "cem": partial(planning.cem, num_samples=400, num_elites=40, iterations=12),
    "icem": partial(
        planning.icem, num_samples=800, num_elites=30, iterations=8, decay=1.1, beta=0.0
    ),
    "mppi": partial(
        planning.mppi, num_samples=4_000, iterations=60, sigma=0.05, gamma=400.0, beta=1.0
    ),
}


@pytest.mark.parametrize("name", PLANNERS)
def test_planners_find_the_best_plan_of_a_quadratic(name):
    plan = jax.jit(partial(PLANNERS[name], quadratic))
    for seed in range(3):
        got = plan(jax.random.key(seed), start(name), LOW, HIGH)
        np.testing.assert_allclose(got.sequence, GOAL, atol=1e-2)
        np.testing.assert_array_equal(got.action, got.sequence[0])
        assert got.value == pytest.approx(0.0, abs=1e-2)


def test_random_shooting_takes_the_best_of_what_it_drew():
    goal = np.asarray(GOAL[:1])

    @jax.jit
    def plan(key):
        seen = []

        def value(actions, key):
            seen.append(actions)
            return quadratic(actions, key, goal)

        return planning.random_shooting(value, key, 1, LOW, HIGH, 100_000), seen[0]

    got, drawn = jax.device_get(plan(jax.random.key(0)))
    np.testing.assert_allclose(got.sequence, goal, atol=2e-2)
    best = np.argmin(np.square(drawn - goal[None]).sum((1, 2)))
    np.testing.assert_array_equal(got.sequence, drawn[best])
    assert (drawn >= np.asarray(LOW)).all()
    assert (drawn <= np.asarray(HIGH)).all()


def test_the_categorical_planner_finds_the_word():
    word = jnp.array([2, 0, 1, 3, 2, 1])

    def value(actions, key):
        assert actions.dtype == jnp.int32
        return jnp.sum(actions == word[None], axis=-1) ** 2.0

    plan = planning.start_categorical_cem(6, 4)
    planner = jax.jit(lambda key, plan: planning.categorical_cem(value, key, plan, 300, 20, 8))
    got = planner(jax.random.key(0), plan)
    assert got.sequence.tolist() == word.tolist()
    assert got.action == 2
    assert got.value == 36
    np.testing.assert_allclose(got.plan.sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("name", PLANNERS)
def test_candidates_lie_within_the_bounds_and_nan_ranks_last(name):
    def value(actions, key):
        # what lies near the best plan is worth nan, and so is the whole left half
        inside = (actions >= LOW[None, None] - 1e-6).all((1, 2)) & (
            actions <= HIGH[None, None] + 1e-6
        ).all((1, 2))
        worth = quadratic(actions, key) - 100.0
        return jnp.where(actions[:, 0, 0] > 0.0, jnp.where(inside, worth, jnp.inf), jnp.nan)

    planner = PLANNERS[name]
    got = jax.jit(partial(planner, value))(jax.random.key(0), start(name), LOW, HIGH)
    assert np.isfinite(got.sequence).all()
    assert got.action[0] > 0.0
    assert got.value == pytest.approx(-100.0, abs=0.1), "inf stands for a candidate out of bounds"

    def nothing(actions, key):
        return jnp.full(actions.shape[0], jnp.nan)

    lost = jax.jit(partial(planner, nothing))(jax.random.key(0), start(name), LOW, HIGH)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((lost.plan, lost.sequence)))
    assert lost.value == -jnp.inf


@pytest.mark.parametrize("name", PLANNERS)
def test_plans_are_warm_and_batched_and_a_new_episode_remembers_nothing(name):
    few = {"cem": {"iterations": 1}, "icem": {"iterations": 2}, "mppi": {"iterations": 1}}[name]
    planner = partial(PLANNERS[name], **few)

    def shifted(actions, key):  # the goal moves on by one step, as the world does
        return quadratic(actions, key, jnp.concatenate([GOAL[1:], jnp.zeros((1, 2))]))

    best = jax.jit(partial(PLANNERS[name], quadratic))
    good = best(jax.random.key(0), start(name), LOW, HIGH).plan
    keys = jax.random.split(jax.random.key(1), 20)
    run = jax.jit(jax.vmap(lambda key, plan: planner(shifted, key, plan, LOW, HIGH), (0, None)))
    warm, cold = run(keys, good), run(keys, start(name))
    assert np.mean(warm.value) > np.mean(cold.value)
    again = run(keys, start(name))
    jax.tree.map(np.testing.assert_array_equal, cold, again)
    alone = jax.jit(partial(planner, shifted))(keys[3], good, LOW, HIGH)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[3], b, rtol=1e-4, atol=1e-4), warm, alone
    )


def uneven(actions):
    """A smooth worth without symmetry; nan in a corner, and infinite in another."""
    h = np.arange(len(actions))[:, None]
    value = np.sum(np.cos(2.0 * actions + h) - 0.3 * (actions - 0.2 * h) ** 2)
    if actions[0, 0] > 0.8:
        return np.nan
    return np.inf if actions[-1, 1] < -1.8 else value


def uneven_value(actions, key):
    h = jnp.arange(actions.shape[1])[None, :, None]
    value = jnp.sum(jnp.cos(2.0 * actions + h) - 0.3 * (actions - 0.2 * h) ** 2, axis=(1, 2))
    value = jnp.where(actions[:, -1, 1] < -1.8, jnp.inf, value)
    return jnp.where(actions[:, 0, 0] > 0.8, jnp.nan, value)


BOUNDS = (np.float64(LOW), np.float64(HIGH))
close = partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("horizon", [1, 5])
def test_random_shooting_equals_the_slow_one(horizon):
    plan = jax.jit(lambda key: planning.random_shooting(uneven_value, key, horizon, LOW, HIGH, 50))
    for seed in range(4):
        key = jax.random.key(seed)
        got = plan(key)
        sequence, value = reference.random_shooting(uneven, key, horizon, *BOUNDS, 50)
        close(got.sequence, sequence)
        close(got.value, value)


@pytest.mark.parametrize("take_best", [False, True])
@pytest.mark.parametrize("iterations", [1, 3])
def test_cem_equals_the_slow_one_step_after_step(iterations, take_best):
    settings = (40, 6, iterations, 0.2, take_best)
    planner = jax.jit(lambda key, plan: planning.cem(uneven_value, key, plan, LOW, HIGH, *settings))
    for seed in range(3):
        got, slow = planning.start_cem(5, LOW, HIGH), np.zeros((5, 2)) + sum(BOUNDS) / 2
        for t in range(3):
            key = jax.random.key(10 * seed + t)
            out = planner(key, got)
            got, (slow, sequence, value) = (
                out.plan,
                reference.cem(uneven, key, slow, *BOUNDS, *settings),
            )
            close(got, slow)
            close(out.sequence, sequence)
            close(out.action, sequence[0])
            close(out.value, value)


@pytest.mark.parametrize(
    ("horizon", "iterations", "num_kept", "beta"),
    [(5, 3, 2, 2.0), (4, 1, 3, 1.0), (1, 2, 6, 0.0), (4, 2, 0, 2.0)],
)
def test_icem_equals_the_slow_one_step_after_step(horizon, iterations, num_kept, beta):
    settings = (30, 6, iterations, 0.1, 1.5, beta)
    planner = jax.jit(
        lambda key, plan: planning.icem(uneven_value, key, plan, LOW, HIGH, *settings)
    )
    for seed in range(3):
        got = planning.start_icem(horizon, LOW, HIGH, num_kept)
        mean, elites = np.zeros((horizon, 2)) + sum(BOUNDS) / 2, None
        for t in range(4):
            key = jax.random.key(10 * seed + t)
            out = planner(key, got)
            got = out.plan
            mean, elites, sequence, value = reference.icem(
                uneven, key, (mean, elites, num_kept), *BOUNDS, *settings
            )
            close(got.mean, mean)
            close(got.elites, elites)
            close(out.sequence, sequence)
            close(out.action, sequence[0])
            close(out.value, value)


@pytest.mark.parametrize("horizon", [1, 5])
@pytest.mark.parametrize("beta", [0.4, 1.0])
def test_mppi_equals_the_slow_one_step_after_step(horizon, beta):
    settings = (40, 2, 0.7, 1.5, beta)
    planner = jax.jit(
        lambda key, plan: planning.mppi(uneven_value, key, plan, LOW, HIGH, *settings)
    )
    for seed in range(3):
        got = planning.start_mppi(horizon, LOW, HIGH)
        mean = np.zeros((horizon, 2)) + sum(BOUNDS) / 2
        before = mean[0]
        for t in range(4):
            key = jax.random.key(10 * seed + t)
            out = planner(key, got)
            got = out.plan
            mean, value = reference.mppi(uneven, key, (mean, before), *BOUNDS, *settings)
            before = mean[0]
            close(got.mean, mean)
            close(got.last, before)
            close(out.sequence, mean)
            close(out.value, value)


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_the_categorical_planner_equals_the_slow_one_step_after_step(floor):
    table = np.random.default_rng(0).normal(size=(5, 4))

    def worth(actions):
        total = sum(table[h, a] for h, a in enumerate(actions)) - 2.0 * (actions[1] == actions[3])
        return np.nan if actions[0] == 2 else total

    def value(actions, key):
        total = jnp.sum(jnp.asarray(table, jnp.float32)[jnp.arange(5)[None], actions], axis=-1)
        total -= 2.0 * (actions[:, 1] == actions[:, 3])
        return jnp.where(actions[:, 0] == 2, jnp.nan, total)

    settings = (30, 5, 3, 0.25, floor)
    planner = jax.jit(lambda key, plan: planning.categorical_cem(value, key, plan, *settings))
    for seed in range(3):
        got, slow = planning.start_categorical_cem(5, 4), np.full((5, 4), 0.25)
        for t in range(3):
            key = jax.random.key(10 * seed + t)
            out = planner(key, got)
            got = out.plan
            slow, sequence, best = reference.categorical_cem(worth, key, slow, *settings)
            close(got, slow)
            assert out.sequence.tolist() == sequence.tolist()
            close(out.value, best)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("steps", [16, 33])
def test_colored_noise_has_unit_variance_and_its_spectrum(beta, steps):
    draw = jax.jit(colored_noise, static_argnums=(1, 2))
    noise = np.asarray(draw(jax.random.key(0), (20_000, steps), beta))
    np.testing.assert_allclose(noise.var(), 1.0, rtol=0.03)
    np.testing.assert_allclose(noise.mean(), 0.0, atol=0.03)
    power = np.mean(np.abs(np.fft.rfft(noise)) ** 2, axis=0)[1 : steps // 2]
    frequency = np.fft.rfftfreq(steps)[1 : steps // 2]
    slope = np.polyfit(np.log(frequency), np.log(power), 1)[0]
    assert slope == pytest.approx(-beta, abs=0.05)


def test_the_value_of_a_model_is_the_mean_return_over_particles():
    def noisy(params, obs, action, key):
        next_obs = obs + action + jax.random.normal(key, obs.shape)
        fault = jnp.where(action[:, 0] > 0.9, jnp.nan, next_obs[:, 0])
        return Prediction(next_obs, fault, next_obs[:, 0] > 1e9, jnp.zeros(len(obs)))

    value = jax.jit(planning.model_value(DynamicsModel(noisy), (), jnp.array([1.0]), 4_000))
    actions = jnp.array([[[0.5], [0.0]], [[-1.0], [0.5]], [[0.0], [0.95]]])
    got = value(actions, jax.random.key(0))
    np.testing.assert_allclose(got[:2], [1.5 + 1.5, 0.0 + 0.5], atol=0.2)
    assert np.isnan(got[2])
    with pytest.raises(InputError, match="particles = 0"):
        planning.model_value(DynamicsModel(noisy), (), jnp.array([1.0]), 0)


@pytest.mark.slow
def test_cem_with_the_true_dynamics_swings_the_pendulum_up():
    env = make_env("Pendulum-v1")
    model, spec = oracle(env), env.spec
    low, high = jnp.array(spec.action_low), jnp.array(spec.action_high)

    def episode(key):
        reset_key, key = jax.random.split(key)
        state, obs = env.reset(reset_key)

        def step(carry, t):
            state, obs, plan = carry
            value = planning.model_value(model, env.params, obs)
            got = planning.cem(value, jax.random.fold_in(key, t), plan, low, high, 200, 20, 5, 0.1)
            state, after = env.step(key, state, got.action)
            return (state, after.obs, got.plan), after.reward

        first = (state, obs, planning.start_cem(30, low, high))
        return jnp.sum(jax.lax.scan(step, first, jnp.arange(200))[1])

    with jax.debug_key_reuse(False):
        total = jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(0), 10))
    assert np.mean(total) >= -180.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: planning.start_cem(0, LOW, HIGH), "horizon = 0: expected 1 or more"),
        (lambda: planning.cem(quadratic, jax.random.key(0), GOAL, LOW, HIGH, 5, 6),
         "num_elites = 6: expected at most num_samples = 5"),
        (lambda: planning.cem(quadratic, jax.random.key(0), GOAL, LOW, HIGH, iterations=0),
         "iterations = 0: expected 1 or more"),
        (lambda: planning.icem(quadratic, jax.random.key(0), start("icem"), LOW, HIGH,
                               num_elites=4),
         "the plan keeps 9 elites: expected at most 4"),
        (lambda: planning.icem(quadratic, jax.random.key(0), start("icem"), LOW, HIGH,
                               num_elites=30, decay=0.5),
         "decay = 0.5: expected 1 or more"),
        (lambda: planning.random_shooting(quadratic, jax.random.key(0), 1, LOW, HIGH, 0),
         "num_samples = 0"),
        (lambda: planning.start_categorical_cem(3, 0), "num_actions = 0"),
    ],
)  # fmt: skip
def test_bad_numbers_are_refused(call, words):
    with pytest.raises(InputError) as error:
        call()
    assert words in str(error.value)
