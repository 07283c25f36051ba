"""Values and policies that the deep agents learn in worlds that are solved exactly.

All worlds of an agent, and two seeds of each, are one compiled program.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import OPTIMISED, STATES, make, probes

from mbrl_jax import AGENTS, make_train
from mbrl_jax.agents import dqn, dreamer, ppo, sac
from mbrl_jax.agents.dreamer_config import model_of
from mbrl_jax.models import rssm_heads
from mbrl_jax.nn import networks
from mbrl_jax.nn.two_hot import symexp_bins, two_hot_mean

GAMMA, SEEDS = 0.9, 2
PROBES = probes(GAMMA)
TABLES = jax.tree.map(lambda *x: np.stack(x), *(world.table for world in PROBES.values()))
OBS = np.eye(STATES, dtype=np.float32)


def trained(name, discrete, total_steps, **fields):
    """(config, parameters [worlds, SEEDS, ...], spec) after training."""
    cfg = AGENTS[name].config_for("", gamma=GAMMA, hidden=(32,), **fields)
    definition = AGENTS[name]._replace(config=cfg)

    def one(key, table):
        env = make(table, discrete)
        train = make_train(definition, env, total_steps, total_steps, eval_episodes=0)
        return train(key)[0]

    run = jax.jit(jax.vmap(jax.vmap(one, in_axes=(0, None)), in_axes=(None, 0)))
    state = run(jax.random.split(jax.random.key(0), SEEDS), TABLES)
    params = state.learner.params if name == "sac" else state.params
    return cfg, params, make(TABLES, discrete).spec


def over_runs(function, params):
    return np.asarray(jax.jit(jax.vmap(jax.vmap(function)))(params))


def check(learned, exact, rtol, atol):
    """`learned` [worlds, SEEDS, S, ...] against `exact(world)`, in the states that are visited."""
    for (name, world), runs in zip(PROBES.items(), learned, strict=True):
        for run in runs:
            np.testing.assert_allclose(
                run[world.visited], exact(world), rtol=rtol, atol=atol, err_msg=name
            )


def check_choices(chance, least):
    """Where one action is better it has at least the chance `least`."""
    matters = 0
    for (name, world), runs in zip(PROBES.items(), chance, strict=True):
        for place, best in zip(world.visited, world.best, strict=True):
            if best >= 0:
                taken = runs[:, place] if best == 1 else 1 - runs[:, place]
                assert (taken >= least).all(), (name, place, taken)
                matters += 1
    assert matters == 5


def test_dqn_learns_the_exact_action_values():
    cfg, params, spec = trained(
        "dqn", True, 3_000, learning_rate=2e-3, num_envs=4, steps_per_update=1, batch_size=32,
        buffer_size=2_000, warmup_steps=200, target_period=1, tau=0.2, n_step=1,
        epsilon_final=0.2, epsilon_steps=1000.0, prioritised=False,
    )  # fmt: skip
    network = dqn.QNetwork(spec, cfg.hidden, cfg.activation, cfg.duelling)
    q = over_runs(lambda params: network.apply(params, OBS), params)
    check(q, lambda world: world.q[world.visited], rtol=0.01, atol=0.03)


def test_sac_learns_the_exact_values_and_the_best_actions():
    cfg, params, spec = trained(
        "sac", False, 3_000, critic_hidden=(32,), learning_rate=3e-3, critic_learning_rate=3e-3,
        num_envs=4, batch_size=32, buffer_size=2_000, warmup_steps=400, tau=0.15,
        learn_temperature=False, temperature=1e-3,
    )  # fmt: skip
    critic = networks.ContinuousCritic(
        spec, cfg.critic_hidden, cfg.activation, cfg.layer_norm, cfg.critic
    )
    policy = sac.make_learner(cfg, spec).policy

    def values(params):
        action = policy(params.actor, OBS).mode()
        each = jax.vmap(lambda one: critic.apply({"params": one}, OBS, action))(params.critic)
        return jnp.mean(each, axis=0)

    # the entropy is worth 0.001 times its nats at each step
    check(over_runs(values, params), lambda world: world.values, rtol=0.04, atol=0.06)
    actions = over_runs(lambda params: policy(params.actor, OBS).mode()[:, 0], params)
    check_choices((actions + 1) / 2, 0.95)


@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "continuous"])
def test_ppo_learns_the_exact_values_and_the_best_actions(discrete):
    cfg, params, spec = trained(
        "ppo", discrete, 20_000, num_envs=16, num_steps=16, epochs=4, minibatches=2,
        learning_rate=5e-3, gae_lambda=0.9, value_clip=False,
    )  # fmt: skip
    actor = networks.PolicyNetwork(spec, cfg.hidden, cfg.activation)
    values = over_runs(lambda params: ppo.values(cfg, spec, params.critic, OBS), params)
    check(values, lambda world: world.values, rtol=0.02, atol=0.05)

    def chance(params):
        out = actor.apply(params.actor, OBS)
        if discrete:
            return jax.nn.softmax(out)[:, 1]
        return (jnp.clip(out[0][:, 0], -1.0, 1.0) + 1.0) / 2.0

    check_choices(over_runs(chance, params), 0.95)


@pytest.mark.slow
def test_dreamer_learns_the_exact_values_and_the_best_actions():
    """One world, in which the first action decides what the second one may earn."""
    world, num = PROBES["an action leads to the reward of the next"], 64
    env = make(jax.tree.map(jnp.asarray, world.table), True)
    cfg = AGENTS["dreamer"].config_for(
        "", gamma=GAMMA, size="nano", num_envs=4, batch_size=4, batch_length=8, train_ratio=8,
        horizon=3, start_windows=64, buffer_size=8_000, learning_rate=3e-3, warmup_updates=20.0,
        entropy_scale=3e-3,
    )  # fmt: skip
    train = make_train("dreamer", env, 3_000, 3_000, eval_episodes=0)
    state, _ = jax.jit(train, compiler_options=OPTIMISED)(jax.random.key(0), cfg)
    model = model_of(cfg, env.spec)

    @jax.jit
    def judge(state, memory, obs, is_first, key):
        _, memory, _ = dreamer.act(
            cfg, env.spec, state, memory, obs, is_first, key, jnp.int32(0), "train"
        )
        logits = rssm_heads.head(state.params["critic"], *memory.latent, model.dtype)
        policy = dreamer.act_in(cfg, model, state.params["actor"], memory.latent)
        value = jnp.mean(two_hot_mean(logits, symexp_bins()))
        return memory, value, jnp.mean(jnp.exp(policy.log_probs["action"][:, 1]))

    memory, first = dreamer.init_memory(cfg, env.spec, num), np.ones(num, bool)
    for place, value, best in zip(world.visited, world.values, world.best, strict=True):
        obs, key = np.tile(OBS[place], (num, 1)), jax.random.key(place)
        memory, found, chance = judge(state, memory, obs, first, key)
        # the action that has led to the next place
        memory = memory._replace(action=jnp.tile(jnp.eye(2)[0], (num, 1)))
        first = ~np.ones(num, bool)
        np.testing.assert_allclose(found, value, atol=0.15)
        assert (chance if best == 1 else 1 - chance) >= 0.95
