"""The queue of fresh windows that come before the uniformly drawn ones, DreamerV3's "online queue".

With it each step is trained on soon and at least once (Hafner et al. 2025, "Mastering diverse
control tasks through world models"; the order is that of the authors' code).

The steps 1 + k * length to (k + 1) * length of every environment are its window number k, so that
windows neither overlap nor leave anything out but step 0. They queue up in the order in which they
become whole, and environment after environment. Nothing is stored but how many have been taken: the
others follow from how many steps are written. A window of which a step is overwritten before it was
taken leaves the queue.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.data.ring import Ring


class Queue(NamedTuple):
    """The head of the queue: the window that is to be taken next.

    Two numbers, as a count of all windows of all environments would outgrow int32.
    """

    window: jax.Array  # int32, its number within its environment
    env: jax.Array  # int32 in [0, num_envs)


def empty() -> Queue:
    """Nothing has been taken."""
    return Queue(jnp.int32(0), jnp.int32(0))


def waiting(ring: Ring, queue: Queue, length: int, written: jax.Array) -> tuple[jax.Array, Queue]:
    """How many windows wait (int32), and the queue without those that were overwritten.

    ring: the ring that holds the steps.
    queue: as `empty`, or the last call of `pop`, gave it.
    length: steps of a window, 1 to `ring.steps`, the same in every call.
    written: int32, the batched steps so far, t + 1. Under `vmap` over seeds the number and the
      queue are batched only if `queue` or `written` are.
    """
    whole = jnp.maximum(written - 1, 0) // length
    # window k is lost once its first step, 1 + k * length, is older than the oldest step kept
    lost = jnp.maximum(written - ring.steps + length - 2, 0) // length
    env = jnp.where(queue.window < lost, 0, queue.env)
    window = jnp.maximum(queue.window, lost)
    return (whole - window) * ring.num_envs - env, Queue(window, env)


def pop(
    ring: Ring, queue: Queue, num: int, length: int, written: jax.Array
) -> tuple[jax.Array, jax.Array, Queue]:
    """At most `num` windows from the head of the queue -> (first rows, how many, queue).

    first rows: [num] int32, of which only the first `how many` (int32, 0 to `num`) mean anything.
    The other arguments are those of `waiting`.
    """
    left, queue = waiting(ring, queue, length, written)
    count = jnp.minimum(left, num)
    place = queue.env + jnp.arange(num, dtype=jnp.int32)
    step = 1 + (queue.window + place // ring.num_envs) * length
    rows = ring.index(step, place % ring.num_envs)
    end = queue.env + count
    return rows, count, Queue(queue.window + end // ring.num_envs, end % ring.num_envs)
