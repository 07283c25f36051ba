"""The posterior pass over sequences, laid out so that its gradient is cheap.

A plain scan keeps every intermediate value of every step for its gradient, one kernel each on an
accelerator, and adds to the gradient of each weight at each step. Here the forward pass keeps only
the states. The backward pass computes all intermediate values again, in one pass over the T * B
rows of all steps at once, since all states are known; goes back through time with cotangents alone;
and forms the gradient of each weight after that, in one product over all rows.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax.models import rssm_cell as cell
from mbrl_jax.models import rssm_latents as latents
from mbrl_jax.models import rssm_layers as layers
from mbrl_jax.models.rssm_cell import How, Normed
from mbrl_jax.types import PyTree, Scalar


class Weights(NamedTuple):
    """What a step multiplies with."""

    core: cell.Weights
    post: jax.Array  # [D, h] of the posterior's layer, its inputs from `deter`
    post_scale: jax.Array  # [h]
    out: jax.Array  # [h, S K]
    out_bias: jax.Array  # [S K]


class Given(NamedTuple):
    """What each step is given and no gradient is asked for."""

    keep: jax.Array  # [T, B] float, 0 where the state before is set to zero, else 1
    noise: jax.Array  # [T, B, S, C]
    share: Scalar


class States(NamedTuple):
    """What the pass gives."""

    deter: jax.Array  # [T, B, D]
    stoch: jax.Array  # [T, B, S, C]
    logits: jax.Array  # [T, B, S, K]


def hoisted(
    how: How, params: PyTree, tokens: jax.Array, actions: jax.Array, keep: jax.Array
) -> tuple[Weights, jax.Array, jax.Array]:
    """The weights of a step, and all that a step takes of its action and its tokens.

    Args:
      how: static.
      params: of the whole model, of which `core` and `post` are used.
      tokens: [*lead, E].
      actions: [*lead, A] float32 vectors, of any size.
      keep: [*lead] float, 0 where the action is set to zero, else 1.

    Returns:
      (weights, drive [*lead, D], tokens [*lead, h]) as `states` takes them.
    """
    core, bias, of_action = cell.cut(params["core"], with_action=False)
    post = params["post"]
    own, of_tokens = jnp.split(post["0"]["kernel"], [core.scale.shape[0]])
    weights = Weights(
        core, own, post["0"]["norm_scale"], post["out"]["kernel"], post["out"]["bias"]
    )
    # what the layer makes of a masked action is not zero
    actions = cell.limited(actions * keep[..., None].astype(actions.dtype))
    drive = layers.layer(params["core"]["x2"], actions, how.dtype)
    drive = layers.dense({"kernel": of_action, "bias": bias}, drive, how.dtype)
    tokens = layers.dense({"kernel": of_tokens, "bias": post["0"]["bias"]}, tokens, how.dtype)
    return weights, drive, tokens


class Trace(NamedTuple):
    """All that a step computes, for R rows."""

    core: cell.Trace
    posterior: Normed  # [R, h]
    logits: jax.Array  # [R, S, K]


def trace(
    how: How,
    w: Weights,
    state: cell.Packed,
    drive: jax.Array,
    tokens: jax.Array,
    stoch: int,
) -> Trace:
    """A step of R rows but for the sample.

    Arguments as of `cell.core`, with `w` from `prepared`, tokens [R, h], and S = `stoch`.
    """
    made = cell.core(how, w.core, state, drive)
    values = cell.dot(how, cell.from_blocks(how, made.deter), w.post) + tokens
    posterior = cell.normed(how, values, w.post_scale[None])
    logits = cell.dot(how, posterior.y, w.out, full=True) + w.out_bias[None]
    return Trace(made, posterior, logits.reshape(logits.shape[0], stoch, -1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def states(
    how: How,
    weights: Weights,
    drive: jax.Array,
    tokens: jax.Array,
    start: tuple[jax.Array, jax.Array],
    given: Given,
) -> States:
    """The states of T steps of B sequences.

    Args:
      how: static.
      weights: from `hoisted`.
      drive: [T, B, D], likewise.
      tokens: [T, B, h], likewise.
      start: the state before the first step, [B, D] and [B, S, C].
      given: keep, noise and the share of the uniform distribution.
    """
    w, blocks = prepared(how, weights), weights.core.gates.shape[0]
    num, batch, stoch, classes = given.noise.shape
    width = drive.shape[-1]

    def turn(state: cell.Packed, x: tuple) -> tuple[cell.Packed, tuple[jax.Array, ...]]:
        drive, tokens, keep, noise = x
        made = trace(how, w, state, drive, tokens, stoch)
        drawn = latents.sample(made.logits, noise, given.share, how.gaussian)
        after = cell.packed(how, made.core.deter, drawn)
        logits = made.logits.reshape(batch, -1)
        if how.rows_first:  # one array in place of three: one kernel writes it
            out: Any = (jnp.concatenate([after.astype(how.wide), logits], -1),)
        else:
            out = (cell.from_blocks(how, after[0]), after[1], logits)
        return cell.masked(how, after, keep), out

    first = cell.packed(how, cell.to_blocks(how, start[0], blocks), start[1])
    first = cell.masked(how, first, given.keep[0])
    # a step masks the state for the next one, in the kernel that makes it
    keep_next = jnp.concatenate([given.keep[1:], jnp.ones_like(given.keep[:1])])
    _, made = jax.lax.scan(turn, first, (drive, tokens, keep_next, given.noise))
    if how.rows_first:
        made = tuple(jnp.split(made[0], [width, width + stoch * classes], -1))
    deter, drawn, logits = made
    drawn = drawn.astype(how.dtype).reshape(num, batch, stoch, classes)
    return States(deter.astype(how.dtype), drawn, logits.reshape(num, batch, stoch, -1))


Factors = tuple[jax.Array, jax.Array]  # of a layer's derivative, see `_back`


class Residual(NamedTuple):
    """What the way back through a step needs; R rows."""

    inner: Factors  # [R, L, h]
    hidden: Factors  # [R, D]
    gates: jax.Array  # [R, G, 3 D/G] derivatives of the next `deter` to the gates
    around: jax.Array  # [R, D] to the last one, around the gates
    posterior: Factors  # [R, h]
    latent: jax.Array  # [R, S, C] probabilities; of normal latents the noise times a slope
    keep: jax.Array  # [R]


class Cotangents(NamedTuple):
    """What the way back through a step leaves for the gradients of weights; R rows."""

    logits: jax.Array  # [R, S K]
    posterior: jax.Array  # [R, h] of the layer's output
    deter: jax.Array  # [R, D] of the next `deter`
    hidden: jax.Array  # [R, D] of the layer's output
    inner: jax.Array  # [R, L h] of the layers' outputs


def _forward(how, weights, drive, tokens, start, given):
    made = states(how, weights, drive, tokens, start, given)
    return made, (weights, drive, tokens, start, given, made.deter, made.stoch)


def _backward(how: How, kept: tuple, cotangent: States) -> tuple:
    weights, drive, tokens, start, given, deter, stoch = kept
    w, blocks = prepared(how, weights), weights.core.gates.shape[0]
    num, batch, variables, _ = stoch.shape

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(num * batch, *x.shape[2:])

    def timed(x: jax.Array) -> jax.Array:
        return x.reshape(num, batch, *x.shape[1:])

    before = rows(jnp.concatenate([start[0][None].astype(deter.dtype), deter[:-1]]))
    drawn = rows(jnp.concatenate([start[1][None].astype(stoch.dtype), stoch[:-1]]))
    keep = rows(given.keep).astype(how.dtype)[:, None]
    before, drawn = keep * before, keep[..., None] * drawn
    before_blocks = cell.to_blocks(how, before, blocks)
    state = cell.packed(how, before_blocks, drawn)
    made = trace(how, w, state, rows(drive), rows(tokens), variables)
    inner, hidden, posterior = made.core.inner, made.core.hidden, made.posterior
    scales = weights.core.scale_in[None], weights.core.scale[None], weights.post_scale[None]

    reset, raw, candidate, update = cell.gate(made.core.gates)
    through = update * (1.0 - candidate * candidate)
    at_update = (candidate - before_blocks) * update * (1.0 - update)
    slopes = jnp.concatenate(
        [through * raw * reset * (1.0 - reset), through * reset, at_update], -1
    )
    if how.gaussian:
        latent = rows(given.noise) * jax.nn.sigmoid(jnp.split(made.logits, 2, -1)[1])
    else:
        latent = jax.nn.softmax(made.logits)
    residual = Residual(
        inner=_factors(inner, scales[0]),
        hidden=_factors(hidden, scales[1]),
        gates=slopes if how.rows_first else jnp.swapaxes(slopes, 0, 1),
        around=cell.from_blocks(how, 1.0 - update),
        posterior=_factors(posterior, scales[2]),
        latent=latent,
        keep=rows(given.keep),
    )
    turn = functools.partial(_back_step, how, w, given.share)
    width = deter.shape[-1]
    zero = jnp.zeros((batch, width + drawn[0].size), how.wide)
    xs = (jax.tree.map(timed, residual), cotangent)
    through, left = jax.lax.scan(turn, zero, xs, reverse=True)
    first = (through[:, :width], through[:, width:].reshape(start[1].shape))

    # all that is left are products over all rows, one for each weight
    left = _unpack_left(how, jax.tree.map(rows, left), w)
    at_after = cell.to_blocks(how, left.deter, blocks)
    at_gates = slopes * jnp.concatenate([at_after] * 3, -1)
    at_inner = _back(residual.inner, left.inner.reshape(inner.y.shape))
    at_hidden = _back(residual.hidden, left.hidden)
    at_posterior = _back(residual.posterior, left.posterior)
    drawn = drawn.reshape(num * batch, -1)
    outer = functools.partial(cell.dot, how, contract=(0, 0))
    grads = Weights(
        cell.Weights(
            front=(outer(before, at_inner[:, 0]), outer(drawn, at_inner[:, 1])),
            bias_in=jnp.sum(at_inner, 0),
            scale_in=jnp.sum(inner.slope * inner.unit * left.inner.reshape(inner.y.shape), 0),
            mix=outer(inner.y.reshape(num * batch, -1), at_hidden),
            blocks=cell.block_outer(how, before_blocks, cell.to_blocks(how, at_hidden, blocks)),
            scale=jnp.sum(hidden.slope * hidden.unit * left.hidden, 0),
            gates=cell.block_outer(how, cell.to_blocks(how, hidden.y, blocks), at_gates),
            gates_bias=jnp.sum(cell.from_blocks(how, at_gates), 0),
        ),
        post=outer(cell.from_blocks(how, made.core.deter), at_posterior),
        post_scale=jnp.sum(posterior.slope * posterior.unit * left.posterior, 0),
        out=outer(posterior.y, left.logits, full=True),
        out_bias=jnp.sum(left.logits, 0),
    )
    grads, at_drive, at_tokens, first = jax.tree.map(
        lambda g, x: g.astype(x.dtype),
        (grads, timed(at_hidden), timed(at_posterior), first),
        (weights, drive, tokens, start),
    )
    return grads, at_drive, at_tokens, first, None


states.defvjp(_forward, _backward)


def _back_step(
    how: How, w: Weights, share: Scalar, carry: jax.Array, x: tuple
) -> tuple[jax.Array, Any]:
    """From the cotangents [R, D + Z] of a step's state to those of the state before it."""
    residual, cotangent = x
    rows, blocks = residual.keep.shape[0], w.core.gates.shape[0]
    back = functools.partial(cell.dot, how, contract=(1, 1))
    deter, stoch = jnp.split(carry, [cotangent.deter.shape[-1]], -1)
    deter, stoch = deter + cotangent.deter, stoch.reshape(cotangent.stoch.shape) + cotangent.stoch
    if how.gaussian:
        logits = jnp.concatenate([stoch, stoch * residual.latent], -1)
    else:
        mean = jnp.sum(residual.latent * stoch, -1, keepdims=True)
        logits = (1.0 - share) * residual.latent * (stoch - mean)
    logits = (logits + cotangent.logits).reshape(rows, -1)
    posterior = back(logits, w.out, full=True)
    at_posterior = _back(residual.posterior, posterior)
    deter = deter + back(at_posterior, w.post)
    gates = residual.gates * jnp.concatenate([deter.reshape(rows, blocks, -1)] * 3, -1)
    gates = gates if how.rows_first else jnp.swapaxes(gates, 0, 1)
    hidden = cell.from_blocks(how, cell.block_dot(how, gates, w.core.gates, (2, 2)))
    at_hidden = _back(residual.hidden, hidden)
    inner = back(at_hidden, w.core.mix)
    at_inner = _back(residual.inner, inner.reshape(rows, *w.core.scale_in.shape))
    through = cell.core_back(how, w.core, at_inner, at_hidden)
    around = jnp.pad(residual.around * deter, ((0, 0), (0, through.shape[1] - deter.shape[1])))
    left = Cotangents(logits, posterior, deter, hidden, inner)
    through = residual.keep[:, None] * (around + through)
    return through, jnp.concatenate(left, -1) if how.rows_first else left


def _unpack_left(how: How, left: Any, w: Weights) -> Cotangents:
    if not how.rows_first:
        return left
    widths = [w.out.shape[1], w.out.shape[0], w.post.shape[0], w.post.shape[0]]
    return Cotangents(*jnp.split(left, np.cumsum(widths).tolist(), -1))


def _factors(layer: Normed, scale: jax.Array) -> Factors:
    return layer.slope * scale * layer.root, layer.unit


def _back(factors: Factors, cotangent: jax.Array) -> jax.Array:
    """From the cotangent of SiLU(RMSNorm(x)) to that of x, over the last axis."""
    slope, unit = factors
    through = slope * cotangent
    return through - unit * jnp.mean(through * unit, -1, keepdims=True)


def prepared(how: How, weights: Weights) -> Weights:
    """The weights as a loop takes them, as `cell.prepared`."""
    post, out = weights.post.astype(how.dtype), weights.out.astype(how.dtype)
    return weights._replace(core=cell.prepared(how, weights.core), post=post, out=out)
