"""Figures of model diagnostics decode, repeat byte for byte and name what they show."""

import matplotlib.image
import numpy as np
import pytest
from test_plots import written_text

from mbrl_jax.analysis import model_plots

NAMES = ("near", "far")


def errors():
    rng = np.random.default_rng(0)
    k = np.arange(1, 21)
    return {n: 1e-4 * np.exp(0.3 * k + rng.normal(0, 0.2, (5, 20))) for n in NAMES}


def shares():
    rng = np.random.default_rng(1)
    return {name: rng.dirichlet(np.full(20, 50.0), 5) for name in NAMES}


def clouds():
    rng = np.random.default_rng(2)
    return {name: np.exp(rng.normal(size=(2, 50))) for name in NAMES}


def draw_growth(path):
    fits = {"near": (1e-4, 0.3)}
    return model_plots.error_growth(errors(), path, title="Pendulum", fits=fits)


def draw_calibration(path):
    return model_plots.calibration(shares(), path, title="Pendulum")


def draw_disagreement(path):
    return model_plots.disagreement_against_error(clouds(), path, title="Pendulum")


def draw_returns(path):
    return model_plots.imagined_against_real(clouds(), path, title="Pendulum")


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (draw_growth, {"steps ahead, k", "0.0001 exp(0.3 k)"}),
        (draw_calibration, {"central interval", "probability integral transform"}),
        (draw_disagreement, {"disagreement of the members", "true error"}),
        (draw_returns, {"real return", "imagined return"}),
    ],
    ids=["growth", "calibration", "disagreement", "returns"],
)
def test_png_and_svg_decode_repeat_and_name_what_they_show(draw, words, tmp_path):
    png, svg = draw(tmp_path / "new" / "figure")
    assert (png, svg) == (tmp_path / "new" / "figure.png", tmp_path / "new" / "figure.svg")
    assert matplotlib.image.imread(png)[..., :3].std() > 0.02  # not blank
    assert {*words, *NAMES, "Pendulum"} <= set(written_text(svg))
    again = draw(tmp_path / "again")
    assert [file.read_bytes() for file in again] == [png.read_bytes(), svg.read_bytes()]


def test_coverage_is_that_of_the_samples():
    pit = np.random.default_rng(3).beta(2, 2, 10_000)
    shares = np.histogram(pit, np.linspace(0, 1, 21))[0] / pit.size
    level, covered = model_plots.coverage_curve(shares)
    np.testing.assert_allclose(level, np.linspace(0.1, 1.0, 10))
    expected = [np.mean(np.abs(pit - 0.5) <= p / 2) for p in level]
    np.testing.assert_allclose(covered, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: model_plots.error_growth({}, p), "no errors"),
        (lambda p: model_plots.error_growth({"a": [[1, 0]]}, p), "'a' has an error of 0.0"),
        (lambda p: model_plots.error_growth({"a": [1, 2]}, p), r"'a' has shape \(2,\)"),
        (lambda p: model_plots.calibration({"a": [[0.2] * 5]}, p), "'a' has 5 bins"),
        (
            lambda p: model_plots.disagreement_against_error({"a": ([1], [np.nan])}, p),
            "'a' has shape .* 1 values that are not finite",
        ),
        (lambda p: model_plots.imagined_against_real({"a": ([1], [1, 2])}, p), "1 and 2 numbers"),
    ],
)
def test_bad_input_is_refused_before_a_file_is_written(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "figure")
    assert not list(tmp_path.iterdir())
