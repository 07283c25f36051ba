"""SAC learns from batches of one's own, as a model-based agent feeds it.

The replay, the networks and the losses know no environment.
"""

import jax
import jax.numpy as jnp

from mbrl_jax import make_env
from mbrl_jax.agents import sac
from mbrl_jax.data import ring
from mbrl_jax.types import Transition

spec = make_env("Pendulum-v1").spec
learner = sac.make_learner(sac.Config(hidden=(64, 64), critic_hidden=(64, 64)), spec)
replay = ring.make(Transition.example(spec), capacity=4096, num_envs=4)
print(replay.num_bytes)  # 139264


@jax.jit
def learn(state, rows, key, written):
    index_key, key = jax.random.split(key)
    index = replay.sample_index(index_key, 8 * 64, written).reshape(8, 64)
    batches = replay.n_step(rows, index, 1, 0.99)  # 8 gradient steps of 64 transitions
    return learner.update(state, batches, key, jnp.int32(0))


state, metrics = learn(learner.init(jax.random.key(0)), replay.init(), jax.random.key(1), 100)
print(sorted(metrics)[:2])  # ['actor_loss', 'critic_loss']
