"""What MuZero's parts are worth: simulations, reanalysis, the search, consistency, the returns.

    python experiments/muzero_ablation.py
    python experiments/muzero_ablation.py --only "Catch.*simulations"
    python experiments/muzero_ablation.py --env DeepSea-bsuite --total-steps 10000

Every row is the preset with `BASE` and one part changed, which its title names, on the same budget
of real steps; a row is stored as soon as it has run (`learning.py`). A world of one's own goes into
files with its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import learning
import tyro
from learning import Run

WORLDS = {"Catch-bsuite": 6_000, "CartPole-v1": 15_000}
"""With their budgets of environment steps."""

BASE: dict[str, Any] = {
    "search": "gumbel",
    "num_simulations": 16,
    "value_target": "lambda",
    "reanalyse_policies": 1.0,
    "reanalyse_values": 1.0,
    "consistency": False,
}
PARTS: dict[str, dict[str, Any]] = {
    "base": {},
    **{f"simulations {n}": {"num_simulations": n} for n in (2, 8, 50)},
    **{
        f"reanalyse {share:g}": {"reanalyse_policies": share, "reanalyse_values": share}
        for share in (0.0, 0.5)
    },
    "puct": {"search": "puct"},
    "puct, simulations 50": {"search": "puct", "num_simulations": 50},
    "consistency": {"consistency": True},
    "n-step returns": {"value_target": "n_step"},
}


@dataclasses.dataclass(frozen=True)
class Options(learning.Options):
    # runs of each row
    seeds: int = 5
    # environment id, whose rows alone are run
    env: str | None = None
    # environment steps of each row of --env
    total_steps: int = 15_000


def rows(env: str, steps: int) -> Iterator[Run]:
    """The rows of a world: the base, and one for each change of a part."""
    for title, changed in PARTS.items():
        yield Run("muzero", env, steps, None, steps // 20, 10,
                  overrides={**BASE, **changed}, title=title)  # fmt: skip


RUNS = tuple(row for env, steps in WORLDS.items() for row in rows(env, steps))


def main(options: Options) -> Path:
    """Trains the rows of both worlds, or of one; -> the table's file."""
    if options.env is None:
        return learning.main("muzero_ablation", RUNS, options)
    chosen = tuple(rows(options.env, options.total_steps))
    return learning.main(f"muzero_ablation_{options.env}", chosen, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
