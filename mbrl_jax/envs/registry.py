"""`make_env`: every gymnax environment by its id, ours among them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax.envs.env import Env
from mbrl_jax.types import ArraySpec, EnvSpec, InputError, unknown
from mbrl_jax.x64 import in_32_bits

_MOST = 2**31 - 1  # JAX holds numbers of steps as int32
# builds its data set from a download
_NEEDS_DOWNLOAD = ("MNISTBandit-bsuite",)


def list_envs() -> list[str]:
    """The ids that `make_env` knows."""
    gymnax = _gymnax()
    from mbrl_jax.envs import boards, craftax, locomotion

    left_out = set(_NEEDS_DOWNLOAD)
    if not locomotion.available():
        left_out.update(locomotion.ROBOTS)
    if not craftax.available():
        left_out.update(craftax.ENVS)
    if not boards.available():
        left_out.update(boards.GAMES)
    return sorted(env for env in gymnax.registered_envs if env not in left_out)


def make_env(
    id: str, *, rescale_actions: bool = True, cached_resets: int = 0, **kwargs: Any
) -> Env:
    """The environment `id`; the same arguments always give the same object, so nothing retraces.

    Args:
      id: a gymnax id, or one of ours (`list_envs()`).
      rescale_actions: continuous actions lie in [-1, 1] and are rescaled to the native bounds;
        False keeps the native bounds. Either way they are clipped to them. A dimension without a
        finite lower and upper bound keeps its native units, and agents that need bounds refuse it.
        Boxes of several axes are flattened for the agent.
      cached_resets: draw this many start states once per run and reuse them (worth it where a
        reset is dear; exact where resets are deterministic, otherwise a finite set of starts).
        0 draws each start afresh.
      **kwargs: constructor arguments (`is_slippery=False`) and parameters of the environment
        (`max_steps_in_episode=200`), told apart by name.

    Raises:
      InputError: an unknown id or argument, a value of the wrong type, or an environment whose
        actions are neither one Discrete nor one Box of floats, whose observations are neither one
        array nor a flat dict of arrays, or whose `max_steps_in_episode` is not a whole number.
    """
    frozen = tuple(sorted((name, _freeze(value)) for name, value in kwargs.items()))
    if isinstance(cached_resets, bool) or not isinstance(cached_resets, int) or cached_resets < 0:
        raise InputError(f"cached_resets = {cached_resets!r}: expected a whole number, 0 or more")
    if not isinstance(rescale_actions, bool):
        raise InputError(f"rescale_actions = {rescale_actions!r}: expected true or false")
    return _build(id, rescale_actions, cached_resets, frozen)


@functools.cache
@in_32_bits
def _build(id: str, rescale: bool, cached_resets: int, kwargs: tuple[tuple[str, Any], ...]) -> Env:
    if id in _NEEDS_DOWNLOAD:
        raise InputError(f"environment {id!r} downloads its data and is not offered")
    factory = _factory(id)
    arguments = {
        name: parameter.default
        for name, parameter in inspect.signature(factory).parameters.items()
        if name != "self"
    }
    given = {name: value for name, value in kwargs if name in arguments}
    for name, value in given.items():
        _check_argument(id, name, value, arguments[name])
    try:
        base = factory(**given)
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise InputError(f"{id}: {error}") from error
    defaults = base.default_params
    fields = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(defaults)}
    changed = {name: value for name, value in kwargs if name not in arguments}
    for name, value in changed.items():
        if name not in fields:
            raise unknown(f"argument of {id}:", name, [*arguments, *fields])
        _check_argument(id, name, value, fields[name])
    params = dataclasses.replace(defaults, **changed)
    env = _wrap(id, base, params, rescale, cached_resets)
    options = (("cached_resets", cached_resets), ("rescale_actions", rescale))
    return dataclasses.replace(env, arguments=options + kwargs)


def _wrap(id: str, base: Any, params: Any, rescale: bool, cached_resets: int) -> Env:
    from mbrl_jax.envs.bases import spaces
    from mbrl_jax.envs.functions import KNOWN, TERMINATIONS

    reward, terminated = KNOWN.get(id, (None, TERMINATIONS.get(id)))
    first, _ = jax.eval_shape(lambda: base.reset_env(jax.random.key(0), params))
    obs_space, action_space = base.observation_space(params), base.action_space(params)
    limit = _limit(id, getattr(params, "max_steps_in_episode", None))
    num_players = getattr(base, "num_players", 1)
    if isinstance(obs_space, spaces.Dict):
        parts = _parts(id, first, obs_space.spaces, action_space)
        spec = EnvSpec(id, (), "dict", limit, obs_parts=parts, num_players=num_players)
    elif isinstance(first, jax.ShapeDtypeStruct):
        part = _array_spec(first, obs_space)
        spec = EnvSpec(id, part.shape, part.dtype, limit, part.num, num_players=num_players)
    else:
        raise InputError(
            f"{id}: observations are a {type(first).__name__} in a {type(obs_space).__name__} "
            "space: expected one array, or a flat dict of arrays in a Dict space; wrap the "
            "environment so that it gives one of these"
        )
    if num_players > 1 and "to_play" not in dict(spec.obs_parts):
        raise InputError(
            f"{id}: {num_players} players: expected a dict of observations with to_play, the "
            "number of the player to move"
        )
    if isinstance(action_space, spaces.Discrete):
        spec = dataclasses.replace(spec, num_actions=int(action_space.n))
        spec = _with_functions(spec, reward, terminated)
        return Env(base, params, spec, cached_resets=cached_resets)
    low, high = _bounds(id, action_space)
    bounded = [math.isfinite(a) and math.isfinite(b) for a, b in zip(low, high, strict=True)]
    unit = [rescale and finite for finite in bounded]
    spec = dataclasses.replace(
        spec,
        action_low=tuple(-1.0 if u else a for u, a in zip(unit, low, strict=True)),
        action_high=tuple(1.0 if u else b for u, b in zip(unit, high, strict=True)),
    )
    shape = tuple(action_space.shape)
    env = Env(base, params, spec, low, high, cached_resets, native_shape=shape)
    spec = _with_functions(spec, reward, terminated, env.native_action)
    return dataclasses.replace(env, spec=spec)


def _limit(id: str, value: Any) -> int:
    """The steps of an episode, from the environment's parameters."""
    number = isinstance(value, (int, float, np.generic, np.ndarray, jax.Array))
    if not number or np.ndim(value) or not 1 <= value <= _MOST or value != int(value):
        raise InputError(
            f"{id}: max_steps_in_episode = {value}, expected a whole number from 1 to {_MOST}; "
            "give one as max_steps_in_episode="
        )
    return int(value)


def _bounds(id: str, space: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Lower and upper bounds of a Box of actions, one for each number of an action.

    A bound of 1e30 or more counts as infinite: some environments give float32's greatest number.
    """
    from mbrl_jax.envs.bases import spaces

    if not isinstance(space, spaces.Box) or not jnp.issubdtype(space.dtype, jnp.floating):
        of = f" of {np.dtype(space.dtype).name}" if isinstance(space, spaces.Box) else ""
        raise InputError(
            f"{id}: actions are a {type(space).__name__}{of}: expected one Discrete, or one Box of "
            "floats; wrap the environment so that it takes one of these"
        )
    try:
        low, high = (
            np.broadcast_to(np.asarray(bound, np.float64), space.shape).ravel()
            for bound in (space.low, space.high)
        )
    except ValueError as error:
        raise InputError(f"{id}: bounds of the actions: {error}") from error
    if not np.all(low <= high):
        raise InputError(
            f"{id}: actions from {low.tolist()} to {high.tolist()}: expected lower bounds that are "
            "not above the upper ones"
        )
    low, high = np.where(low <= -1e30, -np.inf, low), np.where(high >= 1e30, np.inf, high)
    return tuple(low.tolist()), tuple(high.tolist())


def _array_spec(first: jax.ShapeDtypeStruct, space: Any) -> ArraySpec:
    from mbrl_jax.envs.bases import spaces

    if isinstance(space, spaces.Discrete) and first.shape == ():
        return ArraySpec((), "int32", int(space.n))
    return ArraySpec(tuple(first.shape), "uint8" if first.dtype == np.uint8 else "float32")


def _parts(
    id: str, first: Any, parts: Mapping[str, Any], action_space: Any
) -> tuple[tuple[str, ArraySpec], ...]:
    """The arrays of a dict of observations, sorted by name as JAX sorts them."""
    from mbrl_jax.envs.bases import spaces

    if not isinstance(first, dict) or first.keys() != parts.keys():
        said = sorted(first) if isinstance(first, dict) else type(first).__name__
        raise InputError(f"{id}: a reset gives {said}, its observation space has {sorted(parts)}")
    for name, array in first.items():
        if not isinstance(array, jax.ShapeDtypeStruct):
            raise InputError(f"{id}: observation {name!r} is no array; expected a flat dict")
    named = {name: _array_spec(first[name], parts[name]) for name in sorted(parts)}
    if "action_mask" in named:
        shape = named["action_mask"].shape
        if not isinstance(action_space, spaces.Discrete) or shape != (action_space.n,):
            raise InputError(
                f"{id}: action_mask has shape {shape}: expected discrete actions and one entry for "
                "each"
            )
        named["action_mask"] = ArraySpec(shape, "bool")
    if "to_play" in named:
        if named["to_play"].shape != ():
            raise InputError(
                f"{id}: to_play has shape {named['to_play'].shape}: expected one number"
            )
        named["to_play"] = ArraySpec((), "int32", named["to_play"].num)
    return tuple(named.items())


def _with_functions(
    spec: EnvSpec, reward: Any, terminated: Any, native: Any = lambda action: action
) -> EnvSpec:
    """`spec` with the known functions, which take actions in the units of `spec`."""

    def in_units(known: Any) -> Any:
        return known and (lambda obs, action, next_obs: known(obs, native(action), next_obs))

    return dataclasses.replace(
        spec, reward_fn=in_units(reward), termination_fn=in_units(terminated)
    )


def _check_argument(id: str, name: str, value: Any, default: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    limit = name == "max_steps_in_episode"
    if isinstance(default, bool):
        fits, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, int) or (limit and number):
        whole = number and math.isfinite(value) and value == int(value)
        fits, kind = whole and abs(value) <= _MOST, f"a whole number of at most {_MOST}"
    elif isinstance(default, float):
        fits, kind = number and not math.isnan(value), "a number"
    else:
        return
    if not fits:
        raise InputError(f"{id}: {name} = {value!r}, expected {kind} (default {default})")
    if limit and value < 1:
        raise InputError(f"{id}: {name} = {value!r}, expected at least 1")


def _freeze(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item) for item in value)
    return value


def _factory(id: str) -> Any:
    gymnax = _gymnax()
    from mbrl_jax.envs import boards, craftax, locomotion

    if id in locomotion.ROBOTS:
        locomotion.require()
    if id in craftax.ENVS:
        craftax.require()
    if id in boards.GAMES:
        boards.require()
    if id not in list_envs():
        raise unknown("environment", id, list_envs())
    from mbrl_jax.envs.classic import MountainCarContinuous

    if id == "MountainCarContinuous-v0":  # gymnax's has a fault at the left wall
        return MountainCarContinuous
    return gymnax.registration._registry[id]


@in_32_bits
def _gymnax() -> Any:
    from mbrl_jax.envs.bases import gymnax
    from mbrl_jax.envs.classic import register_with_gymnax

    register_with_gymnax()
    return gymnax
