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
import jax.extend
import jax.numpy as jnp

from mbrl_jax.search.base import Lanes, Params, RecurrentFn

Model = Callable[[jax.Array, jax.Array, Any], tuple[Any, Any]]
"""(number of the call, action [L], embedding [L, ...]) -> (RecurrentFnOutput, embedding)."""
Search = Callable[[Model, Lanes], Any]
"""(model, lanes [B, ...]) -> arrays [B, ...], each root by itself."""


def over_seeds(
    search: Search, recurrent_fn: RecurrentFn, params: Params, key: jax.Array, lanes: Lanes
) -> Any:
    """What `search` gives; under `vmap`, one search of the lanes of all seeds.

    Args:
      search: the search of one seed; it may close over nothing that is traced.
      recurrent_fn: as in `muzero_policy`; the traced values that it closes over are found and
        mapped as `params` are.
      params: handed to `recurrent_fn`.
      key: folded with the number of each call of the model.
      lanes: what the roots bring, [B, ...].
    """
    action = jnp.zeros(lanes.prior_logits.shape[0], jnp.int32)
    function, closed = hoisted(recurrent_fn, params, key, action, lanes.embedding)

    def step(everything: Any, *args: Any) -> Any:
        return function(everything[1], everything[0], *args)

    return _run(search, step, None, ())((params, closed), key, lanes)


def hoisted(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], list[Any]]:
    """The function with the traced values that it closes over as an argument, and these values.

    Args:
      function: of arrays.
      args: arrays, or their shapes, to try it with; it may later be called with others.

    Returns:
      (values, *args) -> what `function` gives where it reads `values` in place of those it closes
      over; and the values.
    """
    shapes = jax.eval_shape(lambda *x: x, *args)
    consts = jax.make_jaxpr(function)(*shapes).consts
    found = [x for x in consts if isinstance(x, jax.core.Tracer)]
    if not found:
        return lambda _, *args: function(*args), []

    def call(values: list[Any], *args: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        given = {id(old): new for old, new in zip(found, values, strict=True)}
        consts = [given.get(id(x), x) for x in closed.consts]
        flat = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(closed.jaxpr, consts))
        return jax.tree.unflatten(jax.tree.structure(shape), flat(*jax.tree.leaves(args)))

    return call, found


def _run(
    search: Search, recurrent_fn: RecurrentFn, seeds: int | None, axes: Sequence[int | None]
) -> Callable[..., Any]:
    """(params, key, lanes) -> what `search` gives, with a batching rule.

    Args:
      search: as in `over_seeds`.
      recurrent_fn: closes over nothing that is traced.
      seeds: how many of them the lanes hold, one after another; None before any `vmap`, when the
        key has no axis of seeds.
      axes: 0 or None for each leaf of the parameters: whether an axis of seeds is in front.
    """

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
