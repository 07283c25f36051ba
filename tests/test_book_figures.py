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
    plain, plus = rows(dyna_mazes.fig8_4(tmp_path, SEEDS, ("Dyna-Q", "Dyna-Q+, κ = 1e-4"))).values()
    assert_close(plain["at the end"], 77.3, 2.5)
    assert_close(plus["at the end"], 133.8, 0.9)
    assert plain["at the end"].high < plus["at the end"].low
    # at the end Dyna-Q+ takes the new way (at most 27.9); most of Dyna-Q's seeds have not found it
    assert_close(plain["in the last 500 steps"], 11.3, 0.8)
    assert_close(plus["in the last 500 steps"], 26.6, 0.2)


def test_figure_8_5_shortcut_maze(tmp_path):
    plain, plus = rows(dyna_mazes.fig8_5(tmp_path, SEEDS, ("Dyna-Q", "Dyna-Q+, κ = 1e-3"))).values()
    assert_close(plain["at the end"], 289.5, 2.6)
    assert_close(plus["at the end"], 363.9, 0.7)
    assert plain["at the end"].high < plus["at the end"].low
    # the greedy path takes the shortcut in 1 % and 84 % of the seeds
    assert plain["greedy path is shortest at the end"].point <= 0.05
    assert 0.7 <= plus["greedy path is shortest at the end"].point <= 0.95


@pytest.mark.slow
def test_other_bonuses_in_the_moving_mazes(tmp_path):
    for figure, agent, end, end_error in (
        (dyna_mazes.fig8_4, "Dyna-Q+, κ = 1e-3", 141.2, 0.6),
        (dyna_mazes.fig8_4, "Exercise 8.4, κ = 1e-3", 94.3, 1.7),
        (dyna_mazes.fig8_5, "Dyna-Q+, κ = 1e-4", 316.2, 0.5),
        (dyna_mazes.fig8_5, "Exercise 8.4, κ = 1e-3", 301.2, 1.0),
    ):
        (row,) = rows(figure(tmp_path, SEEDS, (agent,))).values()
        assert_close(row["at the end"], end, end_error)


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
