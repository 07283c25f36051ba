"""The contracts that every part of mbrl_jax speaks.

`Step`, `Transition` and `NStep` are what passes between environment, agent and replay; `Agent` and
`Schedule` are an algorithm; `EnvSpec` is what an agent may know of an environment; `@config` makes
the settings of an algorithm a pytree.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")
PyTree = Any
Scalar = float | jax.Array  # a float field of a config, traced or not
StaticFloat = float | int  # a config field that is a number and static, since shapes follow from it
Metrics = dict[str, jax.Array]
Mode = Literal["random", "train", "eval"]
RESERVED = ("action_mask", "to_play")  # names with a meaning of their own in a dict of observations


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

    Targets bootstrap through `truncated` and stop at `terminated`. Observations are one array or a
    dict of arrays, as the environment's `EnvSpec` says.
    """

    obs: PyTree  # [N, *obs_shape] the observation that was acted on
    action: jax.Array  # [N] int32, or [N, action_dim] float32
    reward: jax.Array  # [N] float32
    next_obs: PyTree  # [N, *obs_shape] the true successor, never one after a reset
    terminated: jax.Array  # [N] bool, the task ended here
    truncated: jax.Array  # [N] bool, cut off by the time limit; never with `terminated`
    is_first: jax.Array  # [N] bool, `obs` opens an episode
    is_last: jax.Array  # [N] bool, `obs` is final and the action idle; only with delayed resets


class Transition(NamedTuple):
    """One environment step as a replay keeps it; [*lead, ...] with any equal leading axes."""

    obs: PyTree  # [*lead, *obs_shape] obs_dtype
    action: jax.Array  # [*lead] int32, or [*lead, action_dim] float32
    reward: jax.Array  # [*lead] float32
    next_obs: PyTree  # [*lead, *obs_shape] obs_dtype, the true successor
    terminated: jax.Array  # [*lead] bool
    truncated: jax.Array  # [*lead] bool

    @classmethod
    def of(cls, step: Step) -> Transition:
        """The fields of `step` that a transition has; [N, ...]."""
        return cls(*(getattr(step, name) for name in cls._fields))

    @classmethod
    def example(cls, spec: EnvSpec) -> Transition:
        """Shapes and dtypes of one step of an environment like `spec`, without leading axes."""

        def struct(shape: tuple[int, ...], dtype: str) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)

        obs, flag = spec.example_obs(), struct((), "bool")
        action = struct(spec.action_shape, "int32" if spec.discrete else "float32")
        return cls(obs, action, struct((), "float32"), obs, flag, flag)


class NStep(NamedTuple):
    """m steps as one, where m is n or the steps to the episode's end."""

    obs: PyTree  # [*lead, *obs_shape]
    action: jax.Array  # [*lead] int32, or [*lead, action_dim] float32
    reward: jax.Array  # [*lead] float32, sum over k < m of gamma**k * reward k
    next_obs: PyTree  # [*lead, *obs_shape], the true successor of the last step
    discount: jax.Array  # [*lead] float32, gamma**m, or 0 where the task ended


class Schedule(NamedTuple):
    """What the loop does between updates; static.

    Before the first update come `warmup_steps` environment steps (over all environments) in mode
    "random", then `prefill_steps` in mode "train". `reset` is "auto" (the step after an episode's
    end starts the next one) or "delayed" (the final observation is a step of its own, `is_last`,
    whose action is idle).
    """

    num_envs: int = 1
    warmup_steps: int = 0
    steps_per_update: int = 1
    reset: Literal["auto", "delayed"] = "auto"
    prefill_steps: int = 0


class Agent(NamedTuple):
    """An algorithm as pure functions, in the manner of `optax.GradientTransformation`.

    `t` is the index of the batched step and `n` that of the update, both from 0, int32 and never
    batched by `vmap`, so that `lax.cond` on them stays a branch and ring positions derived from
    them stay slice updates.
    """

    init: Callable[[jax.Array], PyTree]  # (key) -> state, all that a resume needs
    init_memory: Callable[[int], PyTree]  # (num_envs) -> recurrent memory, () for most
    act: Callable[..., tuple[jax.Array, PyTree, PyTree]]
    """(state, memory, obs, is_first, key, t, mode) -> (action, memory, extras).

    `mode` is static: "random" draws uniformly from the legal actions, "train" explores, "eval" does
    not. Memory and extras belong to the action that is given back, in each mode. In an evaluation
    `t` counts the batched steps of training that lie behind it."""
    observe: Callable[[PyTree, Step, PyTree, jax.Array], PyTree]
    """(state, step, extras, t) -> state: record one batched step."""
    update: Callable[[PyTree, jax.Array, jax.Array, jax.Array], tuple[PyTree, Metrics]]
    """(state, key, t, n) -> (state, metrics): all learning due after step `t`, as update `n`."""
    schedule: Schedule


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of one array of an observation; static and hashable."""

    shape: tuple[int, ...]
    dtype: str  # "float32", "int32", "uint8" or "bool"
    num: int | None = None  # count of integer values, None otherwise


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """What an agent may know of an environment; static and hashable.

    Observations are one array of `obs_shape` and `obs_dtype`, or a dict of arrays: then `obs_parts`
    names each, sorted, and those two are () and "dict". Two names in a dict are reserved:
    `action_mask` [num_actions] bool, the legal actions, and `to_play` [] int32, whose turn it is.
    """

    id: str
    obs_shape: tuple[int, ...]
    obs_dtype: str  # "float32", "int32" or "uint8"; "dict" with `obs_parts`
    episode_limit: int  # steps until truncation
    num_obs: int | None = None  # count of integer observations, None otherwise
    num_actions: int | None = None  # count of discrete actions, None if continuous
    action_low: tuple[float, ...] | None = None  # bounds of a continuous action
    action_high: tuple[float, ...] | None = None
    reward_fn: Callable | None = None  # (obs, action, next_obs) -> reward, where known
    termination_fn: Callable | None = None  # (obs, action, next_obs) -> bool, where known
    obs_parts: tuple[tuple[str, ArraySpec], ...] = ()  # of a dict of observations, by name
    num_players: int = 1  # who act in turns; `to_play` tells whose turn it is

    @property
    def discrete(self) -> bool:
        return self.num_actions is not None

    @property
    def action_shape(self) -> tuple[int, ...]:
        return () if self.action_low is None else (len(self.action_low),)

    @property
    def obs(self) -> Any:
        """The `ArraySpec` of an observation that is one array, or a dict of them by name."""
        return dict(self.obs_parts) or ArraySpec(self.obs_shape, self.obs_dtype, self.num_obs)

    def example_obs(self, *lead: int) -> PyTree:
        """Shapes and dtypes of observations with the leading axes `lead`."""
        return jax.tree.map(
            lambda part: jax.ShapeDtypeStruct((*lead, *part.shape), part.dtype),
            self.obs,
            is_leaf=lambda node: isinstance(node, ArraySpec),
        )

    def zero_obs(self, *lead: int) -> PyTree:
        """Observations of zeros with the leading axes `lead`, such as a network is built on."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.example_obs(*lead))

    def legal(self, obs: PyTree) -> jax.Array | None:
        """[N, num_actions] bool, the actions that `obs` [N, ...] allows; None where all are."""
        return obs["action_mask"] if "action_mask" in dict(self.obs_parts) else None

    def random_action(self, key: jax.Array, legal: jax.Array | None = None) -> jax.Array:
        """One uniformly random action, [] int32 or [action_dim] float32, within the bounds.

        Args:
          key: of one draw.
          legal: [num_actions] bool, the actions to draw from; None for all. Where none is legal, as
            in a final observation, it is action 0.
        """
        if self.num_actions is None:
            self.check_bounded("a uniformly random action")
            low, high = self.bounds(1)
            return jax.random.uniform(key, low.shape, jnp.float32, low, high)
        if legal is None:
            return jax.random.randint(key, (), 0, self.num_actions, jnp.int32)
        pick = jax.random.randint(key, (), 0, jnp.maximum(jnp.sum(legal), 1), jnp.int32)
        return nth_legal(legal, pick)

    def random_actions(self, key: jax.Array, obs: PyTree) -> jax.Array:
        """A uniformly random legal action for each observation of `obs` [N, ...]: [N, ...]."""
        keys = jax.random.split(key, num_rows(obs))
        legal = self.legal(obs)
        if legal is None:
            return jax.vmap(self.random_action)(keys)
        return jax.vmap(self.random_action)(keys, legal)

    def from_unit(self, action: jax.Array) -> jax.Array:
        """Continuous actions [..., D] in [-1, 1] as actions within the bounds."""
        low, high = self.bounds(action.ndim)
        return low + 0.5 * (action + 1.0) * (high - low)

    def to_unit(self, action: jax.Array) -> jax.Array:
        """The inverse of `from_unit`."""
        low, high = self.bounds(action.ndim)
        return 2.0 * (action - low) / (high - low) - 1.0

    def check_usable(self, agent: str, dicts: bool = False, reserved: Iterable[str] = ()) -> None:
        """Raises InputError where `agent` cannot use these observations or so many players.

        Args:
          agent: its name, for the message.
          dicts: whether it takes dicts of arrays.
          reserved: the names in `RESERVED` that it can use.
        """
        if self.num_players > 1 and "to_play" not in reserved:
            raise InputError(
                f"{agent} plays alone; {self.id} has {self.num_players} players; take another agent"
            )
        for name, _ in self.obs_parts:
            if name in RESERVED and name not in reserved:
                raise InputError(
                    f"{agent} cannot use {name!r} in the observations of {self.id}; take another "
                    "agent, or wrap the environment so that it leaves it out"
                )
        if self.obs_parts and not dicts:
            raise InputError(
                f"{agent} needs one array as observation; {self.id} has a dict of "
                f"{', '.join(name for name, _ in self.obs_parts)}; wrap it so that it gives one"
            )

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


def num_rows(obs: PyTree) -> int:
    """The size of the leading axis of observations [N, ...], one array or a dict."""
    return jax.tree.leaves(obs)[0].shape[0]


def nth_legal(legal: jax.Array, pick: jax.Array) -> jax.Array:
    """The action number `pick` ([...] int32, from 0) of those in `legal` [..., A]: [...] int32.

    0 where so many are not legal.
    """
    rank = jnp.cumsum(legal, axis=-1, dtype=jnp.int32) - 1
    return jnp.argmax(legal & (rank == pick[..., None]), axis=-1).astype(jnp.int32)


def env_steps(t: jax.Array, num_envs: int) -> jax.Array:
    """Environment steps behind `t` batched ones, as float32: int32 would overflow at 2**31."""
    return jnp.asarray(t, jnp.float32) * num_envs


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
    elif hint == StaticFloat:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong("a number")
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
