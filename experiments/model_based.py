"""The model-based agents on small tasks: greedy return within a budget of real steps.

    python experiments/model_based.py
    python experiments/model_based.py --only "pets Pendulum"

Agents with their presets (`PRESETS` in `mbrl_jax/agents/`), at least 5 seeds each. How a row is
stored and judged: `learning.py`.
"""

from __future__ import annotations

import learning
import tyro
from learning import Options, Run

RUNS = (
    Run("pets", "Pendulum-v1", 1_200, -200, 200, eval_episodes=10),
    Run("pets", "ContinuousCartPole-v0", 2_000, 475, 900, eval_episodes=5),
    # the starts decide so much of a return that ten would leave 10 of noise in the IQM
    Run("mbpo", "Pendulum-v1", 2_000, -160, 200, eval_episodes=50),
    Run("mbpo", "ContinuousCartPole-v0", 2_000, 475, 200, eval_episodes=10),
)


if __name__ == "__main__":
    learning.main("model_based", RUNS, tyro.cli(Options, description=__doc__))
