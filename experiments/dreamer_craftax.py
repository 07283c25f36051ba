"""Dreamer on Craftax-Classic beside PPO at equal steps, their returns written as they come.

    python experiments/dreamer_craftax.py --agent ppo --total-steps 1000000
    python experiments/dreamer_craftax.py --size 12m --train-ratio 512 --seeds 2 --seconds 3600

Dreamer has one configuration, of which size and train ratio are named; PPO has the settings of
Craftax's own baselines (Matthews et al. 2024) but for the number of environments, 1,024 there,
which would leave it 15 updates in 1,000,000 steps. Craftax needs the extra `envs`. Every evaluation
goes into the agent's record at once, and the shares of the greatest return, 22, of both agents'
records are printed beside one another at the last step that both have reached. A run is saved when
it ends, and when --seconds or a signal stops it; the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from learning import QUICK
from records import train_recorded
from rich import box
from rich.console import Console
from rich.table import Table

import mbrl_jax
from mbrl_jax.analysis.stats import bootstrap_interval, iqm

AGENTS = ("dreamer", "ppo")
# how a row tells of the policy: in episodes of evaluation, and in those that ended while it learned
MEASURES = {"eval_return": "evaluation", "train_return": "while training"}
# mean return after 1,000,000 steps in percent of 22: DreamerV3 on Crafter (danijar/crafter#26), of
# which Craftax-Classic is a remake, and others on Craftax-Classic (Dedieu et al. 2025)
PUBLISHED = {"DreamerV3 on Crafter": 53.2, "PPO with memory": 55.0, "human": 65.0}
PPO: dict[str, Any] = {
    "hidden": (512, 512, 512),
    "activation": "tanh",
    "learning_rate": 2e-4,
    "max_grad_norm": 1.0,
    "num_envs": 16,
    "num_steps": 64,
    "epochs": 4,
    "minibatches": 8,
    "gae_lambda": 0.8,
    "entropy_coef": 0.01,
}
TINY: dict[str, dict[str, Any]] = {
    "ppo": QUICK["ppo"],
    "dreamer": {
        "size": "nano", "num_envs": 4, "train_ratio": 4, "batch_size": 2, "batch_length": 8,
        "horizon": 3, "start_windows": 16, "buffer_size": 512,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    # environment id
    env: Literal["Craftax-Classic-Symbolic-v1", "Craftax-Classic-Pixels-v1"] = (
        "Craftax-Classic-Symbolic-v1"
    )
    # the other one's record is shown beside it
    agent: Literal["dreamer", "ppo"] = "dreamer"
    # of Dreamer's networks
    size: str = "12m"
    # records that Dreamer trains on for each record of the environment; the authors' for Crafter
    train_ratio: int = 512
    # records that Dreamer's replay holds; by default as many as there are steps
    buffer_size: int | None = None
    # environment steps of each seed
    total_steps: int = 1_000_000
    # independent runs
    seeds: int = 5
    # environment steps between evaluations
    eval_every: int = 50_000
    # episodes of an evaluation
    eval_episodes: int = 16
    # the run is saved and stopped at the first evaluation after so many seconds
    seconds: float | None = None
    # folder of the record
    out: Path = Path("experiments/results")
    # the run folder; by default one for each agent and environment
    run: Path | None = None
    # tiny networks and short episodes, to see that it runs
    quick: bool = False


def settings(options: Options) -> dict[str, Any]:
    """The fields of the agent's config that differ from its defaults."""
    if options.quick:
        return TINY[options.agent]
    if options.agent == "ppo":
        return {**PPO, "anneal_steps": float(options.total_steps)}
    buffer_size = options.buffer_size or options.total_steps
    return {
        "size": options.size, "train_ratio": options.train_ratio, "buffer_size": buffer_size,
    }  # fmt: skip


def label(options: Options, agent: str) -> str:
    """Of an agent's record and run folder."""
    return f"{agent}_{options.env}" + ("_quick" if options.quick else "")


def shares(record: dict[str, Any], env_steps: int, measure: str, greatest: int) -> list[float]:
    """Each seed's mean return in percent of the greatest, at the last row up to `env_steps`.

    None of a seed in which no episode has ended, or of all where there is no such row.
    """
    rows = [row for row in record["rows"] if row["env_steps"] <= env_steps]
    last = rows[-1][measure] if rows else []
    return [100.0 * value / greatest for value in last if value is not None]


def compare(records: dict[str, dict[str, Any]], greatest: int) -> Table:
    """The agents' shares at the last step that all records hold, IQM over seeds with intervals."""
    steps = min(record["rows"][-1]["env_steps"] for record in records.values())
    versions = sorted({record["craftax"] for record in records.values()})
    title = f"percent of {greatest} after {steps:,} steps, craftax {' and '.join(versions)}"
    table = Table("", "seeds", *MEASURES.values(), title=title, title_justify="left",
                  box=box.SIMPLE_HEAD)  # fmt: skip
    for agent, record in records.items():
        cells = []
        for measure in MEASURES:
            found = shares(record, steps, measure, greatest)
            if found:
                at = bootstrap_interval(np.asarray(found), statistic=iqm)
                cells.append(f"{at.point:.1f} [{at.low:.1f}, {at.high:.1f}]")
            else:
                cells.append("-")
        table.add_row(agent, str(len(record["rows"][-1]["eval_return"])), *cells)
    return table


def main(options: Options) -> int:
    """Trains, or goes on; -> 0, or 128 + the number of the signal that stopped it."""
    from mbrl_jax.envs import craftax  # which starts the backend

    limit = {"max_steps_in_episode": 50} if options.quick else {}
    paths = {agent: options.out / f"{label(options, agent)}.json" for agent in AGENTS}
    status = train_recorded(
        options.agent,
        mbrl_jax.make_env(options.env, **limit),
        paths[options.agent],
        options.run or Path("runs", "dreamer_craftax", label(options, options.agent)),
        arguments={
            name: getattr(options, name)
            for name in ("total_steps", "seeds", "eval_every", "eval_episodes")
        },
        overrides=settings(options),
        fixed={
            "craftax": craftax.version(),
            "greatest_return": craftax.ACHIEVEMENTS,
            "published_percent": PUBLISHED,
        },
        seconds=options.seconds,
        names=MEASURES,
    )
    found = {agent: path for agent, path in paths.items() if path.exists()}
    records = {agent: json.loads(path.read_text()) for agent, path in found.items()}
    if records:
        Console().print(compare(records, craftax.ACHIEVEMENTS))
    return status


if __name__ == "__main__":
    try:
        raise SystemExit(main(tyro.cli(Options, description=__doc__)))
    except mbrl_jax.InputError as error:
        raise SystemExit(f"error: {error}") from None
