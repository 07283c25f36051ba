"""Figures decode, repeat byte for byte and name what they show; run folders read back."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from mbrl_jax.analysis import plots, stats
from mbrl_jax.analysis.runs import read_run
from mbrl_jax.analysis.stats import Interval

STEPS = np.linspace(0, 1_500_000, 31)


def curves(num_seeds=5, top=100.0):
    rng = np.random.default_rng(0)
    rate = rng.uniform(3, 6, size=(num_seeds, 1))
    return STEPS, top * (1 - np.exp(-rate * STEPS / STEPS[-1]))


def draw_curves(path):
    steps, holes = curves(top=60)
    holes = holes.copy()
    holes[:, 0] = holes[2:, 1] = np.nan
    both = {"Dyna-Q": curves(), "Q-learning": (steps[:20], holes[:, :20])}
    return plots.learning_curves(both, path, title="FrozenLake", references={"exact optimum": 100})


def draw_profiles(path):
    rng = np.random.default_rng(0)
    scores = {"Dyna-Q": rng.normal(1, 0.3, (10, 4)), "Q-learning": rng.normal(0, 0.3, (8, 4))}
    return plots.performance_profiles(scores, path, title="FrozenLake")


def draw_intervals(path):
    panel = {"Dyna-Q": Interval(20_000.0, 10_000.0, np.inf), "Q-learning": Interval(*[np.inf] * 3)}
    return plots.interval_plot({"steps": panel, "wall": panel}, path, title="FrozenLake")


FIGURES = pytest.mark.parametrize("draw", [draw_curves, draw_profiles, draw_intervals])


def written_text(svg):
    """What matplotlib draws as glyphs it also notes as XML comments."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.parse(svg, parser).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return [node.text.strip() for node in root.iter() if node.tag is ElementTree.Comment]


@FIGURES
def test_png_and_svg_are_written_and_decode(draw, tmp_path):
    png, svg = draw(tmp_path / "new" / "figure")
    assert (png, svg) == (tmp_path / "new" / "figure.png", tmp_path / "new" / "figure.svg")
    height, width, _ = matplotlib.image.imread(png).shape
    assert width == 1440
    assert height == (480 if draw is draw_intervals else 840)
    assert matplotlib.image.imread(png)[..., :3].std() > 0.02  # not blank
    assert {"Dyna-Q", "Q-learning", "FrozenLake"} <= set(written_text(svg))


def settings():
    # to read the backend's name would choose one
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}


@FIGURES
def test_figures_repeat_byte_for_byte_whatever_the_settings(draw, tmp_path):
    first = [file.read_bytes() for file in draw(tmp_path / "a")]
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "svg.hashsalt": "other"}):
        before = settings()
        second = [file.read_bytes() for file in draw(tmp_path / "b")]
        assert settings() == before
    assert first == second
    assert b"<dc:date>" not in first[1]
    assert matplotlib.__version__.encode() not in first[1]


def test_pyplot_is_not_used(tmp_path):
    code = (
        "import sys; from mbrl_jax.analysis import plots; "
        "plots.learning_curves({'a': ([0, 1], [[1, 2]])}, sys.argv[1]); "
        "print({'jax', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, tmp_path / "curve"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["curve", "curve.png", "curve.svg"])
def test_path_may_have_a_suffix(name, tmp_path):
    draw_curves(tmp_path / name)
    assert {file.name for file in tmp_path.iterdir()} == {"curve.png", "curve.svg"}


def test_a_dot_in_the_name_is_kept(tmp_path):
    png, _ = draw_curves(str(tmp_path / "lr0.5"))
    assert png.name == "lr0.5.png"


def test_learning_curves_say_what_they_show(tmp_path):
    text = written_text(draw_curves(tmp_path / "curve")[1])
    assert {"environment steps", "return", "exact optimum", "500k", "1M", "1.5M"} <= set(text)
    assert "IQM and 95 % bootstrap interval over 5 seeds" in text
    mixed = {"a": curves(3), "b": curves(10)}
    _, svg = plots.learning_curves(mixed, tmp_path / "mixed", statistic=stats.mean)
    assert "mean and 95 % bootstrap interval over 3-10 seeds" in written_text(svg)


def test_names_at_the_ends_do_not_overlap():
    axes = plots.Figure().subplots()
    axes.set_ylim(0, 10)
    plots._name_ends(axes, [(0, 9.5, str(i), "#000000") for i in range(12)] + [(0, 1, "a", "red")])
    heights = np.array([text.get_position()[1] for text in axes.texts])
    assert np.diff(heights).min() > 0.95 * plots._LABEL_GAP
    assert heights.max() <= 1
    assert heights[0] == pytest.approx(0.1)  # nothing near: stays beside its curve


def test_long_names_leave_room_for_what_they_name(tmp_path):
    """Paths without a gap, and sentences; a warning of axes without width is an error."""
    names = ["/a/folder" * 15, "one word and another " * 9, "x" * 200]
    plots.learning_curves({name: curves(2, i) for i, name in enumerate(names)}, tmp_path / "curve")
    plots.performance_profiles({name: [1.0, 2.0] for name in names}, tmp_path / "profile")
    interval = {name: Interval(1.0, 0.5, 1.5) for name in names}
    plots.interval_plot({"x": interval, "y": interval}, tmp_path / "interval")
    axes = plots.Figure().subplots()
    plots._name_ends(axes, [(0, 0.5, name, "#000000") for name in names])
    assert {text.get_text().count("\n") for text in axes.texts} == {2}
    heights = np.array([text.get_position()[1] for text in axes.texts])
    assert np.diff(heights).min() > 0.95 * 3 * plots._LABEL_GAP


def test_many_algorithms_and_a_single_point_can_be_drawn(tmp_path):
    plots.learning_curves({str(i): curves(2, i) for i in range(9)}, tmp_path / "many")
    plots.learning_curves({"one": ([100], [[1.0]])}, tmp_path / "one")
    plots.performance_profiles({"one": [1.0]}, tmp_path / "profile")
    plots.interval_plot({"x": {"one": Interval(1.0, 1.0, 1.0)}}, tmp_path / "interval")


def luminance(color):
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]  # WCAG 2, relative luminance


def test_palette_stands_out_from_white_and_its_names_can_be_read():
    assert len(set(plots.PALETTE)) == len(plots.PALETTE)
    for color in plots.PALETTE:
        assert 1.05 / (luminance(color) + 0.05) > 2  # lines
    axes = plots.Figure().subplots()
    plots._name_ends(axes, [(0, i, "a", color) for i, color in enumerate(plots.PALETTE)])
    for text in axes.texts:
        written = matplotlib.colors.to_hex(text.get_color())
        assert 1.05 / (luminance(written) + 0.05) > 4.5  # letters: WCAG 2, level AA


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (500, "500"),
        (2500, "2.5k"),
        (1e6, "1M"),
        (-2e9, "\N{MINUS SIGN}2G"),
        (0.25, "0.25"),
    ],
)
def test_large_numbers_are_short(value, text):
    assert plots.thousands(value, 0) == text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: plots.learning_curves({}, path), "no curves"),
        (lambda path: plots.learning_curves({"a": ([1], [[1, 2]])}, path), "curve 'a' has steps"),
        (lambda path: plots.learning_curves({"a": ([1], [[np.nan]])}, path), "0 are numbers"),
        (lambda path: plots.performance_profiles({}, path), "no scores"),
        (lambda path: plots.performance_profiles({"a": []}, path), "no scores"),
        (lambda path: plots.interval_plot({}, path), "no panels"),
        (lambda path: plots.interval_plot({"x": {}}, path), "no algorithms"),
        (
            lambda path: plots.interval_plot({"x": {"a": Interval(1, 1, np.nan)}}, path),
            "panel 'x' holds",
        ),
        (
            lambda path: plots.interval_plot(
                {"x": {"a": Interval(1, 1, 1)}, "y": {"b": Interval(1, 1, 1)}}, path
            ),
            "panel 'y' holds",
        ),
    ],
)
def test_bad_input_is_refused_before_a_file_is_written(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "figure")
    assert not list(tmp_path.iterdir())


# ---- run folders

HEADER = "seed,env_steps,wall_seconds,eval_return,train_return,loss"
ROWS = ["1,100,0.5,3,,0.25", "0,100,0.5,2,,", "0,200,1.0,4,nan,0.5", "1,200,1.0,6,5,0.125"]


def run_folder(path, *lines):
    (path / "metrics.csv").write_text("".join(line + "\n" for line in lines))
    return path


def test_run_reads_back_as_arrays(tmp_path):
    run = read_run(run_folder(tmp_path, HEADER, *ROWS))
    assert list(run) == HEADER.split(",")
    expected = {
        "seed": [0, 1],
        "env_steps": [100, 200],
        "wall_seconds": [[0.5, 1.0], [0.5, 1.0]],
        "eval_return": [[2, 4], [3, 6]],
        "train_return": [[np.nan, np.nan], [np.nan, 5]],
        "loss": [[np.nan, 0.5], [0.25, 0.125]],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(run[name], values)
    assert run["env_steps"].dtype == np.int64
    assert run["loss"].dtype == np.float64
    assert stats.bootstrap_curve(run["eval_return"]).point.tolist() == [2.5, 5.0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "0 rows"),
        ([HEADER], "0 rows"),
        (["step,loss", "1,2"], "rows that begin with seed, env_steps"),
        ([HEADER, *ROWS[:3]], "0 rows of seed 1 at 200"),
        ([HEADER, *ROWS, ROWS[0]], "2 rows of seed 1 at 100"),
        ([HEADER, *ROWS, "1,300,2"], "line 6 has 3 cells"),
        ([HEADER, ",300,2,3,4,5"], "line 2 has 6 cells"),
        ([HEADER, "0,100,fast,3,4,5"], "line 2: could not convert string to float: 'fast'"),
    ],
)
def test_broken_runs_are_refused_in_one_line(lines, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        read_run(run_folder(tmp_path, *lines))
    assert "\n" not in str(caught.value)


def test_a_missing_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*metrics\.csv; expected a run folder"):
        read_run(tmp_path / "nowhere")
