"""Prioritised sampling against plain sums, chances and adversarial values."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from test_structure import copies_in_loops

from mbrl_jax.data import prioritised
from mbrl_jax.types import InputError


@cache
def jitted(capacity):
    made = prioritised.make(capacity)
    return made, jax.jit(made.init), jax.jit(made.set), jax.jit(made.sample, static_argnums=2)


def holding(values):
    """-> priorities of these values, and the jitted sample."""
    values = np.asarray(values, np.float32)
    _, init, set_, sample = jitted(len(values))
    return set_(init(), jnp.arange(len(values)), values), sample


def assert_sums(priorities):
    for below, level in zip(priorities.levels[:-1], priorities.levels[1:], strict=True):
        sums = np.zeros(level.size)
        sums[: below.shape[0]] = np.asarray(below, np.float64).sum(axis=1)
        np.testing.assert_allclose(level.reshape(-1), sums, rtol=1e-6)


updates = st.lists(
    st.lists(
        st.tuples(st.integers(0, 99), st.sampled_from([0.0, 1e-6, 0.5, 3.0, 1e3])),
        min_size=5,
        max_size=5,
    ),
    max_size=8,
)


@settings(deadline=None, max_examples=250)
@given(st.sampled_from([3, 32, 100]), updates)
def test_set_equals_a_dictionary(capacity, calls):
    _, init, set_, _ = jitted(capacity)
    priorities, book, largest = init(), {}, 1.0
    for call in calls:
        index = np.array([row % capacity for row, _ in call], np.int32)
        value = np.array([value for _, value in call], np.float32)
        priorities = set_(priorities, index, value)
        largest = max(largest, *value.tolist())
        leaves = np.asarray(priorities.levels[0]).reshape(-1)
        for row in set(index.tolist()):
            assert leaves[row] in value[index == row], "one of the values given for this row"
            book[row] = leaves[row]
    leaves = np.asarray(priorities.levels[0]).reshape(-1)
    expected = np.zeros_like(leaves)
    expected[list(book)] = list(book.values())
    np.testing.assert_array_equal(leaves, expected)
    assert_sums(priorities)
    assert priorities.largest == np.float32(largest)


@pytest.mark.parametrize("capacity", [1000, 20_000])
def test_a_hundred_thousand_changes_leave_no_drift(capacity):
    made, init, set_, _ = jitted(capacity)

    @jax.jit
    def change(priorities, key):
        def step(priorities, key):
            draws = jax.random.split(key)
            index = jax.random.randint(draws[0], (50,), 0, capacity)
            value = 10.0 ** jax.random.uniform(draws[1], (50,), minval=-6.0, maxval=3.0)
            return made.set(priorities, index, value), None

        return jax.lax.scan(step, priorities, jax.random.split(key, 2000))[0]

    priorities = change(init(), jax.random.key(0))
    assert_sums(priorities)
    emptied = set_(priorities, jnp.arange(capacity), jnp.zeros(capacity))
    assert all((np.asarray(level) == 0).all() for level in emptied.levels)


@pytest.mark.parametrize("capacity", [5, 33, 1100])
def test_rows_are_drawn_in_proportion(capacity):
    values = np.random.default_rng(capacity).gamma(1.0, size=capacity)
    values[1::7] = 0.0
    priorities, sample = holding(values)
    index, probability = sample(priorities, jax.random.key(capacity), 300_000)
    assert (index.dtype, probability.dtype) == (jnp.int32, jnp.float32)
    exact = values / values.sum()
    np.testing.assert_allclose(probability, exact[index], rtol=1e-5)
    counts = np.bincount(index, minlength=capacity)
    assert not counts[values == 0].any()
    often = 300_000 * exact >= 5
    kept = np.append(counts[often], counts[~often].sum())
    chance = np.append(300_000 * exact[often], 300_000 * exact[~often].sum())
    kept, chance = (x[chance > 0] for x in (kept, chance))
    assert stats.chisquare(kept, chance).pvalue > 1e-4


def test_values_of_a_large_range_are_drawn_in_proportion():
    rng = np.random.default_rng(0)
    scale = rng.integers(-6, 4, 50_000)
    values = 10.0**scale
    values[scale > 0] *= rng.random(np.sum(scale > 0)) < 1e-3
    priorities, sample = holding(values)
    index, probability = sample(priorities, jax.random.key(1), 1_000_000)
    np.testing.assert_allclose(probability, (values / values.sum())[index], rtol=1e-5)
    counts = np.bincount(scale[index] + 6, minlength=10)
    chance = 1_000_000 * np.bincount(scale + 6, weights=values, minlength=10) / values.sum()
    counts, chance = (np.append(x[chance >= 5], x[chance < 5].sum()) for x in (counts, chance))
    assert len(counts) > 5
    assert stats.chisquare(counts, chance).pvalue > 1e-4


@pytest.mark.parametrize("capacity", [1, 2, 31, 32, 33, 63, 1023, 1024, 1025, 1057])
def test_a_row_of_value_zero_is_never_drawn(capacity):
    rng = np.random.default_rng(capacity)
    odd = np.arange(capacity) % 2 == (capacity - 1) % 2
    wide = (10.0 ** rng.uniform(-6, 3, capacity)).astype(np.float32)
    thirds = np.full(capacity, np.float32(1 / 3))
    for values in (
        np.eye(capacity)[0],
        np.eye(capacity)[-1],
        odd * wide,
        odd * thirds,
        wide * (rng.random(capacity) < 0.1) + np.eye(capacity)[capacity // 2] * 1e-6,
        np.where(odd, 1e-30, 0.0),
    ):
        priorities, sample = holding(values)
        index = np.asarray(sample(priorities, jax.random.key(0), 20_000)[0])
        assert index.min() >= 0
        assert index.max() < capacity
        assert (np.asarray(values, np.float32)[index] > 0).all()


choose = jax.jit(prioritised._choose)
magnitudes = st.sampled_from([0.0, 1e-30, 1e-6, 1 / 3, 0.1, 1.0, 1e3, 16777216.0, 3e7])


@settings(deadline=None, max_examples=300)
@given(
    st.lists(magnitudes, min_size=32, max_size=32).filter(any),
    st.sampled_from([0.0, 2**-24, 0.25, 0.5, 0.75, 1 - 2**-23, 1 - 2**-24, 1.0]),
)
@example([0.0, 0.0, 1.0] + [0.0] * 29, 0.0)
@example([0.0, 0.0, 1.0] + [0.0] * 29, 1.0)
def test_the_edges_of_a_draw(children, uniform):
    children = np.array(children, np.float32)
    child = int(choose(children[None], jnp.array([uniform], jnp.float32))[0])
    assert children[child] > 0
    before, total = np.float64(children[:child]).sum(), np.float64(children).sum()
    slack = 1e-5 * total
    assert before - slack <= uniform * total <= before + children[child] + slack


def test_draws_are_independent():
    """Neighbours in one batch, and the levels of one draw."""
    priorities, sample = holding(np.ones(32 * 32))
    index = np.asarray(sample(priorities, jax.random.key(3), 100_000)[0])
    pairs = np.histogram2d(index[:-1] // 128, index[1:] // 128, bins=8)[0]
    assert stats.chi2_contingency(pairs).pvalue > 1e-4
    nodes = np.histogram2d(index // 128, index % 32 // 4, bins=8)[0]
    assert stats.chi2_contingency(nodes).pvalue > 1e-4


def test_seeds_hold_priorities_of_their_own():
    made, init, set_, sample = jitted(40)
    values = np.random.default_rng(0).random((2, 40)).astype(np.float32)
    rows = jnp.broadcast_to(jnp.arange(40), (2, 40))
    empty = jax.tree.map(lambda x: jnp.zeros((2, *x.shape), x.dtype), init())
    both = jax.jit(jax.vmap(made.set))(empty, rows, values)
    draw = jax.jit(jax.vmap(lambda p, key: made.sample(p, key, 50)))
    index, probability = draw(both, jax.random.split(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(0))
    for seed in range(2):
        one = sample(set_(init(), rows[seed], values[seed]), keys[seed], 50)
        np.testing.assert_array_equal(index[seed], one[0])
        np.testing.assert_allclose(probability[seed], one[1], rtol=1e-6)


def test_importance_weights_follow_the_formula():
    probability = np.array([0.5, 0.01, 1e-6, 0.1])
    for beta in (0.0, 0.4, 1.0):
        expected = (1000 * probability) ** -beta
        found = jax.jit(prioritised.importance_weights)(
            jnp.asarray(probability, jnp.float32), jnp.int32(1000), jnp.float32(beta)
        )
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected / expected.max(), rtol=1e-5)


@pytest.mark.parametrize("capacity", [1, 32, 33, 5000, 2**15 + 1])
def test_memory_is_as_stated(capacity):
    made = prioritised.make(capacity)
    arrays = jax.tree.leaves(made.init())
    assert made.num_bytes == sum(x.nbytes for x in arrays)
    assert made.num_bytes < 4 * capacity * 32 / 31 + 4 * 32 * 4


@pytest.mark.parametrize("seeds", [1, 3])
def test_no_tree_is_copied_in_the_loop(seeds):
    made = prioritised.make(2**15)

    def copies(read_new):
        def step(carry, _):
            old, key = carry
            key, draw, rows = jax.random.split(key, 3)
            index = jax.random.randint(rows, (8,), 0, 2**15)
            new = made.set(old, index, jnp.ones(8))
            drawn = made.sample(new if read_new else old, draw, 8)
            return (new, key), (jnp.sum(drawn[0]), jnp.sum(drawn[1]))

        loop = jax.vmap(lambda p, key: jax.lax.scan(step, (p, key), length=64))
        start = jax.tree.map(lambda x: jnp.zeros((seeds, *x.shape), x.dtype), made.init())
        keys = jax.random.split(jax.random.key(0), seeds)
        text = jax.jit(loop, donate_argnums=0).lower(start, keys).compile().as_text()
        assert "1024,32]" in text, "the tree is in the program"
        shapes = [f"f32[{seeds},1024,32]", "f32[1024,32]", f"f32[{seeds},1,1024,32]"]
        return [copy for shape in shapes for copy in copies_in_loops(text, shape)]

    assert copies(read_new=True) == []
    assert copies(read_new=False), "the control: reading the old tree copies it"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prioritised.make(0), r"capacity = 0: expected 1 to 2\*\*30"),
        (lambda: prioritised.make(2**30 + 1), r"expected 1 to 2\*\*30"),
    ],
)
def test_bad_input_is_told_in_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("capacity", [5, 40, 9_000])
def test_an_accelerators_sums_and_draws_are_those_of_a_cpu(capacity, monkeypatch):
    rng = np.random.default_rng(capacity)
    tree = prioritised.make(capacity)
    index = jnp.asarray(rng.permutation(capacity)[: capacity // 2], jnp.int32)
    # whole numbers, whose sums are exact in any order; some rows are taken out
    value = jnp.asarray(rng.integers(0, 4, index.shape), jnp.float32)

    def draws():
        priorities = tree.set(tree.init(), index, value)
        return priorities, tree.sample(priorities, jax.random.key(1), 300)

    expected, (rows, chances) = draws()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    got, (other_rows, other_chances) = draws()
    for ours, theirs in zip(got.levels, expected.levels, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(other_rows, rows)
    np.testing.assert_array_equal(other_chances, chances)
