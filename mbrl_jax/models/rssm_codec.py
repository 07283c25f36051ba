"""Encoder and decoder of the world model: observations to tokens, latent states to observations.

An observation is one array, named "obs" here, or a dict of arrays. Each array is of one kind:

| kind | arrays | encoded as | decoded as | loss |
|---|---|---|---|---|
| vector | of no other kind | symlog, flat | the symlog | squared error |
| discrete | integers with a count | one-hot, flat | logits | cross-entropy |
| image | [h, w, c] of uint8 | x / 255 - 0.5 | x / 255, by a sigmoid | squared error |
| grid | [h, w, c] of other numbers | symlog | the symlog | squared error |
| binary | [h, w, c] of bool, or named so | 0 and 1 | logits | Bernoulli cross-entropy |
| bits | others of bool, or named so | 0 and 1, flat | logits | Bernoulli cross-entropy |

Vectors, one-hots and bits of all names, sorted, pass dense layers; the other three, side by side as
channels, pass convolutions. Stages of convolution and 2 x 2 max-pooling halve the image (an odd
side is rounded up) while its sides stay at 4 or above; kernels are 5 x 5, and 3 x 3 for images with
a side under 32. An image of 64 x 64 so has the four stages of DreamerV3 (Hafner et al. 2025); other
sizes, grids, binary channels and bits are of this package.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax.models import rssm_layers as layers
from mbrl_jax.nn.networks import is_image
from mbrl_jax.nn.precision import FULL
from mbrl_jax.nn.two_hot import symexp, symlog
from mbrl_jax.types import RESERVED, ArraySpec, InputError, PyTree

Kind = Literal["vector", "discrete", "image", "grid", "binary", "bits"]
DECODER_BLOCKS = 8  # of the decoder's first layer, whatever the core has
_SMALLEST = 4  # side that pooling leaves
_SMALL = 32  # side below which kernels are 3 x 3
ONE_ARRAY = "obs"  # the name of an observation that is no dict


class Part(NamedTuple):
    """One array of an observation; static and hashable."""

    name: str
    kind: Kind
    shape: tuple[int, ...]  # without leading axes
    classes: int = 0  # of discrete values

    @property
    def spatial(self) -> bool:
        """Whether it passes convolutions."""
        return self.kind in ("image", "grid", "binary")

    @property
    def width(self) -> int:
        """Numbers that encode it, and those that decode it; its channels where it is spatial."""
        if self.spatial:
            return self.shape[-1]
        return math.prod(self.shape) * max(self.classes, 1)


def parts_of(
    obs: ArraySpec | Mapping[str, ArraySpec], binary: Collection[str] = ()
) -> tuple[Part, ...]:
    """The arrays of an observation with their kinds, sorted by name, without the reserved ones.

    Args:
      obs: `EnvSpec.obs`.
      binary: names of arrays whose entries are all 0 or 1, whatever their dtype.

    Raises:
      InputError: an array that cannot be encoded: of more than three axes, without elements, of a
        dtype that is no number, or an image of another size than the others; a name in `binary`
        that is none of theirs, or of integers with a count.
    """
    named = {ONE_ARRAY: obs} if isinstance(obs, ArraySpec) else dict(obs)
    parts = [_part(name, named[name], binary) for name in sorted(named) if name not in RESERVED]
    if not parts:
        raise InputError(f"nothing to encode in an observation of {sorted(named)}; add an array")
    numbers = [part.name for part in parts if part.kind != "discrete"]
    for name in binary:
        if name not in numbers:
            raise InputError(
                f"{name!r} is to be binary; arrays of numbers without a count are here {numbers}; "
                "name one of them"
            )
    sides = {part.shape[:2]: part.name for part in parts if part.spatial}
    if len(sides) > 1:
        sizes = ", ".join(f"{name!r} {shape[0]} x {shape[1]}" for shape, name in sides.items())
        raise InputError(
            f"images of one observation must have one size; here are {sizes}; scale or pad them"
        )
    return tuple(parts)


def _part(name: str, spec: ArraySpec, binary: Collection[str]) -> Part:
    try:
        dtype = np.dtype(spec.dtype)
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind not in "biuf" or len(spec.shape) > 3 or math.prod(spec.shape) == 0:
        raise InputError(
            f"cannot encode the observation {name!r} of shape {spec.shape} and dtype {spec.dtype}; "
            "expected numbers with at most three axes, none of them empty; wrap the environment"
        )
    if spec.num is not None:
        return Part(name, "discrete", spec.shape, spec.num)
    binary_entries = name in binary or dtype.kind == "b"
    if not is_image(spec):
        return Part(name, "bits" if binary_entries else "vector", spec.shape)
    if binary_entries:
        return Part(name, "binary", spec.shape)
    return Part(name, "image" if dtype == np.uint8 else "grid", spec.shape)


def vectors_of(parts: tuple[Part, ...]) -> list[Part]:
    """The parts that pass dense layers."""
    return [part for part in parts if not part.spatial]


def images_of(parts: tuple[Part, ...]) -> list[Part]:
    """The parts that pass convolutions."""
    return [part for part in parts if part.spatial]


class Stages(NamedTuple):
    """The convolutions that fit an image."""

    sides: tuple[tuple[int, int], ...]  # before the first stage and after each, height and width
    channels: tuple[int, ...]  # after each stage
    kernel: int  # side of a kernel


def stages(images: list[Part], depth: int) -> Stages:
    """The stages that `images` pass, with 2, 3 and then 4 times `depth` channels.

    There is at least one: images that are too small to be halved keep their size.
    """
    height, width, _ = images[0].shape
    sides = [(height, width)]
    while min(half := (-(-sides[-1][0] // 2), -(-sides[-1][1] // 2))) >= _SMALLEST:
        sides.append(half)
    if len(sides) == 1:
        sides.append(sides[0])
    channels = [min(stage + 2, 4) * depth for stage in range(len(sides) - 1)]
    return Stages(tuple(sides), tuple(channels), 5 if min(height, width) >= _SMALL else 3)


def encode(params: PyTree, obs: PyTree, parts: tuple[Part, ...], dtype: Any) -> jax.Array:
    """Observations as tokens, the input of the posterior: [*lead, E] of `dtype`.

    Args:
      params: the parameters `enc`.
      obs: arrays [*lead, *shape], a dict by name or one array.
      parts: of these observations, from `parts_of`.
      dtype: computed in.
    """
    obs = _named(obs)
    tokens = []
    if vectors := vectors_of(parts):
        flat = [_flat(obs[part.name], part, dtype) for part in vectors]
        tokens.append(layers.mlp(params["vec"], jnp.concatenate(flat, -1), dtype))
    if images := images_of(parts):
        stacked = [_pixels(obs[part.name], part, dtype) for part in images]
        sides = stages(images, 1).sides
        x = _encode_image(params["img"], jnp.concatenate(stacked, -1), sides, dtype)
        tokens.append(x.reshape(*x.shape[:-3], -1))
    return jnp.concatenate(tokens, -1)


def decode(
    params: PyTree,
    deter: jax.Array,
    stoch: jax.Array,
    parts: tuple[Part, ...],
    depth: int,
    dtype: Any,
) -> dict[str, jax.Array]:
    """What the decoder gives for latent states: {name: [*lead, ...]} float32.

    A vector, image, grid or binary part has the shape [*lead, *shape], a discrete one logits
    [*lead, *shape, classes]; the table above says what the numbers stand for.

    Args:
      params: the parameters `dec`.
      deter: [*lead, D].
      stoch: [*lead, S, C].
      parts: of the observations, from `parts_of`.
      depth: of the convolutions, `Sizes.depth`.
      dtype: computed in.
    """
    lead = deter.shape[:-1]
    flat = stoch.reshape(*lead, -1)
    out = {}
    if vectors := vectors_of(parts):
        x = jnp.concatenate([flat.astype(dtype), deter.astype(dtype)], -1)
        x = layers.mlp(params["vec"], x, dtype)
        for part in vectors:
            y = layers.output(params["vec"]["out"][part.name], x, dtype)
            shape = (*part.shape, part.classes) if part.kind == "discrete" else part.shape
            out[part.name] = y.reshape(*lead, *shape)
    if images := images_of(parts):
        plan = stages(images, depth)
        pixels = _decode_image(params["img"], deter, flat, plan, dtype)
        ends = np.cumsum([part.width for part in images])[:-1].tolist()
        for part, y in zip(images, jnp.split(pixels, ends, -1), strict=True):
            out[part.name] = jax.nn.sigmoid(y) if part.kind == "image" else y
    return out


def losses(
    decoded: dict[str, jax.Array], obs: PyTree, parts: tuple[Part, ...]
) -> dict[str, jax.Array]:
    """The reconstruction loss of each part, {name: [*lead]} float32, summed over its entries.

    Args:
      decoded: from `decode`.
      obs: the observations that were encoded, [*lead, *shape].
      parts: of these observations.
    """
    obs = _named(obs)
    return {part.name: _loss(decoded[part.name], obs[part.name], part) for part in parts}


def _loss(y: jax.Array, x: jax.Array, part: Part) -> jax.Array:
    if part.kind == "discrete":
        one_hot = jax.nn.one_hot(x, part.classes, dtype=y.dtype)
        terms = -jnp.sum(one_hot * jax.nn.log_softmax(y), -1)
    elif part.kind in ("binary", "bits"):
        x = x.astype(y.dtype)
        terms = jax.nn.softplus(y) - x * y
    elif part.kind == "image":
        terms = jnp.square(y - x.astype(y.dtype) / 255.0)
    else:
        terms = jnp.square(y - symlog(x.astype(y.dtype)))
    return jnp.sum(terms, tuple(range(x.ndim - len(part.shape), x.ndim)))


def predictions(decoded: dict[str, jax.Array], parts: tuple[Part, ...]) -> dict[str, jax.Array]:
    """What the decoder predicts, in the units of the observations: {name: [*lead, *shape]}.

    Vectors and grids are numbers, images brightnesses in [0, 255], binary channels and bits chances
    of a 1, all float32; discrete values are the likeliest, int32.
    """
    made = {}
    for part in parts:
        y = decoded[part.name]
        if part.kind == "discrete":
            made[part.name] = jnp.argmax(y, -1).astype(jnp.int32)
        elif part.kind in ("binary", "bits"):
            made[part.name] = jax.nn.sigmoid(y)
        elif part.kind == "image":
            made[part.name] = 255.0 * y
        else:
            made[part.name] = symexp(y)
    return made


def _named(obs: PyTree) -> Mapping[str, jax.Array]:
    return obs if isinstance(obs, Mapping) else {ONE_ARRAY: obs}


def _flat(x: jax.Array, part: Part, dtype: Any) -> jax.Array:
    lead = x.shape[: x.ndim - len(part.shape)]
    if part.kind == "discrete":
        return jax.nn.one_hot(x, part.classes, dtype=dtype).reshape(*lead, -1)
    if part.kind == "bits":
        return x.astype(dtype).reshape(*lead, -1)
    return symlog(_wide(x)).reshape(*lead, -1).astype(dtype)


def _pixels(x: jax.Array, part: Part, dtype: Any) -> jax.Array:
    if part.kind == "image":
        return x.astype(dtype) / 255.0 - 0.5
    return x.astype(dtype) if part.kind == "binary" else symlog(_wide(x)).astype(dtype)


def _wide(x: jax.Array) -> jax.Array:
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)


def _encode_image(
    params: PyTree, x: jax.Array, sides: tuple[tuple[int, int], ...], dtype: Any
) -> jax.Array:
    """[*lead, h, w, c] to the last stage's [*lead, h', w', c']."""
    for number, after in enumerate(sides[1:]):
        stage = params[str(number)]
        x = layers.conv(stage, x, dtype)
        if after != sides[number]:
            x = _max_pool(x)
        x = layers.activate(stage, x)
    return x


def _max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 2 x 2 square: [*lead, h, w, c] -> [*lead, ceil(h/2), ceil(w/2), c]."""
    height, width, channels = x.shape[-3:]
    odd = [(0, 0)] * (x.ndim - 3) + [(0, height % 2), (0, width % 2), (0, 0)]
    if height % 2 or width % 2:
        x = jnp.pad(x, odd, constant_values=-jnp.inf)
    x = x.reshape(*x.shape[:-3], x.shape[-3] // 2, 2, x.shape[-2] // 2, 2, channels)
    return jnp.max(x, (-4, -2))


def _decode_image(
    params: PyTree, deter: jax.Array, stoch: jax.Array, plan: Stages, dtype: Any
) -> jax.Array:
    """Flat latents to the raw outputs [*lead, h, w, channels] of all images, float32."""
    lead, (height, width) = deter.shape[:-1], plan.sides[-1]
    blocks = layers.block_dense(params["from_deter"], deter, dtype)
    # a block of the layer gives some of the channels at all places
    blocks = blocks.reshape(*lead, DECODER_BLOCKS, height, width, -1)
    x = jnp.moveaxis(blocks, -4, -2).reshape(*lead, height, width, -1)
    hidden = layers.layer(params["stoch_hidden"], stoch, dtype)
    x = x + layers.dense(params["from_stoch"], hidden, dtype).reshape(x.shape)
    x = layers.activate(params["start"], x)
    steps = list(reversed(plan.sides))
    for number, side in enumerate(steps[1:]):
        if side != steps[number]:
            x = jnp.repeat(jnp.repeat(x, 2, -3), 2, -2)[..., : side[0], : side[1], :]
        if number < len(steps) - 2:
            stage = params["up"][str(number)]
            x = layers.activate(stage, layers.conv(stage, x, dtype))
    return layers.widened(layers.conv(params["out"], x, dtype, FULL))
