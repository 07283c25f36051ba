"""Presets learn, in runs as short as show it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

from learning import SMALL_DREAMER

from mbrl_jax import train
from mbrl_jax.analysis.stats import iqm


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    ("agent", "env", "total_steps", "seeds", "episodes", "least"),
    [
        ("dqn", "Catch-bsuite", 4_000, 4, 20, 0.98),
        ("ppo", "CartPole-v1", 60_000, 4, 20, 350),
        ("sac", "Pendulum-v1", 5_000, 4, 20, -250),
        ("pets", "Pendulum-v1", 1_000, 2, 2, -400),
        ("mbpo", "Pendulum-v1", 800, 2, 20, -250),
        ("muzero", "Catch-bsuite", 6_000, 1, 100, 0.7),
    ],
)
def test_presets_learn_in_a_short_run(agent, env, total_steps, seeds, episodes, least):
    """IQM of the seeds; the experiments' targets are higher, at larger budgets."""
    result = train(agent, env, total_steps, seeds, eval_every=total_steps, eval_episodes=episodes)
    assert iqm(result.history["eval_return"][:, -1]) >= least


@pytest.mark.usefixtures("optimised")
def test_dreamer_learns_in_a_short_run():
    """The small configuration of the experiments with half the batch and less imagination.

    A random policy balances for 22 steps; three seeds of this run came to 184, 285 and 288.
    """
    fields = {**SMALL_DREAMER, "learning_rate": 1e-3, "batch_size": 8, "train_ratio": 64,
              "horizon": 10}  # fmt: skip
    result = train("dreamer", "CartPole-v1", 2_000, 1, eval_every=2_000, eval_episodes=20, **fields)
    assert result.history["eval_return"][0, -1] >= 100
