"""Priorities of windows of consecutive steps: n-step transitions, or the sequences of an agent with
a memory.

A window is named by the row of its first step. Its priority is 0, so that it is never drawn, from
the write of that step until the window is whole. Then it is as large as the largest priority ever
set, so that it is soon drawn once (Schaul et al. 2016, section 3.3). When the write head comes
round, the first step of a window is the first of it to be overwritten, which closes it again.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.data import prioritised
from mbrl_jax.data.prioritised import Priorities, Prioritised
from mbrl_jax.data.ring import Ring


def make(ring: Ring, length: int) -> Windows:
    """Priorities of all windows of `length` steps (of one environment each) in a ring.

    Memory: as `prioritised.make(ring.capacity)`.

    Raises:
      InputError: a length below 1 or above `ring.steps`.
    """
    ring.check_length("length", length)
    return Windows(prioritised.make(ring.capacity), ring, length)


class Windows(NamedTuple):
    """The static description and the pure functions on `Priorities`."""

    tree: Prioritised
    ring: Ring
    length: int

    @property
    def num_bytes(self) -> int:
        """Bytes of `Priorities`."""
        return self.tree.num_bytes

    def init(self) -> Priorities:
        """No window can be drawn. `num_bytes` bytes."""
        return self.tree.init()

    def add(self, priorities: Priorities, t: jax.Array) -> Priorities:
        """What the batched step `t` (int32, not batched by `vmap`) closes and opens.

        The windows that begin with step `t` are closed, and those that end with it are opened with
        the largest priority so far. Call it once for each `Ring.add`.
        """
        envs = jnp.arange(self.ring.num_envs, dtype=jnp.int32)
        index = self.ring.index(t - (self.length - 1), envs)
        value = jnp.where(t >= self.length - 1, priorities.largest, 0.0)
        value = jnp.broadcast_to(value, envs.shape)
        if self.length > 1:
            index = jnp.concatenate([self.ring.index(t, envs), index])
            value = jnp.concatenate([jnp.zeros_like(value), value])
        return self.tree.set(priorities, index, value)

    def set(
        self, priorities: Priorities, index: jax.Array, value: jax.Array, t: jax.Array
    ) -> Priorities:
        """Gives the windows whose first rows are `index` the priorities `value`.

        index: int32 of any shape, in [0, capacity). The rows of a whole window may be given too:
          those that open no whole window yet stay closed.
        value: float32, shaped as `index`; exponentiated priorities p**alpha, finite and not
          negative. Of a row that is named twice any one of its values stays.
        t: int32, the batched step that was added last.
        """
        value = jnp.where(self.is_open(index, t), value, 0.0)
        return self.tree.set(priorities, index.reshape(-1), value.reshape(-1))

    def sample(
        self, priorities: Priorities, key: jax.Array, num: int
    ) -> tuple[jax.Array, jax.Array]:
        """`num` first rows in proportion to the priorities -> (index, probability), each [num].

        As `Prioritised.sample`; at least one window must be whole, which the caller sees to.
        """
        return self.tree.sample(priorities, key, num)

    def is_open(self, index: jax.Array, t: jax.Array) -> jax.Array:
        """Whether the rows `index` open a whole window after the batched step `t`: bool."""
        age = (t - index // self.ring.num_envs) % self.ring.steps
        return (age >= self.length - 1) & (age <= t)
