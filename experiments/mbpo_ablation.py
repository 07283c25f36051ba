"""What MBPO's parts are worth: rollout length with and without truncation, real share, ensemble.

    python experiments/mbpo_ablation.py
    python experiments/mbpo_ablation.py --only "length 20"

Every row is the preset with the fields that its title names, on the same budget of real steps; a
row is stored as soon as it has run (`learning.py`). Long rollouts are those that a compounding
error ruins; MACURA's truncation cuts them where the ensemble disagrees.
"""

from __future__ import annotations

from typing import Any

import learning
import tyro
from learning import Options, Run

LENGTHS, RATIOS, MEMBERS = (1, 2, 5, 10, 20), (0.0, 0.05, 0.5, 1.0), (1, 3, 7)
BUDGETS = {"Pendulum-v1": 1_000, "ContinuousCartPole-v0": 1_000}


def rows(env: str) -> list[Run]:
    """The rows of one environment."""

    def run(title: str, **fields: Any) -> Run:
        return Run("mbpo", env, BUDGETS[env], None, 200, 10, overrides=fields, title=title)

    found = [
        run(f"length {n}{', macura' * (cut == 'macura')}", rollout_length=(n, n), truncation=cut)
        for n in LENGTHS
        for cut in ("none", "macura")
    ]
    found += [run(f"real share {ratio:g}", real_ratio=ratio) for ratio in RATIOS]
    return found + [run(f"members {n}", num_members=n, num_elites=min(n, 5)) for n in MEMBERS]


RUNS = tuple(run for env in BUDGETS for run in rows(env))


if __name__ == "__main__":
    learning.main("mbpo_ablation", RUNS, tyro.cli(Options, description=__doc__))
