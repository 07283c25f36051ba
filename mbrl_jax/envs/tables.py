"""Finite environments as exact tables, and what dynamic programming says of them.

Source: Sutton and Barto, Reinforcement Learning: An Introduction, 2nd edition (2018), chapters 3
and 4. Everything here is numpy float64; S counts the integer observations, A the actions.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax.envs.env import Env
from mbrl_jax.types import InputError, PyTree

MAX_SWEEPS = 1_000_000


class Tabular(NamedTuple):
    """An environment's exact model, without its time limit.

    A state that ends an episode has rows of its own, as in Gymnasium's `P`: every action stays,
    ends at once and earns nothing, so its value is 0.
    """

    transition: np.ndarray  # [S, A, S] probability of each successor; sums to 1
    terminates: np.ndarray  # [S, A, S] the part of `transition` that ends the episode
    reward: np.ndarray  # [S, A] expected reward
    start: np.ndarray  # [S] probability of each first state


def tabular(env: Env, clock: int = 0) -> Tabular:
    """The exact model of a finite environment, read off its own step function.

    Slippery moves are composed from the sure ones by their probabilities; nothing is sampled.

    Args:
      env: FrozenLake-misc with any map and success rate, or one of the three mazes.
      clock: how many steps of the run have passed; says which walls a moving maze has; the
        others ignore it.

    Raises:
      InputError: for any other environment.
    """
    # gymnax starts the JAX backend, so it loads no earlier than an environment does
    from gymnax.environments.misc.frozen_lake import FrozenLake

    from mbrl_jax.envs.sutton import Maze, MovingMaze

    base = env.base
    if not isinstance(base, (FrozenLake, Maze)):
        raise InputError(
            f"no exact table of {env.spec.id!r}; supported: FrozenLake-misc, DynaMaze-sutton, "
            "BlockingMaze-sutton and ShortcutMaze-sutton"
        )
    _, state = base.reset_env(jax.random.key(0), env.params)
    if isinstance(base, MovingMaze):
        state = state.replace(clock=jnp.int32(clock))
    if not isinstance(base, FrozenLake) or not base.is_slippery:
        return _sure_model(base, env.params, state)
    sure = copy.copy(base)
    sure.is_slippery = False
    return _with_slips(_sure_model(sure, env.params, state), base.success_rate)


def value_iteration(
    model: Tabular, gamma: float, tolerance: float = 1e-12
) -> tuple[np.ndarray, np.ndarray]:
    """The optimal values [S] and action values [S, A], by sweeps from 0.

    It stops once a sweep changes no value by more than `tolerance`; the values are then within
    `tolerance * gamma / (1 - gamma)` of the optimum.

    Raises:
      InputError: if `gamma` lies outside [0, 1], or if the values do not settle, as with
        `gamma` 1 and a reward that can be had for ever.
    """
    _check_discount(gamma)
    num_states, num_actions = model.reward.shape
    onward = (model.transition - model.terminates).reshape(-1, num_states)
    values = np.zeros(num_states)
    for _ in range(MAX_SWEEPS):
        action_values = model.reward + gamma * (onward @ values).reshape(-1, num_actions)
        new_values = action_values.max(axis=1)
        change = np.abs(new_values - values).max()
        values = new_values
        if change <= tolerance:
            return values, action_values
    raise InputError(
        f"gamma = {gamma!r}: the values still change by {change:.1e} after {MAX_SWEEPS} sweeps; "
        "expected a smaller gamma or a larger tolerance"
    )


def policy_evaluation(model: Tabular, policy: np.ndarray, gamma: float) -> np.ndarray:
    """The values [S] of `policy` [S, A], which gives each action's probability; a linear solve.

    Raises:
      InputError: if `gamma` lies outside [0, 1], if `policy` is not a table of probabilities, or
        if `gamma` is 1 and from some state the policy may go on for ever.
    """
    _check_discount(gamma)
    onward, ending, reward = _under_policy(model, policy)
    endless = _may_never_end(onward, ending)
    if gamma == 1.0 and endless.any():
        raise InputError(
            f"gamma = {gamma!r}: expected less than 1, for from state {np.argmax(endless)} the "
            "policy may go on for ever"
        )
    return np.linalg.solve(np.eye(len(onward)) - gamma * onward, reward)


def hitting_time(model: Tabular, policy: np.ndarray) -> np.ndarray:
    """The expected steps [S] until an episode terminates under `policy` [S, A]; a linear solve.

    It is inf where the episode may go on for ever, and 1 in a state that ends episodes itself.

    Raises:
      InputError: if `policy` is not a table of probabilities.
    """
    onward, ending, _ = _under_policy(model, policy)
    steps = np.full(len(onward), np.inf)
    ends = ~_may_never_end(onward, ending)
    within = onward[np.ix_(ends, ends)]
    steps[ends] = np.linalg.solve(np.eye(len(within)) - within, np.ones(len(within)))
    return steps


def _sure_model(base: PyTree, params: PyTree, first: PyTree) -> Tabular:
    """The table of a deterministic gymnax environment that starts in the state `first`."""
    num_states = base.observation_space(params).n
    cells, actions = jnp.arange(num_states), jnp.arange(base.num_actions)

    def outcome(cell: jax.Array, action: jax.Array) -> tuple[jax.Array, ...]:
        here, key = first.replace(position=cell), jax.random.key(0)
        successor, _, reward, terminated, _ = base.step_env(key, here, action, params)
        ended = base.is_terminated(here, params)
        return (
            jnp.where(ended, cell, successor),
            jnp.where(ended, 0.0, reward),
            ended | terminated,
        )

    over_actions = jax.vmap(outcome, (None, 0))
    successor, reward, ends = map(np.asarray, jax.vmap(over_actions, (0, None))(cells, actions))
    transition = np.eye(num_states)[successor]
    return Tabular(
        transition=transition,
        terminates=transition * ends[..., None],
        reward=reward.astype(np.float64),
        start=np.eye(num_states)[int(first.position)],
    )


def _with_slips(sure: Tabular, success_rate: float) -> Tabular:
    """The slippery lake: a slip, to either side, takes a neighbour in the order of the actions."""

    def mix(part: np.ndarray) -> np.ndarray:
        sides = np.roll(part, 1, axis=1) + np.roll(part, -1, axis=1)
        return success_rate * part + (1.0 - success_rate) / 2.0 * sides

    return Tabular(mix(sure.transition), mix(sure.terminates), mix(sure.reward), sure.start)


def _under_policy(model: Tabular, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The chain under a policy: [S, S] going on to a state, [S] ending, [S] expected reward."""
    policy = np.asarray(policy, np.float64)
    shape = model.reward.shape
    if policy.shape != shape or not np.allclose(policy.sum(axis=1), 1.0) or (policy < 0).any():
        raise InputError(f"policy of shape {policy.shape}: expected probabilities of shape {shape}")
    policy = policy / policy.sum(axis=1, keepdims=True)  # float32 rows are only nearly 1
    onward = np.einsum("sa,sat->st", policy, model.transition - model.terminates)
    ending = np.einsum("sa,sat->s", policy, model.terminates)
    return onward, ending, (policy * model.reward).sum(axis=1)


def _may_never_end(onward: np.ndarray, ending: np.ndarray) -> np.ndarray:
    """[S] bool: the states from which the chain may run for ever."""
    edges = onward > 0
    may_end = _leading_to(edges, ending > 0)
    return _leading_to(edges, ~may_end)


def _leading_to(edges: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[S] bool: the states from which a path along `edges` [S, S] leads into `targets` [S]."""
    while True:
        grown = targets | (edges & targets).any(axis=1)
        if (grown == targets).all():
            return targets
        targets = grown


def _check_discount(gamma: float) -> None:
    if not 0.0 <= gamma <= 1.0:
        raise InputError(f"gamma = {gamma!r}: expected a value in [0, 1]")
