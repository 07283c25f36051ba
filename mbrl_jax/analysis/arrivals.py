"""When runs arrive at a threshold, with bootstrap intervals, where some never do.

A run that has not arrived by the end of its budget counts as infinitely late: medians and their
ratios stay right however late it would have arrived (right censoring).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mbrl_jax.analysis.stats import Interval, blocks, check_options, percentiles


def first_reach(steps: ArrayLike, curves: ArrayLike, threshold: float) -> np.ndarray:
    """The step of the first evaluation at which each seed's curve is at or above `threshold`.

    Args:
        steps: [num_points] environment steps of the evaluations, increasing.
        curves: [num_seeds, num_points]; a NaN reaches nothing.
        threshold: in the unit of the curves.

    Returns:
        [num_seeds] environment steps, not interpolated; infinity where it is never reached.

    Raises:
        ValueError: the shapes do not fit, nothing is given, or the steps do not increase.
    """
    steps, curves = np.asarray(steps, dtype=float), np.asarray(curves, dtype=float)
    if curves.ndim != 2 or curves.size == 0 or steps.shape != curves.shape[1:]:
        raise ValueError(
            f"steps have shape {steps.shape} and curves {curves.shape}; expected [num_points] "
            "and [num_seeds, num_points]: give one row per seed, one column per step"
        )
    if not (np.diff(steps) > 0).all():
        at = np.flatnonzero(~(np.diff(steps) > 0))[0]
        raise ValueError(
            f"steps go from {steps[at]:g} to {steps[at + 1]:g}; expected increasing numbers: "
            "sort the evaluations"
        )
    reached = curves >= threshold
    return np.where(reached.any(axis=1), steps[reached.argmax(axis=1)], np.inf)


def steps_to_threshold(
    steps: ArrayLike,
    curves: ArrayLike,
    threshold: float,
    confidence: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> Interval:
    """Median over seeds of the environment steps until a curve first reaches `threshold`.

    A seed that never reaches it counts as infinite, so the median is finite only if more than
    half of the seeds do.

    Args:
        steps: [num_points] environment steps of the evaluations, increasing.
        curves: [num_seeds, num_points]; a NaN reaches nothing.
        threshold: in the unit of the curves.
        confidence: coverage of the interval, in (0, 1).
        replicates: number of bootstrap replicates over seeds.
        seed: of the random numbers; the same seed gives the same interval.

    Returns:
        Interval of floats in environment steps, each may be infinite.

    Raises:
        ValueError: the shapes do not fit, nothing is given, or the steps do not increase;
            confidence or replicates are out of range.
    """
    return median_time(first_reach(steps, curves, threshold), confidence, replicates, seed)


def median_time(
    times: ArrayLike, confidence: float = 0.95, replicates: int = 2000, seed: int = 0
) -> Interval:
    """The median over runs of a time of arrival, which is infinite for a run that did not arrive.

    Args:
        times: [num_runs] positive, infinite where a run did not arrive within its budget.
        confidence: coverage of the interval, in (0, 1).
        replicates: number of bootstrap replicates over runs.
        seed: of the random numbers; the same seed gives the same interval.

    Returns:
        Interval of floats in the unit of the times; an infinite one is beyond the budget.

    Raises:
        ValueError: times are empty, have other axes or are NaN or negative; confidence or
            replicates are out of range.
    """
    times = _arrivals("times", times, np.inf)[0]
    check_options(confidence, replicates)
    rng = np.random.default_rng(seed)
    results = np.empty(replicates)
    for rows in blocks(replicates, times.size):
        drawn = rng.integers(times.size, size=(rows.stop - rows.start, times.size))
        results[rows] = np.median(times[drawn], axis=1)
    return percentiles(float(np.median(times)), results, confidence)


def median_ratio(
    x: ArrayLike,
    y: ArrayLike,
    x_budget: ArrayLike,
    y_budget: ArrayLike,
    confidence: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> Interval:
    """The median of X over that of Y, where some runs of either were cut before they arrived.

    A run that has not arrived within its budget may do so at any later time (right censoring), so
    it stands for every number from its budget to infinity, and so may a median. Each bootstrap
    replicate, which draws the runs of X and of Y independently, therefore bounds the ratio from
    both sides: if X's median is beyond its budget, the ratio may be infinite, if Y's is, it may be
    0, and if both are, nothing is known of it. The interval reaches from a low quantile of the
    lower bounds to a high one of the upper bounds, so that it is right however late the missing
    runs would have arrived.

    Args:
        x: [num_runs_x] the times of arrival, for example from `first_reach`; infinite without one.
        y: [num_runs_y] likewise, in the same unit.
        x_budget: the time up to which the runs of X were watched, in the unit of x; one number,
            or [num_runs_x] where it differs.
        y_budget: likewise of Y.
        confidence: coverage of the interval, in (0, 1).
        replicates: number of bootstrap replicates.
        seed: of the random numbers; the same seed gives the same interval.

    Returns:
        Interval of floats without a unit. The point is infinite where X's median is beyond its
        budget, 0 where Y's is, and NaN (undetermined) where both are.

    Raises:
        ValueError: times are empty, have other axes, are NaN or not positive, or are finite but
            beyond the budget; the budget of a run that did not arrive is not finite; confidence or
            replicates are out of range.
    """
    arms = _arrivals("x", x, x_budget), _arrivals("y", y, y_budget)
    if not all((least > 0).all() and np.isfinite(least).all() for _, least in arms):
        raise ValueError(
            "a time is 0 or a budget infinite; expected positive times and finite budgets: give "
            "the times up to which the runs were watched"
        )
    check_options(confidence, replicates)
    rng = np.random.default_rng(seed)
    medians = np.empty((4, replicates))  # of X and of Y, the least and the greatest they can be
    for rows in blocks(replicates, sum(times.size for times, _ in arms)):
        for number, (times, least) in enumerate(arms):
            drawn = rng.integers(times.size, size=(rows.stop - rows.start, times.size))
            medians[2 * number, rows] = np.median(least[drawn], axis=1)
            medians[2 * number + 1, rows] = np.median(times[drawn], axis=1)
    low = percentiles(None, medians[0] / medians[3], confidence).low
    high = percentiles(None, medians[1] / medians[2], confidence).high
    above, below = (float(np.median(times)) for times, _ in arms)
    point = above / below if np.isfinite(above) or np.isfinite(below) else np.nan
    return Interval(point, low, high)


def _arrivals(name: str, times: ArrayLike, budget: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Times of arrival and the least that they can be, both float64 [num_runs]."""
    times, budget = np.asarray(times, dtype=float), np.asarray(budget, dtype=float)
    if times.ndim != 1 or times.size == 0 or budget.shape not in ((), times.shape):
        raise ValueError(
            f"{name} has shape {times.shape} and its budget {budget.shape}; expected [num_runs] "
            "and one number or [num_runs]: give one time for each run"
        )
    right = (times >= 0) & ((times <= budget) | np.isinf(times))
    if not right.all():
        raise ValueError(
            f"{name} holds {times[~right][0]:g}; expected times from 0 up to the budget, or "
            "infinity: give infinity for a run that did not arrive"
        )
    return times, np.minimum(times, budget)
