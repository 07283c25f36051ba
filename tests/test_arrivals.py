"""Times of arrival against an enumeration of all replicates, and by their properties."""

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_jax.analysis import arrivals

relaxed = settings(max_examples=50, deadline=None)


# ---- steps to a threshold


def test_first_reach_is_the_first_evaluation_at_or_above():
    steps = [10, 20, 30]
    curves = [[1, 2, 3], [2, 0, 0], [0, 0, 1], [np.nan, np.nan, 2]]
    np.testing.assert_array_equal(arrivals.first_reach(steps, curves, 2), [20, 10, np.inf, 30])


def test_steps_to_threshold_with_runs_that_never_reach_it():
    steps = np.arange(1, 11) * 100

    def curves(*reach):
        return steps >= np.array(reach)[:, None]

    assert arrivals.steps_to_threshold(steps, curves(200, 300, 400), 1).point == 300
    some = arrivals.steps_to_threshold(steps, curves(200, 300, 300, 9999, 9999), 1)
    assert (some.point, some.low, some.high) == (300, 200, np.inf)
    # half of the seeds is not more than half
    assert arrivals.steps_to_threshold(steps, curves(200, 9999), 1).point == np.inf
    assert arrivals.steps_to_threshold(steps, curves(9999, 9999), 1) == (np.inf, np.inf, np.inf)


def test_the_median_of_times_knows_infinite_ones():
    times = [200, 300, 400, np.inf]
    curves = np.arange(1, 11) * 100 >= np.array(times)[:, None]
    by_curves = arrivals.steps_to_threshold(np.arange(1, 11) * 100, curves, 1)
    assert arrivals.median_time(times) == by_curves == (350, 200, np.inf)
    assert arrivals.median_time([5, np.inf, np.inf]).point == np.inf


@given(st.integers(1, 12), st.floats(-1, 4), st.integers(0, 5))
@relaxed
def test_a_higher_threshold_is_never_reached_sooner(num_seeds, threshold, seed):
    curves = np.random.default_rng(seed).normal(size=(num_seeds, 20)).cumsum(axis=1)
    steps = np.arange(20)
    lower = arrivals.steps_to_threshold(steps, curves, threshold, replicates=100)
    higher = arrivals.steps_to_threshold(steps, curves, threshold + 1, replicates=100)
    assert not np.isnan([lower, higher]).any()
    assert all(a <= b for a, b in zip(lower, higher, strict=True))
    assert lower.low <= lower.high


# ---- the ratio of medians where some runs were cut

# the first evaluations of six seeds each at 475 on ContinuousCartPole-v0, SAC and MBPO
SAC, MBPO = [4000, 8200, 9000, 11600, 11600, 14000], [600, 600, 600, 1000, 1600, np.inf]


def test_a_run_that_never_arrives_is_infinitely_late():
    ratio = arrivals.median_ratio(SAC, MBPO, 20_000, 2_000)
    assert ratio.point == 12.875
    # half of six draws are of the run that never arrives in 6 of 100 replicates
    assert ratio.low == 0
    assert ratio.high == pytest.approx(19.33, abs=0.01)
    turned = arrivals.median_ratio(MBPO, SAC, 2_000, 20_000)
    assert turned.point == 1 / 12.875
    assert turned.low == pytest.approx(1 / 19.33, abs=1e-3)
    assert turned.high == np.inf


def test_what_a_ratio_of_cut_runs_tells():
    inf = np.inf
    # X beyond 100: at least 100 / 20 and perhaps infinite; and the other way round
    assert arrivals.median_ratio([inf] * 3, [20] * 3, 100, 50) == (inf, 5, inf)
    assert arrivals.median_ratio([20] * 3, [inf] * 3, 50, 100) == (0, 0, 0.2)
    # both: undetermined
    point, *ends = arrivals.median_ratio([inf] * 3, [inf] * 3, 100, 50)
    assert np.isnan(point)
    assert ends == [0, inf]
    # half of two runs: the median lies between 10 and a time beyond 30, so above 20, not 30
    half = arrivals.median_ratio([10, inf], [1.0], 30, 1, confidence=0.4)
    assert (half.point, half.low) == (inf, 20)


def test_each_run_may_have_a_budget_of_its_own():
    # of three runs beyond 10, 20 and 30 the median is beyond 20
    ratio = arrivals.median_ratio([np.inf] * 3, [2.0], [10, 30, 20], 2, confidence=0.4)
    assert (ratio.point, ratio.low, ratio.high) == (np.inf, 10, np.inf)
    some = arrivals.median_ratio([5, np.inf, 25], [1.0], [30, 10, 30], 1, confidence=0.01)
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


times = st.lists(st.sampled_from([1.0, 2.0, 3.0, 5.0, 8.0, np.inf]), min_size=1, max_size=4)


@given(times, times, st.sampled_from([8.0, 13.0]), st.sampled_from([8.0, 21.0]))
@relaxed
def test_ratio_against_all_replicates(x, y, x_budget, y_budget):
    point, low, high = arrivals.median_ratio(x, y, x_budget, y_budget, replicates=4000)
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


@given(times, times, st.integers(0, 3), st.sampled_from([0.5, 4.0]))
@relaxed
def test_a_later_run_never_lowers_the_ratio_and_units_do_not_count(x, y, which, unit):
    before = arrivals.median_ratio(x, y, 8, 8, replicates=200)
    later = list(x)
    later[which % len(x)] = np.inf
    after = arrivals.median_ratio(later, y, 8, 8, replicates=200)
    assert before.low <= after.low
    assert before.high <= after.high
    scaled = arrivals.median_ratio(
        unit * np.array(x), unit * np.array(y), unit * 8, unit * 8, replicates=200
    )
    np.testing.assert_array_equal(scaled, before)


# ---- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: arrivals.first_reach([1, 2], [[1, 2, 3]], 1), r"\(2,\) and curves \(1, 3\)"),
        (lambda: arrivals.first_reach([2, 1], [[1, 2]], 1), "from 2 to 1"),
        (lambda: arrivals.steps_to_threshold([], [[]], 1), r"\(1, 0\)"),
        (lambda: arrivals.median_ratio([], [1], 2, 2), r"x has shape \(0,\)"),
        (lambda: arrivals.median_ratio([1], [[1]], 2, 2), r"y has shape \(1, 1\)"),
        (lambda: arrivals.median_ratio([3], [1], 2, 2), "x holds 3; expected .*, or infinity"),
        (lambda: arrivals.median_ratio([1], [0], 2, 2), "a time is 0 .*; expected positive"),
        (lambda: arrivals.median_ratio([-1], [1], 2, 2), "x holds -1; expected"),
        (lambda: arrivals.median_ratio([1], [np.nan], 2, 2), "y holds nan; expected"),
        (lambda: arrivals.median_ratio([1], [np.inf], 2, np.inf), "budget infinite; expected"),
        (lambda: arrivals.median_ratio([1], [1], [2, 2], 2), r"its budget \(2,\); expected"),
        (lambda: arrivals.median_time([]), r"times has shape \(0,\)"),
        (lambda: arrivals.median_time([1, np.nan]), "times holds nan; expected"),
        (lambda: arrivals.median_ratio([1], [1], 2, 2, confidence=1), "confidence is 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)
