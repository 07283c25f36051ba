"""No program uses a key twice: every agent's training, the searches, models and planners.

Checked on their jaxprs, since `jax_debug_key_reuse` would check each function of every test anew.
"""

import jax
import jax.numpy as jnp
import pytest
import search_worlds
from helpers import CONTINUOUS, SMALL
from jax.errors import KeyReuseError
from jax.experimental.key_reuse._core import check_key_reuse

from mbrl_jax import AGENTS, make_env, make_train, planning, search

KEY = jax.random.key(0)


def test_a_key_used_twice_is_found():
    def loop(key):
        def turn(carry, x):
            return carry + jax.random.normal(key) + jax.random.uniform(key), None

        return jax.lax.scan(turn, 0.0, jnp.arange(3))[0]

    with pytest.raises(KeyReuseError):
        check_key_reuse(jax.jit(loop), KEY)


@pytest.mark.parametrize("name", AGENTS)
def test_training(name):
    """Warm-up, periods with updates, and evaluations."""
    definition = AGENTS[name]
    continuous = "ContinuousCartPole-v0" if name == "pets" else "Pendulum-v1"
    discrete = "CartPole-v1" if name in SMALL else "FrozenLake-misc"
    env = make_env(continuous if name in (*CONTINUOUS, "pets") else discrete)
    config = definition.config_for(env.spec, **SMALL.get(name, {}))
    definition = definition._replace(config=config, presets={})
    train = make_train(definition, env, 128, 64, eval_episodes=2, eval_max_steps=5)
    check_key_reuse(train, KEY)


@pytest.mark.parametrize("policy", ["muzero_policy", "gumbel_muzero_policy"])
@pytest.mark.parametrize("batch", [1, 33])
def test_searches(policy, batch):
    params = search_worlds.world(0, 4, 0.9, 1.0)
    root = search_worlds.root_of(params, batch)

    def run(key):
        return getattr(search, policy)(params, key, root, search_worlds.model, 8)

    check_key_reuse(run, KEY)


def test_planners():
    low, high = -jnp.ones(2), jnp.ones(2)

    def value(candidates, key):
        return -jnp.sum(jnp.square(candidates - jax.random.normal(key)), axis=(1, 2))

    def plans(key):
        keys = jax.random.split(key, 3)
        return (
            planning.random_shooting(value, keys[0], 4, low, high),
            planning.cem(value, keys[1], planning.start_cem(4, low, high), low, high),
            planning.mppi(value, keys[2], planning.start_mppi(4, low, high), low, high),
        )

    check_key_reuse(plans, KEY)
