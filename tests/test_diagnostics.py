"""Diagnostics of dynamics models against scipy, closed forms and slow loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mbrl_jax.models import diagnostics
from mbrl_jax.models.dynamics import DynamicsModel, Gaussian, Prediction
from mbrl_jax.types import InputError


def drift(params, obs, action, key):
    """The world is s' = s + a; the model adds 10 % of s to the first dimension."""
    next_obs = obs + action + 0.1 * obs * jnp.array([[1.0, 0.0]])
    zeros = jnp.zeros(obs.shape[0])
    return Prediction(next_obs, next_obs[:, 0], next_obs[:, 1] > 2.5, zeros + jnp.abs(obs[:, 0]))


DRIFT = DynamicsModel(drift)


def test_k_step_errors_are_those_of_a_slow_open_loop():
    rng = np.random.default_rng(0)
    obs, actions = rng.normal(size=(6, 2)), rng.normal(size=(5, 6, 2))
    true = obs + np.cumsum(actions, axis=0)
    valid = rng.random((5, 6)) < np.linspace(1.0, 0.4, 5)[:, None]
    got = diagnostics.k_step_errors(
        DRIFT, (), *map(jnp.float32, (obs, actions, true)), jnp.array(valid), jax.random.key(0)
    )
    now = obs
    for k in range(5):
        doubt = np.abs(now[:, 0])
        now = now + actions[k] + 0.1 * now * [1.0, 0.0]
        error = ((now - true[k]) ** 2)[valid[k]].mean(0)
        np.testing.assert_allclose(got.per_dim[k], error, rtol=1e-4, atol=1e-10)
        assert got.total[k] == pytest.approx(error.mean(), rel=1e-4)
        assert got.disagreement[k] == pytest.approx(doubt[valid[k]].mean(), rel=1e-4)
        assert got.num[k] == valid[k].sum()


def test_errors_of_a_prediction_that_is_not_finite_are_infinite():
    def broken(params, obs, action, key):
        return drift(params, obs, action, key)._replace(next_obs=obs * jnp.nan)

    shape = jnp.zeros((2, 3, 2))
    got = diagnostics.k_step_errors(
        DynamicsModel(broken), (), shape[0], shape, shape, jnp.ones((2, 3), bool), jax.random.key(0)
    )
    assert np.isposinf(got.total).all()


def test_windows_stop_at_the_end_of_an_episode():
    obs = jnp.arange(6.0)[:, None]
    ends = jnp.array([False, True, False, False, False, True])
    start, actions, after, valid = diagnostics.windows(obs, obs * 10, obs + 1, ends, 3)
    assert start[:, 0].tolist() == [0, 1, 2, 3]
    assert actions[:, 1, 0].tolist() == [10, 20, 30]
    assert after[2, :, 0].tolist() == [3, 4, 5, 6]
    assert valid.T.tolist() == [[True, True, False], [True, False, False], [True] * 3, [True] * 3]
    with pytest.raises(InputError, match="length = 7: expected 1 to 6"):
        diagnostics.windows(obs, obs, obs, ends, 7)


def test_growth_is_fitted_as_numpy_fits_the_logs():
    errors = np.float32([0.1, 0.3, 0.5, 2.0, 3.0])
    slope, intercept = np.polyfit(np.arange(1, 6), np.log(errors), 1)
    a, b = diagnostics.growth_rate(jnp.array(errors))
    assert b == pytest.approx(slope, rel=1e-4)
    assert a == pytest.approx(np.exp(intercept), rel=1e-4)
    with pytest.raises(InputError, match="1 errors: expected 2 or more"):
        diagnostics.growth_rate(jnp.ones(1))


def mixture(seed, num):
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=(3, num, 2)), rng.uniform(0.5, 2.0, size=(3, num, 2))
    which = rng.integers(0, 3, size=(1, num, 2))
    m, s = (np.take_along_axis(x, which, 0)[0] for x in (mean, std))
    outcome = m + s * rng.normal(size=(num, 2))
    end = jnp.full((3, num), jnp.nan)
    return Gaussian(jnp.float32(mean), jnp.float32(std**2), end), jnp.float32(outcome)


def test_a_true_distribution_is_calibrated_and_a_narrow_one_is_not():
    members, outcome = mixture(0, 20_000)
    got = jax.jit(diagnostics.calibration)(members, outcome)
    np.testing.assert_allclose(got.coverage, diagnostics.LEVELS, atol=0.01)
    np.testing.assert_allclose(got.pit, 1 / 20, atol=0.004)
    assert got.pit.sum() == pytest.approx(1.0, abs=1e-3)
    y, mean, var = map(np.asarray, (outcome, members.mean, members.var))
    density = stats.norm.pdf(y, mean, np.sqrt(var)).mean(0)
    assert got.nll == pytest.approx(-np.log(density).mean(), rel=1e-4)
    assert got.mse == pytest.approx(np.mean((y - mean.mean(0)) ** 2), rel=1e-4)
    narrow = diagnostics.calibration(members._replace(var=members.var / 16), outcome)
    assert narrow.coverage[1] < 0.75
    assert narrow.nll > got.nll
    assert narrow.pit[0] > 2 / 20, "too many outcomes in the tails"


def test_rank_correlation_is_scipys():
    rng = np.random.default_rng(0)
    for ties in (False, True):
        a = np.float32(rng.normal(size=200))
        b = np.float32(a**3 + rng.normal(size=200))
        a, b = (np.round(a), np.round(b)) if ties else (a, b)
        expected = stats.spearmanr(a, b).statistic
        got = diagnostics.rank_correlation(jnp.array(a), jnp.array(b))
        assert got == pytest.approx(expected, abs=1e-4)
    assert np.isnan(diagnostics.rank_correlation(jnp.ones(5), jnp.arange(5.0)))


def test_imagined_returns_stop_with_the_task():
    obs = jnp.array([[1.0, 0.0], [1.0, 2.0]])

    def act(obs, key, depth):
        return jnp.tile(jnp.array([[0.0, 1.0]]), (obs.shape[0], 1))

    got = diagnostics.imagined_returns(DRIFT, (), obs, act, jax.random.key(0), 4)
    # 1.1 + 1.21 + 1.331, where the second dimension passes 2.5; and one step alone
    np.testing.assert_allclose(got, [1.1 + 1.21 + 1.331, 1.1], rtol=1e-5)
