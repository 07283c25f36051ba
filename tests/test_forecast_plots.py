"""Pictures of forecasts decode, repeat byte for byte and show what they are given."""

import numpy as np
import pytest
from PIL import Image

from mbrl_jax.analysis import forecast_plots


def board(ball):
    made = np.zeros((len(ball), 10, 5))
    made[np.arange(len(ball)), ball, 2] = 1
    return made


def test_grey_images_and_grids():
    grey = forecast_plots.pictures(board([0, 9]))
    assert grey.shape == (2, 10, 5, 3)
    assert grey[0, 0, 2].tolist() == [255] * 3
    assert grey[0].sum() == 3 * 255
    np.testing.assert_array_equal(grey, forecast_plots.pictures(board([0, 9])[..., None]))
    image = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3).astype(np.uint8)
    np.testing.assert_array_equal(forecast_plots.pictures(image), image)
    np.testing.assert_array_equal(forecast_plots.pictures(image.astype(float) + 0.2), image)
    grid = np.zeros((1, 3, 3, 4))
    grid[0, 0, 0, 1], grid[0, 1, 1, 3] = 1, 0.5
    made = forecast_plots.pictures(grid)
    assert made[0, 0, 0].tolist() == [0xD5, 0x5E, 0x00]
    assert made[0, 1, 1].tolist() == [102, 60, 84]  # half of CC79A7
    assert made[0, 2, 2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("values", [
    np.zeros((3, 3)), np.zeros((0, 3, 3)), np.full((1, 3, 3), np.nan), np.zeros((1, 2, 3, 3, 1)),
])  # fmt: skip
def test_what_is_no_picture_is_refused(values):
    with pytest.raises(ValueError, match="expected"):
        forecast_plots.pictures(values)


def test_a_strip_and_a_film_show_truth_forecast_and_difference(tmp_path):
    true, said = board([0, 1, 2, 3]), board([0, 1, 2, 5])
    path = forecast_plots.strip(true, said, tmp_path / "new" / "strip.gif", 2)
    assert path == tmp_path / "new" / "strip.png"
    with Image.open(path) as image:
        pixels = np.asarray(image)
    width = 25  # five columns, each five times as wide
    assert pixels.shape == (3 * (50 + 4) + 4, 4 * width + 3 * 4, 3)
    bar = pixels[0, [0, 29, 58, 87]]
    assert bar[0].tolist() == bar[1].tolist() == [0, 158, 115]
    assert bar[2].tolist() == bar[3].tolist() == [213, 94, 0]
    last = [pixels[8 + 54 * i : 58 + 54 * i, -width:, 0][::5, ::5] for i in range(3)]
    np.testing.assert_array_equal(last[0], 255 * true[3])
    np.testing.assert_array_equal(last[1], 255 * said[3])
    np.testing.assert_array_equal(last[2], 255 * np.abs(true[3] - said[3]))
    again = forecast_plots.strip(true, said, tmp_path / "again", 2)
    assert again.read_bytes() == path.read_bytes()
    with Image.open(forecast_plots.film(true, said, tmp_path / "film", 2, seconds=0.5)) as film:
        assert (film.n_frames, film.info["duration"], film.info["loop"]) == (4, 500, 0)


def test_curves_have_a_panel_for_each_number(tmp_path):
    rng = np.random.default_rng(0)
    true, said = rng.normal(size=(20, 3)), rng.normal(size=(7, 20, 3))
    one = forecast_plots.curves(true, said, tmp_path / "one", 5, title="Pendulum")
    two = forecast_plots.curves(true, said, tmp_path / "two", 5, title="Pendulum")
    assert [path.suffix for path in one] == [".png", ".svg"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    forecast_plots.curves(true, said[0], tmp_path / "three", 5, names=("x", "y", "z"))
    for wrong in (said[..., :2], np.full_like(said, np.nan)):
        with pytest.raises(ValueError, match="foretold"):
            forecast_plots.curves(true, wrong, tmp_path / "four", 5)
    with pytest.raises(ValueError, match="one shape"):
        forecast_plots.strip(np.zeros((2, 3, 3)), np.zeros((2, 3, 4)), tmp_path / "five", 1)
