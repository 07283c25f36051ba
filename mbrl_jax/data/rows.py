"""Rows of a buffer: a pytree flattened into one matrix for each dtype.

Reading or writing many rows is then one gather or one slice update for each dtype, however many
leaves the tree has.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from mbrl_jax.types import InputError, PyTree

# dtype name -> [*lead, width]; bool is kept as uint8, small floats as the bits of theirs
Rows = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one row is packed; static and hashable.

    Leaves of one dtype lie side by side, in the order of the tree; bool shares the matrix of uint8,
    and floats of 16 and 8 bits those of uint16 and uint8.
    """

    structure: jax.tree_util.PyTreeDef
    names: tuple[str, ...]  # path of each leaf, for messages
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]

    @classmethod
    def of(cls, example: PyTree) -> Layout:
        """The layout of a row like `example`: arrays or ShapeDtypeStructs, without a leading axis.

        Raises:
          InputError: no leaf at all, or a leaf of size zero.
        """
        example = jax.eval_shape(lambda tree: tree, example)
        paths, structure = jax.tree_util.tree_flatten_with_path(example)
        if not paths:
            raise InputError(f"example = {example!r}: expected a pytree with at least one array")
        names = tuple(jax.tree_util.keystr(path) for path, _ in paths)
        shapes = tuple(leaf.shape for _, leaf in paths)
        for name, shape in zip(names, shapes, strict=True):
            if 0 in shape:
                raise InputError(
                    f"example{name} has shape {shape}: expected at least one element; leave it out"
                )
        return cls(structure, names, shapes, tuple(leaf.dtype for _, leaf in paths))

    @property
    def places(self) -> tuple[tuple[str, slice], ...]:
        """The matrix and the columns of each leaf."""
        places: list[tuple[str, slice]] = []
        ends: dict[str, int] = {}
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            name = _stored(dtype).name
            start = ends.get(name, 0)
            ends[name] = start + math.prod(shape)
            places.append((name, slice(start, ends[name])))
        return tuple(places)

    @property
    def widths(self) -> dict[str, int]:
        """Columns of each matrix."""
        # the last leaf of a matrix ends it
        return {name: columns.stop for name, columns in self.places}

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: the sum over the leaves of size times item size."""
        return sum(width * np.dtype(name).itemsize for name, width in self.widths.items())

    def zeros(self, *lead: int) -> Rows:
        """Rows of zeros; lead * row_bytes bytes."""
        return {name: jnp.zeros((*lead, width), name) for name, width in self.widths.items()}

    def pack(self, tree: PyTree) -> Rows:
        """Leaves [*lead, *shape] to matrices [*lead, width].

        Raises:
          InputError: another structure, dtype or shape than the layout's, or unequal `lead`.
        """
        leaves, structure = jax.tree.flatten(tree)
        if structure != self.structure:
            raise InputError(f"tree is {structure}: expected {self.structure}, as in the example")
        lead = np.shape(leaves[0])[: np.ndim(leaves[0]) - len(self.shapes[0])]
        parts: dict[str, list[jax.Array]] = {}
        for name, leaf, shape, dtype in zip(
            self.names, map(jnp.asarray, leaves), self.shapes, self.dtypes, strict=True
        ):
            leaf = _checked(f"tree{name}", leaf, (*lead, *shape), dtype)
            flat = _to_stored(leaf).reshape(*lead, math.prod(shape))
            parts.setdefault(flat.dtype.name, []).append(flat)
        return {name: jnp.concatenate(leaves, axis=-1) for name, leaves in parts.items()}

    def unpack(self, rows: Rows) -> PyTree:
        """Matrices [*lead, width] to leaves [*lead, *shape]: the inverse of `pack`."""
        leaves: list[Any] = []
        for (name, columns), shape, dtype in zip(
            self.places, self.shapes, self.dtypes, strict=True
        ):
            flat = rows[name][..., columns]
            leaves.append(_from_stored(flat.reshape(*flat.shape[:-1], *shape), dtype))
        return jax.tree.unflatten(self.structure, leaves)

    def set(self, rows: Rows, index: jax.Array, fields: PyTree) -> Rows:
        """Matrices [capacity, width] with some leaves of the rows `index` anew: `Ring.set`."""
        given = jax.tree_util.tree_leaves_with_path(fields)
        if not given:
            raise InputError(f"fields = {fields!r}: expected at least one leaf of the example")
        like = jax.tree.unflatten(self.structure, range(len(self.names)))
        known = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
        # checked before anything is written
        values: dict[int, jax.Array] = {}
        for path, value in given:
            which = known.get(_path(path))
            if which is None:
                names = ", ".join(".".join(leaf) for leaf in known)
                raise InputError(
                    f"fields{jax.tree_util.keystr(path)} is no leaf of the example: "
                    f"expected some of {names}"
                )
            values[which] = _checked(
                f"fields{jax.tree_util.keystr(path)}",
                jnp.asarray(value),
                (*index.shape, *self.shapes[which]),
                self.dtypes[which],
            )
        rows = dict(rows)
        target = _last_of_each(index.reshape(-1), next(iter(rows.values())).shape[0])
        for which, value in values.items():
            name, columns = self.places[which]
            flat = _to_stored(value).reshape(target.size, -1)
            rows[name] = rows[name].at[target, columns].set(flat, mode="drop", unique_indices=True)
        return rows


def _stored(dtype: np.dtype) -> np.dtype:
    if dtype == np.bool_:
        # a byte in any case; beside uint8 observations it costs no gather of its own
        return np.dtype(np.uint8)
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        # bits, because XLA on CPUs turns the whole matrix into float32 and back for every write
        return np.dtype(f"uint{8 * dtype.itemsize}")
    return dtype


def _to_stored(leaf: jax.Array) -> jax.Array:
    stored = _stored(leaf.dtype)
    if leaf.dtype == np.bool_:
        return leaf.astype(stored)
    return leaf if leaf.dtype == stored else jax.lax.bitcast_convert_type(leaf, stored)


def _from_stored(leaf: jax.Array, dtype: np.dtype) -> jax.Array:
    if dtype == np.bool_:
        return leaf.astype(dtype)
    return leaf if leaf.dtype == dtype else jax.lax.bitcast_convert_type(leaf, dtype)


def _checked(name: str, leaf: jax.Array, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    if (leaf.shape, leaf.dtype) != (shape, dtype):
        raise InputError(
            f"{name} is {leaf.dtype}{list(leaf.shape)}: expected {dtype}{list(shape)}, "
            "as in the example"
        )
    return leaf


def _path(path: tuple[Any, ...]) -> tuple[str, ...]:
    # a dict's key and a NamedTuple's field of one name are one
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _last_of_each(index: jax.Array, capacity: int) -> jax.Array:
    """`index` [K] int32 with the last of equal rows kept and the others moved past the end.

    No row is then named twice: the order of a scatter is not defined, and a GPU may take another
    one in every run.
    """
    place = jnp.arange(index.size, dtype=jnp.int32)
    row, order = jax.lax.sort((index, place), num_keys=1, is_stable=True)
    is_last = jnp.append(row[1:] != row[:-1], True)
    return place.at[order].set(
        jnp.where(is_last, row, capacity + order), mode="promise_in_bounds", unique_indices=True
    )


@custom_vmap
def write_slice(rows: jax.Array, batch: jax.Array, start: jax.Array) -> jax.Array:
    """`rows` [*lead, capacity, width] with `batch` [*lead, num_envs, width] from row `start` on."""
    zero = jnp.zeros_like(start)  # of its dtype, as 64-bit JAX demands
    return jax.lax.dynamic_update_slice(rows, batch, (zero,) * (rows.ndim - 2) + (start, zero))


@write_slice.def_vmap
def _write_slices(
    axis_size: int, batched: list[bool], rows: jax.Array, batch: jax.Array, start: jax.Array
) -> tuple[jax.Array, bool]:
    # JAX's own rule makes a scatter even of an unbatched start
    if batched[2]:
        axes = tuple(0 if is_batched else None for is_batched in batched)
        return jax.vmap(write_slice.fun, axes)(rows, batch, start), True
    rows, batch = (
        x if is_batched else jnp.broadcast_to(x[None], (axis_size, *x.shape))
        for x, is_batched in zip((rows, batch), batched[:2], strict=True)
    )
    return write_slice(rows, batch, start), True
