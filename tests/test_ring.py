"""The replay ring against plain Python lists, slow n-step returns and its HLO."""

from collections import deque
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_structure import copies_in_loops, primitives

from mbrl_jax.data import ring
from mbrl_jax.data.rows import Layout
from mbrl_jax.types import EnvSpec, InputError, Transition

MIXED = {
    "pixels": jax.ShapeDtypeStruct((2, 3), "uint8"),
    "flags": (jax.ShapeDtypeStruct((), "bool"), jax.ShapeDtypeStruct((2,), "bool")),
    "count": jax.ShapeDtypeStruct((), "int32"),
    "vector": jax.ShapeDtypeStruct((2,), "float32"),
    "scalar": jax.ShapeDtypeStruct((), "float32"),
}
X = jax.ShapeDtypeStruct((3,), "float32")
SPEC = EnvSpec("any", (3,), "float32", 100, num_actions=2)
CONTINUOUS = EnvSpec("any", (4, 4), "uint8", 100, action_low=(0.0, 0.0), action_high=(1.0, 1.0))


def noise(example, lead, seed):
    """Every bit random, so float32 holds NaNs, infinities and denormals too."""
    rng = np.random.default_rng(seed)

    def leaf(struct):
        shape = (*lead, *struct.shape)
        if struct.dtype == np.bool_:
            return rng.integers(0, 2, shape).astype(bool)
        raw = rng.bytes(int(np.prod(shape)) * struct.dtype.itemsize)
        return np.frombuffer(raw, struct.dtype).reshape(shape)

    return jax.tree.map(leaf, example)


def many(tree, *lead):
    return jax.tree.map(lambda x: np.zeros((*lead, *x.shape), x.dtype), tree)


def assert_same_bits(found, expected):
    def same(a, b):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(same, found, expected)


@cache
def jitted(capacity, num_envs):
    made = ring.make(MIXED, capacity, num_envs)
    return made, jax.jit(made.init), jax.jit(made.add), jax.jit(made.add_masked), jax.jit(made.get)


@settings(deadline=None, max_examples=250)
@given(
    st.sampled_from([(1, 1), (5, 1), (6, 2), (4, 4)]),
    st.integers(0, 12),
    st.integers(0, 2**32 - 1),
)
def test_add_equals_a_deque(sizes, adds, seed):
    capacity, num_envs = sizes
    made, init, add, _, get = jitted(capacity, num_envs)
    rows, steps = init(), deque(maxlen=capacity // num_envs)
    for t in range(adds):
        batch = noise(MIXED, (num_envs,), seed + t)
        steps.append((t, batch))
        rows = add(rows, batch, jnp.int32(t))
    expected = jax.tree.map(lambda s: np.zeros((capacity, *s.shape), s.dtype), MIXED)
    for t, batch in steps:
        for env in range(num_envs):
            row = (t % made.steps) * num_envs + env
            for whole, part in zip(jax.tree.leaves(expected), jax.tree.leaves(batch), strict=True):
                whole[row] = part[env]
    assert_same_bits(get(rows, jnp.arange(capacity)), expected)


@settings(deadline=None, max_examples=250)
@given(
    st.sampled_from([4, 7]),
    st.lists(st.lists(st.booleans(), min_size=4, max_size=4), max_size=8),
    st.integers(0, 2**32 - 1),
)
def test_add_masked_equals_a_list(capacity, masks, seed):
    _, init, _, add_masked, get = jitted(capacity, 1)
    rows, cursor, written = init(), ring.empty_cursor(), []
    for i, mask in enumerate(masks):
        batch = noise(MIXED, (4,), seed + i)
        rows, cursor = add_masked(rows, batch, jnp.array(mask), cursor)
        written += [jax.tree.map(lambda x, j=j: x[j], batch) for j in range(4) if mask[j]]
    expected = jax.tree.map(lambda s: np.zeros((capacity, *s.shape), s.dtype), MIXED)
    for i, one in enumerate(written):
        for whole, part in zip(jax.tree.leaves(expected), jax.tree.leaves(one), strict=True):
            whole[i % capacity] = part
    assert_same_bits(get(rows, jnp.arange(capacity)), expected)
    assert cursor == (len(written) % capacity, min(len(written), capacity))


def test_pointers_of_masked_rings_differ_by_seed():
    made, init, _, add_masked, get = jitted(7, 1)
    batch = noise(MIXED, (2, 4), 0)
    masks = np.array([[1, 0, 1, 1], [0, 0, 0, 1]], bool)
    empty = many((init(), ring.empty_cursor()), 2)
    rows, cursor = jax.jit(jax.vmap(made.add_masked))(empty[0], batch, masks, empty[1])
    assert cursor.position.tolist() == cursor.size.tolist() == [3, 1]
    for seed in range(2):
        one = jax.tree.map(lambda x, seed=seed: x[seed], (rows, batch))
        alone, _ = add_masked(init(), one[1], masks[seed], ring.empty_cursor())
        assert_same_bits(get(one[0], jnp.arange(7)), get(alone, jnp.arange(7)))


def stream(rng, length, num_envs):
    """Batched steps whose `next_obs` after an episode's end is not the next `obs`."""
    terminated = rng.random((length, num_envs)) < 0.2
    truncated = ~terminated & (rng.random((length, num_envs)) < 0.2)
    return Transition(
        obs=rng.standard_normal((length, num_envs, 3)).astype(np.float32),
        action=rng.integers(0, 2, (length, num_envs)).astype(np.int32),
        reward=rng.standard_normal((length, num_envs)).astype(np.float32),
        next_obs=rng.standard_normal((length, num_envs, 3)).astype(np.float32),
        terminated=terminated,
        truncated=truncated,
    )


def slow_n_step(steps, t, env, n, gamma):
    total, power = 0.0, 1.0
    for k in range(t, t + n):
        total += power * float(steps.reward[k, env])
        power *= gamma
        if steps.terminated[k, env]:
            power = 0.0
        if steps.terminated[k, env] or steps.truncated[k, env]:
            break
    return total, steps.next_obs[k, env], power


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_n_step_equals_a_slow_loop(n):
    length, num_envs, kept = 60, 2, 37
    steps = stream(np.random.default_rng(n), length, num_envs)
    made = ring.make(Transition.example(SPEC), kept * num_envs, num_envs)
    rows, add = made.init(), jax.jit(made.add)
    for t in range(length):
        rows = add(rows, jax.tree.map(lambda x, t=t: x[t], steps), jnp.int32(t))
    starts = [(t, env) for t in range(length - kept, length - n + 1) for env in range(num_envs)]
    index = jnp.array([(t % kept) * num_envs + env for t, env in starts])
    found = jax.jit(made.n_step, static_argnums=2)(rows, index, n, jnp.float32(0.9))
    found = jax.tree.map(np.asarray, found)
    ends = 0
    for i, (t, env) in enumerate(starts):
        reward, next_obs, discount = slow_n_step(steps, t, env, n, 0.9)
        np.testing.assert_array_equal(found.obs[i], steps.obs[t, env])
        assert found.action[i] == steps.action[t, env]
        assert found.reward[i] == pytest.approx(reward, rel=1e-5, abs=1e-6)
        np.testing.assert_array_equal(found.next_obs[i], next_obs)
        assert found.discount[i] == pytest.approx(discount, rel=1e-6)
        ends += discount not in (0.0, pytest.approx(0.9**n))
    assert ends > 0 or n == 1, "some windows are cut short by truncation"


def test_nothing_of_the_next_episode_reaches_a_cut_window():
    steps = stream(np.random.default_rng(0), 3, 1)
    steps = steps._replace(
        reward=np.array([[1.0], [np.nan], [np.inf]], np.float32),
        terminated=np.array([[False], [True], [True]]),
        truncated=np.array([[True], [False], [False]]),
    )
    made = ring.make(Transition.example(SPEC), 3)
    rows, add = made.init(), jax.jit(made.add)
    for t in range(3):
        rows = add(rows, jax.tree.map(lambda x, t=t: x[t], steps), t)
    found = jax.jit(lambda rows: made.n_step(rows, jnp.array([[0]]), 3, 0.5))(rows)
    assert (found.reward.item(), found.discount.item()) == (1.0, 0.5)
    assert found.next_obs.shape == (1, 1, 3)


def count(jaxpr, name):
    return sum(equation.primitive.name == name for equation in primitives(jaxpr.jaxpr))


def test_reads_are_one_gather_for_each_dtype():
    made = ring.make(Transition.example(SPEC), 8)
    rows, index = made.init(), jnp.arange(6).reshape(2, 3)
    assert list(rows) == ["float32", "int32", "uint8"]
    assert count(jax.make_jaxpr(made.get)(rows, index), "gather") == 3
    for n in (1, 4):
        n_step = jax.make_jaxpr(lambda rows, index, n=n: made.n_step(rows, index, n, 0.9))
        assert count(n_step(rows, index), "gather") == 3 * n
    pixels = ring.make(Transition.example(CONTINUOUS), 8)
    reads = jax.make_jaxpr(pixels.get)(pixels.init(), index)
    assert count(reads, "gather") == 2, "flags lie beside pixels"


@pytest.mark.parametrize("x64", [False, True])
def test_a_row_is_that_of_its_step_also_late_and_in_64_bits(x64):
    made = ring.make(X, 2**30 - 2**30 % 66, 66)
    with jax.enable_x64(x64):
        for t in (0, 1, made.steps - 1, made.steps, 2**31 - 1):
            row = jax.jit(made.index)(jnp.int32(t), jnp.arange(66, dtype=jnp.int32))
            assert row.dtype == jnp.int32
            assert row.tolist() == [t % made.steps * 66 + env for env in range(66)]
        assert made.index(7, 3).dtype == jnp.int32


@pytest.mark.parametrize("x64", [False, True])
def test_dtypes_are_the_same_in_64_bits(x64):
    with jax.enable_x64(x64):
        made = ring.make(Transition.example(SPEC), 12, 3)

        def use(rows, batch, mask, t, key):
            rows = made.add(rows, batch, t)
            index = made.sample_index(key, 4, t + 1)
            drawn = made.n_step(rows, index, 2, jnp.float32(0.9))
            rows, cursor = made.add_masked(rows, batch, mask, ring.empty_cursor())
            return rows, index, drawn, cursor, made.sample_filled(key, 4, cursor)

        batch = jax.tree.map(lambda x: x[0], stream(np.random.default_rng(0), 1, 3))
        with jax.debug_key_reuse(False):
            rows, index, drawn, cursor, filled = jax.jit(use)(
                made.init(), batch, np.ones(3, bool), jnp.int32(0), jax.random.key(0)
            )
        assert {name: x.dtype.name for name, x in rows.items()} == {x: x for x in rows}
        assert {x.dtype.name for x in jax.tree.leaves((index, cursor, filled))} == {"int32"}
        floats = (drawn.obs, drawn.reward, drawn.next_obs, drawn.discount)
        assert {x.dtype.name for x in floats} == {"float32"}
        assert drawn.action.dtype == jnp.int32


@pytest.mark.parametrize("seeds", [None, 3])
def test_reading_everything_gathers_nothing(seeds):
    made = ring.make(MIXED, 6, 2)
    lead = () if seeds is None else (seeds,)
    trees = noise(MIXED, (*lead, 6), 0)
    rows = jax.jit(made.layout.pack)(trees)

    def whole(read):
        mapped = read if seeds is None else jax.vmap(read)
        return jax.jit(mapped).lower(rows).compile()

    assert_same_bits(whole(made.all)(rows), trees)
    assert " gather(" not in whole(made.all).as_text()
    by_index = whole(lambda rows: made.get(rows, jnp.arange(6)))
    assert_same_bits(by_index(rows), trees)
    assert " gather(" in by_index.as_text(), "the control: rows by index"


def test_a_write_under_vmap_is_a_slice_update():
    made, init, add, _, _ = jitted(6, 2)
    batch, rows, t = noise(MIXED, (3, 4, 2), 0), many(init(), 3, 4), jnp.int32(4)
    over_seeds = jax.vmap(jax.vmap(made.add, (0, 0, None)), (0, 0, None))
    jaxpr = jax.make_jaxpr(over_seeds)(rows, batch, t)
    assert count(jaxpr, "dynamic_update_slice") == 3
    assert count(jaxpr, "scatter") == 0
    written = jax.tree.map(np.asarray, jax.jit(over_seeds)(rows, batch, t))
    for seed in np.ndindex(3, 4):
        part = jax.tree.map(lambda x, seed=seed: x[seed], (written, batch))
        assert_same_bits(part[0], add(init(), part[1], t))


def test_a_write_is_right_whatever_is_batched():
    made, init, add, _, _ = jitted(6, 2)
    batch = noise(MIXED, (3, 2), 0)
    first, times = jax.tree.map(lambda x: x[0], batch), np.array([0, 4, 5], np.int32)
    fresh = jax.jit(jax.vmap(made.add, (None, 0, None)))(init(), batch, jnp.int32(1))
    moved = jax.jit(jax.vmap(made.add, (None, None, 0)))(init(), first, times)
    fresh, moved = jax.tree.map(np.asarray, (fresh, moved))
    for i in range(3):
        part = jax.tree.map(lambda x, i=i: x[i], (fresh, batch, moved))
        assert_same_bits(part[0], add(init(), part[1], jnp.int32(1)))
        assert_same_bits(part[2], add(init(), first, times[i]))


CAPACITY = 4096


def replay_loop(made, read_new):
    def step(carry, t):
        rows, key = carry
        key, draw = jax.random.split(key)
        batch = jax.tree.map(
            lambda s: jnp.full((made.num_envs, *s.shape), t, s.dtype), Transition.example(SPEC)
        )
        new = made.add(rows, batch, t)
        index = made.sample_index(draw, 16, t + 1)
        drawn = made.n_step(new if read_new else rows, index, 1, 0.9)
        return (new, key), jnp.sum(drawn.obs) + jnp.sum(drawn.reward) + jnp.sum(drawn.discount)

    return lambda rows, key: jax.lax.scan(step, (rows, key), jnp.arange(64, dtype=jnp.int32))


@pytest.mark.parametrize("seeds", [1, 3])
def test_no_ring_is_copied_in_the_loop(seeds):
    made = ring.make(Transition.example(SPEC), CAPACITY, 4)
    keys = jax.random.split(jax.random.key(0), seeds)
    rows = many(made.init(), seeds)
    jaxpr = jax.make_jaxpr(jax.vmap(replay_loop(made, True)))(rows, keys)
    assert count(jaxpr, "scatter") == 0

    def copies(read_new):
        loop = jax.jit(jax.vmap(replay_loop(made, read_new)), donate_argnums=0)
        compiled = loop.lower(rows, keys).compile()
        text = compiled.as_text()
        assert str(CAPACITY) in text, "the ring is in the program"
        shapes = [f"f32[{seeds},{CAPACITY},7]", f"f32[{CAPACITY},7]", f"f32[1,{CAPACITY},7]"]
        return compiled, [copy for shape in shapes for copy in copies_in_loops(text, shape)]

    compiled, found = copies(read_new=True)
    assert found == []
    assert compiled.memory_analysis().alias_size_in_bytes >= seeds * made.num_bytes
    assert compiled.memory_analysis().temp_size_in_bytes < made.num_bytes
    assert copies(read_new=False)[1], "the control: reading the old rows copies the ring"


def test_rows_come_back_bit_for_bit():
    layout = Layout.of(MIXED)
    for lead in ((), (5,), (2, 3)):
        tree = noise(MIXED, lead, len(lead))
        packed = jax.jit(layout.pack)(tree)
        assert {name: x.shape for name, x in packed.items()} == {
            "uint8": (*lead, 9),
            "int32": (*lead, 1),
            "float32": (*lead, 3),
        }
        assert all(x.dtype.name == name for name, x in packed.items())
        assert_same_bits(jax.jit(layout.unpack)(packed), tree)
    assert layout.row_bytes == 9 + 4 + 12
    assert hash(layout) == hash(Layout.of(noise(MIXED, (), 0)))
    assert layout == Layout.of(noise(MIXED, (), 0))


def test_memory_is_as_stated():
    for made in (ring.make(MIXED, 30, 3), ring.make(Transition.example(CONTINUOUS), 30)):
        assert made.num_bytes == sum(x.nbytes for x in made.init().values())
        assert all(x.size for x in made.init().values())
    assert ring.make(Transition.example(CONTINUOUS), 30).num_bytes == 30 * (2 * 16 + 2 * 4 + 4 + 2)


def test_a_transition_is_shaped_by_the_environment():
    step = Transition.example(CONTINUOUS)
    assert (step.obs.shape, step.obs.dtype) == ((4, 4), np.uint8)
    assert step.next_obs == step.obs
    assert (step.action.shape, step.action.dtype) == ((2,), np.float32)
    assert (step.reward.shape, step.reward.dtype) == ((), np.float32)
    assert step.terminated.dtype == step.truncated.dtype == np.bool_
    action = Transition.example(SPEC).action
    assert (action.shape, action.dtype) == ((), np.int32)


def add(example, batch, num_envs=2):
    made = ring.make(example, 4, num_envs)
    return made.add(made.init(), batch, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ring.make(X, 10, 3), "capacity = 10 with num_envs = 3.* multiple.* such as 9"),
        (lambda: ring.make(X, 0), "capacity = 0 .* positive multiple"),
        (lambda: ring.make(X, 4, 0), "num_envs = 0"),
        (lambda: ring.make(X, 2**30 + 1), "expected at most 2\\*\\*30"),
        (lambda: ring.make((), 4), "at least one array"),
        (lambda: ring.make({"a": jnp.zeros((0, 3))}, 4), r"example\['a'\] has shape \(0, 3\)"),
        (lambda: add({"a": X}, {"b": jnp.zeros((2, 3))}), "tree is .*expected"),
        (lambda: add({"a": X}, {"a": jnp.zeros((2, 4))}), r"tree\['a'\] is float32\[2, 4\]"),
        (lambda: add(X, jnp.zeros((2, 3), jnp.int32)), r"tree is int32\[2, 3\].*float32\[2, 3\]"),
        (lambda: add(X, jnp.zeros((3, 3))), r"leading axes \(3,\): expected \(2,\)"),
        (lambda: add(X, jnp.zeros(3)), r"leading axes \(\)"),
        (
            lambda: add((X, X), (jnp.zeros((2, 3)), jnp.zeros((3, 3)))),
            r"tree\[1\] is float32\[3, 3\]: expected float32\[2, 3\]",
        ),
        (
            lambda: ring.make(X, 4, 2).sample_index(jax.random.key(0), 1, 4, n_step=3),
            "n_step = 3: expected 1 to 2",
        ),
        (
            lambda: ring.make(X, 4).add_masked(
                ring.make(X, 4).init(), jnp.zeros((5, 3)), jnp.ones(5, bool), ring.empty_cursor()
            ),
            "batch of 5 rows: expected at most the capacity 4",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
