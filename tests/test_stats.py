"""Statistics against scipy, against rliable's own numbers, and by their properties."""

import functools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mbrl_jax.analysis import stats

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "rliable.json").read_text())
X, Y = np.array(GOLDEN["x"]), np.array(GOLDEN["y"])
AGGREGATES = {
    "mean": stats.mean,
    "median": stats.median,
    "iqm": stats.iqm,
    "optimality_gap": stats.optimality_gap,
}
# the random streams differ: both ends carry the error of some thousand replicates
TOLERANCE = 0.04  # of the interval's width

matrices = arrays(
    float,
    st.tuples(st.integers(1, 12), st.integers(1, 4)),
    elements=st.floats(-100, 100, width=16),
)
relaxed = settings(max_examples=50, deadline=None)
quick = functools.partial(stats.bootstrap_interval, replicates=200)


def assert_near(interval, golden, tolerance):
    np.testing.assert_allclose(interval.point, np.squeeze(golden["point"]), atol=1e-12)
    np.testing.assert_allclose(interval.low, np.squeeze(golden["low"]), atol=tolerance)
    np.testing.assert_allclose(interval.high, np.squeeze(golden["high"]), atol=tolerance)


# ---- against rliable


@pytest.mark.parametrize("name", AGGREGATES)
@pytest.mark.parametrize(("algorithm", "scores"), [("x", X), ("y", Y)])
def test_aggregates_agree_with_rliable(name, algorithm, scores):
    golden = GOLDEN[f"aggregates_{algorithm}"][name]
    interval = stats.bootstrap_interval(scores, AGGREGATES[name], replicates=20_000)
    assert_near(interval, golden, TOLERANCE * (golden["high"][0] - golden["low"][0]))


def test_profile_agrees_with_rliable():
    profile = stats.performance_profile(X, GOLDEN["thresholds"], replicates=20_000)
    one_run = 1 / X.size  # the fractions are multiples of it
    assert_near(profile, GOLDEN["profile_x"], one_run + 1e-9)


def test_improvement_agrees_with_rliable():
    golden = GOLDEN["improvement"]
    interval = stats.probability_of_improvement(X, Y, replicates=20_000)
    assert_near(interval, golden, TOLERANCE * (golden["high"][0] - golden["low"][0]))


# ---- against scipy and literal values


def test_literal_values():
    scores = np.array([[0.0, 10.0], [2.0, 20.0], [4.0, 60.0]])
    assert stats.mean(scores) == 16.0
    assert stats.median(scores) == 16.0  # of the task means 2 and 30
    assert stats.iqm(scores) == np.mean([2, 4, 10, 20])
    assert stats.optimality_gap(scores, target=10.0) == 10 - np.mean([0, 2, 4, 10, 10, 10])
    assert stats.iqm([1.0, 2.0, 9.0]) == 4.0  # below four runs nothing is cut


@given(matrices)
@relaxed
def test_iqm_is_the_trimmed_mean_of_scipy(scores):
    expected = scipy.stats.trim_mean(scores, 0.25, axis=None)
    np.testing.assert_allclose(stats.iqm(scores), expected, rtol=1e-12, atol=1e-12)


@given(matrices, matrices)
@relaxed
def test_improvement_is_mann_whitney_of_scipy(x, y):
    tasks = min(x.shape[1], y.shape[1])
    x, y = x[:, :tasks], y[:, :tasks]
    expected = [
        scipy.stats.mannwhitneyu(a, b, method="asymptotic").statistic / (len(a) * len(b))
        for a, b in zip(x.T, y.T, strict=True)
        if np.ptp(np.concatenate([a, b])) > 0  # scipy divides by zero where all runs tie
    ]
    expected += [0.5] * (tasks - len(expected))
    point = stats.probability_of_improvement(x, y, replicates=1).point
    np.testing.assert_allclose(point, np.mean(expected), atol=1e-12)


def test_interval_agrees_with_bootstrap_of_scipy():
    scores = np.random.default_rng(1).normal(size=30)
    for ours, theirs in ((stats.mean, np.mean), (stats.iqm, trimmed)):
        interval = stats.bootstrap_interval(scores, ours, replicates=20_000)
        expected = scipy.stats.bootstrap(
            (scores,), theirs, n_resamples=20_000, method="percentile", rng=2
        ).confidence_interval
        tolerance = TOLERANCE * (expected.high - expected.low)
        np.testing.assert_allclose(interval[1:], expected, atol=tolerance)


def trimmed(scores, axis):
    return scipy.stats.trim_mean(scores, 0.25, axis=axis)


# ---- intervals


def test_interval_of_the_mean_covers_it_95_times_in_100():
    rng = np.random.default_rng(0)
    trials, covered = 400, 0
    for trial in range(trials):
        scores = rng.normal(3.0, 2.0, size=50)
        _, low, high = stats.bootstrap_interval(scores, stats.mean, replicates=500, seed=trial)
        covered += low <= 3.0 <= high
    error = np.sqrt(0.95 * 0.05 / trials)
    # with 50 seeds the percentile interval itself covers about 94 %
    assert 0.94 - 3 * error < covered / trials < 0.95 + 3 * error


def test_strata_are_resampled_independently():
    """The mean of independent tasks varies less, by the root of their number, than of copies."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 25))
    width = np.ptp(stats.bootstrap_interval(scores, stats.mean)[1:])
    expected = 2 * 1.96 * np.sqrt(scores.var(axis=0).mean() / 40 / 25)
    assert width == pytest.approx(expected, rel=0.08)


def test_tasks_are_never_mixed():
    scores = np.array([[1.0, 5.0], [1.0, 5.0], [1.0, 5.0]])
    assert stats.bootstrap_interval(scores, stats.mean) == (3.0, 3.0, 3.0)
    assert stats.bootstrap_interval([7.0]) == (7.0, 7.0, 7.0)


def test_same_seed_same_interval_and_wider_with_confidence():
    assert quick(X) == quick(X)
    assert quick(X) != quick(X, seed=1)
    narrow, wide = quick(X, confidence=0.5), quick(X, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_blocks_do_not_change_the_distribution(monkeypatch):
    whole = stats.bootstrap_interval(X, replicates=5000)
    monkeypatch.setattr(stats, "_BLOCK", 7 * X.size)
    parts = stats.bootstrap_interval(X, replicates=5000)
    np.testing.assert_allclose(parts, whole, atol=TOLERANCE * np.ptp(whole[1:]))
    assert stats.performance_profile(X, [0.5], replicates=10).point == np.mean(X > 0.5)


@given(matrices)
@relaxed
def test_interval_is_within_the_scores_and_holds_the_point_of_the_mean(scores):
    point, low, high = quick(scores, stats.mean)
    slack = 1e-9 * (1 + np.abs(scores).max())
    assert scores.min() - slack <= low <= high <= scores.max() + slack
    if len(scores) >= 4:
        # a few seeds of which one is far out may skew it: the point is still no outlier
        assert low - slack <= point <= high + slack


# ---- properties of the aggregates


@given(matrices, st.floats(-50, 50), st.floats(0.01, 20), st.randoms(use_true_random=False))
@relaxed
def test_iqm_ignores_order_and_follows_shift_and_scale(scores, shift, scale, random):
    value, size = stats.iqm(scores), 1 + np.abs(scores).max()
    shuffled = scores.ravel().tolist()
    random.shuffle(shuffled)
    close = functools.partial(np.testing.assert_allclose, rtol=0)
    close(stats.iqm(np.reshape(shuffled, scores.shape)), value, atol=1e-12 * size)
    close(stats.iqm(shuffled), value, atol=1e-12 * size)  # pooled: the tasks do not matter
    close(stats.iqm(scores * scale + shift), value * scale + shift, atol=1e-9 * size)


@given(matrices)
@relaxed
def test_batches_reduce_like_their_rows(scores):
    batch = np.stack([scores, 2 * scores, -scores])
    for statistic in AGGREGATES.values():
        rows = [statistic(row) for row in batch]
        np.testing.assert_allclose(statistic(batch), rows, rtol=1e-12, atol=1e-10)


@given(matrices)
@relaxed
def test_one_task_may_be_a_vector(scores):
    column = scores[:, 0]
    for statistic in AGGREGATES.values():
        assert statistic(column) == statistic(column[:, None])
    assert quick(column) == quick(column[:, None])


@given(matrices, st.floats(-100, 100))
@relaxed
def test_optimality_gap_is_never_negative(scores, target):
    gap = stats.optimality_gap(scores, target)
    assert gap >= -1e-9
    assert gap == pytest.approx(np.maximum(target - scores, 0).mean(), abs=1e-9)


# ---- profiles and improvement


@given(matrices, arrays(float, 7, elements=st.floats(-120, 120)))
@relaxed
def test_profile_falls_from_one_to_zero(scores, thresholds):
    thresholds = np.sort(thresholds)
    thresholds[0], thresholds[-1] = -101, 101
    profile, low, high = stats.performance_profile(scores, thresholds, replicates=100)
    expected = [(scores > threshold).mean() for threshold in thresholds]
    np.testing.assert_allclose(profile, expected, atol=1e-12)
    assert profile[0] == low[0] == high[0] == 1
    assert profile[-1] == low[-1] == high[-1] == 0
    for curve in (profile, low, high):
        assert (np.diff(curve) <= 1e-12).all()
    assert (low <= high).all()


@given(matrices, matrices)
@relaxed
def test_improvement_of_either_side_sums_to_one(x, y):
    assume(x.shape[1] == y.shape[1])
    there = stats.probability_of_improvement(x, y, replicates=100)
    back = stats.probability_of_improvement(y, x, replicates=100)
    assert there.point + back.point == pytest.approx(1)
    assert 0 <= there.low <= there.high <= 1


def test_improvement_of_a_clear_winner_and_of_equals():
    assert stats.probability_of_improvement(X + 10, Y) == (1.0, 1.0, 1.0)
    assert stats.probability_of_improvement(X, X).point == 0.5


# ---- curves


def test_curve_is_the_interval_of_each_point():
    curves = np.random.default_rng(0).normal(size=(10, 6)).cumsum(axis=1)
    band = stats.bootstrap_curve(curves, replicates=20_000)
    for point in range(6):
        one = stats.bootstrap_interval(curves[:, point], replicates=20_000)
        width = one.high - one.low
        assert band.point[point] == pytest.approx(one.point)
        np.testing.assert_allclose(
            [band.low[point], band.high[point]], one[1:], atol=TOLERANCE * width
        )


def test_curve_draws_the_same_seeds_at_all_points():
    curve = np.random.default_rng(0).normal(size=(10, 1))
    band = stats.bootstrap_curve(np.hstack([curve, curve, 2 * curve]))
    for part in band:
        np.testing.assert_allclose(part, part[0] * np.array([1, 1, 2]))


def test_curve_leaves_out_seeds_without_a_value():
    rng = np.random.default_rng(0)
    curves = rng.normal(size=(8, 5))
    holes = curves.copy()
    holes[:, 0] = np.nan
    holes[:3, 1] = np.nan
    band, whole = stats.bootstrap_curve(holes), stats.bootstrap_curve(curves)
    assert np.isnan([part[0] for part in band]).all()
    assert band.point[1] == stats.iqm(curves[3:, 1])
    assert curves[3:, 1].min() <= band.low[1] <= band.high[1] <= curves[3:, 1].max()
    for part, full in zip(band, whole, strict=True):
        np.testing.assert_array_equal(part[2:], full[2:])


def test_a_curve_in_blocks_is_the_same(monkeypatch):
    curves = np.random.default_rng(0).normal(size=(8, 5))
    whole = stats.bootstrap_curve(curves)
    monkeypatch.setattr(stats, "_BLOCK", 3 * curves.size)
    np.testing.assert_array_equal(stats.bootstrap_curve(curves), whole)


# ---- what is refused


@pytest.mark.parametrize("scores", [[], [[]], 1.0, [1.0, np.nan], [np.inf, 1.0]])
@pytest.mark.parametrize("statistic", AGGREGATES.values())
def test_scores_that_are_no_scores_are_refused(scores, statistic):
    with pytest.raises(ValueError, match=r"scores .*; expected"):
        statistic(scores)
    with pytest.raises(ValueError, match=r"scores .*; expected"):
        stats.bootstrap_interval(scores, statistic)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.bootstrap_interval(np.ones((2, 3, 4))), r"shape \(2, 3, 4\); expected"),
        (lambda: stats.bootstrap_interval(X, np.mean), "statistic turns shape"),
        (lambda: stats.bootstrap_interval(X, confidence=95), "confidence is 95"),
        (lambda: stats.bootstrap_interval(X, replicates=0), "replicates is 0"),
        (lambda: stats.bootstrap_curve([1.0, 2.0]), r"shape \(2,\)"),
        (lambda: stats.bootstrap_curve([[1.0, np.inf]]), "1 infinite"),
        (lambda: stats.performance_profile(X, []), "thresholds have"),
        (lambda: stats.performance_profile(X, [np.nan]), "thresholds have"),
        (lambda: stats.probability_of_improvement(X, Y[:, 1:]), "5 tasks and y has 4"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)


def test_stats_need_neither_jax_nor_matplotlib():
    code = (
        "import sys; from mbrl_jax.analysis import arrivals, runs, stats; "
        "print({'jax', 'gymnax', 'matplotlib', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
