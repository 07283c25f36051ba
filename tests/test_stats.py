"""Statistics against scipy, against rliable's own numbers, and by their properties."""

import functools
import itertools
import json
import pathlib
import statistics
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


# ---- steps to a threshold


def test_first_reach_is_the_first_evaluation_at_or_above():
    steps = [10, 20, 30]
    curves = [[1, 2, 3], [2, 0, 0], [0, 0, 1], [np.nan, np.nan, 2]]
    np.testing.assert_array_equal(stats.first_reach(steps, curves, 2), [20, 10, np.inf, 30])


def test_steps_to_threshold_with_runs_that_never_reach_it():
    steps = np.arange(1, 11) * 100

    def curves(*reach):
        return steps >= np.array(reach)[:, None]

    assert stats.steps_to_threshold(steps, curves(200, 300, 400), 1).point == 300
    some = stats.steps_to_threshold(steps, curves(200, 300, 300, 9999, 9999), 1)
    assert (some.point, some.low, some.high) == (300, 200, np.inf)
    # half of the seeds is not more than half
    assert stats.steps_to_threshold(steps, curves(200, 9999), 1).point == np.inf
    assert stats.steps_to_threshold(steps, curves(9999, 9999), 1) == (np.inf, np.inf, np.inf)


def test_the_median_of_times_knows_infinite_ones():
    times = [200, 300, 400, np.inf]
    curves = np.arange(1, 11) * 100 >= np.array(times)[:, None]
    by_curves = stats.steps_to_threshold(np.arange(1, 11) * 100, curves, 1)
    assert stats.median_time(times) == by_curves == (350, 200, np.inf)
    assert stats.median_time([5, np.inf, np.inf]).point == np.inf


@given(st.integers(1, 12), st.floats(-1, 4), st.integers(0, 5))
@relaxed
def test_a_higher_threshold_is_never_reached_sooner(num_seeds, threshold, seed):
    curves = np.random.default_rng(seed).normal(size=(num_seeds, 20)).cumsum(axis=1)
    steps = np.arange(20)
    lower = stats.steps_to_threshold(steps, curves, threshold, replicates=100)
    higher = stats.steps_to_threshold(steps, curves, threshold + 1, replicates=100)
    assert not np.isnan([lower, higher]).any()
    assert all(a <= b for a, b in zip(lower, higher, strict=True))
    assert lower.low <= lower.high


# ---- the ratio of medians where some runs were cut

# the first evaluations of six seeds each at 475 on ContinuousCartPole-v0, SAC and MBPO
SAC, MBPO = [4000, 8200, 9000, 11600, 11600, 14000], [600, 600, 600, 1000, 1600, np.inf]


def test_a_run_that_never_arrives_is_infinitely_late():
    ratio = stats.median_ratio(SAC, MBPO, 20_000, 2_000)
    assert ratio.point == 12.875
    # half of six draws are of the run that never arrives in 6 of 100 replicates
    assert ratio.low == 0
    assert ratio.high == pytest.approx(19.33, abs=0.01)
    turned = stats.median_ratio(MBPO, SAC, 2_000, 20_000)
    assert turned.point == 1 / 12.875
    assert turned.low == pytest.approx(1 / 19.33, abs=1e-3)
    assert turned.high == np.inf


def test_what_a_ratio_of_cut_runs_tells():
    inf = np.inf
    # X beyond 100: at least 100 / 20 and perhaps infinite; and the other way round
    assert stats.median_ratio([inf] * 3, [20] * 3, 100, 50) == (inf, 5, inf)
    assert stats.median_ratio([20] * 3, [inf] * 3, 50, 100) == (0, 0, 0.2)
    # both: undetermined
    point, *ends = stats.median_ratio([inf] * 3, [inf] * 3, 100, 50)
    assert np.isnan(point)
    assert ends == [0, inf]
    # half of two runs: the median lies between 10 and a time beyond 30, so above 20, not 30
    half = stats.median_ratio([10, inf], [1.0], 30, 1, confidence=0.4)
    assert (half.point, half.low) == (inf, 20)


def test_each_run_may_have_a_budget_of_its_own():
    # of three runs beyond 10, 20 and 30 the median is beyond 20
    ratio = stats.median_ratio([np.inf] * 3, [2.0], [10, 30, 20], 2, confidence=0.4)
    assert (ratio.point, ratio.low, ratio.high) == (np.inf, 10, np.inf)
    some = stats.median_ratio([5, np.inf, 25], [1.0], [30, 10, 30], 1, confidence=0.01)
    assert (some.point, some.high) == (25, 25)
    assert some.low == 10  # the second may have arrived at 11


def enumerated(x, y, x_budget, y_budget):
    """Bounds of the ratio in every replicate that there is, each as likely as the others."""
    bounds = []
    for a in itertools.product(x, repeat=len(x)):
        for b in itertools.product(y, repeat=len(y)):
            far_a, far_b = statistics.median(a), statistics.median(b)
            near_a = statistics.median(min(t, x_budget) for t in a)
            near_b = statistics.median(min(t, y_budget) for t in b)
            bounds.append((near_a / far_b, far_a / near_b))
    return np.array(bounds).T


arrivals = st.lists(st.sampled_from([1.0, 2.0, 3.0, 5.0, 8.0, np.inf]), min_size=1, max_size=4)


@given(arrivals, arrivals, st.sampled_from([8.0, 13.0]), st.sampled_from([8.0, 21.0]))
@relaxed
def test_ratio_against_all_replicates(x, y, x_budget, y_budget):
    point, low, high = stats.median_ratio(x, y, x_budget, y_budget, replicates=4000)
    least, most = enumerated(x, y, x_budget, y_budget)
    above, below = np.median(x), np.median(y)
    if np.isinf(above) and np.isinf(below):
        assert np.isnan(point)
    else:
        assert point == above / below
    assert 0 <= low <= high
    # 4,000 replicates miss a tail of 0.025 by 0.01 less than once in 10,000 times
    slack = 0.01
    assert (least < low).mean() <= 0.025 + slack
    assert (least <= low).mean() >= 0.025 - slack
    assert (most > high).mean() <= 0.025 + slack
    assert (most >= high).mean() >= 0.025 - slack


@given(arrivals, arrivals, st.integers(0, 3), st.sampled_from([0.5, 4.0]))
@relaxed
def test_a_later_run_never_lowers_the_ratio_and_units_do_not_count(x, y, which, unit):
    before = stats.median_ratio(x, y, 8, 8, replicates=200)
    later = list(x)
    later[which % len(x)] = np.inf
    after = stats.median_ratio(later, y, 8, 8, replicates=200)
    assert before.low <= after.low
    assert before.high <= after.high
    scaled = stats.median_ratio(
        unit * np.array(x), unit * np.array(y), unit * 8, unit * 8, replicates=200
    )
    np.testing.assert_array_equal(scaled, before)


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
        (lambda: stats.first_reach([1, 2], [[1, 2, 3]], 1), r"\(2,\) and curves \(1, 3\)"),
        (lambda: stats.first_reach([2, 1], [[1, 2]], 1), "from 2 to 1"),
        (lambda: stats.steps_to_threshold([], [[]], 1), r"\(1, 0\)"),
        (lambda: stats.median_ratio([], [1], 2, 2), r"x has shape \(0,\)"),
        (lambda: stats.median_ratio([1], [[1]], 2, 2), r"y has shape \(1, 1\)"),
        (lambda: stats.median_ratio([3], [1], 2, 2), "x holds 3; expected .*, or infinity"),
        (lambda: stats.median_ratio([1], [0], 2, 2), "a time is 0 .*; expected positive"),
        (lambda: stats.median_ratio([-1], [1], 2, 2), "x holds -1; expected"),
        (lambda: stats.median_ratio([1], [np.nan], 2, 2), "y holds nan; expected"),
        (lambda: stats.median_ratio([1], [np.inf], 2, np.inf), "budget infinite; expected"),
        (lambda: stats.median_ratio([1], [1], [2, 2], 2), r"its budget \(2,\); expected"),
        (lambda: stats.median_time([]), r"times has shape \(0,\)"),
        (lambda: stats.median_time([1, np.nan]), "times holds nan; expected"),
        (lambda: stats.median_ratio([1], [1], 2, 2, confidence=1), "confidence is 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)


def test_stats_need_neither_jax_nor_matplotlib():
    code = (
        "import sys; from mbrl_jax.analysis import runs, stats; "
        "print({'jax', 'gymnax', 'matplotlib', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
