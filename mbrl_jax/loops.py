"""Scans and branches that are short on an accelerator, where kernels are what takes time.

A learner of small networks has dozens of small arrays: biases, counters, states of environments.
XLA gives each of them a kernel of its own in every turn of a loop, and makes the host wait for the
predicate of each conditional. On a CPU both are cheap, and these functions are those of `jax.lax`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from mbrl_jax.types import PyTree

Carry = TypeVar("Carry")
Out = TypeVar("Out")

# elements of a leaf that is moved with others: to copy it costs less than to start a kernel
_SMALL = 4096
# of a matrix: a product reads one as it lies, and would need a larger one as a copy of its own
_SMALL_MATRIX = 2048
_WORDS = (jnp.float32, jnp.int32, jnp.uint32, jnp.bool_)


def scan(
    body: Callable[[Carry, Any], tuple[Carry, Any]], carry: Carry, xs: PyTree
) -> tuple[Carry, Any]:
    """`jax.lax.scan(body, carry, xs)`, which on an accelerator carries all small arrays as one.

    There one kernel writes the small leaves of a turn (up to 4,096 elements, matrices up to 2,048),
    with all elementwise arithmetic that leads to them, as 32-bit words of one vector; so with what
    `body` gives beside the carry. A leaf that `body` hands on as it is stays outside the loop. The
    result has the same bits, and `body` is traced once more. SAC's step on Pendulum, compiled for
    an H100, is 69 kernels in place of 109.

    Args:
      body: (carry, x) -> (carry, y).
      carry: a pytree of arrays, to whose shapes and dtypes `body` keeps.
      xs: a pytree of arrays [T, ...], one entry for each turn.

    Returns:
      The last carry, and all y with a leading axis T.

    Raises:
      TypeError: as `jax.lax.scan` for a body that changes a type of the carry; on an accelerator
        also where a derivative is taken through the loop.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.scan(body, carry, xs)
    before, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, carry))
    moved, kept, y = _traced(body, carry, xs)
    if not kept:  # whose error names the leaf
        return jax.lax.scan(body, carry, xs)
    inside, beside = Packing([before[i] for i in moved]), Packing(jax.tree.leaves(y))

    def whole(packed: tuple) -> Carry:
        leaves = list(before)
        for i, leaf in zip(moved, inside.unpack(packed), strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(structure, leaves)

    def turn(packed: tuple, x: PyTree) -> tuple[tuple, tuple]:
        after, y = body(whole(packed), x)
        leaves = jax.tree.leaves(after)
        return inside.pack([leaves[i] for i in moved]), beside.pack(jax.tree.leaves(y))

    packed, ys = jax.lax.scan(turn, inside.pack([before[i] for i in moved]), xs)
    return whole(packed), jax.tree.unflatten(jax.tree.structure(y), beside.unpack(ys))


def cond(
    predicate: jax.Array, yes: Callable[..., Out], no: Callable[..., Out], *operands: PyTree
) -> Out:
    """`jax.lax.cond` for branches of a few kernels: an accelerator runs both and selects.

    The arithmetic of both is cheaper there than the wait of the host for `predicate`.

    Args:
      predicate: [] bool.
      yes, no: functions of `operands` to pytrees of equal shapes and dtypes.
      operands: of both.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.cond(predicate, yes, no, *operands)
    return jax.tree.map(lambda a, b: jnp.where(predicate, a, b), yes(*operands), no(*operands))


class Packing:
    """The arrays of a list as fewer ones: the small ones lie in one vector of 32-bit words."""

    def __init__(self, like: list[Any]):
        """`like` gives the shapes and dtypes: arrays or ShapeDtypeStructs."""
        self.like = [(leaf.shape, leaf.dtype) for leaf in like]
        self.small = [i for i, leaf in enumerate(like) if _is_small(leaf)]

    def pack(self, leaves: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        """(words [W] int32, the other arrays)."""
        words = [_to_words(leaves[i]).reshape(-1) for i in self.small]
        others = [leaf for i, leaf in enumerate(leaves) if i not in self.small]
        return jnp.concatenate([*words, jnp.zeros(0, jnp.int32)]), others

    def unpack(self, packed: tuple[jax.Array, list[jax.Array]]) -> list[jax.Array]:
        """What `pack` was given; leading axes of `packed` stay."""
        words, others = packed[0], iter(packed[1])
        leaves, end = [], 0
        for i, (shape, dtype) in enumerate(self.like):
            if i not in self.small:
                leaves.append(next(others))
                continue
            start, end = end, end + math.prod(shape)
            part = words[..., start:end].reshape(*words.shape[:-1], *shape)
            leaves.append(_from_words(part, dtype))
        return leaves


def _traced(body: Callable, carry: PyTree, xs: PyTree) -> tuple[list[int], bool, PyTree]:
    """The leaves of the carry that the body makes anew, whether they keep their types, and the
    shapes of what it gives beside."""
    moved: list[int] = []

    def look(carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        after, y = body(carry, x)
        pairs = zip(jax.tree.leaves(carry), jax.tree.leaves(after), strict=False)
        moved.extend(i for i, (old, new) in enumerate(pairs) if new is not old)
        return after, y

    shape_of_turn = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    after, y = jax.eval_shape(look, carry, shape_of_turn)
    before = jax.eval_shape(lambda tree: tree, carry)
    types = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (before, after)]
    return moved, types[0] == types[1], y


def _is_small(leaf: Any) -> bool:
    if leaf.dtype not in _WORDS:
        return False
    return leaf.size <= (_SMALL if leaf.ndim < 2 else _SMALL_MATRIX)


def _to_words(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.int32)
    if leaf.dtype == jnp.float32:
        leaf = _undifferentiated(leaf)
    # integers, since arithmetic may give a NaN other bits
    return jax.lax.bitcast_convert_type(leaf, jnp.int32)


@jax.custom_jvp
def _undifferentiated(x: jax.Array) -> jax.Array:
    return x


@_undifferentiated.defjvp
def _refuse(primals: tuple, tangents: tuple) -> tuple:
    # a derivative through the words would be zero without a sound
    raise TypeError("a loop of loops.scan has no derivative; take jax.lax.scan")


def _from_words(words: jax.Array, dtype: Any) -> jax.Array:
    if dtype == jnp.bool_:
        return words.astype(dtype)
    return jax.lax.bitcast_convert_type(words, dtype)
