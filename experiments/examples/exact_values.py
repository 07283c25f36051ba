"""Exact values of a finite world, and a statistic over seeds with its interval."""

from mbrl_jax import analysis, envs, make_env

lake = envs.tabular(make_env("FrozenLake-misc", is_slippery=True))
values, action_values = envs.value_iteration(lake, gamma=0.99)
print(round(values[0], 4))  # 0.542
print(analysis.stats.bootstrap_interval([0.1, 0.4, 0.5, 0.9, 1.0]))  # IQM with its 95% interval
