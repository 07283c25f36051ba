"""Figures of how good a dynamics model is: what `models.diagnostics` returns, as PNG and SVG.

As in `plots`: no display, no JAX, and the same data give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from mbrl_jax.analysis.plots import SIZE, STYLE, color_of, draw_band, note, require, save
from mbrl_jax.analysis.stats import Interval, Statistic, bootstrap_curve, iqm, mean

_DASH = (0, (5, 3))
_GREY = "#666666"


def error_growth(
    errors: Mapping[str, ArrayLike],
    path: str | os.PathLike[str],
    *,
    fits: Mapping[str, tuple[float, float]] | None = None,
    title: str | None = None,
    ylabel: str = "mean squared error",
    statistic: Statistic = iqm,
) -> list[Path]:
    """Draw open-loop errors against the steps ahead, with 95 % bootstrap bands over seeds.

    Args:
        errors: name -> [num_seeds, T], such as `KStepErrors.total` of data in and out of
            distribution, or one of its dimensions; positive.
        path: where to write; both suffixes, .png and .svg, are added or take the place of one.
        fits: name -> (a, b) of `growth_rate`; draws a exp(b k) as a dashed line.
        title: heading of the figure.
        ylabel: what the errors are, with their unit.
        statistic: over seeds, reduces [..., num_seeds, 1] to [...].

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        ValueError: there are no errors, they are not finite and positive, or have other axes.
    """
    require(errors, "errors")
    with style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE)
        axes = figure.subplots()
        seeds = set()
        for index, (name, values) in enumerate(errors.items()):
            values = _finite(name, values, 2)
            if (values <= 0).any():
                raise ValueError(
                    f"{name!r} has an error of {values.min()}: expected positive ones, since their "
                    "axis is logarithmic"
                )
            k = np.arange(1, values.shape[1] + 1)
            draw_band(axes, index, name, k, bootstrap_curve(values, statistic))
            if fits and name in fits:
                scale, rate = map(float, fits[name])
                label = f"{scale:.2g} exp({rate:.2g} k)"
                axes.plot(
                    k, scale * np.exp(rate * k), color=color_of(index), linestyle=_DASH,
                    linewidth=1.2, label=label,
                )  # fmt: skip
            seeds.add(len(values))
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="steps ahead, k", ylabel=ylabel, title=title)
        axes.legend(fontsize=9)
        note(figure, "95 % bootstrap interval over", seeds)
        return save(figure, path)


def calibration(
    pit: Mapping[str, ArrayLike],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
) -> list[Path]:
    """Draw coverage against level, and the histogram of the probability integral transform.

    Args:
        pit: name -> [num_seeds, bins], `Calibration.pit`; an even number of bins.
        path: where to write; both suffixes, .png and .svg, are added or take the place of one.
        title: heading of the figure.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        ValueError: there are no shares, they are not finite, have other axes or odd bins.
    """
    require(pit, "probability integral transforms")
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(8.6, 4.0))
        left, right = figure.subplots(1, 2)
        seeds = set()
        for index, (name, shares) in enumerate(pit.items()):
            shares = _finite(name, shares, 2)
            bins = shares.shape[1]
            if bins % 2:
                raise ValueError(f"{name!r} has {bins} bins: expected an even number")
            level, covered = coverage_curve(shares)
            draw_band(left, index, name, level, bootstrap_curve(covered, mean))
            band = bootstrap_curve(bins * shares, mean)
            edges = np.linspace(0, 1, bins + 1)
            # each bin as a step, its last value repeated for the right edge
            stepped = Interval(*(np.append(values, values[-1]) for values in band))
            right.fill_between(
                edges, stepped.low, stepped.high, step="post", color=color_of(index), alpha=0.18,
                linewidth=0,
            )  # fmt: skip
            right.step(edges, stepped.point, where="post", color=color_of(index), label=name)
            seeds.add(len(shares))
        left.plot([0, 1], [0, 1], color=_GREY, linestyle=_DASH, linewidth=1.2, zorder=1.5)
        right.axhline(1, color=_GREY, linestyle=_DASH, linewidth=1.2, zorder=1.5)
        for axis in (left.xaxis, left.yaxis):
            axis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
        left.set(xlabel="central interval", ylabel="outcomes within it", xlim=(0, 1), ylim=(0, 1))
        right.set(xlabel="probability integral transform", ylabel="density", xlim=(0, 1))
        right.set_ylim(bottom=0)
        left.legend(fontsize=9)
        if title is not None:
            figure.suptitle(title, x=0.01, ha="left")
        note(figure, "dashed: calibrated; mean and 95 % bootstrap interval over", seeds)
        return save(figure, path)


def coverage_curve(pit: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Levels [bins / 2] and the share within each central interval, from `pit` [*lead, bins]."""
    shares = np.asarray(pit, dtype=float)
    half = shares.shape[-1] // 2
    pairs = shares[..., half:] + shares[..., half - 1 :: -1]
    return np.arange(1, half + 1) / half, np.cumsum(pairs, axis=-1)


def disagreement_against_error(
    parts: Mapping[str, tuple[ArrayLike, ArrayLike]],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    xlabel: str = "disagreement of the members",
    ylabel: str = "true error",
) -> list[Path]:
    """Draw what a model doubts against how wrong it is, a dot for each state.

    Args:
        parts: name -> (disagreement [N], error [N]) of one seed.
        path: where to write; both suffixes, .png and .svg, are added or take the place of one.
        title: heading of the figure.
        xlabel: what the disagreement is.
        ylabel: what the error is, with its unit.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        ValueError: there are no parts, they are not finite, or their lengths differ.
    """
    return _scatter(parts, path, title, xlabel, ylabel, "log")


def imagined_against_real(
    parts: Mapping[str, tuple[ArrayLike, ArrayLike]],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    xlabel: str = "real return",
    ylabel: str = "imagined return",
) -> list[Path]:
    """Draw returns that a model promises against those that came, a dot for each start.

    Arguments, results and errors are those of `disagreement_against_error`, with (real [N],
    imagined [N]); on the dashed diagonal both are equal, above it the model is exploited.
    """
    return _scatter(parts, path, title, xlabel, ylabel, "linear")


def _scatter(
    parts: Mapping[str, tuple[ArrayLike, ArrayLike]],
    path: str | os.PathLike[str],
    title: str | None,
    xlabel: str,
    ylabel: str,
    scale: str,
) -> list[Path]:
    require(parts, "parts")
    with style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE)
        axes = figure.subplots()
        for index, (name, pair) in enumerate(parts.items()):
            x, y = (_finite(name, values, 1) for values in pair)
            if x.shape != y.shape:
                raise ValueError(f"{name!r} has {len(x)} and {len(y)} numbers: expected as many")
            axes.scatter(x, y, 6, color=color_of(index), alpha=0.5, linewidths=0, label=name)
        if scale == "linear":
            axes.axline((0, 0), slope=1, color=_GREY, linestyle=_DASH, linewidth=1.2, zorder=1.5)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title, xscale=scale, yscale=scale)
        axes.legend(fontsize=9, markerscale=2)
        return save(figure, path)


def _finite(name: str, values: ArrayLike, ndim: int) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != ndim or not array.size or not np.isfinite(array).all():
        raise ValueError(
            f"{name!r} has shape {array.shape} and {np.count_nonzero(~np.isfinite(array))} values "
            f"that are not finite: expected {ndim} axes of finite numbers"
        )
    return array
