"""Pictures of open-loop forecasts: strips and films of images and grids, curves of vectors.

As in `plots`: no display, no JAX, and the same data give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image

from mbrl_jax.analysis.plots import PALETTE, STYLE, color_of, save

ROWS = ("true", "foretold", "difference")
_CELL = 48  # least height of a picture, in pixels
_GAP = 4  # between two pictures, in pixels
_SEEN = (0, 158, 115)  # bar above the pictures that the model has seen
_BLIND = (213, 94, 0)  # above the others


def pictures(values: ArrayLike) -> np.ndarray:
    """Observations as colours, [T, h, w, 3] uint8.

    Args:
        values: [T, h, w] grey from 0 to 1; [T, h, w, 3] uint8 or numbers beyond 1, an image from 0
            to 255; other [T, h, w, c], a grid whose channels get a colour each, the strongest on
            top.

    Raises:
        ValueError: other axes, no element or numbers that are not finite.
    """
    array = np.asarray(values)
    if array.ndim not in (3, 4) or not array.size or not np.isfinite(array).all():
        raise ValueError(
            f"pictures of shape {array.shape}: expected [T, h, w] or [T, h, w, c] of finite numbers"
        )
    if array.ndim == 4 and array.shape[-1] == 3 and (array.dtype == np.uint8 or array.max() > 1):
        return np.clip(np.round(array), 0, 255).astype(np.uint8)
    array = np.clip(array.astype(float), 0, 1)
    if array.ndim == 3 or array.shape[-1] == 1:
        grey = array.reshape(*array.shape[:3], 1)
        return np.round(255 * np.repeat(grey, 3, -1)).astype(np.uint8)
    colors = np.array([to_rgb(PALETTE[i % len(PALETTE)]) for i in range(array.shape[-1])])
    top = array.argmax(-1)
    shown = colors[top] * array.max(-1, keepdims=True)
    return np.round(255 * shown).astype(np.uint8)


def strip(true: ArrayLike, foretold: ArrayLike, path: str | os.PathLike[str], context: int) -> Path:
    """Draws truth, forecast and their difference, three rows with time from left to right, as PNG.

    A green bar stands above what the model has seen, an orange one above what it has not.

    Args:
        true, foretold: as in `pictures`, of one shape.
        path: where to write; .png is added or takes the place of another suffix.
        context: pictures that the model has seen.

    Returns:
        The path of the PNG.

    Raises:
        ValueError: as `pictures`, or for two shapes.
    """
    rows = _rows(true, foretold)
    frames = [_frame([row[t] for row in rows], t < context) for t in range(len(rows[0]))]
    gap = np.full((frames[0].shape[0], _GAP, 3), 255, np.uint8)
    joined = [part for frame in frames for part in (frame, gap)][:-1]
    return _write(Image.fromarray(np.concatenate(joined, 1)), path)


def film(
    true: ArrayLike,
    foretold: ArrayLike,
    path: str | os.PathLike[str],
    context: int,
    seconds: float = 0.4,
) -> Path:
    """Draws the columns of `strip` one after another as GIF, each for so many seconds.

    Arguments, result and errors are those of `strip`, with .gif.
    """
    rows = _rows(true, foretold)
    frames = [
        Image.fromarray(_frame([row[t] for row in rows], t < context)) for t in range(len(rows[0]))
    ]
    return _write(frames[0], path, frames[1:], round(1_000 * seconds))


def curves(
    true: ArrayLike,
    foretold: ArrayLike,
    path: str | os.PathLike[str],
    context: int,
    *,
    title: str | None = None,
    names: Sequence[str] = (),
) -> list[Path]:
    """Draws each number of a vector over time, true and foretold, as PNG and SVG.

    Args:
        true: [T, D].
        foretold: [T, D], or [N, T, D] of several samples, whose range is a band.
        path: where to write; both suffixes, .png and .svg, are added or take the place of one.
        context: steps that the model has seen, left of the dotted line.
        title: heading of the figure.
        names: of the numbers; their index by default.

    Raises:
        ValueError: shapes that do not fit, or numbers that are not finite.
    """
    came, said = np.asarray(true, float), np.asarray(foretold, float)
    said = said[None] if said.ndim == 2 else said
    finite = np.isfinite(came).all() and np.isfinite(said).all()
    if came.ndim != 2 or said.ndim != 3 or said.shape[1:] != came.shape or not finite:
        raise ValueError(
            f"true {came.shape} and foretold {said.shape}: expected [T, D] and [N, T, D] of finite "
            "numbers"
        )
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(7.2, 1.2 + 1.3 * came.shape[1]))
        panels = figure.subplots(came.shape[1], sharex=True, squeeze=False)[:, 0]
        time = np.arange(len(came))
        for index, axes in enumerate(panels):
            series = said[..., index]
            axes.fill_between(
                time, series.min(0), series.max(0), color=color_of(1), alpha=0.2, linewidth=0
            )
            axes.plot(time, came[:, index], color=color_of(0), label="true")
            axes.plot(time, series.mean(0), color=color_of(1), label="foretold")
            axes.axvline(context - 0.5, color="#666666", linestyle=":", linewidth=1.2)
            axes.set(ylabel=names[index] if names else str(index))
        panels[0].legend(fontsize=9, ncols=2)
        panels[-1].set(xlabel="step")
        if title is not None:
            figure.suptitle(title, x=0.01, ha="left")
        return save(figure, path)


def _rows(true: ArrayLike, foretold: ArrayLike) -> list[np.ndarray]:
    came, said = np.asarray(true), np.asarray(foretold)
    if came.shape != said.shape:
        raise ValueError(f"true {came.shape} and foretold {said.shape}: expected one shape")
    shown = [pictures(came), pictures(said)]
    apart = np.abs(shown[0].astype(int) - shown[1]).astype(np.uint8)
    return [*shown, apart]


def _frame(cells: list[np.ndarray], seen: bool) -> np.ndarray:
    """Pictures [h, w, 3] of one step, one above another, under a bar."""
    times = max(1, -(-_CELL // cells[0].shape[0]))
    cells = [cell.repeat(times, 0).repeat(times, 1) for cell in cells]
    width = cells[0].shape[1]
    bar = np.empty((_GAP, width, 3), np.uint8)
    bar[:] = _SEEN if seen else _BLIND
    gap = np.full((_GAP, width, 3), 255, np.uint8)
    return np.concatenate([bar, *(part for cell in cells for part in (gap, cell))])


def _write(
    image: Image.Image,
    path: str | os.PathLike[str],
    more: Sequence[Image.Image] = (),
    milliseconds: int = 0,
) -> Path:
    target = Path(os.path.expanduser(path)).with_suffix(".gif" if milliseconds else ".png")
    target.parent.mkdir(parents=True, exist_ok=True)
    if milliseconds:
        image.save(target, save_all=True, append_images=list(more), duration=milliseconds, loop=0)
    else:
        image.save(target)
    return target
