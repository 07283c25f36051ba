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

Rows = dict[str, jax.Array]  # dtype name -> [*lead, width]; bool is kept as uint8


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one row is packed; static and hashable.

    Leaves of one dtype lie side by side, in the order of the tree; bool shares the matrix of uint8.
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
    def widths(self) -> dict[str, int]:
        """Columns of each matrix."""
        widths: dict[str, int] = {}
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            name = _stored(dtype).name
            widths[name] = widths.get(name, 0) + math.prod(shape)
        return widths

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
            if (leaf.shape, leaf.dtype) != ((*lead, *shape), dtype):
                raise InputError(
                    f"tree{name} is {leaf.dtype}{list(leaf.shape)}: "
                    f"expected {dtype}{[*lead, *shape]}, as in the example"
                )
            flat = leaf.reshape(*lead, math.prod(shape)).astype(_stored(dtype))
            parts.setdefault(flat.dtype.name, []).append(flat)
        return {name: jnp.concatenate(leaves, axis=-1) for name, leaves in parts.items()}

    def unpack(self, rows: Rows) -> PyTree:
        """Matrices [*lead, width] to leaves [*lead, *shape]: the inverse of `pack`."""
        start = dict.fromkeys(rows, 0)
        leaves: list[Any] = []
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            name = _stored(dtype).name
            end = start[name] + math.prod(shape)
            flat = rows[name][..., start[name] : end]
            leaves.append(flat.reshape(*flat.shape[:-1], *shape).astype(dtype))
            start[name] = end
        return jax.tree.unflatten(self.structure, leaves)


def _stored(dtype: np.dtype) -> np.dtype:
    # bool is a byte in any case; beside uint8 observations it costs no gather of its own
    return np.dtype(np.uint8) if dtype == np.bool_ else dtype


@custom_vmap
def write_slice(rows: jax.Array, batch: jax.Array, start: jax.Array) -> jax.Array:
    """`rows` [*lead, capacity, width] with `batch` [*lead, num_envs, width] from row `start` on."""
    return jax.lax.dynamic_update_slice(rows, batch, (0,) * (rows.ndim - 2) + (start, 0))


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
