"""Threefry in one fused kernel, for the few draws of a small step inside a hot loop.

On a CPU JAX lowers threefry to a rolled loop of many small kernels, which costs more than the
whole environment step of a small problem. Here the twenty rounds are written out, so that XLA
fuses a draw into the kernel that reads it. `split` and `fold_in` give the bits of `jax.random`;
keys of another implementation go to `jax.random` itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32

# Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3", Threefry-2x32
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def fold_in(key: jax.Array, data: jax.Array) -> jax.Array:
    """Keys of `data`'s shape, each `jax.random.fold_in(key, data[i])`."""
    if not _is_threefry(key):
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, data)
    counters = data.astype(jnp.uint32)
    words = _threefry(key, jnp.zeros_like(counters), counters)
    return jax.random.wrap_key_data(jnp.stack(words, axis=-1), impl="threefry2x32")


def split(key: jax.Array, num: int = 2) -> jax.Array:
    """`jax.random.split`: [num] keys."""
    return fold_in(key, jnp.arange(num, dtype=jnp.uint32))


def uniform(key: jax.Array, num: int, fused: int = 4) -> jax.Array:
    """[num] float32 in [0, 1): multiples of 2**-24, two from each block of threefry.

    Up to `fused` draws are computed in the kernel that reads them, which pays for more of them
    where only one kernel does; the bits are the same.
    """
    if not _is_threefry(key):
        return jax.random.uniform(key, (num,), jnp.float32)
    half = (num + 1) // 2
    counters = jnp.arange(half, dtype=jnp.uint32)
    if num <= fused:
        bits = jnp.concatenate(_threefry(key, counters, counters + jnp.uint32(half)))
    else:
        # the same bits from the rolled loop, whose result is stored: fused into several gathers
        # the rounds would run once for every element that each of them reads
        bits = threefry_2x32(jax.random.key_data(key), jnp.arange(2 * half, dtype=jnp.uint32))
    return (bits[:num] >> 8).astype(jnp.float32) * 2.0**-24


def shuffles(key: jax.Array, num: int, size: int) -> jax.Array:
    """[num, size] int32, each row a random order of 0 to `size` - 1 (at most 2**24).

    Sorts one word for each entry, random bits above the index, in a quarter of the time of a sort
    of pairs (CPU). The few entries whose random bits are equal stay neighbours in ascending order.
    """
    low = max(size - 1, 1).bit_length()
    words = jax.random.bits(key, (num, size), jnp.uint32) >> low << low
    words = jnp.sort(words | jnp.arange(size, dtype=jnp.uint32)[None], axis=-1, stable=False)
    return (words & jnp.uint32(2**low - 1)).astype(jnp.int32)


def _is_threefry(key: jax.Array) -> bool:
    return str(jax.random.key_impl(key)) == "threefry2x32"


def _threefry(key: jax.Array, x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    k0, k1 = jax.random.key_data(key)
    schedule = (k0, k1, k0 ^ k1 ^ jnp.uint32(_PARITY))
    x0, x1 = x0 + schedule[0], x1 + schedule[1]
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << rotation) | (x1 >> (32 - rotation)))
        x0 = x0 + schedule[(i + 1) % 3]
        x1 = x1 + schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1
