"""Windows of a ring against a deque of steps."""

from collections import deque
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_structure import primitives

from mbrl_jax.data import sequence
from mbrl_jax.types import InputError

EXAMPLE = {
    "step": jax.ShapeDtypeStruct((), "int32"),
    "env": jax.ShapeDtypeStruct((), "int32"),
    "image": jax.ShapeDtypeStruct((2, 2), "uint8"),
    "is_first": jax.ShapeDtypeStruct((), "bool"),
}


def batch_of(t, num_envs, seed=0):
    rng = np.random.default_rng([seed, t])
    return {
        "step": np.full(num_envs, t, np.int32),
        "env": np.arange(num_envs, dtype=np.int32),
        "image": rng.integers(0, 256, (num_envs, 2, 2)).astype(np.uint8),
        "is_first": rng.random(num_envs) < 0.3,
    }


@cache
def jitted(capacity, num_envs):
    made = sequence.make(EXAMPLE, capacity, num_envs)
    sample = jax.jit(made.sample, static_argnums=(2, 3))
    return made, jax.jit(made.init), jax.jit(made.add), sample


def filled(capacity, num_envs, written):
    made, init, add, sample = jitted(capacity, num_envs)
    rows = init()
    for t in range(written):
        rows = add(rows, batch_of(t, num_envs), jnp.int32(t))
    return made, rows, sample


@settings(deadline=None, max_examples=250)
@given(
    st.sampled_from([(5, 1, 1), (5, 1, 3), (12, 2, 6), (12, 3, 2)]),
    st.integers(0, 14),
    st.integers(0, 2**32 - 1),
)
def test_windows_equal_slices_of_a_deque(sizes, extra, seed):
    capacity, num_envs, length = sizes
    _, init, add, sample = jitted(capacity, num_envs)
    rows, kept = init(), deque(maxlen=capacity // num_envs)
    for t in range(length + extra):
        kept.append(batch_of(t, num_envs, seed))
        rows = add(rows, kept[-1], jnp.int32(t))
    windows, index = sample(rows, jax.random.key(seed), 8, length, jnp.int32(length + extra))
    windows, index = jax.tree.map(np.asarray, (windows, index))
    assert (index.dtype, index.shape) == (np.int32, (8, length))
    slots = capacity // num_envs
    np.testing.assert_array_equal(index, windows["step"] % slots * num_envs + windows["env"])
    stream = jax.tree.map(lambda *steps: np.stack(steps), *kept)
    for i in range(8):
        start, env = windows["step"][i, 0] - kept[0]["step"][0], windows["env"][i, 0]
        assert 0 <= start <= len(kept) - length
        for name, found in windows.items():
            expected = stream[name][start : start + length, env]
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found[i], expected)


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 4, 5])
def test_the_windows_that_are_drawn_are_the_whole_ones(length, num_envs):
    steps = 5
    for written in [*range(length, 2 * steps + 2), 4 * steps]:
        _, rows, sample = filled(steps * num_envs, num_envs, written)
        windows, _ = sample(rows, jax.random.key(written), 512, length, jnp.int32(written))
        windows = jax.tree.map(np.asarray, windows)
        assert windows["image"].shape == (512, length, 2, 2)
        np.testing.assert_array_equal(
            windows["step"], windows["step"][:, :1] + np.arange(length)[None]
        )
        assert (windows["env"] == windows["env"][:, :1]).all()
        starts = set(
            zip(windows["step"][:, 0].tolist(), windows["env"][:, 0].tolist(), strict=True)
        )
        whole = range(max(written - steps, 0), written - length + 1)
        assert starts == {(t, env) for t in whole for env in range(num_envs)}


@pytest.mark.parametrize(("written", "count"), [(15, 12 * 2), (47, 17 * 2)])
def test_starts_are_drawn_with_equal_chance(written, count):
    _, rows, sample = filled(40, 2, written)
    windows, _ = sample(rows, jax.random.key(0), 40_000, 4, jnp.int32(written))
    starts = np.stack([windows["step"][:, 0], windows["env"][:, 0]])
    counts = np.unique(starts, axis=1, return_counts=True)[1]
    assert len(counts) == count
    assert stats.chisquare(counts).pvalue > 1e-4


def test_a_window_is_one_gather_for_each_dtype_and_memory_is_as_stated():
    made, rows, _ = filled(12, 3, 4)
    assert made.num_bytes == sum(x.nbytes for x in rows.values()) == 12 * (4 + 4 + 4 + 1)
    jaxpr = jax.make_jaxpr(made.sample, static_argnums=(2, 3))(rows, jax.random.key(0), 5, 3, 4)
    assert sum(e.primitive.name == "gather" for e in primitives(jaxpr.jaxpr)) == len(rows) == 2


def test_seeds_draw_windows_of_their_own():
    made, init, add, sample = jitted(12, 3)

    def stack(*trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    rows, add_both = stack(init(), init()), jax.jit(jax.vmap(made.add, (0, 0, None)))
    for t in range(6):
        rows = add_both(rows, stack(batch_of(t, 3, 0), batch_of(t, 3, 1)), jnp.int32(t))
    draw = jax.jit(jax.vmap(lambda rows, key: made.sample(rows, key, 4, 2, jnp.int32(6))))
    found = draw(rows, jax.random.split(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(0))
    for seed in range(2):
        alone = init()
        for t in range(6):
            alone = add(alone, batch_of(t, 3, seed), jnp.int32(t))
        one = sample(alone, keys[seed], 4, 2, jnp.int32(6))
        jax.tree.map(lambda a, b, seed=seed: np.testing.assert_array_equal(a[seed], b), found, one)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequence.make(EXAMPLE, 10, 4), "capacity = 10 with num_envs = 4.*such as 8"),
        (lambda: sequence.make((), 4), "at least one array"),
        (
            lambda: jitted(12, 3)[0].sample({}, jax.random.key(0), 1, 5, 9),
            "length = 5: expected 1 to 4",
        ),
        (
            lambda: jitted(12, 3)[0].sample({}, jax.random.key(0), 1, 0, 9),
            "length = 0: expected 1 to 4",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
