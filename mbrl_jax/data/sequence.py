"""Windows of consecutive steps from a ring, for agents with a recurrent memory.

A window follows one environment and may run over the end of an episode: let the rows hold
`is_first`, so that the agent can reset its memory there.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.data import ring
from mbrl_jax.data.ring import Ring
from mbrl_jax.data.rows import Rows
from mbrl_jax.types import InputError, PyTree


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

    def sample(
        self, rows: Rows, key: jax.Array, num: int, length: int, written: jax.Array
    ) -> PyTree:
        """`num` windows of `length` steps: leaves [num, length, ...].

        Uniform with replacement over all environments and all starts whose window is wholly
        written and does not run across the write head. `written` (int32, not batched by `vmap`)
        counts the batched steps so far, t + 1; it must be at least `length`, which the caller sees
        to. One gather of num * length rows for each dtype.

        Raises:
          InputError: a window longer than the buffer.
        """
        if not 1 <= length <= self.ring.steps:
            raise InputError(
                f"length = {length}: expected 1 to {self.ring.steps}, the batched steps that the "
                "buffer holds; take a larger capacity"
            )
        start = self.ring.sample_index(key, num, written, n_step=length)
        ahead = jnp.arange(length, dtype=jnp.int32)[None]
        return self.ring.get(rows, self.ring.after(start[:, None], ahead))
