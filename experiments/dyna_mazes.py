"""The mazes of Sutton and Barto's chapter 8, over many seeds, with the exact optimum drawn in.

    python experiments/dyna_mazes.py
    python experiments/dyna_mazes.py --only fig8_2

fig8_2: planning steps speed up Dyna-Q in the Dyna maze (Example 8.1, Figure 8.2).
fig8_4: a wall closes the short way; Dyna-Q+ finds the new one sooner (Example 8.2, Figure 8.4).
fig8_5: a wall opens a shorter way; only Dyna-Q+ finds it (Example 8.3, Figure 8.5). Both with the
    agent of Exercise 8.4, whose bonus moves the choice of actions only.
sweeping: prioritised sweeping needs fewer updates than Dyna-Q to solve the Dyna maze and its
    version of twice the resolution (Example 8.4).

Source: Sutton and Barto, Reinforcement Learning: An Introduction, 2nd edition (2018), Sections 8.2
to 8.4. The book gives neither step size, kappa nor planning steps of Figures 8.4 and 8.5.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from common import Tables, exploring_optimum, histories, mean_interval, per_episode, report

from mbrl_jax.analysis import plots
from mbrl_jax.analysis.arrivals import first_reach, median_ratio, median_time
from mbrl_jax.analysis.stats import Interval, bootstrap_interval, mean
from mbrl_jax.envs import Env, hitting_time, make_env, tabular

GAMMA, EPSILON = 0.95, 0.1
ENDLESS = 10**6  # the book's episodes have no time limit

BONUS = {  # name -> (agent, fields)
    "Dyna-Q": ("dyna_q", {}),
    "Dyna-Q+, κ = 1e-4": ("dyna_q_plus", {"kappa": 1e-4}),
    "Dyna-Q+, κ = 1e-3": ("dyna_q_plus", {"kappa": 1e-3}),
    "Exercise 8.4, κ = 1e-3": ("dyna_q", {"bonus": "recency_action", "kappa": 1e-3}),
}


def optimal_steps(env: Env, epsilon: float, clock: int = 0) -> float:
    """Expected steps from the start to the goal by the optimal policy, exploring by `epsilon`."""
    model = tabular(env, clock)
    return float(model.start @ hitting_time(model, exploring_optimum(model, GAMMA, epsilon)))


def fig8_2(
    out: Path,
    seeds: int = 256,
    # environment steps in which (nearly) all seeds finish the episodes, for each n
    planning: Mapping[int, int] = {0: 14_000, 5: 8_000, 50: 8_000},
    episodes: int = 50,
) -> Tables:
    """Steps per episode in the Dyna maze, for several numbers of planning steps."""
    started = time.perf_counter()
    env = make_env("DynaMaze-sutton", max_steps_in_episode=ENDLESS)
    curves, rows = {}, {}
    for index, (n, total_steps) in enumerate(planning.items()):
        names = ("train_episodes", "train_length")
        fields = {"planning_steps": n, "gamma": GAMMA, "epsilon": EPSILON, "step_size": 0.1}
        history = histories(
            "dyna_q", env, total_steps, seeds, fields, names, index, eval_every=1, eval_episodes=0
        )
        lengths = per_episode(history, "train_length", episodes)
        # as in the book without the first episode, a random walk that would flatten the rest
        curves[f"n = {n}"] = (np.arange(2, episodes + 1), lengths[:, 1:])
        shown = (1, 2, 3, 5, 10, 20, 30)
        row = {f"episode {e}": _mean_of_present(lengths[:, e - 1]) for e in shown if e <= episodes}
        row["last 10"] = _mean_of_present(lengths[:, -10:].mean(axis=1))
        row["first episode with a mean <= 20"] = _first_below(lengths, 20.0)
        row["seeds with episodes missing"] = int(np.isnan(lengths[:, -1]).sum())
        rows[f"n = {n}"] = row
    model = tabular(env)
    uniform = np.full(model.reward.shape, 1 / model.reward.shape[1])
    exact = {
        "random walk": {"steps per episode": float(model.start @ hitting_time(model, uniform))},
        "ε-greedy optimum": {"steps per episode": optimal_steps(env, EPSILON)},
        "optimum": {"steps per episode": optimal_steps(env, 0.0)},
    }
    plots.learning_curves(
        curves,
        out / "fig8_2.png",
        title="Figure 8.2: Dyna-Q with n planning steps in the Dyna maze",
        xlabel="episode (from the second on)",
        ylabel="steps per episode",
        statistic=mean,
        references={"ε-greedy optimum": exact["ε-greedy optimum"]["steps per episode"]},
    )
    tables = {"Figure 8.2, steps per episode": rows, "exact": exact}
    return report(out, "fig8_2", tables, started, seeds=seeds, total_steps=planning)


def fig8_4(out: Path, seeds: int = 256, agents: Sequence[str] = tuple(BONUS)) -> Tables:
    """Cumulative reward in the blocking maze."""
    env = make_env("BlockingMaze-sutton", max_steps_in_episode=ENDLESS)
    return moving_maze("fig8_4", "Figure 8.4: blocking maze", env, 3000, 10, agents, out, seeds)


def fig8_5(out: Path, seeds: int = 256, agents: Sequence[str] = tuple(BONUS)) -> Tables:
    """Cumulative reward in the shortcut maze."""
    env = make_env("ShortcutMaze-sutton", max_steps_in_episode=ENDLESS)
    return moving_maze("fig8_5", "Figure 8.5: shortcut maze", env, 6000, 50, agents, out, seeds)


def moving_maze(
    name: str,
    title: str,
    env: Env,
    total_steps: int,
    planning_steps: int,
    agents: Sequence[str],
    out: Path,
    seeds: int,
) -> Tables:
    """Cumulative reward of agents in a maze whose wall moves, and whether they follow."""
    started = time.perf_counter()
    period, switch = total_steps // 120, int(env.params.switch_step)
    steps = np.arange(0, total_steps + 1, period)
    fields = {"planning_steps": planning_steps, "gamma": GAMMA, "epsilon": EPSILON, "step_size": 1}
    names = ("train_reward", "eval_return")
    check = {"eval_every": period, "eval_episodes": 1}
    # so the greedy path earns the reward only if it is as short as it now can be
    check["eval_max_steps"] = round(optimal_steps(env, 0.0, clock=switch))
    curves, rows = {}, {}
    for index, label in enumerate(agents):
        agent, changed = BONUS[label]
        history = histories(
            agent, env, total_steps, seeds, {**fields, **changed}, names, index, **check
        )
        earned = np.insert(np.cumsum(history["train_reward"], axis=1), 0, 0.0, axis=1)
        curves[label] = (steps, earned)
        rows[label] = {
            "reward at the switch": mean_interval(earned[:, switch // period]),
            "at the end": mean_interval(earned[:, -1]),
            "sd of a seed": float(earned[:, -1].std()),
            "in the last 500 steps": mean_interval(earned[:, -1] - earned[:, -1 - 500 // period]),
            "greedy path is shortest at the end": mean_interval(history["eval_return"][:, -1]),
        }
    before, after = (1 / optimal_steps(env, EPSILON, clock) for clock in (0, switch))
    line = before * np.minimum(steps, switch) + after * np.maximum(steps - switch, 0)
    # a straight line has no seeds; as many equal ones keep the figure's count of seeds
    curves["ε-greedy optimum"] = (steps, np.tile(line, (seeds, 1)))
    plots.learning_curves(
        curves,
        out / f"{name}.png",
        title=f"{title}, the wall moves at step {switch}",
        ylabel="cumulative reward",
        statistic=mean,
    )
    exact = {
        "before": {"reward per 1000 steps": 1000 * before},
        "after": {"reward per 1000 steps": 1000 * after},
    }
    tables = {f"{title}, cumulative reward": rows, "exact ε-greedy optimum": exact}
    return report(out, name, tables, started, seeds=seeds, planning_steps=planning_steps)


def sweeping(
    out: Path,
    seeds: int = 128,
    # environment steps in which nearly all seeds solve the maze, for each resolution
    budgets: Mapping[int, int] = {1: 6_000, 2: 20_000},
) -> Tables:
    """Updates until the greedy path is at most 1.2 times the shortest, looked at every 20 steps.

    Four greedy paths must all be as short, since a single one may get there by lucky ties. A seed
    that is not solved counts with all its updates, which leaves a median below it as it is.
    """
    started = time.perf_counter()
    agents = {"Dyna-Q": "dyna_q", "prioritised sweeping": "prioritised_sweeping"}
    fields = {"planning_steps": 5, "gamma": GAMMA, "epsilon": EPSILON, "step_size": 0.5}
    names = ("env_steps", "backups", "eval_return")
    panels, rows = {}, {}
    for resolution, total_steps in budgets.items():
        env = make_env("DynaMaze-sutton", resolution=resolution, max_steps_in_episode=ENDLESS)
        check = {"eval_every": 20, "eval_episodes": 4}
        check["eval_max_steps"] = int(1.2 * round(optimal_steps(env, 0.0)))
        reached, limits, row = [], [], {}
        for index, (label, agent) in enumerate(agents.items()):
            history = histories(agent, env, total_steps, seeds, fields, names, index, **check)
            # "backups" is the mean over the steps of a period
            updates = np.cumsum(20 * history["backups"].astype(float), axis=1)
            steps = first_reach(history["env_steps"][0], history["eval_return"], 1.0)
            at = np.minimum(steps / 20, updates.shape[1]).astype(int) - 1
            # a seed that does not get there counts as infinite, not with its budget
            needed = np.where(np.isfinite(steps), updates[np.arange(seeds), at], np.inf)
            reached.append(needed)
            limits.append(updates[:, -1])
            row[f"{label}: updates"] = median_time(needed)
            row[f"{label}: environment steps"] = float(np.median(steps))
            row[f"{label}: seeds solved"] = mean_interval(np.isfinite(steps))
        row["ratio of updates"] = median_ratio(*reached, *limits)
        title = f"{env.spec.num_obs} states"
        rows[title] = row
        panels[title] = {label: row[f"{label}: updates"] for label in agents}
    plots.interval_plot(
        panels,
        out / "sweeping.png",
        title="Example 8.4: updates until the Dyna maze is solved",
        xlabel=f"updates, median of {seeds} seeds and 95 % bootstrap interval",
    )
    tables = {"Example 8.4, medians until the greedy path is <= 1.2 x the shortest": rows}
    return report(out, "sweeping", tables, started, seeds=seeds, total_steps=budgets)


def _mean_of_present(values: np.ndarray) -> Interval:
    return mean_interval(values[~np.isnan(values)])


def _first_below(lengths: np.ndarray, threshold: float) -> Interval:
    """The first episode whose mean over seeds is at most `threshold`; whole seeds are redrawn."""

    def first(drawn: np.ndarray) -> np.ndarray:
        means = np.nanmean(lengths[drawn[..., 0].astype(int)], axis=-2)
        low = means <= threshold
        return np.where(low.any(axis=-1), low.argmax(axis=-1) + 1.0, np.inf)

    return bootstrap_interval(np.arange(len(lengths)), first, replicates=500)


FIGURES: dict[str, Callable[..., Tables]] = {
    "fig8_2": fig8_2,
    "fig8_4": fig8_4,
    "fig8_5": fig8_5,
    "sweeping": sweeping,
}


def main(
    seeds: int | None = None,
    out: Path = Path("experiments/results"),
    only: Literal["fig8_2", "fig8_4", "fig8_5", "sweeping"] | None = None,
) -> None:
    """The figures of chapter 8.

    Args:
      seeds: runs of each agent; by default 256, and 128 for sweeping, which takes the longest.
      out: folder of the figures and tables.
      only: one of the figures; all by default.
    """
    for name, figure in FIGURES.items():
        if only in (None, name):
            figure(out) if seeds is None else figure(out, seeds)


if __name__ == "__main__":
    tyro.cli(main)
