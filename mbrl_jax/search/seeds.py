"""Searches under `vmap`: seeds become lanes of one search.

A batched while loop has a predicate for each seed, and JAX then selects between whole buffers at
every level. So the search has its own batching rule: it puts the seeds' roots beside each other and
maps only the recurrent function over seeds, where each has parameters of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mbrl_jax.search.base import RecurrentFn

Model = Callable[[jax.Array, jax.Array, Any], tuple[Any, Any]]
"""(number of the call, action [L], embedding [L, ...]) -> (RecurrentFnOutput, embedding)."""
Search = Callable[[Model, Any], Any]
"""(model, lanes [B, ...]) -> arrays [B, ...], each root by itself."""


def over_seeds(search: Search, recurrent_fn: RecurrentFn) -> Callable[[Any, jax.Array, Any], Any]:
    """(params, key, lanes) -> what `search` gives; under vmap one search of all lanes.

    `vmap` must reach what it maps through these arguments: a recurrent function that closes over a
    mapped array is not seen.
    """
    return _run(search, recurrent_fn, None, ())


def _run(
    search: Search, recurrent_fn: RecurrentFn, seeds: int | None, axes: Sequence[int | None]
) -> Callable[..., Any]:
    """`axes`, 0 or None, tells which leaves of the parameters have an axis of seeds in front."""

    @jax.custom_batching.custom_vmap
    def run(params: Any, key: jax.Array, lanes: Any) -> Any:
        def alone(n: jax.Array, action: jax.Array, embedding: Any) -> tuple[Any, Any]:
            return recurrent_fn(params, jax.random.fold_in(key, n), action, embedding)

        if seeds is None:
            return search(alone, lanes)
        batch = jax.tree.leaves(lanes)[0].shape[0] // seeds

        def model(n: jax.Array, action: jax.Array, embedding: Any) -> tuple[Any, Any]:
            keys = jax.vmap(lambda k: jax.random.fold_in(k, n))(key)
            action, embedding = jax.tree.map(split, (action, embedding))
            of_params = jax.tree.unflatten(jax.tree.structure(params), axes)
            mapped = jax.vmap(recurrent_fn, in_axes=(of_params, 0, 0, 0))
            return jax.tree.map(join, mapped(params, keys, action, embedding))

        def split(x: jax.Array) -> jax.Array:
            x = x.reshape(-1, seeds, batch, *x.shape[1:])
            return jnp.moveaxis(x, 1, 0).reshape(seeds, -1, *x.shape[3:])

        def join(x: jax.Array) -> jax.Array:
            x = x.reshape(seeds, -1, batch, *x.shape[2:])
            return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:])

        return search(model, lanes)

    @run.def_vmap
    def rule(size: int, batched: Any, params: Any, key: jax.Array, lanes: Any) -> Any:
        present = seeds or 1

        def merged(x: jax.Array, is_batched: bool, own: bool) -> jax.Array:
            """[size, seeds, ...] in one axis; `own`: each of the present seeds has its own."""
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            if not own:
                x = jnp.broadcast_to(x[:, None], (size, present, *x.shape[1:]))
            return x.reshape(size * present, *x.shape[2:])

        params_batched, key_batched, lanes_batched = batched
        leaves, structure = jax.tree.flatten(params)
        own = [None] * len(leaves) if seeds is None else axes
        flags = zip(leaves, jax.tree.leaves(params_batched), own, strict=True)
        moved = [
            (merged(x, b, o is not None), 0) if b or o is not None else (x, None)
            for x, b, o in flags
        ]
        params = jax.tree.unflatten(structure, [x for x, _ in moved])
        wider = [axis for _, axis in moved]
        key = merged(key, key_batched, seeds is not None)
        lanes = jax.tree.map(
            lambda x, b: merged_lanes(x if b else jnp.broadcast_to(x, (size, *x.shape))),
            lanes, lanes_batched,
        )  # fmt: skip
        found = _run(search, recurrent_fn, size * present, wider)(params, key, lanes)
        found = jax.tree.map(lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), found)
        return found, jax.tree.map(lambda _: True, found)

    def merged_lanes(x: jax.Array) -> jax.Array:
        return x.reshape(math.prod(x.shape[:2]), *x.shape[2:])

    return run
