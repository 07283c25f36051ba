"""The recurrent functions of bench_search.py, of one set of weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax import search

STATE, HIDDEN = 64, 128


def weights(num_actions: int) -> dict[str, jax.Array]:
    """Of all three recurrent functions."""
    shapes = {
        "first": (STATE + num_actions, STATE), "second": (STATE, STATE),
        "policy": (STATE, num_actions), "value": (STATE,), "reward": (STATE,),
        "wide": (STATE + num_actions, HIDDEN), "blocks": (4, 2, HIDDEN, HIDDEN),
        "narrow": (HIDDEN, STATE),
    }  # fmt: skip
    draw = np.random.default_rng(0).standard_normal
    return {
        name: jnp.float32(draw(shape) / math.sqrt(shape[-2] if len(shape) > 1 else shape[0]))
        for name, shape in shapes.items()
    }


def heads(params: dict[str, jax.Array], state: jax.Array) -> tuple[Any, jax.Array]:
    out = search.RecurrentFnOutput(
        reward=state @ params["reward"], discount=jnp.full(state.shape[:1], 0.97),
        prior_logits=3.0 * state @ params["policy"], value=state @ params["value"],
    )  # fmt: skip
    return out, state


def trivial(params: Any, key: jax.Array, action: jax.Array, state: jax.Array) -> Any:
    num = jnp.arange(params["policy"].shape[1])
    state = 0.99 * jnp.roll(state, 1, axis=-1) + 0.1 * (0.37 * action[:, None] % 1.0)
    logits = 2.0 * state[:, :1] * jnp.sin(1.7 * num)[None] + jnp.cos(1.0 * num)[None]
    out = search.RecurrentFnOutput(
        reward=state[:, 0], discount=jnp.full(action.shape, 0.97), prior_logits=logits,
        value=state[:, 1],
    )  # fmt: skip
    return out, state


def with_action(params: Any, action: jax.Array, state: jax.Array) -> jax.Array:
    return jnp.concatenate([state, jax.nn.one_hot(action, params["policy"].shape[1])], axis=-1)


def mlp(params: Any, key: jax.Array, action: jax.Array, state: jax.Array) -> Any:
    hidden = jax.nn.relu(with_action(params, action, state) @ params["first"])
    return heads(params, jnp.tanh(hidden @ params["second"]))


def residual(params: Any, key: jax.Array, action: jax.Array, state: jax.Array) -> Any:
    hidden = with_action(params, action, state) @ params["wide"]
    for first, second in params["blocks"]:
        hidden = hidden + jax.nn.relu(jax.nn.relu(hidden) @ first) @ second
    return heads(params, jnp.tanh(hidden @ params["narrow"]))


FUNCTIONS: dict[str, Callable[..., Any]] = {"trivial": trivial, "mlp": mlp, "residual": residual}
