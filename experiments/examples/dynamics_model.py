"""An ensemble of dynamics models on arrays of one's own: training, rollouts, planning.

A spec tells the shapes. A known reward and termination would judge the prediction as it is stored,
clipped to the range of the data. A rollout of B rows and T depths of D observations and A actions
keeps T B (8 D + 4 A + 11) bytes, which the tests check in the compiled program; `rollout.unroll`
writes each depth into a replay instead.
"""

import jax
import jax.numpy as jnp

from mbrl_jax import planning
from mbrl_jax.models import dynamics, ensemble, fit, rollout
from mbrl_jax.types import EnvSpec, Transition

spec = EnvSpec("mine", (3,), "float32", 100, action_low=(-1.0,), action_high=(1.0,))
keys = jax.random.split(jax.random.key(0), 7)
obs = jax.random.normal(keys[0], (1000, 3))
action = jax.random.uniform(keys[1], (1000, 1), minval=-1.0)
next_obs = 0.9 * obs + 0.1 * action
never = jnp.zeros(1000, bool)
data = Transition(obs, action, -jnp.square(next_obs).sum(-1), next_obs, never, never)

config = dynamics.Config(hidden=(64, 64), weight_decay=(1e-5,), termination="never")
models = ensemble.make(config, spec, num_members=5, num_elites=3)
training = fit.Config(max_epochs=20)
fit.check(models.dynamics, training, data, 1000)  # one clear line for what does not fit


@jax.jit
def learn(key, data):
    init_key, fit_key = jax.random.split(key)
    params = models.init(init_key)
    return models.fit(params, models.init_opt(params), training, data, jnp.int32(1000), fit_key)


params, opt, curves = learn(keys[2], data)
said = models.model("ts1", score="std").predict(params, obs, action, keys[3])
print(said.next_obs.shape, said.disagreement.shape)  # (1000, 3) (1000,)


def policy(obs, key, depth):
    return jax.random.uniform(key, (obs.shape[0], 1), minval=-1.0)


imagined = rollout.rollout(models.model("ts1"), params, obs, policy, keys[4], max_length=5)
print(imagined.transition.obs.shape)  # (5, 1000, 3), the depths first

low, high = jnp.array([-1.0]), jnp.array([1.0])
value = planning.model_value(models.model("tsinf"), params, obs[0], particles=20)
start = planning.start_cem(10, low, high)  # the next step's is best.plan
best = planning.cem(value, keys[5], start, low, high, 100, 10, iterations=4)
print(best.action.shape)  # (1,)
