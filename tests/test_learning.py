"""Presets learn, in runs as short as show it."""

import pytest

from mbrl_jax import train
from mbrl_jax.analysis.stats import iqm


@pytest.mark.parametrize(
    ("agent", "env", "total_steps", "seeds", "episodes", "least"),
    [
        ("dqn", "Catch-bsuite", 4_000, 4, 20, 0.98),
        ("ppo", "CartPole-v1", 60_000, 4, 20, 350),
        ("sac", "Pendulum-v1", 5_000, 4, 20, -250),
        ("pets", "Pendulum-v1", 1_000, 2, 2, -400),
        ("mbpo", "Pendulum-v1", 800, 2, 20, -250),
    ],
)
def test_presets_learn_in_a_short_run(agent, env, total_steps, seeds, episodes, least):
    """IQM of the seeds; the experiments' targets are higher, at larger budgets."""
    result = train(agent, env, total_steps, seeds, eval_every=total_steps, eval_episodes=episodes)
    assert iqm(result.history["eval_return"][:, -1]) >= least
