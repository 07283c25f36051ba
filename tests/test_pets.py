"""PETS: what it plans is what the planner plans, and nothing of an episode outlives it."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, assert_same
from test_fit import selected_in_gradient_steps

from mbrl_jax import AGENTS, InputError, make_env, planning
from mbrl_jax.agents import make_agent, pets
from mbrl_jax.models import ensemble
from mbrl_jax.types import EnvSpec, Step, Transition

PENDULUM = make_env("Pendulum-v1").spec
CARTPOLE = make_env("CartPole-v1").spec


def config(spec=PENDULUM, **fields):
    return AGENTS["pets"].config_for(spec.id, **{**SMALL["pets"], **fields})


def batch(spec, num, seed=0):
    """A step of `num` environments with random numbers."""
    rng = np.random.default_rng(seed)
    example = Transition.example(spec)

    def fill(leaf):
        if leaf.dtype == bool:
            return np.zeros((num, *leaf.shape), bool)
        if leaf.dtype == jnp.int32:
            return np.int32(rng.integers(0, 2, (num, *leaf.shape)))
        return np.float32(rng.uniform(-1, 1, (num, *leaf.shape)))

    never = np.zeros(num, bool)
    return Step(*jax.tree.map(fill, example), never, never)


@cache
def after_training(spec, buffer_size=64):
    """The state once 32 random steps are observed and learned from; the same for all planners."""
    agent = make_agent("pets", spec, config(spec, buffer_size=buffer_size))
    steps = jax.tree.map(lambda *x: np.stack(x), *(batch(spec, 1, t) for t in range(32)))

    def observe(state, x):
        return agent.observe(state, x[0], (), x[1]), None

    def run(key):
        times = jnp.arange(32, dtype=jnp.int32)
        state, _ = jax.lax.scan(observe, agent.init(key), (steps, times))
        return agent.update(state, jax.random.fold_in(key, 0), jnp.int32(31), jnp.int32(0))[0]

    return jax.jit(run)(jax.random.key(0))


@pytest.mark.parametrize("planner", ["cem", "icem", "mppi", "random_shooting", "categorical"])
def test_actions_are_those_of_the_planner_and_nothing_outlives_an_episode(planner):
    spec = CARTPOLE if planner == "categorical" else PENDULUM
    cfg = config(spec, **({} if planner == "categorical" else {"planner": planner}))
    agent = make_agent("pets", spec, cfg)
    state = after_training(spec)
    obs = batch(spec, 2, 99).obs
    act = jax.jit(
        lambda memory, first, key: agent.act(
            state, memory, obs, first, key, jnp.int32(32), "train"
        )[:2]
    )
    first = jnp.ones(2, bool)
    action, memory = act(agent.init_memory(2), first, jax.random.key(5))
    again, _ = act(memory, first, jax.random.key(5))
    np.testing.assert_array_equal(action, again, err_msg="an episode's start forgets the last one")
    if planner != "random_shooting":
        warm, _ = act(memory, ~first, jax.random.key(5))
        assert (warm != action).any() or planner == "categorical", "the plan is warm-started"

    models = ensemble.make(cfg.model, spec, cfg.num_members, cfg.num_members)
    start, plan = pets.make_planner(cfg, spec)

    def by_hand(obs, key):
        value = planning.model_value(models.model("tsinf"), state.params, obs, cfg.particles)
        again = pets.plan_action(cfg, spec, state.params, obs, start, jax.random.clone(key))
        return plan(value, key, start).action + 0 * again.action

    expected = jax.jit(jax.vmap(by_hand))(obs, jax.random.split(jax.random.key(5), 2))
    np.testing.assert_allclose(action, expected, rtol=1e-5, atol=1e-5)
    assert action.shape == (2, *spec.action_shape)


def test_random_steps_of_vmapped_seeds_plan_nothing():
    """No product with the model's weights, and the plan starts anew after them."""
    agent = make_agent("pets", PENDULUM, config())
    keys = jax.random.split(jax.random.key(0), 4)
    states = jax.eval_shape(jax.vmap(agent.init), keys)
    obs, first = jnp.zeros((4, 2, 3)), jnp.zeros((4, 2), bool)
    memory = jax.vmap(lambda key: agent.init_memory(2))(keys)

    def act(mode):
        one = lambda *args: agent.act(*args, jnp.int32(5), mode)  # noqa: E731
        return jax.make_jaxpr(jax.vmap(one))(states, memory, obs, first, keys)

    assert "dot_general" not in str(act("random"))
    assert "cond" not in str(act("random"))
    assert "dot_general" in str(act("train"))


def test_until_the_first_training_actions_are_random_also_in_training():
    """SMALL has 16 steps of warm-up and trains after 8 more; under vmapped seeds it is a branch."""
    agent = make_agent("pets", PENDULUM, config())
    state = jax.jit(jax.vmap(agent.init))(jax.random.split(jax.random.key(0), 2))
    obs, first, keys = (
        jnp.zeros((2, 3, 3)),
        jnp.zeros((2, 3), bool),
        jax.random.split(jax.random.key(1), 2),
    )
    memory = jax.vmap(lambda key: agent.init_memory(3))(keys)

    def act(mode, t):
        one = lambda *args: agent.act(*args[:-1], args[-1], mode)[:2]  # noqa: E731
        return jax.vmap(one, (0, 0, 0, 0, 0, None))(state, memory, obs, first, keys, t)

    until = jax.jit(partial(act, "train"))
    with jax.debug_key_reuse(False):  # the same draws are compared
        drawn = jax.jit(partial(act, "random"))(jnp.int32(23))
        assert_same(until(jnp.int32(23)), drawn)
        assert (np.asarray(until(jnp.int32(24))[0]) != np.asarray(drawn[0])).all()
        jaxpr = str(jax.make_jaxpr(partial(act, "train"))(jnp.int32(23)))
    assert "cond[" in jaxpr, "a select would plan in vain"


def test_training_of_four_vmapped_seeds_selects_no_parameters():
    cfg = config(model={"hidden": (13, 11), "weight_decay": (1e-5,)}, training={"batch_size": 7})
    agent = make_agent("pets", PENDULUM, cfg)
    keys = jax.random.split(jax.random.key(0), 4)
    states = jax.eval_shape(jax.vmap(agent.init), keys)
    update = jax.vmap(agent.update, (0, 0, None, None))
    jaxpr = jax.make_jaxpr(update)(states, keys, jnp.int32(31), jnp.int32(0)).jaxpr
    assert selected_in_gradient_steps(jaxpr, states.params.net) == (1, [])


def test_the_model_learns_only_from_what_was_observed():
    """Rows of the buffer that are not written change nothing."""
    states = [after_training(PENDULUM, size) for size in (32, 64)]
    scaling = [state.params.scaling for state in states]
    rows = [batch(PENDULUM, 1, t) for t in range(32)]
    seen = np.concatenate([row.obs for row in rows])
    for part in scaling:
        assert (np.asarray(part.obs_low) >= seen.min(0) - 1e-6).all()
        assert (np.asarray(part.obs_high) <= seen.max(0) + 1e-6).all()
        spread = np.asarray(part.x_std)[: seen.shape[1]]
        np.testing.assert_allclose(spread, seen.std(0), rtol=0.5)


def test_what_pets_cannot_do_is_refused():
    pixels = EnvSpec("pixels", (8, 8, 3), "uint8", 9, num_actions=2)
    cases = [
        (pixels, {}, r"float32 vectors; pixels has shape \(8, 8, 3\)"),
        (PENDULUM, {"num_elites": 9}, "num_elites = 9: expected at most num_samples = 8"),
        (PENDULUM, {"num_envs": 3}, "capacity = 64 with num_envs = 3"),
        (PENDULUM, {"horizon": 0}, r"horizon = 0: expected a value in \[1, inf\)"),
        (PENDULUM, {"warmup_steps": 1}, r"warmup_steps = 1: expected a value in \[2, inf\)"),
        (PENDULUM, {"warmup_steps": 100}, "warmup_steps = 100: expected at most buffer_size = 64"),
        (PENDULUM, {"warmup_steps": 4}, "warmup_steps = 4: too few for a holdout of 0.2"),
        (PENDULUM, {"propagation": "moment_matching"}, "one of 'ts1', 'tsinf'"),
        (PENDULUM, {"planner": "grid"}, "planner = 'grid': expected one of 'cem'"),
    ]
    for spec, fields, said in cases:
        with pytest.raises(InputError, match=said):
            make_agent("pets", spec, config(spec, **fields))
    unbounded = EnvSpec("free", (3,), "float32", 9, action_low=(-np.inf,), action_high=(1.0,))
    with pytest.raises(InputError, match="PETS needs bounded actions"):
        make_agent("pets", unbounded, config(unbounded))


def test_presets_are_of_known_environments():
    for env_id in pets.PRESETS:
        make_agent("pets", make_env(env_id).spec, AGENTS["pets"].config_for(env_id))
