"""What MBPO's parts are worth: rollout length with and without truncation, real share, ensemble.

    python experiments/mbpo_ablation.py
    python experiments/mbpo_ablation.py --only "length 20"

Every row is the preset with the fields that its title names, on the same budget of real steps; a
row is stored as soon as it has run (`learning.py`). Long rollouts are those that a compounding
error ruins; MACURA's truncation cuts them where the ensemble disagrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import learning
import tyro
from learning import CHEETAH, Options, Run

LENGTHS, RATIOS, MEMBERS = (1, 2, 5, 10, 20), (0.0, 0.05, 0.5, 1.0), (1, 3, 7)


def rows(env: str, steps: int, lengths: Sequence[int], note: str = "", **shared: Any) -> list[Run]:
    """The rows of rollout lengths of one environment."""
    episodes = 2 if shared else 10
    return [
        Run("mbpo", env, steps, None, steps, episodes,
            overrides={**shared, "rollout_length": (n, n), "truncation": cut},
            title=f"length {n}{', macura' * (cut == 'macura')}{note}")
        for n in lengths
        for cut in ("none", "macura")
    ]  # fmt: skip


def parts(env: str, steps: int) -> list[Run]:
    """The rows of real shares and of ensembles."""
    fields = [(f"real share {ratio:g}", {"real_ratio": ratio}) for ratio in RATIOS]
    fields += [(f"members {n}", {"num_members": n, "num_elites": min(n, 3)}) for n in MEMBERS]
    return [
        Run("mbpo", env, steps, None, steps, 10, overrides=overrides, title=title)
        for title, overrides in fields
    ]


CARTPOLE = ("ContinuousCartPole-v0", 600)
RUNS = (
    *rows(*CARTPOLE, LENGTHS),
    *parts(*CARTPOLE),
    *rows("HalfCheetah-v5", 6_000, (1, 20), **CHEETAH),
    # as in the paper, where predictions may leave the range of the data
    *rows("HalfCheetah-v5", 4_000, (1, 50), ", no clipping", **CHEETAH, clip_margin=1e6),
)


if __name__ == "__main__":
    learning.main("mbpo_ablation", RUNS, tyro.cli(Options, description=__doc__))
