"""Learning matches the book's figures, as measured elsewhere with another implementation.

Sutton and Barto (2018), Figures 8.2, 8.4 and 8.5 and Example 8.4; the numbers expected here are
means over 128 to 256 seeds, with their standard errors, of an independent implementation.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import dyna_frozenlake
import dyna_mazes

SEEDS = 128


def rows(tables):
    return next(iter(tables.values()))


def error(interval):
    """The standard error behind a 95 % interval."""
    return (interval.high - interval.low) / (2 * 1.96)


def assert_close(measured, expected, expected_error=0.0):
    """Within four standard errors and 2 %."""
    tolerance = 4 * np.hypot(error(measured), expected_error) + 0.02 * expected
    assert abs(measured.point - expected) <= tolerance, (measured, expected)


@pytest.fixture(scope="module")
def fig8_2(tmp_path_factory):
    return rows(dyna_mazes.fig8_2(tmp_path_factory.mktemp("fig8_2"), SEEDS))


# planning steps, first episode whose mean is at most 20 with its tolerance, mean of the second
@pytest.mark.parametrize(
    ("n", "first", "within", "second"), [(0, 29, 6, 714), (5, 6, 2, 153), (50, 3, 1, 40)]
)
def test_figure_8_2(fig8_2, n, first, within, second):
    row = fig8_2[f"n = {n}"]
    assert row["seeds with episodes missing"] <= 0.01 * SEEDS
    assert abs(row["first episode with a mean <= 20"].point - first) <= within
    # before the first reward every agent walks at random: 869 steps, by a linear solve
    assert abs(row["episode 1"].point - 869) <= 4 * error(row["episode 1"])
    assert_close(row["episode 2"], second, second / 16)
    assert 15.88 < row["last 10"].point < 18 * 1.1


def test_figure_8_4_blocking_maze(tmp_path):
    row = rows(dyna_mazes.fig8_4(tmp_path, SEEDS))
    end = {name: cells["at the end"] for name, cells in row.items()}
    assert_close(end["Dyna-Q"], 77.3, 2.5)
    assert_close(end["Dyna-Q+, κ = 1e-4"], 133.8, 0.9)
    assert_close(end["Dyna-Q+, κ = 1e-3"], 141.2, 0.6)
    assert_close(end["Exercise 8.4, κ = 1e-3"], 94.3, 1.7)
    assert end["Dyna-Q"].high < end["Dyna-Q+, κ = 1e-4"].low
    late = {name: cells["in the last 500 steps"] for name, cells in row.items()}
    assert_close(late["Dyna-Q"], 11.3, 0.8)
    assert_close(late["Dyna-Q+, κ = 1e-4"], 26.6, 0.2)


def test_figure_8_5_shortcut_maze(tmp_path):
    row = rows(dyna_mazes.fig8_5(tmp_path, SEEDS))
    end = {name: cells["at the end"] for name, cells in row.items()}
    assert_close(end["Dyna-Q"], 289.5, 2.6)
    assert_close(end["Dyna-Q+, κ = 1e-3"], 363.9, 0.7)
    assert_close(end["Dyna-Q+, κ = 1e-4"], 316.2, 0.5)
    assert_close(end["Exercise 8.4, κ = 1e-3"], 301.2, 1.0)
    assert end["Dyna-Q"].high < end["Dyna-Q+, κ = 1e-3"].low
    # whose greedy path takes the shortcut: 1 % and 84 % of the seeds
    taken = {name: cells["greedy path is shortest at the end"] for name, cells in row.items()}
    assert taken["Dyna-Q"].point <= 0.05
    assert 0.7 <= taken["Dyna-Q+, κ = 1e-3"].point <= 0.95


@pytest.mark.parametrize(
    ("resolution", "steps", "least"),
    [(1, 6_000, 3.0), pytest.param(2, 20_000, 2.0, marks=pytest.mark.slow)],
)
def test_prioritised_sweeping_needs_fewer_updates(tmp_path, resolution, steps, least):
    (row,) = rows(dyna_mazes.sweeping(tmp_path, SEEDS, {resolution: steps})).values()
    assert row["ratio of updates"].low >= least
    for agent in ("Dyna-Q", "prioritised sweeping"):
        assert row[f"{agent}: seeds solved"].point >= 0.95


def test_frozenlake_after_the_first_goal(tmp_path):
    table = rows(dyna_frozenlake.main(seeds=256, out=tmp_path))
    for n, ten, fifty in ((0, 0.04, 0.20), (5, 0.66, 0.84), (50, 0.87, 0.89)):
        row = table[f"n = {n}"]
        assert row["success in the 10 episodes after it"].point == pytest.approx(ten, abs=0.06)
        assert row["success in the 50 episodes after it"].point == pytest.approx(fifty, abs=0.06)
        assert row["success in the last 100 episodes"].point == pytest.approx(0.895, abs=0.03)
        assert row["seeds with all these episodes"] >= 250
        assert row["first goal episode, median"] == table["n = 0"]["first goal episode, median"]
