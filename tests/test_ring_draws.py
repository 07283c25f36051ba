"""What a replay ring draws: exactly the whole windows, with equal chance, and exact products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from scipy import stats

from mbrl_jax.data import ring
from mbrl_jax.data.ring import Cursor

ROW = jax.ShapeDtypeStruct((3,), "float32")


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_the_rows_that_are_drawn_are_those_whose_window_is_whole(n, num_envs):
    steps = 5
    made = ring.make(ROW, steps * num_envs, num_envs)
    draw = jax.jit(lambda key, written: made.sample_index(key, 512, written, n))
    for written in range(n, 3 * steps + 2):
        whole = range(max(written - steps, 0), written - n + 1)
        valid = {(t % steps) * num_envs + env for t in whole for env in range(num_envs)}
        drawn = draw(jax.random.key(written), jnp.int32(written))
        assert drawn.dtype == jnp.int32
        assert set(drawn.tolist()) == valid, (written, n, num_envs)


def test_too_early_draws_stay_inside_the_ring():
    made = ring.make(ROW, 6, 2)
    draw = jax.jit(lambda key, written: made.sample_index(key, 100, written, 3))
    for written in range(3):
        index = np.asarray(draw(jax.random.key(0), jnp.int32(written)))
        assert index.min() >= 0
        assert index.max() < 6
    assert made.sample_filled(jax.random.key(0), 9, ring.empty_cursor()).tolist() == [0] * 9


@pytest.mark.parametrize(
    ("written", "n", "count"), [(40, 1, 120), (40, 4, 111), (70, 1, 150), (73, 6, 135)]
)
def test_windows_are_drawn_with_equal_chance(written, n, count):
    made = ring.make(ROW, 150, 3)
    drawn = made.sample_index(jax.random.key(written), 60_000, jnp.int32(written), n)
    counts = np.unique(drawn, return_counts=True)[1]
    assert len(counts) == count
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("capacity", [2**24 + 1, 100_000_007, 2**27, 2**30])
def test_large_rings_are_drawn_with_equal_chance(capacity, impl):
    made = ring.make(ROW, capacity)
    key = jax.random.key(5, impl=impl)
    drawn = np.asarray(made.sample_index(key, 200_000, jnp.int32(capacity + 12_345)))
    assert drawn.min() >= 0
    assert drawn.max() < capacity
    # runs of rows, and the lowest bits, which 24 random bits would never reach
    for bins in (drawn.astype(np.int64) * 100 // capacity, drawn % 97):
        assert stats.chisquare(np.unique(bins, return_counts=True)[1]).pvalue > 1e-4


def test_a_draw_is_the_high_word_of_an_exact_product():
    made = ring.make(ROW, 2**27 - 39)
    key, count = jax.random.key(1), 2**27 - 40
    drawn = made.sample_filled(key, 1001, Cursor(jnp.int32(0), jnp.int32(count)))
    with jax.debug_key_reuse(False):
        words = threefry_2x32(jax.random.key_data(key), jnp.arange(1001, dtype=jnp.uint32))
    expected = (np.asarray(words).astype(np.uint64) * np.uint64(count)) >> np.uint64(32)
    np.testing.assert_array_equal(drawn, expected)


def test_masked_rings_are_drawn_with_equal_chance():
    made = ring.make(ROW, 50)
    cursor = Cursor(jnp.int32(37), jnp.int32(37))
    drawn = made.sample_filled(jax.random.key(2), 20_000, cursor)
    rows, counts = np.unique(drawn, return_counts=True)
    assert rows.tolist() == list(range(37))
    assert stats.chisquare(counts).pvalue > 1e-4
