"""MuZero as an agent: what it records, what it refuses, what it says of itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from helpers import SMALL

from mbrl_jax import AGENTS, InputError, make_agent, make_env, train
from mbrl_jax.agents import muzero, muzero_config
from mbrl_jax.agents.muzero_presets import PRESETS
from mbrl_jax.envs.env import reset_batch, step_batch
from mbrl_jax.types import EnvSpec

SEARCHES = {
    "gumbel": ("Catch-bsuite", {}),
    "puct": ("Catch-bsuite", {"search": "puct"}),
    "chance": ("FrozenLake-misc", {"search": "puct", "chance_codes": 3}),
    "sampled": (
        "Pendulum-v1",
        {"search": "sampled", "num_candidates": 4, "wide_candidates": 2},
    ),
}


def built(name, **fields):
    env_id, more = SEARCHES[name]
    env = make_env(env_id)
    cfg = AGENTS["muzero"].config_for("", **{**SMALL["muzero"], **more, **fields})
    return env, cfg, make_agent("muzero", env.spec, cfg)


@pytest.mark.parametrize(
    ("env", "fields", "said"),
    [
        ("Pendulum-v1", {}, "search = 'gumbel': Pendulum-v1 has continuous actions; .* 'sampled'"),
        ("CartPole-v1", {"search": "sampled"}, "has discrete actions; expected 'gumbel' or 'puct'"),
        ("CartPole-v1", {"reanalyse_policies": 1.5}, r"reanalyse_policies = 1.5: .* in \[0, 1\]"),
        ("CartPole-v1", {"reanalyse_values": -0.1}, r"reanalyse_values = -0.1: .* in \[0, 1\]"),
        ("CartPole-v1", {"reanalyse_values": "all"}, "reanalyse_values = 'all': .* a number"),
        ("CartPole-v1", {"unroll": 501}, "unroll = 501: expected at most 500, the steps of"),
        ("CartPole-v1", {"warmup_steps": 9}, "warmup_steps = 9: expected at least .* = 10"),
        ("CartPole-v1", {"buffer_size": 8}, "buffer_size = 8: expected at least .* = 10"),
        ("CartPole-v1", {"reward_range": (0.0, 0.0)}, "expected a reward other than 0"),
        ("CartPole-v1", {"reward_range": (1.0,)}, r"reward_range = \(1.0,\): expected \(least"),
        ("CartPole-v1", {"chance_codes": 4}, "search = 'gumbel' with chance_codes = 4: .* 'puct'"),
        ("CartPole-v1", {"chance_codes": 1, "search": "puct"}, "chance_codes = 1: expected 0"),
        (
            "CartPole-v1",
            {"chance_codes": 2, "search": "puct", "prefix_period": 3},
            "prefix_period = 3 with chance_codes = 2",
        ),
        ("CartPole-v1", {"prefix_period": 3, "hidden": ()}, r"hidden = \(\): expected a width"),
        (
            "Pendulum-v1",
            {"search": "sampled", "num_candidates": 2, "wide_candidates": 3},
            "wide_candidates = 3: expected at most num_candidates = 2",
        ),
        ("CartPole-v1", {"num_simulations": 2**30}, "num_simulations = .* GiB, expected at most"),
        ("CartPole-v1", {"torso": "grid"}, "torso = 'grid' with CartPole-v1: expected one"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(env, fields, said):
    spec = make_env(env).spec
    with pytest.raises(InputError, match=said):
        make_agent("muzero", spec, AGENTS["muzero"].config_for("", **{**SMALL["muzero"], **fields}))


def test_images_that_no_torso_fits_are_refused():
    spec = EnvSpec("photo", (64, 64, 3), "uint8", 100, num_actions=2)
    with pytest.raises(InputError, match=r"'obs' of photo has shape \(64, 64, 3\): .* 3 to 24"):
        make_agent("muzero", spec)


def test_three_players_are_refused():
    spec = EnvSpec("trio", (2,), "float32", 100, num_actions=2, num_players=3)
    with pytest.raises(InputError, match="games of two players; trio has 3"):
        make_agent("muzero", spec)


@pytest.mark.parametrize("env_id", [*PRESETS])
def test_presets_fit_their_environments(env_id):
    make_agent("muzero", make_env(env_id).spec)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "DeepSea-bsuite", "TicTacToe-pgx"])
def test_rewards_lie_within_a_preset_s_range(env_id):
    env = make_env(env_id)
    low, high = AGENTS["muzero"].config_for(env.spec).reward_range

    def one(batch, key):
        batch, step = step_batch(env, key, batch, env.spec.random_actions(key, batch.obs))
        return batch, step.reward

    @jax.jit
    def rewards(key):
        return jax.lax.scan(one, reset_batch(env, key, 16), jax.random.split(key, 100))[1]

    with jax.debug_key_reuse(False):
        found = rewards(jax.random.key(0))
    assert np.any(found)
    assert low <= found.min()
    assert found.max() <= high


def test_plain_is_the_paper_s():
    cfg = AGENTS["muzero_plain"].config
    assert (cfg.search, cfg.num_simulations, cfg.value_target) == ("puct", 50, "n_step")
    assert cfg.reanalyse_policies == cfg.reanalyse_values == 0
    assert not cfg.consistency
    assert not cfg.prefix_period


@pytest.mark.parametrize("name", [*SEARCHES])
@pytest.mark.parametrize("mode", ["random", "train", "eval"])
def test_what_acts_is_what_is_recorded(name, mode):
    env, cfg, agent = built(name, num_envs=3, buffer_size=96, warmup_steps=48)
    state = jax.jit(agent.init)(jax.random.key(0))
    batch = reset_batch(env, jax.random.key(1), 3, delayed=True)
    act = jax.jit(agent.act, static_argnums=6)
    action, memory, extras = act(
        state, agent.init_memory(3), batch.obs, batch.is_first, jax.random.key(2), jnp.int32(0),
        mode,
    )  # fmt: skip
    np.testing.assert_array_equal(memory, action)
    sums = extras.weights.sum(axis=-1)
    np.testing.assert_allclose(sums, 1.0, rtol=1e-5)
    assert extras.value.shape == (3,)
    if env.spec.discrete:
        np.testing.assert_array_equal(action, extras.action)
        assert ((action >= 0) & (action < env.spec.num_actions)).all()
    else:
        np.testing.assert_allclose(env.spec.from_unit(extras.action), action, rtol=1e-5)
        assert (np.abs(extras.action) <= 1).all()
        assert extras.candidates.shape == (3, 4, 1)
    _, step = step_batch(env, jax.random.key(3), batch, action)
    state = jax.jit(agent.observe)(state, step, extras, jnp.int32(4))
    rows = muzero.replay(cfg, env.spec).ring
    record = rows.get(state.replay, rows.index(4, jnp.arange(3)))
    for field, expected in (
        ("action", extras.action), ("weights", extras.weights), ("value", extras.value),
        ("reward", step.reward), ("terminated", step.terminated), ("is_last", step.is_last),
        ("obs", step.obs),
    ):  # fmt: skip
        np.testing.assert_array_equal(getattr(record, field), expected, err_msg=field)


def test_an_evaluation_is_without_noise_and_training_is_not():
    env, _, agent = built("gumbel", num_envs=64, buffer_size=640, warmup_steps=640)
    state = jax.jit(agent.init)(jax.random.key(0))
    obs = jax.tree.map(
        lambda x: jnp.broadcast_to(x[:1], x.shape),
        reset_batch(env, jax.random.key(1), 64, delayed=True).obs,
    )
    act, before = jax.jit(agent.act, static_argnums=6), agent.init_memory(64)
    first = jnp.ones(64, bool)

    def actions(mode, key):
        found = act(state, before, obs, first, jax.random.key(key), 0, mode)[0]
        return set(np.asarray(found).tolist())

    assert len(actions("eval", 0) | actions("eval", 1)) == 1
    assert actions("train", 0) == actions("random", 0) == {0, 1, 2}


def test_illegal_actions_are_never_taken_and_weigh_nothing():
    env = toys.make(toys.Doors)
    cfg = AGENTS["muzero"].config_for("", **{**SMALL["muzero"], "num_envs": 16, "unroll": 1,
                                             "warmup_steps": 64, "buffer_size": 128})  # fmt: skip
    agent = make_agent("muzero", env.spec, cfg)
    state = jax.jit(agent.init)(jax.random.key(0))
    batch = reset_batch(env, jax.random.key(1), 16, delayed=True)
    act, first = jax.jit(agent.act, static_argnums=6), jnp.zeros(16, bool)
    for mode in ("random", "train", "eval"):
        before = agent.init_memory(16)
        action, _, extras = act(state, before, batch.obs, first, jax.random.key(2), 0, mode)
        legal = np.asarray(batch.obs["action_mask"])
        assert not legal.all()
        assert legal[np.arange(16), action].all()
        assert (np.asarray(extras.weights)[~legal] == 0).all()
        assert np.isfinite(extras.weights).all()


@pytest.mark.parametrize("world", ["discrete", "masked", "continuous"])
@pytest.mark.parametrize("repeat", [0.0, 0.8])
def test_random_actions_repeat_those_before_where_they_may(world, repeat):
    """Not in the first step of an episode, and never what has become illegal."""
    num = 4096
    env = toys.make(toys.Doors) if world == "masked" else make_env(
        {"discrete": "CartPole-v1", "continuous": "Pendulum-v1"}[world]
    )  # fmt: skip
    search = "sampled" if world == "continuous" else "gumbel"
    fields = {"num_envs": num, "warmup_steps": 16 * num, "buffer_size": 16 * num, "unroll": 1}
    given = {**SMALL["muzero"], "search": search, **fields, "warmup_repeat": repeat}
    agent = make_agent("muzero", env.spec, AGENTS["muzero"].config_for("", **given))
    state = jax.eval_shape(agent.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.params)
    obs = reset_batch(env, jax.random.key(1), num, delayed=True).obs
    before = env.spec.random_actions(jax.random.key(2), env.spec.zero_obs(num))
    if world == "masked":  # any action, also those that are shut now
        before = jax.random.randint(jax.random.key(2), (num,), 0, env.spec.num_actions)
    first = jnp.arange(num) % 2 == 0

    @jax.jit
    def acted(params, before, obs, first, key):
        own = muzero.State(params, None, None, None, None)
        return agent.act(own, before, obs, first, key, jnp.int32(0), "random")

    action, memory, extras = acted(params, before, obs, first, jax.random.key(3))
    np.testing.assert_array_equal(memory, action)
    # a record holds continuous actions squashed, from which the bounds themselves do not come back
    same = np.isclose(action, before, atol=2e-3).reshape(num, -1).all(axis=1)
    allowed = np.ones(num, bool)
    chance = np.full(num, 1 / env.spec.num_actions if env.spec.discrete else 0.0)
    if world == "masked":
        legal = np.asarray(obs["action_mask"]) > 0
        assert legal[np.arange(num), np.asarray(action)].all()
        allowed, chance = legal[np.arange(num), np.asarray(before)], 1 / legal.sum(axis=1)
        assert not same[~allowed].any()
    for running, share in ((first, 0.0), (~first, repeat)):
        rows = np.asarray(running) & allowed
        expected = (share + (1 - share) * chance[rows]).mean()
        np.testing.assert_allclose(same[rows].mean(), expected, atol=0.04)
    assert np.isfinite(extras.value).all()


def test_the_temperature_falls_with_the_steps():
    cfg = AGENTS["muzero"].config_for("", num_envs=2, temperature_steps=100.0)
    at = [float(muzero.temperature(cfg, jnp.int32(t))) for t in (0, 25, 50, 500)]
    np.testing.assert_allclose(at, [1.0, 0.625, 0.25, 0.25])


def test_bins_follow_from_rewards_discount_and_limit():
    spec = make_env("Pendulum-v1").spec
    fields = {"search": "sampled", "reward_range": (-17.0, 0.0), "gamma": 0.99}

    def ends(spec, **more):
        cfg = AGENTS["muzero"].config_for("", **{**fields, **more})
        found = muzero_config.support(cfg, spec)
        return [round(float(muzero.muzero_net.signed_parabolic(x[-1])), 1) for x in found]

    value = 17 * (1 - 0.99**200) / 0.01
    np.testing.assert_allclose(ends(spec), [17, value], rtol=1e-3)
    np.testing.assert_allclose(ends(spec, gamma=1.0), [17, 17 * 200], rtol=1e-3)
    np.testing.assert_allclose(ends(spec, value_limit=9), [17, 9], rtol=1e-3)
    np.testing.assert_allclose(ends(spec, prefix_period=3), [51, value], rtol=1e-3)
    two = toys.make(toys.Pieces).spec
    np.testing.assert_allclose(ends(two, reward_range=(-1, 1)), [1, 1], rtol=1e-3)


def test_the_target_network_is_copied_after_each_period():
    env, _, agent = built("gumbel", target_period=3, updates=1)
    state = jax.jit(agent.init)(jax.random.key(0))
    batch = reset_batch(env, jax.random.key(1), 2, delayed=True)
    act, observe = jax.jit(agent.act, static_argnums=6), jax.jit(agent.observe)
    memory = agent.init_memory(2)
    for t in range(12):
        action, memory, extras = act(
            state, memory, batch.obs, batch.is_first, jax.random.key(t), t, "random"
        )
        batch, step = step_batch(env, jax.random.key(100 + t), batch, action)
        state = observe(state, step, extras, jnp.int32(t))
    update, same = jax.jit(agent.update), []
    for n in range(6):
        state, metrics = update(state, jax.random.key(n), jnp.int32(11), jnp.int32(n))
        pairs = zip(*map(jax.tree.leaves, (state.params, state.target)), strict=True)
        same.append(all(np.array_equal(a, b) for a, b in pairs))
    assert same == [False, False, True] * 2
    assert all(np.isfinite(x) for x in metrics.values())
    assert 0 <= metrics["age"] <= 2 * 11


def test_rewards_beyond_the_bins_are_counted_and_told_of_once(recwarn):
    fields = {**SMALL["muzero"], **SEARCHES["sampled"][1], "reward_range": (-0.01, 0.0)}
    with pytest.warns(UserWarning, match=r"of the reward targets lie beyond the agent's bins") as w:
        result = train("muzero", "Pendulum-v1", 64, eval_every=16, eval_episodes=0, **fields)
    assert len([x for x in w if "reward targets" in str(x.message)]) == 1
    assert (result.history["reward_clipped"] > 0).all()
    assert (result.history["reward_largest"] > 0.01).all()
