"""Proportional prioritised sampling (Schaul et al. 2016, "Prioritized experience replay").

Values lie in a tree of sums whose nodes have 32 children: 2**17 values take a depth of four. A
draw goes down from the root with one gather of 32 values a level. Parents are always summed anew
from their children, so that no rounding error gathers, however often values change.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax import prng
from mbrl_jax.types import InputError, Scalar

_FAN_OUT = 32  # 16 to 32 draw fastest on a CPU; 64 takes twice as long
# up to so many children all parents are summed: one kernel instead of two
_WHOLE, _WHOLE_ACCELERATOR = 8192, 2**20
# column j sums what lies before child j
_BEFORE = np.triu(np.ones((_FAN_OUT, _FAN_OUT), np.float32), 1)


class Priorities(NamedTuple):
    """The values of all rows and their sums."""

    levels: tuple[jax.Array, ...]  # [nodes, 32] float32 each, from the rows up to the root
    largest: jax.Array  # float32, the largest value ever set and at least 1: for new rows


def make(capacity: int) -> Prioritised:
    """Priorities for the rows of a buffer of `capacity`.

    Memory: 4 bytes a row and about 1/31 more for the sums, which is `num_bytes`.

    Raises:
      InputError: a capacity below 1 or above 2**30.
    """
    if not 1 <= capacity <= 2**30:
        raise InputError(f"capacity = {capacity}: expected 1 to 2**30, the rows of the buffer")
    return Prioritised(capacity)


class Prioritised(NamedTuple):
    """The static description and the pure functions on `Priorities`."""

    capacity: int

    @property
    def num_bytes(self) -> int:
        """Bytes of `Priorities`."""
        return 4 * (_FAN_OUT * sum(self._nodes()) + 1)

    def init(self) -> Priorities:
        """All values are 0: no row is drawn before its value is set. `num_bytes` bytes."""
        levels = tuple(jnp.zeros((nodes, _FAN_OUT), jnp.float32) for nodes in self._nodes())
        return Priorities(levels, jnp.float32(1.0))

    def set(self, priorities: Priorities, index: jax.Array, value: jax.Array) -> Priorities:
        """Gives the rows `index` [K] (int32 in [0, capacity)) the values `value` [K] float32.

        Values are exponentiated priorities p**alpha, finite and not negative; 0 takes a row out.
        Of a row that is named twice any one of its values stays.
        """
        levels: list[jax.Array] = []
        whole = _WHOLE if jax.default_backend() == "cpu" else _WHOLE_ACCELERATOR
        largest = jnp.maximum(priorities.largest, jnp.max(value))
        for level in priorities.levels:
            if levels and levels[-1].size <= whole:
                sums = jnp.sum(levels[-1], axis=-1)
                levels.append(jnp.pad(sums, (0, level.size - sums.size)).reshape(level.shape))
                continue
            level = level.at[_place(index)].set(value, mode="promise_in_bounds")
            index = index // _FAN_OUT
            # the sum of what was written, whichever of two values for one row it is
            value = jnp.sum(level.at[index].get(mode="promise_in_bounds"), axis=-1)
            levels.append(level)
        return Priorities(tuple(levels), largest)

    def sample(
        self, priorities: Priorities, key: jax.Array, num: int
    ) -> tuple[jax.Array, jax.Array]:
        """`num` independent draws in proportion to the values -> (index, probability).

        index: [num] int32. A row of value 0 is never drawn; at least one value must be above 0,
          which the caller sees to.
        probability: [num] float32, the row's value over the sum of all.

        At each node a child's chance is off by about 2**-23 at most. Read the priorities after
        they were set: a reader of the old ones makes XLA copy the tree.
        """
        depth = len(priorities.levels)
        draws = prng.uniform(key, depth * num).reshape(depth, num)
        node = jnp.zeros(num, jnp.int32)
        for draw, level in zip(draws, reversed(priorities.levels), strict=True):
            children = level.at[node].get(mode="promise_in_bounds")
            node = node * _FAN_OUT + _choose(children, draw)
        value = priorities.levels[0].at[_place(node)].get(mode="promise_in_bounds")
        return node, value / jnp.sum(priorities.levels[-1])

    def _nodes(self) -> list[int]:
        nodes = [-(-self.capacity // _FAN_OUT)]
        while nodes[-1] > 1:
            nodes.append(-(-nodes[-1] // _FAN_OUT))
        return nodes


def importance_weights(probability: jax.Array, count: Scalar, beta: Scalar) -> jax.Array:
    """(count * P)**-beta over its maximum, [num] float32: at most 1.

    probability: [num] float32 as `sample` gives it.
    count: rows that could be drawn; it cancels but for rounding.
    beta: 0 for none, 1 for full correction of the bias that prioritised sampling brings.
    """
    weights = (count * probability) ** -beta
    return weights / jnp.max(weights)


def _place(index: jax.Array) -> tuple[jax.Array, jax.Array]:
    return index // _FAN_OUT, index % _FAN_OUT


def _choose(children: jax.Array, uniform: jax.Array) -> jax.Array:
    """A child of each node [num, 32] in proportion to its value, [num] int32.

    `uniform` [num] lies in [0, 1]; not even 1 leads to a child of value 0.
    """
    if jax.default_backend() == "cpu":
        # a matrix product, because a cumulative sum is many kernels on a CPU
        before = jax.lax.dot(children, jnp.asarray(_BEFORE), precision=jax.lax.Precision.HIGHEST)
    else:
        # a sum, into which XLA fuses the gather of the children
        before = jnp.sum(children[:, :, None] * _BEFORE[None], axis=1)
    target = uniform * (before[:, -1] + children[:, -1])
    # the last child that is not 0 and does not lie wholly above the target. However the sums were
    # rounded there is one: before the first that is not 0 lies exactly 0
    eligible = (children > 0) & (before <= target[:, None])
    column = jnp.arange(_FAN_OUT, dtype=jnp.int32)[None]
    return jnp.max(jnp.where(eligible, column, 0), axis=-1)
