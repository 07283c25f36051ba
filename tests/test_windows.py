"""Priorities of windows against lists, and against what the authors of DreamerV3 hold."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prioritised import assert_sums
from test_sequence import GOLDEN
from test_structure import copies_in_loops, primitives

from mbrl_jax.data import ring, windows
from mbrl_jax.types import InputError

FLAG = jax.ShapeDtypeStruct((), "bool")


@cache
def windowed(capacity, num_envs, length):
    made = windows.make(ring.make(FLAG, capacity, num_envs), length)
    over_seeds = jax.vmap(made.add, (0, None)), jax.vmap(made.set, (0, 0, 0, None))
    return made, jax.jit(made.add), jax.jit(made.set), *map(jax.jit, over_seeds)


def leaves(priorities, capacity):
    """[*seeds, capacity]"""
    level = np.asarray(priorities.levels[0])
    return level.reshape(*level.shape[:-2], -1)[..., :capacity]


class SlowWindows:
    """Priorities by (environment, first step), recomputed from the definition after each step."""

    def __init__(self, steps, num_envs, length):
        self.steps, self.num_envs, self.length = steps, num_envs, length
        self.written, self.largest, self.values = 0, 1.0, {}

    def add(self):
        self.written += 1
        oldest = max(self.written - self.steps, 0)
        whole = range(oldest, self.written - self.length + 1)
        kept = {(env, start) for env in range(self.num_envs) for start in whole}
        self.values = {window: self.values.get(window, self.largest) for window in kept}

    def set(self, rows, values):
        for row, value in zip(rows, values, strict=True):
            if self.at(row):
                self.values[self.at(row)] = value
                self.largest = max(self.largest, value)

    def at(self, row):
        """The open window that begins in this row."""
        env, slot = row % self.num_envs, row // self.num_envs
        found = [w for w in self.values if w[0] == env and w[1] % self.steps == slot]
        return found[0] if found else None

    def leaves(self):
        values = np.zeros(self.steps * self.num_envs, np.float32)
        for (env, start), value in self.values.items():
            values[start % self.steps * self.num_envs + env] = value
        return values


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([(5, 1, 1), (5, 1, 3), (4, 1, 4), (12, 3, 2), (12, 2, 6), (80, 2, 5)]),
    st.lists(
        st.lists(st.tuples(st.integers(0, 99), st.sampled_from([0.0, 0.5, 3.0, 1e3]))), max_size=20
    ),
    st.integers(0, 15),
)
def test_windows_are_open_while_they_are_whole(sizes, calls, extra):
    capacity, num_envs, length = sizes
    made, add, set_, add_both, set_both = windowed(*sizes)
    seeds = [SlowWindows(capacity // num_envs, num_envs, length) for _ in range(2)]
    one, both = made.init(), jax.tree.map(lambda x: jnp.stack([x, x]), made.init())
    for t, call in enumerate([[]] * extra + calls):
        one, both = add(one, jnp.int32(t)), add_both(both, jnp.int32(t))
        # four rows at a time and none twice, as any value of a row named twice may stay
        rows = list(dict.fromkeys(row % capacity for row, _ in call))[:4]
        rows += [row for row in range(capacity) if row not in rows][: 4 - len(rows)]
        value = np.resize(np.array([v for _, v in call] or [2.0], np.float32), 4)
        index = np.array(rows, np.int32).reshape(2, 2)
        value = np.stack([value, value + 1]).reshape(2, 2, 2)
        one = set_(one, index, value[0], jnp.int32(t))
        both = set_both(both, np.stack([index, index]), value, jnp.int32(t))
        for slow, values in zip(seeds, value, strict=True):
            slow.add()
            slow.set(rows, values.reshape(-1).tolist())
        np.testing.assert_array_equal(leaves(one, capacity), seeds[0].leaves())
        np.testing.assert_array_equal(leaves(both, capacity), [slow.leaves() for slow in seeds])
        assert one.largest == np.float32(seeds[0].largest)
    assert_sums(one)


def test_no_window_is_drawn_that_is_not_whole():
    made, add, _, _, _ = windowed(12, 2, 3)
    sample = jax.jit(made.sample, static_argnums=2)
    priorities = made.init()
    for t in range(15):
        priorities = add(priorities, jnp.int32(t))
        if t >= 2:
            drawn = set(sample(priorities, jax.random.key(t), 500)[0].tolist())
            whole = range(max(t - 5, 0), t - 1)
            assert drawn == {start % 6 * 2 + env for start in whole for env in range(2)}
            index = jnp.arange(12, dtype=jnp.int32)
            is_open = made.is_open(index, jnp.int32(t))
            assert set(np.flatnonzero(is_open).tolist()) == drawn


def test_the_windows_that_are_held_are_those_of_the_authors():
    # they count windows and we steps: six of three steps, in two environments, are five steps
    made, add, _, _, _ = windowed(10, 2, 3)
    priorities = made.init()
    for t in range(12):
        priorities = add(priorities, jnp.int32(t))
        # after the insertions of both environments
        expected = GOLDEN["capacity"]["numbers"][2 * t + 1]
        rows = np.flatnonzero(leaves(priorities, 10)).tolist()
        assert rows == sorted(start % 5 * 2 + env for env, start in expected)


@pytest.mark.parametrize(("num_envs", "records"), GOLDEN["first_update"]["numbers"])
def test_1024_windows_are_there_when_the_authors_begin_to_train(num_envs, records):
    made, add, _, _, _ = windowed(4096, num_envs, 65)
    add_all = jax.jit(lambda p, times: jax.lax.scan(lambda p, t: (made.add(p, t), ()), p, times)[0])
    steps = records // num_envs
    before = add_all(made.init(), jnp.arange(steps - 1, dtype=jnp.int32))
    assert np.count_nonzero(leaves(before, 4096)) == 1024 - num_envs
    assert np.count_nonzero(leaves(add(before, jnp.int32(steps - 1)), 4096)) == 1024


@pytest.mark.parametrize("x64", [False, True])
def test_windows_late_and_in_64_bits(x64):
    with jax.enable_x64(x64):
        made = windows.make(ring.make(FLAG, 64 * 100, 64), 5)
        priorities, t = made.init(), 2**31 - 1
        for step in range(t - 5, t + 1):
            priorities = jax.jit(made.add)(priorities, jnp.int32(step))
        rows = {step % 100 * 64 + env for step in (t - 5, t - 4) for env in range(64)}
        # the first adds opened windows whose steps were written before
        rows |= {step % 100 * 64 + env for step in range(t - 9, t - 5) for env in range(64)}
        assert set(np.flatnonzero(leaves(priorities, 6400)).tolist()) == rows
        index, probability = jax.jit(made.sample, static_argnums=2)(
            priorities, jax.random.key(0), 8
        )
        assert set(index.tolist()) <= rows
        assert (index.dtype, probability.dtype) == (jnp.int32, jnp.float32)
        assert {x.dtype.name for x in jax.tree.leaves(priorities)} == {"float32"}


@pytest.mark.parametrize("seeds", [None, 3])
def test_no_tree_of_windows_is_copied_in_the_loop(seeds):
    made = windows.make(ring.make(FLAG, 2**15, 4), 3)

    def step(carry, t):
        priorities, key = carry
        key, draw = jax.random.split(key)
        priorities = made.add(priorities, t)
        index, probability = made.sample(priorities, draw, 8)
        return (made.set(priorities, index, 1 / probability, t), key), jnp.sum(probability)

    def loop(priorities, key):
        return jax.lax.scan(step, (priorities, key), jnp.arange(64, dtype=jnp.int32))

    mapped = loop if seeds is None else jax.vmap(loop)
    lead = () if seeds is None else (seeds,)
    start = jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), x.dtype), made.init())
    key = jax.random.key(0) if seeds is None else jax.random.split(jax.random.key(0), seeds)
    jaxpr = jax.make_jaxpr(mapped)(start, key)
    writes = [e.invars[2].aval for e in primitives(jaxpr.jaxpr) if e.primitive.name == "scatter"]
    # adding writes eight rows and their parents, setting eight
    assert writes
    assert all(x.size <= 8 * (seeds or 1) for x in writes)
    text = jax.jit(mapped, donate_argnums=0).lower(start, key).compile().as_text()
    assert "1024,32]" in text, "the tree is in the program"
    for shape in ("f32[1024,32]", f"f32[{seeds},1024,32]", f"f32[{seeds},1,1024,32]"):
        assert not copies_in_loops(text, shape)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: windows.make(ring.make(FLAG, 8, 2), 5), "length = 5: expected 1 to 4"),
        (lambda: windows.make(ring.make(FLAG, 8, 2), 0), "length = 0: expected 1 to 4"),
    ],
)
def test_bad_input_is_told_in_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
