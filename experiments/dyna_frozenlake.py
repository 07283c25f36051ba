"""Dyna-Q on the deterministic FrozenLake: what planning is worth once the goal has been seen.

    python experiments/dyna_frozenlake.py

With values of 0 and ties broken at random, every agent walks at random until it first meets the
goal, in half of the runs within 49 episodes, whatever its planning steps: a model without reward
plans nothing. From then on planning shows. 50 steps carry the reward back to the start at once,
5 steps within ten episodes, and plain Q-learning takes more than a hundred. So the table and the
second figure count from the first goal on.

Method: Sutton and Barto, Reinforcement Learning, 2nd edition (2018), Section 8.2. Environment:
gymnax's FrozenLake 4x4 without slipping.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from common import Tables, exploring_optimum, histories, mean_interval, per_episode, report

from mbrl_jax.analysis import plots
from mbrl_jax.analysis.arrivals import steps_to_threshold
from mbrl_jax.analysis.stats import Interval, mean
from mbrl_jax.envs import make_env, policy_evaluation, tabular

GAMMA, EPSILON = 0.99, 0.1


def main(
    seeds: int = 256,
    out: Path = Path("experiments/results"),
    episodes: int = 500,
    total_steps: int = 6000,
    planning: Sequence[int] = (0, 5, 50),
) -> Tables:
    """Success over episodes and after the first goal, for several numbers of planning steps.

    Args:
      seeds: runs of each agent.
      out: folder of the figures and of the table.
      episodes: episodes that are kept of each run, whole tens.
      total_steps: environment steps of each run, enough for all these episodes.
      planning: planning steps to compare.
    """
    started = time.perf_counter()
    env = make_env("FrozenLake-misc", is_slippery=False)
    curves, aligned, rows = {}, {}, {}
    for n in planning:
        fields = {"planning_steps": n, "gamma": GAMMA, "epsilon": EPSILON, "step_size": 0.1}
        names = ("train_episodes", "train_return")
        # the same keys for every n, so that all meet the goal first in the very same episode
        history = histories(
            "dyna_q", env, total_steps, seeds, fields, names, eval_every=1, eval_episodes=0
        )
        success = per_episode(history, "train_return", episodes)
        missing = np.isnan(success[:, -1]).sum()
        if missing:
            raise SystemExit(
                f"n = {n}: {missing} of {seeds} seeds had fewer than {episodes} episodes in "
                f"{total_steps} steps; raise --total-steps"
            )
        after = after_first_goal(success, 100)
        rows[f"n = {n}"] = summary(success, after)
        curves[f"n = {n}"] = binned(success, 10)
        aligned[f"n = {n}"] = binned(after, 5)
    model = tabular(env)
    # undiscounted, the value of the start is the chance of reaching the goal
    explore = exploring_optimum(model, GAMMA, EPSILON)
    ceiling = float(model.start @ policy_evaluation(model, explore, 1.0))
    uniform = np.full(model.reward.shape, 1 / model.reward.shape[1])
    luck = float(model.start @ policy_evaluation(model, uniform, 1.0))
    median = float(np.log(0.5) / np.log1p(-luck))
    references = {"ε-greedy optimum": ceiling}
    draw = partial(plots.learning_curves, statistic=mean, references=references)
    draw(
        curves,
        out / "dyna_frozenlake.png",
        title="Deterministic FrozenLake: Dyna-Q with n planning steps",
        xlabel="episode",
        ylabel="success rate in 10 episodes",
    )
    draw(
        aligned,
        out / "dyna_frozenlake_after_goal.png",
        title="After the first goal: Dyna-Q with n planning steps",
        xlabel="episodes after the first goal",
        ylabel="success rate in 5 episodes",
    )
    tables = {
        "FrozenLake 4x4, not slippery": rows,
        "exact": {
            "random walk": {"success of an episode": luck, "first goal episode, median": median},
            "ε-greedy optimum": {"success of an episode": ceiling},
        },
    }
    return report(out, "dyna_frozenlake", tables, started, seeds=seeds, total_steps=total_steps)


def after_first_goal(success: np.ndarray, count: int) -> np.ndarray:
    """The `count` episodes after each seed's first goal, [seeds, count]; NaN past the last one."""
    after = np.full((len(success), count), np.nan)
    for row, seed in zip(after, success, strict=True):
        # without a goal there is nothing after it
        tail = seed[seed.argmax() + 1 :][:count] if seed.any() else seed[:0]
        row[: len(tail)] = tail
    return after


def binned(success: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A curve of the rates in every `width` episodes, at the last of them."""
    rates = success.reshape(len(success), -1, width).mean(axis=-1)
    return np.arange(1, rates.shape[1] + 1) * width, rates


def summary(success: np.ndarray, after: np.ndarray) -> dict[str, Interval | int]:
    """The row of one agent, given all its episodes and those after the first goal."""
    number = np.arange(1, success.shape[1] + 1)
    row = {"first goal episode, median": steps_to_threshold(number, success, 1.0)}
    whole = ~np.isnan(after[:, :50]).any(axis=1)
    for window in (10, 50):
        rates = after[whole, :window].mean(axis=1)
        row[f"success in the {window} episodes after it"] = mean_interval(rates)
    row["seeds with all these episodes"] = int(whole.sum())
    row["success in the last 100 episodes"] = mean_interval(success[:, -100:].mean(axis=1))
    return row


if __name__ == "__main__":
    tyro.cli(main)
