"""Windows of a ring against a deque of steps, and what is written back to them."""

import json
import re
from collections import deque
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_structure import primitives

from mbrl_jax.data import online, sequence
from mbrl_jax.types import InputError

EXAMPLE = {
    "step": jax.ShapeDtypeStruct((), "int32"),
    "env": jax.ShapeDtypeStruct((), "int32"),
    "image": jax.ShapeDtypeStruct((2, 2), "uint8"),
    "is_first": jax.ShapeDtypeStruct((), "bool"),
}
GOLDEN = json.loads((Path(__file__).parent / "golden" / "dreamer_replay.json").read_text())


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


def test_latents_are_written_back_as_by_the_authors():
    example = {"deter": jax.ShapeDtypeStruct((2,), "bfloat16")}
    made = sequence.make(example, 80, 2)
    rows, add = made.init(), jax.jit(made.add)
    for t in range(40):
        acting = jnp.array([[t, 0], [t, 1]], jnp.bfloat16)
        rows = add(rows, {"deter": acting}, jnp.int32(t))
    expected = np.asarray(GOLDEN["write_back"]["numbers"], np.float32)
    windows, index = jax.jit(made.read, static_argnums=2)(rows, made.index(10, 0)[None], 5)
    assert windows["deter"][0, :, 0].tolist() == [10, 11, 12, 13, 14]
    # the first record is the context; the others are trained on and get their new latents
    latents = jnp.asarray(expected[None, 11:15], jnp.bfloat16)
    assert not (latents == windows["deter"][:, 1:]).any()
    rows = jax.jit(made.set)(rows, index[:, 1:], {"deter": latents})
    found = made.ring.all(rows)["deter"].reshape(40, 2, 2)
    np.testing.assert_array_equal(found[:, 0], jnp.asarray(expected, jnp.bfloat16))
    np.testing.assert_array_equal(found[:, 1, 1], np.ones(40))


LATENT = {
    "obs": jax.ShapeDtypeStruct((5,), "float32"),
    "is_first": jax.ShapeDtypeStruct((), "bool"),
    "code": jax.ShapeDtypeStruct((4,), "uint8"),
    "deter": jax.ShapeDtypeStruct((8,), "bfloat16"),
    "value": jax.ShapeDtypeStruct((), "float32"),
}
CAPACITY = 4096


def training(made, ordered):
    """Adds a step, reads windows, writes back what does not follow from them."""

    def step(carry, t):
        rows, key, queue = carry
        key, noise, draw = jax.random.split(key, 3)
        noise = jax.random.normal(noise, (4, 8))
        batch = {
            name: (noise[:, : s.shape[0]] if s.shape else noise[:, 0]).astype(s.dtype)
            for name, s in LATENT.items()
        }
        rows = made.add(rows, batch, t)
        windows, index, queue = made.sample_online(rows, draw, 16, 3, t + 1, queue)
        if not ordered:
            index = made.ring.after(
                online.pop(made.ring, queue, 16, 3, t)[0][:, None], jnp.arange(3)[None]
            )
            windows = made.ring.get(rows, index)
        fields = {
            "code": jnp.full((16, 3, 4), t, jnp.uint8),
            "deter": jnp.full((16, 3, 8), t, jnp.bfloat16),
            "value": jnp.full((16, 3), t, jnp.float32),
        }
        sums = sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(windows))
        return (made.set(rows, index, fields), key, queue), sums

    times = jnp.arange(64, dtype=jnp.int32)
    return lambda rows, key: jax.lax.scan(step, (rows, key, online.empty()), times)


@pytest.mark.parametrize("seeds", [None, 3])
def test_no_buffer_is_copied_where_steps_are_added_read_and_written_back(seeds):
    made = sequence.make(LATENT, CAPACITY, 4)
    lead = () if seeds is None else (seeds,)
    rows = jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), x.dtype), made.init())
    keys = jax.random.key(0) if seeds is None else jax.random.split(jax.random.key(0), seeds)

    def compiled(ordered):
        loop = training(made, ordered)
        loop = loop if seeds is None else jax.vmap(loop)
        return jax.jit(loop, donate_argnums=0).lower(rows, keys).compile()

    def whole(program):
        """Copies, conversions and transpositions of a buffer or a seed's part of it."""
        return re.findall(
            rf"= \S*\b{CAPACITY},[568]\]\S* (?:copy|convert|transpose)\(", program.as_text()
        )

    program = compiled(True)
    for matrix in rows.values():
        assert f"[{','.join(map(str, matrix.shape))}]" in program.as_text()
    assert whole(program) == []
    memory, size = program.memory_analysis(), sum(x.nbytes for x in rows.values())
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 4
    if seeds is None:
        assert whole(compiled(False)), "the control: a write of which XLA knows no order"


@pytest.mark.parametrize("x64", [False, True])
def test_dtypes_are_the_same_in_64_bits(x64):
    made = sequence.make(EXAMPLE, 12, 3)

    def shapes():
        rows, key = made.init(), jax.random.key(0)
        for t in range(3):
            rows = made.add(rows, batch_of(t, 3), jnp.int32(t))
        written = jnp.int32(3)
        windows, index, queue = made.sample_online(rows, key, 4, 2, written, online.empty())
        rows = made.set(rows, index, {"step": windows["step"]})
        return rows, windows, index, queue, made.sample(rows, key, 4, 2, written)[1]

    with jax.enable_x64(x64):
        rows, windows, index, queue, drawn = jax.eval_shape(shapes)
        assert {x.dtype.name for x in jax.tree.leaves((index, queue, drawn))} == {"int32"}
        assert {name: x.dtype for name, x in windows.items()} == {
            name: s.dtype for name, s in EXAMPLE.items()
        }
        assert {name: x.dtype.name for name, x in rows.items()} == {
            "int32": "int32",
            "uint8": "uint8",
        }


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
        (
            lambda: jitted(12, 3)[0].sample_online({}, jax.random.key(0), 1, 5, 9, online.empty()),
            "length = 5: expected 1 to 4",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
