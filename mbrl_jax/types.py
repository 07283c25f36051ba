"""The contracts that every part of mbrl_jax speaks: Step, Agent, Schedule, EnvSpec and @config."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np

T = TypeVar("T")
PyTree = Any
Scalar = float | jax.Array  # a float field of a config, traced or not
Metrics = dict[str, jax.Array]


class InputError(ValueError):
    """Bad input, told in one line: the value, what was expected, how to mend it."""


def unknown(kind: str, name: str, options: Iterable[str]) -> InputError:
    """The error for a name that is not among `options`, with the nearest ones."""
    options = list(options)
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.4)
    by_case = {option.lower(): option for option in options}
    if name.lower() in by_case:
        near = [by_case[name.lower()]]
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {options}"
    return InputError(f"unknown {kind} {name!r}; {hint}")


class Step(NamedTuple):
    """One batched environment step; every array has the leading axis `num_envs` (N).

    Targets bootstrap through `truncated` and stop at `terminated`.
    """

    obs: jax.Array  # [N, *obs_shape] the observation that was acted on
    action: jax.Array  # [N] int32, or [N, action_dim] float32
    reward: jax.Array  # [N] float32
    next_obs: jax.Array  # [N, *obs_shape] the true successor, never one after a reset
    terminated: jax.Array  # [N] bool, the task ended here
    truncated: jax.Array  # [N] bool, cut off by the time limit; never with `terminated`
    is_first: jax.Array  # [N] bool, `obs` opens an episode


class Schedule(NamedTuple):
    """What the loop does between updates; static.

    `warmup_steps` counts environment steps (over all environments) that act uniformly at random
    before the first update. `reset` is "auto" (the step after an episode's end starts the next
    one) or "delayed" (the final observation is a step of its own, whose action is ignored).
    """

    num_envs: int = 1
    warmup_steps: int = 0
    steps_per_update: int = 1
    reset: Literal["auto", "delayed"] = "auto"


class Agent(NamedTuple):
    """An algorithm as pure functions, in the manner of `optax.GradientTransformation`.

    `t` is the index of the batched step, int32 and never batched by `vmap`, so `lax.cond` on it
    stays a branch and ring positions derived from it stay slice updates.
    """

    init: Callable[[jax.Array], PyTree]  # (key) -> state, all that a resume needs
    init_memory: Callable[[int], PyTree]  # (num_envs) -> recurrent memory, () for most
    act: Callable[..., tuple[jax.Array, PyTree, PyTree]]
    """(state, memory, obs, is_first, key, explore) -> (action, memory, extras)."""
    observe: Callable[[PyTree, Step, PyTree, jax.Array], PyTree]
    """(state, step, extras, t) -> state: record one batched step."""
    update: Callable[[PyTree, jax.Array, jax.Array], tuple[PyTree, Metrics]]
    """(state, key, t) -> (state, metrics): all learning due after step `t`."""
    schedule: Schedule


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """What an agent may know of an environment; static and hashable."""

    id: str
    obs_shape: tuple[int, ...]
    obs_dtype: str  # "float32", "int32" or "uint8"
    episode_limit: int  # steps until truncation
    num_obs: int | None = None  # count of integer observations, None otherwise
    num_actions: int | None = None  # count of discrete actions, None if continuous
    action_low: tuple[float, ...] | None = None  # bounds of a continuous action
    action_high: tuple[float, ...] | None = None
    reward_fn: Callable | None = None  # (obs, action, next_obs) -> reward, where known
    termination_fn: Callable | None = None  # (obs, action, next_obs) -> bool, where known

    @property
    def discrete(self) -> bool:
        return self.num_actions is not None

    @property
    def action_shape(self) -> tuple[int, ...]:
        return () if self.action_low is None else (len(self.action_low),)

    def from_unit(self, action: jax.Array) -> jax.Array:
        """Continuous actions [..., D] in [-1, 1] as actions within the bounds."""
        low, high = self.bounds(action.ndim)
        return low + 0.5 * (action + 1.0) * (high - low)

    def to_unit(self, action: jax.Array) -> jax.Array:
        """The inverse of `from_unit`."""
        low, high = self.bounds(action.ndim)
        return 2.0 * (action - low) / (high - low) - 1.0

    def check_bounded(self, agent: str) -> None:
        """Raises InputError where a bound of the continuous actions is not finite."""
        ends = (self.action_low or ()) + (self.action_high or ())
        if not np.all(np.isfinite(ends)):
            raise InputError(
                f"{agent} needs bounded actions; {self.id} has {self.action_low} to "
                f"{self.action_high}; wrap it so that they are finite"
            )

    def bounds(self, ndim: int) -> tuple[np.ndarray, np.ndarray]:
        """`action_low` and `action_high` as float32 with `ndim` axes, the last of size D."""
        shape = (1,) * (ndim - 1) + (-1,)
        low, high = (np.asarray(ends, np.float32) for ends in (self.action_low, self.action_high))
        return low.reshape(shape), high.reshape(shape)


def ranged(interval: str, *, default: float | tuple[float, ...]) -> Any:
    """A config field; its value, or each number of it, lies in `interval`, such as "[0, inf)"."""
    return dataclasses.field(default=default, metadata={"interval": interval})


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(ranged,))
def config(cls: type[T]) -> type[T]:
    """A frozen keyword-only dataclass that is a pytree.

    The one rule: a field annotated `float` (or another config) is a traced leaf, which may be
    vmapped and never recompiles; every other field is static.
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    hints = typing.get_type_hints(cls)
    traced = [n for n, hint in hints.items() if hint is float or dataclasses.is_dataclass(hint)]
    static = [n for n in hints if n not in traced]
    return jax.tree_util.register_dataclass(cls, data_fields=traced, meta_fields=static)


def check_config(value: PyTree) -> None:
    """Raises InputError for a field of the wrong type or outside its interval; skips tracers."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        _check_field(field, hints[field.name], getattr(value, field.name))


def _check_field(field: dataclasses.Field, hint: Any, value: Any) -> None:
    def wrong(expected: str) -> InputError:
        return InputError(f"{field.name} = {value!r}: expected {expected}")

    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, hint):
            raise wrong(f"a {hint.__module__}.{hint.__qualname__}, or a mapping of its fields")
        check_config(value)
        return
    if hint is float:
        number = np.asarray(value)
        if not np.issubdtype(number.dtype, np.number) or isinstance(value, bool):
            raise wrong("a number")
        if not np.all(np.isfinite(number)):
            raise wrong("a finite number")
    elif hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong("a whole number")
    elif hint is bool:
        if not isinstance(value, bool):
            raise wrong("True or False")
    elif hint == tuple[int, ...]:
        whole = isinstance(value, tuple) and all(type(item) is int for item in value)
        if not whole or ("interval" not in field.metadata and min(value, default=1) < 1):
            raise wrong("a tuple of whole numbers, 1 or more")
    elif hint == tuple[float, ...]:
        if not isinstance(value, tuple) or not all(type(item) in (int, float) for item in value):
            raise wrong("a tuple of numbers")
    elif typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
        raise wrong(f"one of {', '.join(map(repr, typing.get_args(hint)))}")
    interval = field.metadata.get("interval")
    if interval is not None and not _inside(np.asarray(value), interval):
        raise wrong(f"a value in {interval}")


def _inside(value: np.ndarray, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return bool(np.all(above & below))
