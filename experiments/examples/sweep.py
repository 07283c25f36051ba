"""A grid over seeds, epsilon and step size, as one compiled call.

A field of a config that is annotated `float` is a traced leaf: it may be vmapped.
"""

import dataclasses

import jax
import jax.numpy as jnp

import mbrl_jax

env = mbrl_jax.make_env("FrozenLake-misc", is_slippery=False)
config = mbrl_jax.AGENTS["dyna_q"].config_for(env.spec.id, planning_steps=10)
train = mbrl_jax.make_train("dyna_q", env, total_steps=2000)


def cell(key, epsilon, step_size):
    new = dataclasses.replace(config, epsilon=epsilon, step_size=step_size)
    return train(key, new)[1]["eval_return"][-1]


over_seeds = jax.vmap(cell, in_axes=(0, None, None))
over_epsilon = jax.vmap(over_seeds, in_axes=(None, 0, None))
grid = jax.jit(jax.vmap(over_epsilon, in_axes=(None, None, 0)))
keys = jax.random.split(jax.random.key(0), 16)
returns = grid(keys, jnp.array([0.05, 0.1, 0.3]), jnp.array([0.1, 0.5]))
print(returns.shape)  # (2 step sizes, 3 epsilons, 16 seeds)
