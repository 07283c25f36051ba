"""Rows of a buffer: writing some leaves of some rows, and small floats, to the bit."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ring import CAPACITY, MIXED, X, assert_same_bits, many, noise
from test_structure import primitives

from mbrl_jax.data import ring
from mbrl_jax.data.rows import Layout, _last_of_each
from mbrl_jax.types import InputError


class Latent(NamedTuple):
    deter: jax.Array
    code: jax.Array


WRITABLE = {**MIXED, "latent": Latent(MIXED["vector"], jax.ShapeDtypeStruct((2, 2), "bfloat16"))}
# a NamedTuple's leaves go by their names, in a dict or in one of its kind that lacks the others
PARTS = [
    {"scalar": MIXED["scalar"]},
    {"flags": {"1": MIXED["flags"][1]}, "pixels": MIXED["pixels"]},
    {"latent": {"code": WRITABLE["latent"].code}, "vector": MIXED["vector"]},
    {"latent": WRITABLE["latent"], "count": MIXED["count"]},
    {"latent": Latent(None, WRITABLE["latent"].code)},
]


def by_name(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


@cache
def writers(part):
    made = ring.make(WRITABLE, 6, 2)
    return made, jax.jit(made.layout.pack), jax.jit(made.set), jax.jit(jax.vmap(made.set))


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(range(len(PARTS))),
    st.lists(st.integers(0, 5), min_size=12, max_size=12),
    st.integers(0, 2**32 - 1),
)
def test_set_equals_a_loop_in_which_the_last_value_stays(part, index, seed):
    struct = PARTS[part]
    made, pack, set_, set_both = writers(part)
    trees, fields = noise(WRITABLE, (2, 6), seed), noise(struct, (2, 2, 3), seed + 1)
    index = np.array(index, np.int32).reshape(2, 2, 3)
    rows = pack(trees)
    expected = jax.tree.map(np.array, trees)
    for name, values in by_name(fields).items():
        for s, i, j in np.ndindex(2, 2, 3):
            by_name(expected)[name][s, index[s, i, j]] = values[s, i, j]
    both = made.layout.unpack(set_both(rows, index, fields))
    assert_same_bits(both, expected)
    one = jax.tree.map(lambda x: x[1], (rows, fields, expected))
    assert_same_bits(made.all(set_(one[0], index[1], one[1])), one[2])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 5), min_size=12, max_size=12))
def test_no_row_is_written_twice(index):
    """Which of two writes of one scatter stays would differ by backend, and run by run on GPUs."""
    target = last_of_each(np.array(index, np.int32)).tolist()
    assert len(set(target)) == 12
    for place, row in enumerate(index):
        assert target[place] == row if row not in index[place + 1 :] else target[place] >= 6


last_of_each = jax.jit(lambda index: _last_of_each(index, 6))


@pytest.mark.parametrize("seeds", [None, 3])
def test_a_set_touches_no_more_than_its_leaves(seeds):
    made = ring.make(WRITABLE, 4096, 2)
    fields = {"latent": WRITABLE["latent"], "scalar": WRITABLE["scalar"]}
    lead = () if seeds is None else (seeds,)
    set_ = made.set if seeds is None else jax.vmap(made.set)
    jaxpr = jax.make_jaxpr(set_)(
        many(made.init(), *lead), np.zeros((*lead, 5, 3), np.int32), many(fields, *lead, 5, 3)
    )
    scatters = [e for e in primitives(jaxpr.jaxpr) if e.primitive.name == "scatter"]
    widths = sorted(e.invars[2].aval.size // (15 * (seeds or 1)) for e in scatters)
    assert widths == [1, 1, 2, 4], "the order of the rows and three leaves"
    large = [e for e in primitives(jaxpr.jaxpr) if e.outvars[0].aval.size >= 4096]
    assert {e.primitive.name for e in large} == {"scatter"}
    assert len(large) == 3


SMALL = {
    "bfloat16": jax.ShapeDtypeStruct((2, 3), "bfloat16"),
    "float16": jax.ShapeDtypeStruct((), "float16"),
    "float8": jax.ShapeDtypeStruct((2,), "float8_e4m3fn"),
    "uint16": jax.ShapeDtypeStruct((2,), "uint16"),
    "flag": jax.ShapeDtypeStruct((), "bool"),
}


def test_small_floats_come_back_bit_for_bit():
    layout = Layout.of(SMALL)
    assert layout.widths == {"uint16": 6 + 1 + 2, "uint8": 2 + 1}
    assert layout.row_bytes == 2 * 9 + 3
    tree = noise(SMALL, (5, 4), 0)
    assert_same_bits(jax.jit(lambda x: layout.unpack(layout.pack(x)))(tree), tree)


def test_a_write_of_small_floats_converts_no_ring():
    made = ring.make({"latent": jax.ShapeDtypeStruct((8,), "bfloat16")}, CAPACITY, 4)

    def step(rows, t):
        rows = made.add(rows, {"latent": jnp.full((4, 8), t, jnp.bfloat16)}, t)
        index = made.index(t, jnp.arange(4, dtype=jnp.int32))
        latent = made.get(rows, index)["latent"]
        return made.set(rows, index, {"latent": latent * 2}), jnp.sum(latent)

    loop = jax.jit(lambda rows, times: jax.lax.scan(step, rows, times), donate_argnums=0)
    times = jnp.arange(8, dtype=jnp.int32)
    compiled = loop.lower(made.init(), times).compile()
    assert f"[{CAPACITY},8]" in compiled.as_text(), "the ring is in the program"
    assert f"f32[{CAPACITY},8]" not in compiled.as_text()
    rows = loop(made.init(), times)[0]
    found = made.all(rows)["latent"].astype(jnp.float32)
    np.testing.assert_array_equal(found[:32], np.repeat(2.0 * np.arange(8), 4)[:, None] + [[0] * 8])


def set_fields(fields):
    made = ring.make({"a": X, "c": {"d": X}}, 4)
    return made.set(made.init(), jnp.arange(2), fields)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: set_fields({}), "fields = {}: expected at least one leaf"),
        (
            lambda: set_fields({"b": jnp.zeros((2, 3))}),
            r"fields\['b'\] is no leaf of the example: expected some of a, c.d",
        ),
        (lambda: set_fields({"c": jnp.zeros(2)}), r"fields\['c'\] is no leaf .* c.d"),
        (
            lambda: set_fields({"a": jnp.zeros((2, 4))}),
            r"fields\['a'\] is float32\[2, 4\]: expected float32\[2, 3\]",
        ),
        (
            lambda: set_fields({"c": {"d": jnp.zeros((2, 3), jnp.int32)}}),
            r"fields\['c'\]\['d'\] is int32\[2, 3\]: expected float32\[2, 3\]",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
