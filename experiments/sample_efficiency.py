"""Real steps and seconds that SAC, DroQ and MBPO need, with the same networks and warm-up.

    python experiments/sample_efficiency.py
    python experiments/sample_efficiency.py --only Pendulum

All arms but one have MBPO's preset for the policy, the critics and the warm-up. "SAC" makes one
update a step, "SAC, 20 updates" as many as MBPO, which is the honest ablation of the model, and
"DroQ" as many with its dropout critics. "SAC, its own preset" is what a user of SAC alone would
run (one update a step; not for HalfCheetah, for which SAC has none). HalfCheetah is smaller than in
the paper (`learning.CHEETAH`). A row is stored as soon as it has run (`learning.py`).

Steps to a threshold are those of a seed's first evaluation at or above it, infinite without one;
the ratio is that of the medians over seeds (`analysis.arrivals`): infinite where half of an arm's
seeds never reach it, 0 where half of MBPO's do not, and undetermined where both do not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import learning
import numpy as np
import tyro
from learning import CHEETAH, Options, Run

from mbrl_jax.agents import AGENTS
from mbrl_jax.analysis import plots
from mbrl_jax.analysis.arrivals import first_reach, median_ratio, steps_to_threshold

THRESHOLDS = {"Pendulum-v1": -200.0, "ContinuousCartPole-v0": 475.0, "HalfCheetah-v5": 500.0}
# steps of SAC and of the others, evaluation of both, and episodes of one evaluation
BUDGETS = {
    "Pendulum-v1": (10_000, 2_000, 100, 10),
    "ContinuousCartPole-v0": (20_000, 2_000, 200, 10),
    "HalfCheetah-v5": (10_000, 10_000, 1_500, 2),
}


def arms(env: str) -> list[Run]:
    """The rows of one environment."""
    reduced = CHEETAH if env == "HalfCheetah-v5" else {}
    settings: dict[str, Any] = {**AGENTS["mbpo"].presets[env], **reduced}
    shared = {**settings["sac"], "warmup_steps": settings["warmup_steps"], "buffer_size": 50_000}
    many = AGENTS["mbpo"].config_for(env, **reduced).updates
    droq = {"critic": "dropout", "layer_norm": True, "actor_value": "mean"}
    slow, fast, every, episodes = BUDGETS[env]
    target = THRESHOLDS[env]

    def sac(steps: int, title: str, **fields: Any) -> Run:
        batch = {"batch_size": settings["batch_size"]}
        return Run("sac", env, steps, target, every, episodes,
                   overrides={**shared, **batch, **fields}, title=title)  # fmt: skip

    own = Run("sac", env, slow, target, every, episodes, title="SAC, its own preset")
    return [
        *([own] if env in AGENTS["sac"].presets else []),
        sac(slow, "SAC"),
        sac(fast, f"SAC, {many} updates", updates=many),
        sac(fast, f"DroQ, {many} updates", updates=many, **droq),
        Run("mbpo", env, fast, target, every, episodes, overrides=reduced, title="MBPO"),
    ]


RUNS = tuple(run for env in THRESHOLDS for run in arms(env))


def main(options: Options) -> None:
    """Trains the chosen rows, and compares all that are stored."""
    started = time.perf_counter()
    compare(learning.main("sample_efficiency", RUNS, options), started)


def compare(path: Path, started: float) -> None:
    """Figures over steps and seconds, and the table of steps to the threshold beside the runs."""
    from common import report

    stored = json.loads(path.read_text())["runs"]
    tables: Any = {}
    for env, threshold in THRESHOLDS.items():
        found = {
            key.split(maxsplit=3)[3]: record
            for key, record in stored.items()
            if key.split()[1] == env
        }
        if not found:
            continue
        by_steps, by_seconds = {}, {}
        for title, record in found.items():
            steps, returns = np.array(record["env_steps"]), np.array(record["eval_return"])
            seconds = steps / steps[-1] * record["made"]["wall_seconds"] / len(returns)
            by_steps[title], by_seconds[title] = (steps, returns), (seconds, returns)
        stem = path.with_name(f"{path.stem}_{env.split('-')[0].lower()}")
        more = {"title": f"{env}: greedy return", "references": {"threshold": threshold}}
        plots.learning_curves(by_steps, stem, xlabel="real environment steps", **more)
        plots.learning_curves(
            by_seconds, stem.with_name(f"{stem.name}_seconds"),
            xlabel="seconds a seed, evaluation and compilation included", **more,
        )  # fmt: skip
        tables[f"{env}: real steps to {threshold:g}"] = {
            title: efficiency(by_steps, title, threshold) for title in by_steps
        }
    report(path.parent, f"{path.stem}_steps", tables, started)


def efficiency(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str, threshold: float
) -> dict[str, Any]:
    """One column: the median of the steps, and its ratio to MBPO's."""
    steps, returns = curves[title]
    row: dict[str, Any] = {
        "median of the first step there": steps_to_threshold(steps, returns, threshold),
        "seeds that reach it": f"{int((returns >= threshold).any(axis=1).sum())} of {len(returns)}",
        "budget": int(steps[-1]),
    }
    if "MBPO" in curves and title != "MBPO":
        arms = [curves[title], curves["MBPO"]]
        reach = [first_reach(*arm, threshold) for arm in arms]
        ratio = median_ratio(*reach, *(int(arm[0][-1]) for arm in arms))
        row["times MBPO's steps"] = "undetermined" if np.isnan(ratio.point) else ratio
    return row


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
