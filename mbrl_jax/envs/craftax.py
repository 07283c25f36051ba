"""Craftax-Classic, an open world in JAX, in the gymnax interface (Matthews et al. 2024).

Craftax-Classic is Crafter (Hafner 2021): gather, build, fight and survive in a random world, with a
reward of 1 for the first of each of 22 achievements and 0.1 for a point of health won or lost. The
world, its rules and its pictures are those of the installed package craftax, 1.6 or newer: older
ones reward a death otherwise. What differs here: pixels are uint8, rounded from craftax's floats,
and reaching the limit of 10,000 steps truncates an episode, which craftax counts as its end.

A start state is a whole new world, so a batch makes one only where an episode has ended
(`costly_reset`), of the same bits as if every step made one for every environment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mbrl_jax.envs.bases import environment, spaces
from mbrl_jax.types import InputError

SYMBOLIC, PIXELS = "Craftax-Classic-Symbolic-v1", "Craftax-Classic-Pixels-v1"
ENVS = (SYMBOLIC, PIXELS)
ACHIEVEMENTS = 22  # the greatest return of an episode, health apart
OLDEST = (1, 6)
_NEVER = np.int32(2**31 - 1)


@struct.dataclass
class CraftaxParams(environment.EnvParams):
    """Craftax's own parameters with its defaults; `max_steps_in_episode` is its max_timesteps."""

    max_steps_in_episode: int = 10_000
    day_length: int = 300
    always_diamond: bool = True
    zombie_health: int = 5
    cow_health: int = 3
    skeleton_health: int = 3
    mob_despawn_distance: int = 14
    spawn_cow_chance: float = 0.1
    spawn_zombie_base_chance: float = 0.02
    spawn_zombie_night_chance: float = 0.1
    spawn_skeleton_chance: float = 0.05


class Craftax(environment.Environment):
    """One of ENVS.

    There are 17 actions. A symbolic observation is float32 [1345]: the 7 x 9 blocks around the
    player, each 17 kinds of block and 4 of creature as zeros and ones, then 12 counts of the
    inventory, health, food, drink and energy, all in tenths, the direction as 4 zeros and ones,
    daylight, and whether the player sleeps. A picture is uint8 [63, 63, 3].

    Raises:
      InputError: without craftax, or with one that is too old.
    """

    costly_reset = True

    def __init__(self, env_id: str):
        super().__init__()
        require()
        from craftax.craftax_env import make_craftax_env_from_name

        self._id = env_id
        # it tells of its textures, and its first pictures take a minute
        with contextlib.redirect_stdout(sys.stderr):
            self.world = make_craftax_env_from_name(env_id, auto_reset=False)

    @property
    def default_params(self) -> CraftaxParams:
        return CraftaxParams()

    @property
    def name(self) -> str:
        return self._id

    @property
    def num_actions(self) -> int:
        return int(self.world.num_actions)

    def reset_env(self, key: jax.Array, params: CraftaxParams) -> tuple[jax.Array, Any]:
        impl = jax.random.key_impl(key)

        def make(words: jax.Array, native: Any) -> tuple[jax.Array, Any]:
            key = jax.random.wrap_key_data(words, impl=impl)
            with jax.numpy_rank_promotion("allow"):  # craftax relies on it
                obs, state = self.world.reset_env(key, native)
            return self._observed(obs), _stored(state)

        if jax.default_backend() == "cpu":
            # jaxlib 0.10.2 gives every eighth world of a batch the same noise (jax#39103)
            make = jax.custom_batching.sequential_vmap(make)
        return make(jax.random.key_data(key), self._native(params))

    def step_env(
        self, key: jax.Array, state: Any, action: Any, params: CraftaxParams
    ) -> tuple[jax.Array, Any, jax.Array, jax.Array, dict[Any, Any]]:
        with jax.numpy_rank_promotion("allow"):
            obs, state, reward, terminated, _ = self.world.step_env(
                key, state, action, self._native(params)
            )
        return self._observed(obs), _stored(state), reward, terminated, {}

    def is_terminated(self, state: Any, params: CraftaxParams) -> jax.Array:
        return self.world.is_terminal(state, self._native(params))

    def is_truncated(self, state: Any, params: CraftaxParams) -> jax.Array:
        return state.timestep >= params.max_steps_in_episode

    def action_space(self, params: Any = None) -> spaces.Discrete:
        return spaces.Discrete(self.num_actions)

    def observation_space(self, params: Any = None) -> spaces.Box:
        shape = self.world.observation_space(self.world.default_params).shape
        if self._id == PIXELS:
            return spaces.Box(0, 255, shape, jnp.uint8)
        return spaces.Box(0.0, 1.0, shape)

    def _native(self, params: CraftaxParams) -> Any:
        """Craftax's parameters, under which only lava and death end an episode."""
        names = [field.name for field in dataclasses.fields(params)]
        values = {name: getattr(params, name) for name in names if name != "max_steps_in_episode"}
        native = self.world.default_params.replace(max_timesteps=_NEVER, **values)
        return jax.tree.map(jnp.asarray, native)

    def _observed(self, obs: jax.Array) -> jax.Array:
        # from brightnesses in [0, 1]
        return jnp.round(255.0 * obs).astype(jnp.uint8) if self._id == PIXELS else obs


class CraftaxSymbolic(Craftax):
    """Craftax-Classic observed as a vector of 1,345 numbers."""

    def __init__(self) -> None:
        super().__init__(SYMBOLIC)


class CraftaxPixels(Craftax):
    """Craftax-Classic observed as a picture of 63 x 63 pixels."""

    def __init__(self) -> None:
        super().__init__(PIXELS)


def version() -> str | None:
    """The installed craftax's version, such as "1.6.1"; None without one."""
    try:
        return importlib.metadata.version("craftax")
    except importlib.metadata.PackageNotFoundError:
        return None


def available() -> bool:
    """Whether craftax is installed and new enough."""
    found = re.match(r"(\d+)\.(\d+)", version() or "")
    return found is not None and (int(found[1]), int(found[2])) >= OLDEST


def require() -> None:
    """Raises InputError where it is not."""
    if not available():
        have = f"it has {version()}" if version() else "it is not installed"
        raise InputError(
            f"{' and '.join(ENVS)} need craftax {'.'.join(map(str, OLDEST))} or newer, whose "
            f"rewards differ from older ones', and {have}; install the extra: "
            "pip install --upgrade 'mbrl-jax[envs]'"
        )


def _stored(state: Any) -> Any:
    """The state with its key as plain words, which may be selected and saved like the rest.

    The key draws the noise of the picture that was made with it, and nothing later.
    """
    return state.replace(state_rng=jax.random.key_data(state.state_rng))
