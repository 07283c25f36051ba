"""Windows of consecutive steps from a ring, for agents with a recurrent memory.

A window follows one environment and may run over the end of an episode: let the rows hold
`is_first`, so that the agent can reset its memory there. What training finds out about the steps of
a window (latents, policies, values) is written back with `set` and the rows that came with it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.data import online, ring
from mbrl_jax.data.online import Queue
from mbrl_jax.data.ring import Ring
from mbrl_jax.data.rows import Rows
from mbrl_jax.types import PyTree, Scalar


def make(example: PyTree, capacity: int, num_envs: int = 1) -> Sequence:
    """A buffer of `capacity` rows like `example` (one step of one environment), read in windows.

    Memory: capacity * (bytes of `example`), which is `num_bytes`; successors need no room of their
    own, as they are the next step of the window.

    Raises:
      InputError: a capacity that is no positive multiple of `num_envs` or is above 2**30, or an
        example without arrays or with arrays of size zero.
    """
    return Sequence(ring.make(example, capacity, num_envs))


class Sequence(NamedTuple):
    """The static description of a buffer and the pure functions on its rows."""

    ring: Ring

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows."""
        return self.ring.num_bytes

    def init(self) -> Rows:
        """Unwritten rows, as `Ring.init`."""
        return self.ring.init()

    def add(self, rows: Rows, batch: PyTree, t: jax.Array) -> Rows:
        """Writes `batch` [num_envs, ...] as the batched step `t`, as `Ring.add`."""
        return self.ring.add(rows, batch, t)

    def index(self, t: Scalar, env: Scalar) -> jax.Array:  # type: ignore[override]
        """The row of environment `env` at the batched step `t`, as `Ring.index`."""
        return self.ring.index(t, env)

    def sample(
        self, rows: Rows, key: jax.Array, num: int, length: int, written: jax.Array
    ) -> tuple[PyTree, jax.Array]:
        """`num` windows of `length` steps: leaves [num, length, ...], and their rows.

        Uniform with replacement over all environments and all starts whose window is wholly
        written and does not run across the write head. `written` (int32, not batched by `vmap`)
        counts the batched steps so far, t + 1; it must be at least `length`, which the caller sees
        to. One gather of num * length rows for each dtype.

        The rows, [num, length] int32, are for `set`, which comes after the read then.

        Raises:
          InputError: a window longer than the buffer.
        """
        self.ring.check_length("length", length)
        start = self.ring.sample_index(key, num, written, n_step=length)
        return self.read(rows, start, length)

    def sample_online(
        self,
        rows: Rows,
        key: jax.Array,
        num: int,
        length: int,
        written: jax.Array,
        queue: Queue,
    ) -> tuple[PyTree, jax.Array, Queue]:
        """As `sample`, but what waits in the queue of fresh windows (`online`) comes first.

        -> (windows, rows, queue). The first of the `num` windows are those at the head of the
        queue, in its order and as many as there are; the others are drawn uniformly.

        queue: `online.empty()` at first; `length` is the same in every call.

        Raises:
          InputError: a window longer than the buffer.
        """
        self.ring.check_length("length", length)
        fresh, count, queue = online.pop(self.ring, queue, num, length, written)
        drawn = self.ring.sample_index(key, num, written, n_step=length)
        start = jnp.where(jnp.arange(num, dtype=jnp.int32) < count, fresh, drawn)
        return *self.read(rows, start, length), queue

    def read(self, rows: Rows, start: jax.Array, length: int) -> tuple[PyTree, jax.Array]:
        """The windows that begin with the rows `start` [num] int32: [num, length, ...], and rows.

        `start` comes from `Windows.sample` for instance; the rows, [num, length] int32, are for
        `set`.
        """
        ahead = jnp.arange(length, dtype=jnp.int32)[None]
        index = self.ring.after(start[:, None], ahead)
        read = self.ring.get_packed(rows, index)
        return self.ring.layout.unpack(read), _after(index, read)

    def set(self, rows: Rows, index: jax.Array, fields: PyTree) -> Rows:
        """Writes some leaves of the rows `index` anew, as `Ring.set`.

        In place, as long as `index` is (a part of) what came with the last windows that were read.
        """
        return self.ring.set(rows, index, fields)


def _after(index: jax.Array, read: Rows) -> jax.Array:
    """`index`, in such a way that whatever uses it comes after all of `read`."""
    # XLA orders by data alone, also despite a barrier, and where a write might come before a read
    # it copies the whole matrix. XLA does not see that this is zero
    for x in read.values():
        index = index + jnp.minimum((x.reshape(-1)[0] == 0).astype(index.dtype), 0)
    return index
