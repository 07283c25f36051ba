"""Sizes of the world model and its parameters.

Parameters are a dict of dicts: `params["core"]["hid"]["kernel"]`. Each array is one tensor of the
published code, since the optimiser clips by the norms of whole tensors; a forward pass cuts them as
it needs. Sizes and constants of Hafner et al. (2025), "Mastering diverse control tasks through
world models" (DreamerV3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.models.rssm_actions import ActionPart, action_width
from mbrl_jax.models.rssm_codec import DECODER_BLOCKS, Part, images_of, stages, vectors_of
from mbrl_jax.models.rssm_layers import init_kernel
from mbrl_jax.types import InputError, PyTree, unknown

NUM_BINS = 255  # logits of rewards and values


class Sizes(NamedTuple):
    """How large a world model is."""

    deter: int  # width of the recurrent state
    hidden: int  # of the layers around it
    units: int  # of encoder, decoder and heads
    stoch: int  # random variables of a latent
    classes: int  # of each of them
    depth: int  # channels of the convolutions are multiples of it
    blocks: int  # of the recurrent layers


def _of(units: int) -> Sizes:
    return Sizes(8 * units, units, units, 32, units // 16, units // 16, 8)


SIZES = {
    "nano": Sizes(128, 32, 32, 32, 4, 4, 8),
    "1m": _of(64),
    "12m": _of(256),
    "25m": _of(384),
    "50m": _of(512),
    "100m": _of(768),
    "200m": _of(1024),
    "400m": _of(1536),
}


def sizes_of(name: str) -> Sizes:
    """The entry of `SIZES`; InputError for an unknown one."""
    if name not in SIZES:
        raise unknown("size", name, SIZES)
    return SIZES[name]


def init(
    key: jax.Array,
    sizes: Sizes,
    obs: tuple[Part, ...],
    actions: tuple[ActionPart, ...],
    gaussian: bool = False,
    decoder: bool = True,
) -> PyTree:
    """Parameters drawn at random: `enc`, `core`, `post`, `prior`, `dec`, `reward`, `cont`, `actor`
    and `critic`, all float32.

    Biases are 0 and scales of norms 1; the outputs of reward and critic are 0, those of the actor
    small. A slow critic starts as a copy of `critic`.

    Args:
      key: consumed.
      sizes: of the model.
      obs: the parts of an observation.
      actions: the parts of an action.
      gaussian: latents are normal, not categorical.
      decoder: whether there is one.

    Raises:
      InputError: sizes that the blocks do not divide.
    """
    _check(sizes, obs, decoder)
    tensors = list(_tensors(sizes, obs, actions, gaussian, decoder))
    keys = jax.random.split(key, len(tensors))
    params: dict = {}
    for i, (path, shape, scale) in enumerate(tensors):
        *nodes, leaf = path.split(".")
        place = params
        for node in nodes:
            place = place.setdefault(node, {})
        if leaf == "kernel":
            place[leaf] = init_kernel(keys[i], shape, scale)
        else:
            place[leaf] = jnp.full(shape, leaf == "norm_scale", jnp.float32)
    return params


def _check(sizes: Sizes, obs: tuple[Part, ...], decoder: bool) -> None:
    if sizes.deter % sizes.blocks:
        raise InputError(f"deter = {sizes.deter}: expected a multiple of blocks = {sizes.blocks}")
    if decoder and images_of(obs) and (sizes.deter % DECODER_BLOCKS or sizes.depth % 2):
        raise InputError(
            f"deter = {sizes.deter}, depth = {sizes.depth}: a decoder of images needs multiples of "
            f"{DECODER_BLOCKS} and of 2"
        )


Tensor = tuple[str, tuple[int, ...], float]  # name, shape, scale of a kernel's initial values


def _tensors(
    sizes: Sizes,
    obs: tuple[Part, ...],
    actions: tuple[ActionPart, ...],
    gaussian: bool,
    decoder: bool,
) -> Iterator[Tensor]:
    """All tensors of a model."""
    deter, hidden, units, blocks = sizes.deter, sizes.hidden, sizes.units, sizes.blocks
    latent = sizes.stoch * sizes.classes
    feature, raw = deter + latent, latent * (2 if gaussian else 1)
    yield from _encoder(sizes, obs)
    yield from _layer("core.x0", deter, hidden)
    yield from _layer("core.x1", latent, hidden)
    yield from _layer("core.x2", action_width(actions), hidden)
    yield from _block("core.hid", blocks, deter + 3 * hidden * blocks, deter)
    yield "core.hid.norm_scale", (deter,), 1.0
    yield from _block("core.gates", blocks, deter, 3 * deter)
    yield from _layer("post.0", deter + _num_tokens(sizes, obs), hidden)
    yield from _dense("post.out", hidden, raw)
    yield from _layers("prior", deter, hidden, 2)
    yield from _dense("prior.out", hidden, raw)
    if decoder:
        yield from _decoder(sizes, obs)
    yield from _layers("reward", feature, units, 1)
    yield from _dense("reward.out", units, NUM_BINS, 0.0)
    yield from _layers("cont", feature, units, 1)
    yield from _dense("cont.out", units, 1)
    yield from _layers("actor", feature, units, 3)
    for part in actions:
        for kind in ("logits",) if part.discrete else ("mean", "std"):
            yield from _dense(f"actor.out.{part.name}.{kind}", units, part.size, 0.01)
    yield from _layers("critic", feature, units, 3)
    yield from _dense("critic.out", units, NUM_BINS, 0.0)


def _num_tokens(sizes: Sizes, obs: tuple[Part, ...]) -> int:
    width = sizes.units if vectors_of(obs) else 0
    if images := images_of(obs):
        plan = stages(images, sizes.depth)
        width += math.prod(plan.sides[-1]) * plan.channels[-1]
    return width


def _encoder(sizes: Sizes, obs: tuple[Part, ...]) -> Iterator[Tensor]:
    if vectors := vectors_of(obs):
        yield from _layers("enc.vec", sum(part.width for part in vectors), sizes.units, 3)
    if images := images_of(obs):
        plan = stages(images, sizes.depth)
        before = sum(part.width for part in images)
        for i, after in enumerate(plan.channels):
            yield from _conv(f"enc.img.{i}", plan.kernel, before, after)
            yield f"enc.img.{i}.norm_scale", (after,), 1.0
            before = after


def _decoder(sizes: Sizes, obs: tuple[Part, ...]) -> Iterator[Tensor]:
    latent, units = sizes.stoch * sizes.classes, sizes.units
    if vectors := vectors_of(obs):
        yield from _layers("dec.vec", sizes.deter + latent, units, 3)
        for part in vectors:
            yield from _dense(f"dec.vec.out.{part.name}", units, part.width)
    if images := images_of(obs):
        plan = stages(images, sizes.depth)
        before = 4 * sizes.depth
        grid = math.prod(plan.sides[-1]) * before
        yield from _block("dec.img.from_deter", DECODER_BLOCKS, sizes.deter, grid)
        yield from _layer("dec.img.stoch_hidden", latent, 2 * units)
        yield from _dense("dec.img.from_stoch", 2 * units, grid)
        yield "dec.img.start.norm_scale", (before,), 1.0
        for i, after in enumerate(reversed(plan.channels[:-1])):
            yield from _conv(f"dec.img.up.{i}", plan.kernel, before, after)
            yield f"dec.img.up.{i}.norm_scale", (after,), 1.0
            before = after
        yield from _conv("dec.img.out", plan.kernel, before, sum(part.width for part in images))


def _dense(path: str, inputs: int, outputs: int, scale: float = 1.0) -> Iterator[Tensor]:
    yield f"{path}.kernel", (inputs, outputs), scale
    yield f"{path}.bias", (outputs,), 0.0


def _layer(path: str, inputs: int, outputs: int) -> Iterator[Tensor]:
    yield from _dense(path, inputs, outputs)
    yield f"{path}.norm_scale", (outputs,), 1.0


def _layers(path: str, inputs: int, outputs: int, num: int) -> Iterator[Tensor]:
    for i in range(num):
        yield from _layer(f"{path}.{i}", outputs if i else inputs, outputs)


def _block(path: str, blocks: int, inputs: int, outputs: int) -> Iterator[Tensor]:
    yield f"{path}.kernel", (blocks, inputs // blocks, outputs // blocks), 1.0
    yield f"{path}.bias", (outputs,), 0.0


def _conv(path: str, side: int, inputs: int, outputs: int) -> Iterator[Tensor]:
    yield f"{path}.kernel", (side, side, inputs, outputs), 1.0
    yield f"{path}.bias", (outputs,), 0.0
