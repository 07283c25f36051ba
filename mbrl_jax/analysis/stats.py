"""Aggregates over seeds and tasks with bootstrap intervals, for a handful of runs.

After Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice"
(https://arxiv.org/abs/2108.13264), and its library rliable, with which the tests compare.

Scores are [num_seeds], one task, or [num_seeds, num_tasks]; larger is better, in any unit that
the tasks share (normalise first where they differ). A statistic reduces the last two axes, so it
takes a batch of bootstrap replicates [..., num_seeds, num_tasks] at once; `functools.partial`
sets its options. Intervals lie between two order statistics of the replicates, rounded
outwards: nothing is interpolated, so they hold for infinite values too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Statistic = Callable[[np.ndarray], Any]

# numbers drawn at a time: bounds the memory (8 MB an array) whatever the count of replicates
_BLOCK = 1 << 20


class Interval(NamedTuple):
    """A point estimate with its bootstrap interval, in the unit of the scores.

    Each is a float, or an array with one entry per point of a curve or a profile.
    """

    point: Any
    low: Any
    high: Any


def mean(scores: ArrayLike) -> Any:
    """Mean over tasks of the mean over seeds.

    Takes scores [num_seeds] or [..., num_seeds, num_tasks] and returns [...] in their unit; raises
    ValueError if they are empty or not finite.
    """
    return _finite(scores).mean(axis=(-2, -1))


def median(scores: ArrayLike) -> Any:
    """Median over tasks of the mean over seeds; with one task that is the mean over seeds.

    Takes scores [num_seeds] or [..., num_seeds, num_tasks] and returns [...] in their unit; raises
    ValueError if they are empty or not finite.
    """
    return np.median(_finite(scores).mean(axis=-2), axis=-1)


def iqm(scores: ArrayLike) -> Any:
    """Interquartile mean: all runs pooled, the lowest and the highest quarter left out.

    A quarter is rounded down to whole runs, so it is the mean below four runs (Agarwal et al.
    2021, section 4; `scipy.stats.trim_mean(scores, 0.25, axis=None)`).

    Takes scores [num_seeds] or [..., num_seeds, num_tasks] and returns [...] in their unit; raises
    ValueError if they are empty or not finite.
    """
    runs = _finite(scores)
    runs = runs.reshape(*runs.shape[:-2], -1)
    cut = runs.shape[-1] // 4
    return np.sort(runs, axis=-1)[..., cut : runs.shape[-1] - cut].mean(axis=-1)


def optimality_gap(scores: ArrayLike, target: float = 1.0) -> Any:
    """How far the runs fall short of `target` on average; what exceeds it does not count.

    Args:
        scores: [num_seeds] or [..., num_seeds, num_tasks].
        target: the score beyond which gains are worth nothing (1 if human-normalised).

    Returns:
        A float, or [...] with batch axes, in the unit of the scores; smaller is better.

    Raises:
        ValueError: scores are empty or not finite.
    """
    return target - np.minimum(_finite(scores), target).mean(axis=(-2, -1))


def bootstrap_interval(
    scores: ArrayLike,
    statistic: Statistic = iqm,
    confidence: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> Interval:
    """A statistic with its stratified percentile bootstrap interval (Agarwal et al., section 4).

    Within each task seeds are drawn anew with replacement, independently of the other tasks: the
    interval tells how much the result would move with other seeds on the same tasks.

    Args:
        scores: [num_seeds] or [num_seeds, num_tasks].
        statistic: reduces [..., num_seeds, num_tasks] to [...].
        confidence: coverage of the interval, in (0, 1).
        replicates: number of bootstrap replicates.
        seed: of the random numbers; the same seed gives the same interval.

    Returns:
        Interval of floats.

    Raises:
        ValueError: scores are empty, not finite or have other axes; confidence or replicates
            are out of range; the statistic does not reduce the last two axes.
    """
    scores = _matrix(scores)
    check_options(confidence, replicates)
    rng = np.random.default_rng(seed)
    num_seeds, num_tasks = scores.shape
    results = np.empty(replicates)
    for rows in blocks(replicates, scores.size):
        drawn = rng.integers(num_seeds, size=(rows.stop - rows.start, num_seeds, num_tasks))
        # flat positions, since one take is faster than indexing by two arrays
        results[rows] = _reduce(statistic, scores.take(drawn * num_tasks + np.arange(num_tasks)))
    return percentiles(float(_reduce(statistic, scores)), results, confidence)


def bootstrap_curve(
    curves: ArrayLike,
    statistic: Statistic = iqm,
    confidence: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> Interval:
    """A statistic over seeds at each point of their curves, with pointwise bootstrap intervals.

    Whole seeds are drawn, the same for all points, so the band is as smooth as the curves. Where
    some seeds have no value yet (NaN), the others alone are drawn and averaged.

    Args:
        curves: [num_seeds, num_points], NaN where a seed has no value.
        statistic: reduces [..., num_seeds, 1] to [...].
        confidence: coverage of each point's interval, in (0, 1).
        replicates: number of bootstrap replicates.
        seed: of the random numbers; the same seed gives the same intervals.

    Returns:
        Interval of arrays [num_points], NaN where no seed has a value.

    Raises:
        ValueError: curves are empty, infinite or not [num_seeds, num_points]; confidence or
            replicates are out of range; the statistic does not reduce the last two axes.
    """
    curves = np.asarray(curves, dtype=float)
    if curves.ndim != 2 or curves.size == 0 or np.isinf(curves).any():
        raise ValueError(
            f"curves have shape {curves.shape} and {np.isinf(curves).sum()} infinite values; "
            "expected finite values (or NaN) [num_seeds, num_points]: give one row per seed"
        )
    check_options(confidence, replicates)
    uniform = np.random.default_rng(seed).random((replicates, curves.shape[0]))
    band = Interval(*np.full((3, curves.shape[1]), np.nan))
    # points at which the same seeds have values are one batch: usually a few, often one
    patterns, group = np.unique(~np.isnan(curves), axis=1, return_inverse=True)
    for index, present in enumerate(patterns.T):
        if not present.any():
            continue
        points = np.flatnonzero(group.ravel() == index)
        values = curves[np.ix_(present, points)].T  # [points, present seeds]
        drawn = (uniform[:, : present.sum()] * present.sum()).astype(int)
        results = np.empty((replicates, points.size))
        for rows in blocks(replicates, values.size):
            results[rows] = _reduce(statistic, values[:, drawn[rows], None]).T
        part = percentiles(_reduce(statistic, values[..., None]), results, confidence)
        for whole, some in zip(band, part, strict=True):
            whole[points] = some
    return band


def performance_profile(
    scores: ArrayLike,
    thresholds: ArrayLike,
    confidence: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> Interval:
    """Fraction of runs that score above each threshold (Agarwal et al.: run-score distribution).

    Args:
        scores: [num_seeds] or [num_seeds, num_tasks].
        thresholds: [num_thresholds], in the unit of the scores, in any order.
        confidence: coverage of each threshold's interval, in (0, 1).
        replicates: number of stratified bootstrap replicates.
        seed: of the random numbers; the same seed gives the same bands.

    Returns:
        Interval of arrays [num_thresholds] in [0, 1]: the profile, its lower and upper band.

    Raises:
        ValueError: scores or thresholds are empty, not finite or have other axes; confidence or
            replicates are out of range.
    """
    scores = _matrix(scores)
    thresholds = np.asarray(thresholds, dtype=float)
    if thresholds.ndim != 1 or thresholds.size == 0 or not np.isfinite(thresholds).all():
        raise ValueError(
            f"thresholds have shape {thresholds.shape} and "
            f"{np.count_nonzero(~np.isfinite(thresholds))} values that are NaN or infinite; "
            "expected finite numbers [num_thresholds]: give for example numpy.linspace(0, 1, 100)"
        )
    check_options(confidence, replicates)
    rng = np.random.default_rng(seed)
    above = (scores.T[..., None] > thresholds).astype(float)  # [tasks, seeds, thresholds]
    results = np.empty((replicates, thresholds.size))
    for rows in blocks(replicates, scores.size):
        counts = _draw_counts(rng, rows.stop - rows.start, *scores.shape)
        # one product over tasks and seeds: many small ones lose to the threads of BLAS
        results[rows] = counts.reshape(-1, scores.size) @ above.reshape(scores.size, -1)
    return percentiles(above.mean(axis=(0, 1)), results / scores.size, confidence)


def probability_of_improvement(
    x: ArrayLike,
    y: ArrayLike,
    confidence: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> Interval:
    """How likely a run of X beats a run of Y on a task drawn at random; a tie counts one half.

    The mean over tasks of P(X > Y) + P(X = Y) / 2, which is the Mann-Whitney statistic divided
    by the number of pairs (Agarwal et al. 2021, section 4). Seeds of X and of Y are drawn
    independently within each task.

    Args:
        x: [num_seeds_x] or [num_seeds_x, num_tasks].
        y: [num_seeds_y] or [num_seeds_y, num_tasks], on the same tasks in the same order.
        confidence: coverage of the interval, in (0, 1).
        replicates: number of stratified bootstrap replicates.
        seed: of the random numbers; the same seed gives the same interval.

    Returns:
        Interval of floats in [0, 1].

    Raises:
        ValueError: scores are empty, not finite, have other axes or differ in their tasks;
            confidence or replicates are out of range.
    """
    x, y = _matrix(x), _matrix(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"x has {x.shape[1]} tasks and y has {y.shape[1]}; expected the same: "
            "give scores [num_seeds, num_tasks] whose columns are the same tasks"
        )
    check_options(confidence, replicates)
    rng = np.random.default_rng(seed)
    ours, theirs = x.T[:, :, None], y.T[:, None, :]
    wins = (ours > theirs) + 0.5 * (ours == theirs)  # [tasks, seeds of x, seeds of y]
    results = np.empty(replicates)
    for rows in blocks(replicates, x.size + y.size):
        counts_x = _draw_counts(rng, rows.stop - rows.start, *x.shape)
        counts_y = _draw_counts(rng, rows.stop - rows.start, *y.shape)
        results[rows] = np.einsum("rty,try->r", counts_y, counts_x.swapaxes(0, 1) @ wins)
    return percentiles(float(wins.mean()), results / wins.size, confidence)


def _finite(scores: ArrayLike) -> np.ndarray:
    """Scores as float64 [..., num_seeds, num_tasks]."""
    array = np.asarray(scores, dtype=float)
    if array.ndim == 0 or array.size == 0:
        raise ValueError(
            f"scores have shape {array.shape}; expected [num_seeds] or [num_seeds, num_tasks]: "
            "give at least one score"
        )
    if not np.isfinite(array).all():
        raise ValueError(
            f"scores hold {np.count_nonzero(~np.isfinite(array))} values that are NaN or "
            "infinite; expected finite numbers: score a run that failed as the worst possible one"
        )
    return array[:, None] if array.ndim == 1 else array


def _matrix(scores: ArrayLike) -> np.ndarray:
    array = _finite(scores)
    if array.ndim != 2:
        raise ValueError(
            f"scores have shape {array.shape}; expected [num_seeds] or [num_seeds, num_tasks]: "
            "give one algorithm's scores at a time"
        )
    return array


def check_options(confidence: float, replicates: int) -> None:
    """Raises ValueError where no interval can be told from them."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected in (0, 1): give for example 0.95")
    if replicates < 1:
        raise ValueError(f"replicates is {replicates}; expected at least 1: give for example 2000")


def blocks(replicates: int, size: int) -> Iterator[slice]:
    """Slices over the replicates that each draw about `_BLOCK` numbers, `size` a replicate."""
    length = max(1, _BLOCK // size)
    for start in range(0, replicates, length):
        yield slice(start, min(start + length, replicates))


def _draw_counts(rng: np.random.Generator, count: int, num_seeds: int, num_tasks: int) -> Any:
    """How often each seed is drawn in each replicate, float64 [count, num_tasks, num_seeds]."""
    drawn = rng.integers(num_seeds, size=(count * num_tasks, num_seeds))
    drawn += num_seeds * np.arange(count * num_tasks)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=drawn.size).astype(float)
    return counts.reshape(count, num_tasks, num_seeds)


def _reduce(statistic: Statistic, scores: np.ndarray) -> np.ndarray:
    result = np.asarray(statistic(scores))
    if result.shape != scores.shape[:-2]:
        raise ValueError(
            f"statistic turns shape {scores.shape} into {result.shape}; expected "
            f"{scores.shape[:-2]}: reduce the last two axes, as lambda s: s.max(axis=(-2, -1))"
        )
    return result


def percentiles(point: Any, results: np.ndarray, confidence: float) -> Interval:
    """The percentile interval of replicates [replicates, ...]."""
    tail = (1 - confidence) / 2
    low = np.quantile(results, tail, axis=0, method="lower")
    high = np.quantile(results, 1 - tail, axis=0, method="higher")
    return Interval(point, low, high)
