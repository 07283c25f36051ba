"""The invertible transform of MuZero's rewards and values, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_jax.nn.scaling import signed_hyperbolic, signed_parabolic

EPS = 1e-3
POINTS = np.concatenate([[0.0, 1e-30, 1e-12, 1e-6, 1.0], np.logspace(-5, 4, 400)])
POINTS = np.unique(np.concatenate([-POINTS, POINTS]).astype(np.float32))
numbers = st.floats(-1e4, 1e4, width=32)


def slow_transform(x, eps=EPS):
    """Pohlen et al. (2018), proposition A.2, in float64; the root less 1 by `expm1`."""
    x = np.float64(x)
    return np.sign(x) * np.expm1(0.5 * np.log1p(np.abs(x))) + eps * x


def slow_inverse(y, eps=EPS):
    """By bisection, so that no formula is read twice."""
    y = np.float64(y)
    low, high = np.full(y.shape, -1e9), np.full(y.shape, 1e9)
    for _ in range(200):
        middle = 0.5 * (low + high)
        above = slow_transform(middle, eps) > y
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return 0.5 * (low + high)


@pytest.mark.parametrize("eps", [1e-3, 1e-2, 0.1])
def test_the_transform_is_that_of_float64(eps):
    found = signed_hyperbolic(POINTS, eps)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, slow_transform(POINTS, eps), rtol=1e-6, atol=1e-36)


def test_known_values():
    """Of the paper's scale: 0, the square root less 1, and the small linear part."""
    given = np.float32([0.0, 3.0, -3.0, 8.0, 9999.0])
    expected = np.float64([0.0, 1.003, -1.003, 2.008, 99.0 + 9.999])
    np.testing.assert_allclose(signed_hyperbolic(given), expected, rtol=1e-6)
    np.testing.assert_allclose(signed_parabolic(np.float32(expected)), given, rtol=3e-6)


@pytest.mark.parametrize("eps", [1e-3, 1e-2, 0.1])
def test_the_inverse_is_that_of_float64(eps):
    y = np.float32(np.linspace(-slow_transform(1e4, eps), slow_transform(1e4, eps), 301))
    found = signed_parabolic(y, eps)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, slow_inverse(y, eps), rtol=2e-6, atol=1e-6)


def test_there_and_back():
    back = np.asarray(signed_parabolic(signed_hyperbolic(POINTS)))
    np.testing.assert_allclose(back, POINTS, rtol=3e-6, atol=1e-36)
    again = np.asarray(signed_hyperbolic(signed_parabolic(POINTS[np.abs(POINTS) < 110])))
    np.testing.assert_allclose(again, POINTS[np.abs(POINTS) < 110], rtol=3e-6, atol=1e-36)


@pytest.mark.parametrize("transform", [signed_hyperbolic, signed_parabolic])
@settings(max_examples=200, deadline=None)
@given(a=numbers, b=numbers)
def test_monotone_and_odd(transform, a, b):
    low, high, mirrored = np.asarray(transform(np.float32([min(a, b), max(a, b), -a])))
    assert low <= high
    assert mirrored == -np.asarray(transform(np.float32([a])))[0]
    assert np.sign(mirrored) == -np.sign(np.float32(a)) or abs(a) < 1e-37


@pytest.mark.parametrize("transform", [signed_hyperbolic, signed_parabolic])
def test_gradients_are_the_slopes(transform):
    points = np.float32([0.5, -0.01, -7.0, 1e4, -1e4])
    slopes = np.asarray(jax.vmap(jax.grad(transform))(points))
    slow = slow_transform if transform is signed_hyperbolic else slow_inverse
    step = 1e-5 * np.abs(np.float64(points))
    differences = (slow(points + step) - slow(points - step)) / (2 * step)
    np.testing.assert_allclose(slopes, differences, rtol=1e-4)


def test_there_is_no_kink_at_zero():
    """The slope is one half and eps there, also at 0 itself."""
    points = np.float32([0.0, -0.0, 1e-30, -1e-12, 1e-5, -1e-5])
    slopes = jax.vmap(jax.grad(signed_hyperbolic))(points)
    np.testing.assert_allclose(slopes, 0.5 + EPS, rtol=1e-4)
    slopes = jax.vmap(jax.grad(signed_parabolic))(points)
    np.testing.assert_allclose(slopes, 1 / (0.5 + EPS), rtol=1e-4)
