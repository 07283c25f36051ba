"""The records of Dreamer's replay: an observation, what came with it, and what was done on it.

An episode's last observation is a record of its own, without an action. After Hafner et al. (2025),
"Mastering diverse control tasks through world models", as the authors' code has it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.agents.dreamer_config import Config, Model, model_of
from mbrl_jax.data import sequence
from mbrl_jax.data.sequence import Sequence
from mbrl_jax.models import rssm
from mbrl_jax.types import EnvSpec, PyTree, Step


class Record(NamedTuple):
    """One record, or a window of them."""

    obs: PyTree  # [*lead, *obs_shape]
    action: jax.Array  # [*lead] int32, or [*lead, action_dim] float32 as sampled; 0 where is_last
    reward: jax.Array  # [*lead] float32, that came with `obs`
    is_first: jax.Array  # [*lead] bool, `obs` opens an episode
    is_last: jax.Array  # [*lead] bool, `obs` ends one
    is_terminal: jax.Array  # [*lead] bool, the task has ended with `obs`
    deter: PyTree  # [*lead, D] of the dtype that is computed in; None unless stored
    stoch: PyTree  # [*lead, S] uint8 classes, or [*lead, S, C] numbers; None likewise


class Arrived(NamedTuple):
    """What came with the observations that are acted on next."""

    reward: jax.Array  # [N] float32
    is_terminal: jax.Array  # [N] bool


def nothing_arrived(num_envs: int) -> Arrived:
    """Before the first step."""
    return Arrived(jnp.zeros(num_envs, jnp.float32), jnp.zeros(num_envs, bool))


def record_of(step: Step, arrived: Arrived, extras: PyTree) -> tuple[Record, Arrived]:
    """The record of a step with delayed resets, [N, ...], and what arrives with the next one.

    The observation of a record is the one that was acted on, so its reward and whether the task
    has ended with it come from the step before.

    Args:
      step: from the environments.
      arrived: what came with `step.obs`.
      extras: `action` as it was sampled, and the `deter` and `stoch` of the policy, if stored.
    """
    idle = step.is_last.reshape(-1, *(1,) * (extras["action"].ndim - 1))
    record = Record(
        obs=step.obs,
        action=jnp.where(idle, jnp.zeros_like(extras["action"]), extras["action"]),
        reward=arrived.reward,
        is_first=step.is_first,
        is_last=step.is_last,
        is_terminal=arrived.is_terminal,
        deter=extras.get("deter"),
        stoch=extras.get("stoch"),
    )
    return record, Arrived(step.reward, step.terminated)


def loaded(window: Record) -> Record:
    """A window [B, L, ...] as it is trained on.

    Its first record opens it, and a record before the start of an episode ends one, also where that
    episode was given up without an end.
    """
    first, last = window.is_first, window.is_last
    return window._replace(
        is_first=jnp.concatenate([jnp.ones_like(first[:, :1]), first[:, 1:]], axis=1),
        is_last=jnp.concatenate([last[:, :-1] | first[:, 1:], last[:, -1:]], axis=1),
    )


def stored(model: Model, latent: rssm.State) -> dict[str, jax.Array]:
    """Latents [*lead] as records keep them: classes as bytes."""
    stoch = latent.stoch
    if not model.gaussian:
        stoch = jnp.argmax(stoch, axis=-1).astype(jnp.uint8)
    return {"deter": latent.deter, "stoch": stoch}


def unstored(model: Model, deter: jax.Array, stoch: jax.Array) -> rssm.State:
    """Latents [*lead] of records as the model takes them: the inverse of `stored`."""
    if not model.gaussian:
        stoch = jax.nn.one_hot(stoch, model.sizes.classes, dtype=model.dtype)
    return rssm.State(deter, stoch)


def replay_of(cfg: Config, spec: EnvSpec) -> Sequence:
    """A replay of `Record`s; without latents where the config stores none.

    Raises:
      InputError: a size that the environments do not divide.
    """
    model = model_of(cfg, spec)
    latent: dict[str, Any] = {}
    if cfg.replay_context == "stored":
        sizes = model.sizes
        zero = rssm.zero_state((), sizes.deter, sizes.stoch, sizes.classes, model.dtype)
        latent = jax.eval_shape(lambda: stored(model, zero))

    def struct(dtype: str, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    example = Record(
        obs=spec.example_obs(),
        action=struct("int32" if spec.discrete else "float32", *spec.action_shape),
        reward=struct("float32"),
        is_first=struct("bool"),
        is_last=struct("bool"),
        is_terminal=struct("bool"),
        deter=latent.get("deter"),
        stoch=latent.get("stoch"),
    )
    return sequence.make(example, cfg.buffer_size, cfg.num_envs)
