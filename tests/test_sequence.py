"""Windows of a ring against a deque of steps, and the queue of fresh ones against a slow one."""

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
from mbrl_jax.data.online import Queue
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


class SlowQueue:
    """Every record of every environment, one after the other, as the authors' replay gets them."""

    def __init__(self, steps, num_envs, length):
        self.steps, self.num_envs, self.length = steps, num_envs, length
        self.written, self.windows = 0, deque()

    def add(self):
        for env in range(self.num_envs):
            if self.written and self.written % self.length == 0:
                self.windows.append((self.written - self.length + 1, env))
        self.written += 1
        while self.windows and self.windows[0][0] < self.written - self.steps:
            self.windows.popleft()

    def take(self, num):
        return [self.windows.popleft() for _ in range(min(num, len(self.windows)))]


@cache
def online_jitted(capacity, num_envs, num, length):
    made = sequence.make(EXAMPLE, capacity, num_envs)

    def sample(rows, key, written, queue):
        return made.sample_online(rows, key, num, length, written, queue)

    over_seeds = jax.vmap(sample, (0, 0, None, 0))
    return jax.jit(sample), jax.jit(over_seeds)


@settings(deadline=None, max_examples=150)
@given(
    # the second and third hold no more than a window or two; the last gives out less than it gets
    st.sampled_from([(24, 2, 5, 3), (5, 1, 2, 5), (18, 3, 4, 4), (40, 1, 3, 1), (24, 4, 1, 2)]),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_fresh_windows_come_first_as_from_a_slow_queue(sizes, gaps, seed):
    capacity, num_envs, num, length = sizes
    steps = capacity // num_envs
    _, init, add, _ = jitted(capacity, num_envs)
    sample, _ = online_jitted(*sizes)
    rows, queue, slow = init(), online.empty(), SlowQueue(steps, num_envs, length)
    for call, gap in enumerate([length, *gaps]):
        for _ in range(gap):
            rows = add(rows, batch_of(slow.written, num_envs, seed), jnp.int32(slow.written))
            slow.add()
        key, written = jax.random.key(seed + call), jnp.int32(slow.written)
        windows, index, queue = sample(rows, key, written, queue)
        windows, index = jax.tree.map(np.asarray, (windows, index))
        starts = list(
            zip(windows["step"][:, 0].tolist(), windows["env"][:, 0].tolist(), strict=True)
        )
        expected = slow.take(num)
        assert starts[: len(expected)] == expected
        for start, env in starts[len(expected) :]:
            assert max(slow.written - steps, 0) <= start <= slow.written - length
            assert env < num_envs
        assert (windows["step"] == windows["step"][:, :1] + np.arange(length)[None]).all()
        np.testing.assert_array_equal(index, windows["step"] % steps * num_envs + windows["env"])
        drawn = jitted(capacity, num_envs)[3](rows, key, num, length, written)[1]
        np.testing.assert_array_equal(index[len(expected) :], drawn[len(expected) :])


def test_every_step_but_the_first_is_given_out_once_while_the_queue_keeps_up():
    _, init, add, _ = jitted(24, 2)
    sample, _ = online_jitted(24, 2, 5, 3)
    rows, queue, seen = init(), online.empty(), []
    for t in range(50):
        rows = add(rows, batch_of(t, 2), jnp.int32(t))
        if t % 6 == 4 and t > 4:
            waiting = online.waiting(sequence.make(EXAMPLE, 24, 2).ring, queue, 3, t + 1)[0]
            windows, _, queue = sample(rows, jax.random.key(t), jnp.int32(t + 1), queue)
            fresh = jax.tree.map(lambda x, n=int(waiting): np.asarray(x[:n]), windows)
            seen += zip(fresh["step"].reshape(-1), fresh["env"].reshape(-1), strict=True)
    assert sorted(seen) == [(step, env) for step in range(1, 46) for env in range(2)]


def test_the_queue_under_vmap_is_that_of_each_seed_and_stays_unbatched_if_it_was():
    sizes = (24, 2, 5, 3)
    made, init, add, _ = jitted(24, 2)
    sample, both = online_jitted(*sizes)
    rows = [init(), init()]
    for t in range(11):
        rows = [add(rows[s], batch_of(t, 2, s), jnp.int32(t)) for s in range(2)]
    keys = jax.random.split(jax.random.key(0))
    queues = [Queue(jnp.int32(0), jnp.int32(1)), Queue(jnp.int32(2), jnp.int32(0))]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *zip(rows, queues, strict=True))
    found = both(stacked[0], keys, jnp.int32(11), stacked[1])
    for s in range(2):
        alone = sample(rows[s], keys[s], jnp.int32(11), queues[s])
        jax.tree.map(lambda a, b, s=s: np.testing.assert_array_equal(a[s], b), found, alone)

    def shared(rows, key):
        windows, _, queue = made.sample_online(rows, key, 5, 3, jnp.int32(11), queues[0])
        return windows, queue

    queue = jax.jit(jax.vmap(shared, out_axes=(0, None)))(stacked[0], keys)[1]
    assert jax.tree.map(int, queue) == (3, 0)


def test_the_queue_counts_right_at_the_end_of_int32():
    made = sequence.make({"x": jax.ShapeDtypeStruct((), "uint8")}, 2**20, 64)
    length, written = 3, 2**31 - 1
    assert written // length * 64 > 2**31, "a count of all windows would overflow"
    pop = jax.jit(lambda queue, t: online.pop(made.ring, queue, 200, length, t))
    last = (written - 1) // length
    for taken, env in ((0, 0), (last - 9, 5), (last - 1, 5), (last, 0)):
        rows, count, queue = pop(Queue(jnp.int32(taken), jnp.int32(env)), jnp.int32(written))
        lost = -(-(written - made.ring.steps - 1) // length)
        first = (taken * 64 + env) if taken >= lost else lost * 64
        expected = range(first, min(first + 200, last * 64))
        assert int(count) == len(expected)
        assert rows[: len(expected)].tolist() == [
            (1 + i // 64 * length) % made.ring.steps * 64 + i % 64 for i in expected
        ]
        if expected:
            assert jax.tree.map(int, queue) == divmod(expected[-1] + 1, 64)


def test_the_queue_and_the_windows_are_those_of_the_authors():
    made, init, add, sample = jitted(80, 2)
    first = jax.jit(lambda queue, t: online.pop(made.ring, queue, 2, 5, t))
    rows, queue, arrivals = init(), online.empty(), []
    for t in range(40):
        rows = add(rows, batch_of(t, 2), jnp.int32(t))
        index, count, queue = jax.tree.map(np.asarray, first(queue, jnp.int32(t + 1)))
        arrivals += [[t, int(row % 2), int(row // 2)] for row in index[:count]]
    assert arrivals == GOLDEN["online"]["numbers"]

    drawn, _ = sample(rows, jax.random.key(0), 4096, 5, jnp.int32(40))
    starts = set(zip(drawn["env"][:, 0].tolist(), drawn["step"][:, 0].tolist(), strict=True))
    assert starts == {(env, start) for env, start in GOLDEN["valid"]["numbers"]}

    batch, _ = online_jitted(80, 2, 3, 5)
    windows, _, _ = batch(rows, jax.random.key(0), jnp.int32(40), online.empty())
    found = np.stack([windows["env"][:, 0], windows["step"][:, 0]], axis=1)
    assert found.tolist() == GOLDEN["first_batch"]["numbers"]


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
    with jax.enable_x64(x64):
        made = sequence.make(EXAMPLE, 12, 3)
        rows, key = made.init(), jax.random.key(0)
        for t in range(3):
            rows = made.add(rows, batch_of(t, 3), jnp.int32(t))
        written = jnp.int32(3)
        windows, index, queue = made.sample_online(rows, key, 4, 2, written, online.empty())
        rows = made.set(rows, index, {"step": windows["step"]})
        assert {x.dtype.name for x in jax.tree.leaves((index, queue))} == {"int32"}
        assert made.sample(rows, key, 4, 2, written)[1].dtype == jnp.int32
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
