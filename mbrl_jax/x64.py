"""Programs of 32 bits, also where JAX_ENABLE_X64=1 makes 64 the default of everything."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])
_NARROW = {"float64": "float32", "int64": "int32", "uint64": "uint32", "complex128": "complex64"}


def in_32_bits(function: F) -> F:
    """`function` as it computes without JAX_ENABLE_X64, whatever the flag says.

    Arrays of 64 bits among its arguments are cast to 32, and what it makes has 32. It may be
    jitted, vmapped, differentiated and scanned as ever: the flag is read where a function is
    traced, and only counters of loops, on which no result depends, have 64 bits in its program.

    Args:
      function: of pytrees; its arrays may be anything.
    """

    @functools.wraps(function)
    def narrow(*args: Any, **kwargs: Any) -> Any:
        if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            return function(*args, **kwargs)
        args, kwargs = jax.tree.map(_cast, (args, kwargs))
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return narrow  # type: ignore[return-value]


def _cast(leaf: Any) -> Any:
    dtype = _NARROW.get(str(getattr(leaf, "dtype", "")))
    return leaf if dtype is None else leaf.astype(dtype)
