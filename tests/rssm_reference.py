"""The world model's recurrence written plainly: one step after another, nothing hoisted or cut.

Gradients are JAX's own, through the scan. Everything is computed in the dtype of the parameters.
"""

import jax
import jax.numpy as jnp


def dense(params, x):
    return jnp.matmul(x, params["kernel"]) + jnp.broadcast_to(
        params["bias"], (*x.shape[:-1], params["bias"].shape[0])
    )


def layer(params, x):
    x = dense(params, x)
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-4)
    x = x * jnp.broadcast_to(params["norm_scale"], x.shape)
    return x / (1 + jnp.exp(-x))


def block_matrix(kernel):
    """The dense matrix [in, out] of a block kernel [G, in/G, out/G]."""
    blocks, rows, columns = kernel.shape
    matrix = jnp.zeros((blocks * rows, blocks * columns), kernel.dtype)
    for g in range(blocks):
        matrix = matrix.at[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns].set(
            kernel[g]
        )
    return matrix


def core(params, deter, stoch, action):
    """The next deter [N, D]: each block of the hidden layer reads its piece of deter and all x."""
    params = params["core"]
    blocks = params["hid"]["kernel"].shape[0]
    action = action / jax.lax.stop_gradient(jnp.maximum(1, jnp.abs(action)))
    x = [
        layer(params["x0"], deter),
        layer(params["x1"], stoch.reshape(len(stoch), -1)),
        layer(params["x2"], action),
    ]
    pieces = jnp.split(deter, blocks, -1)
    inputs = jnp.concatenate([y for piece in pieces for y in (piece, *x)], -1)
    hidden = {**params["hid"], "kernel": block_matrix(params["hid"]["kernel"])}
    gates = {**params["gates"], "kernel": block_matrix(params["gates"]["kernel"])}
    gates = dense(gates, layer(hidden, inputs))
    after = []
    for piece, gate in zip(pieces, jnp.split(gates, blocks, -1), strict=True):
        reset, candidate, update = jnp.split(gate, 3, -1)
        candidate = jnp.tanh(candidate / (1 + jnp.exp(-reset)))
        update = 1 / (1 + jnp.exp(1 - update))
        after.append(update * candidate + (1 - update) * piece)
    return jnp.concatenate(after, -1)


def sample(raw, noise, share, gaussian):
    if gaussian:
        mean, spread = jnp.split(raw, 2, -1)
        return mean + (jnp.log1p(jnp.exp(spread)) + 0.1) * noise
    prob = jnp.exp(raw - jnp.max(raw, -1, keepdims=True))
    prob = (1 - share) * prob / jnp.sum(prob, -1, keepdims=True) + share / raw.shape[-1]
    picked = jnp.argmax(jnp.log(prob) + noise, -1)
    one_hot = jax.nn.one_hot(picked, raw.shape[-1], dtype=prob.dtype)
    return one_hot + (prob - jax.lax.stop_gradient(prob))


def prior(params, deter, stoch):
    params = params["prior"]
    x = dense(params["out"], layer(params["1"], layer(params["0"], deter)))
    return x.reshape(len(deter), stoch, -1)


def observe(params, tokens, actions, is_first, noise, start, share=0.01, gaussian=False):
    """(deter [B, T, D], stoch [B, T, S, C], raw [B, T, S, K]) as of `rssm.observe`."""

    def turn(state, x):
        deter, stoch = state
        tokens, action, is_first, noise = x
        deter = jnp.where(is_first[:, None], 0, deter)
        stoch = jnp.where(is_first[:, None, None], 0, stoch)
        deter = core(params, deter, stoch, jnp.where(is_first[:, None], 0, action))
        x = layer(params["post"]["0"], jnp.concatenate([deter, tokens], -1))
        raw = dense(params["post"]["out"], x).reshape(*noise.shape[:2], -1)
        stoch = sample(raw, noise, share, gaussian)
        return (deter, stoch), (deter, stoch, raw)

    xs = [jnp.swapaxes(x, 0, 1) for x in (tokens, actions, is_first, noise)]
    return tuple(jnp.swapaxes(x, 0, 1) for x in jax.lax.scan(turn, tuple(start), tuple(xs))[1])
