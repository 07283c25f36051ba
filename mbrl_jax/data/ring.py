"""A ring of environment steps on the device, sampled uniformly.

Row `(t % (capacity // num_envs)) * num_envs + env` holds what environment `env` did at the batched
step `t`. Because `t` is the same for all seeds, a write is one slice update for each dtype, also
under `vmap`. A buffer that the model fills, whose pointer differs by seed, uses `add_masked`.

Write first and then read the new rows: a reader of the old ones makes XLA copy the whole ring.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32

from mbrl_jax.data.rows import Layout, Rows, write_slice
from mbrl_jax.types import InputError, NStep, PyTree, Scalar, Transition


class Cursor(NamedTuple):
    """Where a ring with masked writes stands; under `vmap` it differs by seed."""

    position: jax.Array  # int32, the next row to be written
    size: jax.Array  # int32, how many rows are written


def empty_cursor() -> Cursor:
    """Nothing is written."""
    return Cursor(jnp.int32(0), jnp.int32(0))


def make(example: PyTree, capacity: int, num_envs: int = 1) -> Ring:
    """A ring of `capacity` rows like `example` (one step of one environment).

    Memory: capacity * (bytes of `example`), which is `num_bytes`. A transition holds two
    observations: a million steps with 16 float32 each take 138 MB.

    Raises:
      InputError: a capacity that is no positive multiple of `num_envs` or is above 2**30, or an
        example without arrays or with arrays of size zero.
    """
    if num_envs < 1 or capacity < 1 or capacity % num_envs:
        nearest = max(capacity // max(num_envs, 1), 1) * max(num_envs, 1)
        raise InputError(
            f"capacity = {capacity} with num_envs = {num_envs}: expected a positive multiple of "
            f"num_envs, such as {nearest}"
        )
    if capacity > 2**30:
        raise InputError(f"capacity = {capacity}: expected at most 2**30, as rows are int32")
    return Ring(Layout.of(example), capacity, num_envs)


class Ring(NamedTuple):
    """The static description of a ring and the pure functions on its rows."""

    layout: Layout
    capacity: int  # rows, one for each environment step
    num_envs: int

    @property
    def steps(self) -> int:
        """Batched steps that the ring holds."""
        return self.capacity // self.num_envs

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows."""
        return self.capacity * self.layout.row_bytes

    def check_length(self, name: str, length: int) -> None:
        """Refuses windows that the ring cannot hold; `name` is what the caller calls the length.

        Raises:
          InputError: a length below 1 or above `steps`.
        """
        if not 1 <= length <= self.steps:
            raise InputError(
                f"{name} = {length}: expected 1 to {self.steps}, the batched steps that the "
                "replay holds; take a larger capacity"
            )

    def init(self) -> Rows:
        """Unwritten rows: one [capacity, width] matrix for each dtype, `num_bytes` bytes."""
        return self.layout.zeros(self.capacity)

    def add(self, rows: Rows, batch: PyTree, t: jax.Array) -> Rows:
        """Writes `batch` [num_envs, ...] as the batched step `t` (int32, not batched by `vmap`).

        Raises:
          InputError: a batch unlike the example or without the leading axis `num_envs`.
        """
        packed = self._packed(batch, self.num_envs)
        start = self.index(t, 0)
        return {name: write_slice(x, packed[name], start) for name, x in rows.items()}

    def sample_index(
        self, key: jax.Array, num: int, written: jax.Array, n_step: int = 1
    ) -> jax.Array:
        """`num` rows, [num] int32, uniform with replacement, that open a whole window.

        The window of a row is its step and the next `n_step` - 1 of the same environment. It must
        be written and must not run across the write head, so the newest `n_step` - 1 batched steps
        are never drawn. `written` (int32, not batched by `vmap`) counts the batched steps so far,
        t + 1; it must be at least `n_step`, which the caller sees to. The chance of a row is off
        by less than 2**-32.

        Raises:
          InputError: a window longer than the ring.
        """
        self.check_length("n_step", n_step)
        kept = jnp.minimum(written, self.steps)
        oldest = self.index(written - kept, 0)
        count = jnp.maximum(kept - n_step + 1, 1) * self.num_envs
        return self._wrapped(oldest + below(key, num, count))

    def get(self, rows: Rows, index: jax.Array) -> PyTree:
        """The rows `index` (any shape, int32 in [0, capacity)): leaves [*index.shape, ...].

        One gather of whole rows for each dtype, not checked for bounds.
        """
        return self.layout.unpack(self.get_packed(rows, index))

    def get_packed(self, rows: Rows, index: jax.Array) -> Rows:
        """As `get`, but packed: matrices [*index.shape, width]."""
        return {name: x.at[index].get(mode="promise_in_bounds") for name, x in rows.items()}

    def index(self, t: Scalar, env: Scalar) -> jax.Array:  # type: ignore[override]
        """The row of environment `env` at the batched step `t`: int32, as they broadcast."""
        return jnp.asarray(t % self.steps * self.num_envs + env, jnp.int32)

    def set(self, rows: Rows, index: jax.Array, fields: PyTree) -> Rows:
        """Writes some leaves of some rows anew and leaves everything else as it is.

        index: the rows, int32 of any shape, in [0, capacity). Where a row is named more than once,
          the last of its values in row-major order stays, the same for all leaves.
        fields: the leaves to be written, each [*index.shape, *shape], under the names that they
          have in the example: {"a": {"b": x}} for `example["a"]["b"]` or `example.a.b`. A
          NamedTuple of the example's kind with None for all others will do too.

        One scatter for each leaf, and a sort of `index`. It is done in place where the values or
        `index` follow from all that was read of the same rows (see `Sequence.sample`); otherwise
        XLA copies the ring.

        Raises:
          InputError: no leaf, one that the example lacks, or one of another shape or dtype.
        """
        return self.layout.set(rows, index, fields)

    def all(self, rows: Rows) -> PyTree:
        """Every row in the order of the ring: leaves [capacity, ...]; unwritten rows are zeros.

        Slices of the matrices, where `get` of all rows would gather them one by one.
        """
        return self.layout.unpack(rows)

    def after(self, index: jax.Array, steps: int | jax.Array = 1) -> jax.Array:
        """The rows of the same environments `steps` (0 to `self.steps`) batched steps later."""
        return self._wrapped(index + steps * self.num_envs)

    def n_step(self, rows: Rows, index: jax.Array, n: int, gamma: Scalar) -> NStep:
        """`n` steps from each row of `index` as one; the rows are `Transition`s.

        The sum of rewards ends with the episode; truncation bootstraps, termination does not.
        `index` comes from `sample_index` with `n_step=n`. n gathers of whole rows for each dtype.
        """
        first: Transition = self.get(rows, index)
        reward, next_obs, terminated = first.reward, first.next_obs, first.terminated
        going = ~(terminated | first.truncated)
        power = jnp.full(index.shape, gamma, jnp.float32)
        for _ in range(1, n):
            index = self.after(index)
            step: Transition = self.get(rows, index)
            reward = jnp.where(going, reward + power * step.reward, reward)
            power = jnp.where(going, power * gamma, power)
            next_obs = jax.tree.map(partial(_where, going), step.next_obs, next_obs)
            terminated = terminated | (going & step.terminated)
            going = going & ~(step.terminated | step.truncated)
        discount = jnp.where(terminated, 0.0, power)
        return NStep(first.obs, first.action, reward, next_obs, discount)

    def add_masked(
        self, rows: Rows, batch: PyTree, mask: jax.Array, cursor: Cursor
    ) -> tuple[Rows, Cursor]:
        """Writes the rows of `batch` [B, ...] where `mask` [B] bool, one behind the other.

        The pointer moves by as many rows as the mask holds, so it differs by seed and the write is
        a scatter; `num_envs` plays no part. Rows are read with `get`.

        Raises:
          InputError: B above the capacity, or a batch unlike the example.
        """
        num = mask.shape[0]
        if num > self.capacity:
            raise InputError(
                f"a batch of {num} rows: expected at most the capacity {self.capacity}; write in "
                "parts or take a larger capacity"
            )
        packed = self._packed(batch, num)
        rank = jnp.cumsum(mask, dtype=jnp.int32)
        # what the mask leaves out is written past the end, where the write is dropped
        index = jnp.where(mask, self._wrapped(cursor.position + rank - 1), self.capacity)
        rows = {name: x.at[index].set(packed[name], mode="drop") for name, x in rows.items()}
        position = self._wrapped(cursor.position + rank[-1])
        return rows, Cursor(position, jnp.minimum(cursor.size + rank[-1], self.capacity))

    def sample_filled(self, key: jax.Array, num: int, cursor: Cursor) -> jax.Array:
        """`num` rows, [num] int32, uniform with replacement over the `cursor.size` written ones.

        At least one row must be written, which the caller sees to.
        """
        return below(key, num, cursor.size)

    def _packed(self, batch: PyTree, num: int) -> Rows:
        packed = self.layout.pack(batch)
        lead = next(iter(packed.values())).shape[:-1]
        if lead != (num,):
            raise InputError(f"a batch with leading axes {lead}: expected ({num},)")
        return packed

    def _wrapped(self, index: jax.Array) -> jax.Array:
        # a division by a constant that need not be a power of two is dearer than a select
        return jnp.where(index < self.capacity, index, index - self.capacity)


def _where(mask: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (yes.ndim - mask.ndim)), yes, no)


def below(key: jax.Array, num: int, count: jax.Array) -> jax.Array:
    """[num] int32 in [0, count): the high word of 32 random bits times `count`.

    One draw for each, where `jax.random.randint` makes two. A chance differs from 1 / count by
    less than 2**-32, and that of any run of values too.
    """
    if str(jax.random.key_impl(key)) == "threefry2x32":
        # two words from each block, where jax.random.bits takes one: a third of its time on a CPU
        bits = threefry_2x32(jax.random.key_data(key), jnp.arange(num, dtype=jnp.uint32))
    else:
        bits = jax.random.bits(key, (num,), jnp.uint32)
    factor = count.astype(jnp.uint32)
    # the product in halves of 16 bits: 64-bit integers are not to be had
    high, low = bits >> 16, bits & 0xFFFF
    factor_high, factor_low = factor >> 16, factor & 0xFFFF
    middle = high * factor_low + (low * factor_low >> 16)
    middle_low = low * factor_high + (middle & 0xFFFF)
    return (high * factor_high + (middle >> 16) + (middle_low >> 16)).astype(jnp.int32)
