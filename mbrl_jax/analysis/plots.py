"""Figures of learning curves, performance profiles and intervals, each as PNG and SVG.

Every function draws on a figure of its own, without pyplot or a display, whatever the user's
matplotlib settings are. The same data give the same bytes, so committed figures do not churn.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from mbrl_jax.analysis.stats import Interval, Statistic, bootstrap_curve, iqm, performance_profile

# Okabe and Ito 2008, "Color Universal Design"; their yellow is too faint on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_DASHES = ("-", "-.", ":")  # for more algorithms than colours
_INK, _GREY = "#222222", "#666666"
SIZE = (7.2, 4.2)  # inches
_LABEL_GAP = 0.065  # least distance of two names beside the axes, in heights of the axes
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.titlesize": 13,
    "figure.titleweight": "bold",
    "font.size": 11,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "savefig.dpi": 200,
    "svg.hashsalt": "mbrl_jax",
    "text.color": _INK,
    "xtick.color": _GREY,
    "xtick.labelcolor": _INK,
    "ytick.color": _GREY,
    "ytick.labelcolor": _INK,
}


def learning_curves(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    xlabel: str = "environment steps",
    ylabel: str = "return",
    statistic: Statistic = iqm,
    references: Mapping[str, float] | None = None,
) -> list[Path]:
    """Draw a statistic over seeds against steps, with pointwise 95 % bootstrap bands.

    Each curve is named at its end.

    Args:
        curves: algorithm -> (steps [num_points], values [num_seeds, num_points]); NaN where a
            seed has no value yet. Algorithms may differ in their steps and seeds.
        path: where to write; both suffixes, .png and .svg, are added or take the place of one.
        title: heading of the figure.
        xlabel: what the steps are, with their unit.
        ylabel: what the values are, with their unit.
        statistic: over seeds, reduces [..., num_seeds, 1] to [...].
        references: name -> value, drawn as dashed lines, such as the exact optimum.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        ValueError: there are no curves, shapes do not fit, or a curve has no value at all.
    """
    require(curves, "curves")
    with style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE)
        axes = figure.subplots()
        ends, seeds = [], set()
        for index, (name, (steps, values)) in enumerate(curves.items()):
            steps, values = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
            if values.shape[1:] != steps.shape or np.isnan(values).all():
                raise ValueError(
                    f"curve {name!r} has steps {steps.shape} and values {values.shape}, of which "
                    f"{np.count_nonzero(~np.isnan(values))} are numbers; expected [num_points] "
                    "and [num_seeds, num_points] with some number: mend it or leave it out"
                )
            band = bootstrap_curve(values, statistic)
            last = np.flatnonzero(~np.isnan(band.point))[-1]
            draw_band(axes, index, name, steps, band, last)
            ends.append((steps[last], band.point[last], name, color_of(index)))
            seeds.add(len(values))
        right = axes.dataLim.x1
        for name, value in (references or {}).items():
            axes.axhline(value, color=_GREY, linestyle=(0, (5, 3)), linewidth=1.2, zorder=1.5)
            ends.append((right, value, name, _GREY))
        if axes.dataLim.width > 0:
            axes.set_xlim(axes.dataLim.x0, right)
        _name_ends(axes, ends)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(thousands))
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        label = getattr(statistic, "__name__", "point").replace("iqm", "IQM").replace("_", " ")
        note(figure, f"{label} and 95 % bootstrap interval over", seeds)
        return save(figure, path)


def performance_profiles(
    scores: Mapping[str, ArrayLike],
    path: str | os.PathLike[str],
    *,
    thresholds: ArrayLike | None = None,
    title: str | None = None,
    xlabel: str = "score τ",
) -> list[Path]:
    """Draw the fraction of runs above each score, with pointwise 95 % bootstrap bands.

    Args:
        scores: algorithm -> [num_seeds] or [num_seeds, num_tasks].
        path: where to write; both suffixes, .png and .svg, are added or take the place of one.
        thresholds: [num_thresholds] increasing scores; by default 201 over all that occur.
        title: heading of the figure.
        xlabel: what the scores are, with their unit.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        ValueError: there are no scores, they are not finite, or they have other axes.
    """
    require(scores, "scores")
    if thresholds is None:
        pooled = np.concatenate([np.asarray(runs, dtype=float).ravel() for runs in scores.values()])
        require(pooled, "scores")
        thresholds = np.linspace(pooled.min(), pooled.max(), 201)
    thresholds = np.asarray(thresholds, dtype=float)
    profiles = {name: performance_profile(runs, thresholds) for name, runs in scores.items()}
    with style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE)
        axes = figure.subplots()
        for index, (name, band) in enumerate(profiles.items()):
            draw_band(axes, index, name, thresholds, band)
        axes.margins(x=0)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
        axes.set(xlabel=xlabel, ylabel="runs that score above τ", title=title)
        axes.legend()
        note(figure, "95 % bootstrap interval over", {len(np.asarray(s)) for s in scores.values()})
        return save(figure, path)


def interval_plot(
    panels: Mapping[str, Mapping[str, Interval]],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    xlabel: str = "point and 95 % interval",
) -> list[Path]:
    """Draw a point and its interval for each algorithm, a row each, and a panel for each statistic.

    Args:
        panels: statistic -> algorithm -> Interval of floats, the same algorithms in each. An
            infinite bound runs to the edge, where an arrow marks it.
        path: where to write; both suffixes, .png and .svg, are added or take the place of one.
        title: heading of the figure.
        xlabel: what is drawn, with its unit.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        ValueError: there are no panels or algorithms, the panels differ in their algorithms, or
            an interval is NaN.
    """
    require(panels, "panels")
    names = list(next(iter(panels.values())))
    require(names, "algorithms")
    with style.context(["default", STYLE]):
        width = max(SIZE[0], 1.6 + 2.6 * len(panels))
        figure = Figure(figsize=(width, 1.5 + 0.45 * len(names)))
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (panel, intervals) in zip(row, panels.items(), strict=True):
            if set(intervals) != set(names) or np.isnan(list(intervals.values())).any():
                raise ValueError(
                    f"panel {panel!r} holds {dict(intervals)}; expected intervals without NaN of "
                    f"{names}: give every panel the same algorithms"
                )
            _draw_intervals(axes, [intervals[name] for name in names])
            axes.set_title(panel, loc="center", fontsize=11, fontweight="normal")
        row[0].set_yticks(range(len(names)), [wrapped(name) for name in names])
        row[0].set_ylim(len(names) - 0.4, -0.6)
        figure.supxlabel(xlabel, fontsize=11)
        if title is not None:
            figure.suptitle(title, x=0.01, ha="left")
        return save(figure, path)


def require(things: Collection, kind: str) -> None:
    """Raises ValueError where there is nothing to draw."""
    if len(things) == 0:
        raise ValueError(f"no {kind} to draw; expected at least one: name and give it")


def color_of(index: int) -> str:
    """Of curve number `index`."""
    return PALETTE[index % len(PALETTE)]


def wrapped(name: str) -> str:
    """A name in lines so short that they leave room for what they name, three at most."""
    return textwrap.fill(name, 34, max_lines=3, placeholder="…")


def thousands(value: float, _: int) -> str:
    """A number on an axis with k, M or G."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return Formatter.fix_minus(f"{value / unit:g}{suffix}")
    return Formatter.fix_minus(f"{value:g}")


def draw_band(
    axes: Axes, index: int, name: str, x: np.ndarray, band: Interval, last: int | None = None
) -> None:
    """Draw one curve and its band; a dot marks the point `last`."""
    dashes = _DASHES[index // len(PALETTE) % len(_DASHES)]
    axes.fill_between(x, band.low, band.high, color=color_of(index), alpha=0.18, linewidth=0)
    (line,) = axes.plot(x, band.point, dashes, color=color_of(index), label=wrapped(name))
    if last is not None:
        line.set(marker="o", markersize=4.5, markevery=[last], clip_on=False)


def _draw_intervals(axes: Axes, intervals: list[Interval]) -> None:
    """Draw one panel, the first interval uppermost."""
    ends = np.array(intervals, dtype=float)  # [algorithms, (point, low, high)]
    finite = ends[np.isfinite(ends)]
    left, right = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    margin = 0.08 * (right - left) or 0.5
    left, right = left - margin, right + margin
    for index, (point, low, high) in enumerate(ends):
        color = color_of(index)
        start, stop = np.clip([low, high], left, right)
        axes.barh(index, stop - start, 0.5, start, color=color, alpha=0.35)
        if np.isfinite(point):
            axes.vlines(point, index - 0.25, index + 0.25, color=color, linewidth=3)
        if np.isneginf(low):
            axes.plot(left, index, "<", color=color, markersize=9, clip_on=False)
        if np.isposinf(high):
            axes.plot(right, index, ">", color=color, markersize=9, clip_on=False)
    axes.set_xlim(left, right)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))


def _name_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write names (x, y, name, color) right of the axes, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    ends = [(x, y, wrapped(name), color) for x, y, name, color in ends]
    ends.sort(key=lambda end: end[1])
    lines = np.array([1 + name.count("\n") for _, _, name, _ in ends])
    gaps = _LABEL_GAP * (lines[:-1] + lines[1:]) / 2
    heights = np.array([(y - low) / (high - low) for _, y, _, _ in ends])
    for _ in range(50 * len(ends)):
        overlap = np.maximum(gaps - np.diff(heights), 0) / 2
        heights[:-1] -= overlap
        heights[1:] += overlap
        heights[-1] = min(heights[-1], 1)
    for (x, y, name, color), height in zip(ends, heights, strict=True):
        axes.annotate(
            name,
            (x, y),
            (1.035, height),
            textcoords="axes fraction",
            annotation_clip=False,
            color=0.6 * np.array(to_rgb(color)),  # darker, since letters are thinner than lines
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.8,
                "relpos": (0, 0.5),
                "shrinkA": 2,
                "shrinkB": 3,
            },
        )


def note(figure: Figure, text: str, seeds: set[int]) -> None:
    """Say beneath the figure what the bands are, and over how many seeds."""
    span = "-".join(str(count) for count in sorted({min(seeds), max(seeds)}))
    plural = "" if max(seeds) == 1 else "s"
    figure.supxlabel(f"{text} {span} seed{plural}", x=0.99, ha="right", fontsize=8.5, color=_GREY)


def save(figure: Figure, path: str | os.PathLike[str]) -> list[Path]:
    """Writes the PNG and the SVG."""
    path = Path(os.path.expanduser(path))
    if path.suffix in (".png", ".svg"):
        path = path.with_suffix("")
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = Path(f"{path}.png"), Path(f"{path}.svg")
    # neither dates nor versions, so that a figure changes only with its data
    figure.savefig(png, metadata={"Software": None})
    figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return [png, svg]
