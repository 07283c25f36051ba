"""The fused threefry gives the bits of jax.random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32
from scipy import stats

from mbrl_jax import prng

words = jax.random.key_data


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_split_and_fold_in_equal_jax_random(seed, num):
    np.testing.assert_array_equal(
        words(prng.split(jax.random.key(seed), num)),
        words(jax.random.split(jax.random.key(seed), num)),
    )
    data = jnp.array([0, 1, seed // 2, seed], jnp.uint32)
    expected = jnp.stack([words(jax.random.fold_in(jax.random.key(seed), i)) for i in data])
    np.testing.assert_array_equal(words(prng.fold_in(jax.random.key(seed), data)), expected)


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 8, 51])
def test_uniform_is_threefry_whether_fused_or_rolled(num):
    even = 2 * ((num + 1) // 2)
    bits = threefry_2x32(words(jax.random.key(3)), jnp.arange(even, dtype=jnp.uint32))[:num]
    uniform = prng.uniform(jax.random.key(3), num)
    np.testing.assert_array_equal(uniform * 2.0**24, bits >> 8)
    assert uniform.dtype == jnp.float32


@pytest.mark.parametrize("num", [2, 16])
def test_uniform_is_uniform(num):
    draws = jax.vmap(lambda key: prng.uniform(key, num))(jax.random.split(jax.random.key(0), 4096))
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in np.asarray(draws).T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    correlation = np.corrcoef(np.asarray(draws).T) - np.eye(num)
    assert np.abs(correlation).max() < 5 / np.sqrt(4096)


def test_keys_of_another_implementation_go_to_jax_random():
    key = jax.random.key(0, impl="rbg")
    np.testing.assert_array_equal(
        words(prng.split(key, 3)),
        words(
            jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
                jax.random.key(0, impl="rbg"), jnp.arange(3)
            )
        ),
    )
    assert prng.uniform(jax.random.key(0, impl="rbg"), 5).shape == (5,)


@pytest.mark.parametrize("size", [1, 2, 5, 128, 500])
def test_shuffles_are_permutations_and_each_is_as_likely(size):
    orders = np.asarray(
        jax.jit(prng.shuffles, static_argnums=(1, 2))(jax.random.key(0), 4000, size)
    )
    assert orders.dtype == np.int32
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(size), (4000, 1)))
    if size == 5:
        counts = np.unique(orders, axis=0, return_counts=True)[1]
        assert len(counts) == 120
        assert stats.chisquare(counts).pvalue > 1e-4
    elif size > 1:
        parts = 10 if size % 10 == 0 else 2
        assert stats.chisquare(np.bincount(orders[:, 0] * parts // size)).pvalue > 1e-4
        rising = np.mean(orders[:, :-1] < orders[:, 1:], axis=1)
        assert stats.ttest_1samp(rising, 0.5).pvalue > 1e-4
