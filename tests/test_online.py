"""The queue of fresh windows against a slow one and against the authors' numbers."""

from collections import deque
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sequence import EXAMPLE, GOLDEN, batch_of, jitted

from mbrl_jax.data import online, sequence
from mbrl_jax.data.online import Queue


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
