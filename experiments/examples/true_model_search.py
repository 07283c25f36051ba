"""Search in the true environment, as AlphaZero does: the paddle of Catch catches every ball.

No value and no policy are learned. With exact values, `gumbel_muzero_policy` follows optimal paths
through FrozenLake and the Dyna maze with 4 simulations; with more, at a discount of 0.95, it does
not always, since a value is then the mean of what was tried below, good and bad (at 0.7 it does).
"""

import jax
import jax.numpy as jnp

from mbrl_jax import make_env, search
from mbrl_jax.models import latent, oracle

env = make_env("Catch-bsuite")


def evaluate(params, obs):
    return jnp.zeros((obs.shape[0], 3)), jnp.zeros(obs.shape[0])  # policy logits, values


model = oracle.latent_oracle(env, evaluate, discount=1.0)


@jax.jit
def episode(key):
    start, key = jax.random.split(key)
    params, first = oracle.OracleParams(env.params), jax.vmap(env.reset)(start[None])

    def step(now, key):
        plan_key, key = jax.random.split(key)
        root = latent.search_root(model, params, now)
        plan = search.muzero_policy(
            params, plan_key, root, latent.recurrent_fn(model), num_simulations=128, temperature=0
        )
        state, after = jax.vmap(env.step)(key[None], now[0], plan.action)
        return (state, after.obs), after.reward

    return jax.lax.scan(step, first, jax.random.split(key, 9))[1].sum()


print(episode(jax.random.key(0)))  # 1.0
