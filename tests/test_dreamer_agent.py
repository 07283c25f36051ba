"""Dreamer as an agent: acting with a memory, its records, and latents that are written back."""

import dataclasses
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import COLLECTIVES
from probes import randomly, zeros
from test_dreamer_switches import CFG, DISCRETE, SPEC, B, T, changed, draws_of, start_of, state_of

from mbrl_jax import AGENTS, InputError, make_agent, make_env, train
from mbrl_jax.agents import dreamer, dreamer_records
from mbrl_jax.agents.dreamer_config import model_of, window_length
from mbrl_jax.models import rssm_heads
from mbrl_jax.nn.two_hot import symexp_bins, two_hot_mean
from mbrl_jax.runtime import devices
from mbrl_jax.types import Step

N = 3


def acting(cfg, spec, mode):
    def run(state, memory, obs, is_first, key):
        return dreamer.act(cfg, spec, state, memory, obs, is_first, key, jnp.int32(0), mode)

    return jax.jit(run)


@pytest.mark.parametrize("spec", [SPEC, DISCRETE], ids=["numbers", "classes"])
def test_the_policy_carries_latents_and_its_last_action(spec):
    state, model = state_of(CFG, spec), model_of(CFG, spec)
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(2, N, 3)).astype(np.float32)
    act, first = acting(CFG, spec, "train"), np.zeros(N, bool)
    keys = jax.random.split(jax.random.key(1), 2)
    start = dreamer.init_memory(CFG, spec, N)
    _, memory, _ = act(state, start, obs[0], ~first, keys[0])
    first[1] = True
    action, after, extras = act(state, memory, obs[1], first, keys[1])
    # the second environment has begun anew: nothing of its memory is left
    other = jax.tree.map(lambda x: jnp.asarray(x).at[1].add(1.0), memory)
    _, same, _ = act(state, other, obs[1], first, keys[1])
    jax.tree.map(np.testing.assert_array_equal, after, same)
    _, forgot, _ = act(state, memory, obs[1], ~np.zeros(N, bool), keys[1])
    np.testing.assert_array_equal(after.latent.deter[1], forgot.latent.deter[1])
    assert not np.allclose(after.latent.deter[0], forgot.latent.deter[0])
    # what a record keeps is what the memory holds
    kept = dreamer_records.unstored(model, extras["deter"], extras["stoch"])
    jax.tree.map(np.testing.assert_array_equal, kept, after.latent)
    if spec.discrete:
        np.testing.assert_array_equal(after.action, np.eye(3)[action])
        np.testing.assert_array_equal(extras["action"], action)
    else:
        np.testing.assert_array_equal(after.action, extras["action"])
        assert (np.abs(extras["action"]) > 1).any(), "as sampled, beyond the bounds"
        np.testing.assert_array_equal(action, np.clip(extras["action"], -1, 1))


@pytest.mark.parametrize("spec", [SPEC, DISCRETE], ids=["numbers", "classes"])
def test_random_actions_are_remembered_and_evaluations_sample(spec):
    state, first = state_of(CFG, spec), np.ones(N, bool)
    given = (state, dreamer.init_memory(CFG, spec, N), np.zeros((N, 3), np.float32), first)
    key = jax.random.key(2)
    action, memory, extras = acting(CFG, spec, "random")(*given, key)
    done = np.eye(3)[action] if spec.discrete else action
    np.testing.assert_allclose(memory.action, done, atol=1e-6)
    np.testing.assert_allclose(extras["action"], action, atol=1e-6)
    judged = acting(CFG, spec, "eval")
    played = [judged(*given, k)[0].tolist() for k in jax.random.split(key, 8)]
    assert len({str(actions) for actions in played}) > 1


UPDATES = 3
ROUND = changed(train_ratio=B * T * UPDATES)


@cache
def update_alone():
    """A round of one seed, of which the later updates read what the earlier ones wrote."""
    return jax.jit(lambda cfg, *given: dreamer.update(cfg, SPEC, *given))


def filled(seed):
    """A state of random parameters whose replay is full of random records."""
    state = state_of(ROUND, SPEC)
    bits = jnp.asarray(np.random.default_rng(seed).integers(0, 2, (64, 35)), jnp.uint8)
    replay = {**randomly(state.replay, 4 + seed), "uint8": bits}
    params = jax.tree.map(lambda x: (1 + 0.1 * seed) * x, state.params)
    return state._replace(replay=replay, params=params)


def test_an_update_writes_its_latents_back_and_nothing_else():
    cfg, updates = ROUND, UPDATES
    replay, state = dreamer_records.replay_of(cfg, SPEC), filled(0)
    t, n, key = jnp.int32(40), jnp.int32(7), jax.random.key(5)
    after, metrics = update_alone()(cfg, state, key, t, n)

    @jax.jit
    def one(state, key, number, queue):
        keys = [jax.random.fold_in(key, 2 * number + i) for i in range(2)]
        window, index, queue = replay.sample_online(
            state.replay, keys[0], B, window_length(cfg), t + 1, queue
        )
        draws = dreamer.draw(cfg, SPEC, keys[1])
        state, learnt, _ = dreamer.learn(cfg, SPEC, state, window, draws, n * updates + number)
        return state, learnt.latent, index, queue

    expected, queue = state, state.queue
    for number in range(updates):
        expected, latent, index, queue = one(expected, key, jnp.int32(number), queue)
        records = jax.tree.map(np.array, replay.ring.all(expected.replay))
        for row in range(B):
            for step in range(T):
                place = index[row, 1 + step]
                records.deter[place] = latent.deter[row, step]
                records.stoch[place] = np.argmax(latent.stoch[row, step], -1)
        expected = expected._replace(replay=replay.ring.layout.pack(records))
    found, old = replay.ring.all(after.replay), replay.ring.all(state.replay)
    for name, kept in records._asdict().items():
        # classes that a rounding error decides are few
        off = ~np.isclose(getattr(found, name), kept, rtol=1e-4, atol=1e-5)
        assert off.mean() < 1e-3, name
    for name in ("obs", "action", "reward", "is_first", "is_last", "is_terminal"):
        np.testing.assert_array_equal(getattr(found, name), getattr(old, name), name)
    changed_rows = (np.asarray(found.deter) != np.asarray(old.deter)).any(-1).sum()
    assert T <= changed_rows <= updates * B * T
    assert after.queue == queue
    assert np.isfinite(list(metrics.values())).all()


@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_seeds_on_eight_devices_are_seeds_alone(mode):
    """Within a rounding error, but for few entries: LaProp scales a gradient that is no more."""
    cfg = dataclasses.replace(ROUND, learning_rate=1e-3, warmup_updates=0.0)
    states, keys = [filled(seed) for seed in range(16)], jax.random.split(jax.random.key(6), 16)
    t, n = jnp.int32(40), jnp.int32(7)
    mesh = devices.seed_mesh(16)

    def of_seed(state, key, cfg):
        return dreamer.update(cfg, SPEC, state, key, t, n)

    given = jax.tree.map(lambda *x: jnp.stack(x), *states), devices.put_seeds(keys, mesh), cfg
    run = jax.jit(devices.over_seeds(of_seed, mesh, mode, shared=1)).lower(*given).compile()
    assert not re.findall(COLLECTIVES, run.as_text())
    after, metrics = run(*given)
    for seed in (0, 9, 15):
        alone, numbers = update_alone()(cfg, states[seed], keys[seed], t, n)
        here = jax.tree.map(lambda x, seed=seed: np.asarray(x)[seed], (after, metrics))
        for name, number in numbers.items():
            np.testing.assert_allclose(here[1][name], number, rtol=1e-3, atol=1e-4, err_msg=name)
        for name in ("params", "slow", "opt", "replay"):
            found, expected, before = (
                np.concatenate(
                    [np.float64(x).ravel() for x in jax.tree.leaves(getattr(state, name))]
                )
                for state in (here[0], alone, states[seed])
            )
            off = ~np.isclose(found, expected, rtol=1e-3, atol=1e-4)
            assert off.mean() < 1e-3, name
            assert (~np.isclose(expected, before, rtol=1e-3, atol=4e-4)).mean() > 0.1, name
        assert here[0].queue == alone.queue
        np.testing.assert_allclose(here[0].range_, alone.range_, rtol=1e-4)


def test_a_record_waits_for_what_comes_with_its_observation():
    state = zeros(jax.eval_shape(partial(dreamer.init, CFG, SPEC), jax.random.key(0)))
    observe = jax.jit(partial(dreamer.observe, CFG, SPEC))
    flag = np.zeros(1, bool)
    for t in range(3):
        obs = np.full((1, 3), float(t), np.float32)
        reward, ends = np.float32([10.0 + t]), np.array([t == 1])
        step = Step(obs, np.zeros((1, 2), np.float32), reward, obs, ends, flag, flag, flag)
        extras = {
            "action": np.full((1, 2), 0.5 + t, np.float32),
            "deter": np.zeros((1, 128), np.float32),
            "stoch": np.zeros((1, 32), np.uint8),
        }
        state = observe(state, step, extras, jnp.int32(t))
    records = dreamer_records.replay_of(CFG, SPEC).ring.all(state.replay)
    assert records.reward[:3].tolist() == [0.0, 10.0, 11.0]
    assert records.is_terminal[:3].tolist() == [False, False, True]
    assert records.action[:3, 0].tolist() == [0.5, 1.5, 2.5]
    assert records.obs[:3, 0].tolist() == [0.0, 1.0, 2.0]


def test_the_gradient_through_the_dynamics_is_the_slope_of_the_loss():
    """One imagined step with normal latents, all of which is smooth: by central differences."""
    cfg = changed(actor_gradient="dynamics", latents="gaussian", horizon=1, normalise_returns=False)
    state, model = state_of(cfg, SPEC), model_of(cfg, SPEC)
    draws, start = draws_of(cfg, SPEC), start_of()
    # actions within [-1, 1], where the core's limit has a slope, and values of ordinary size
    draws = draws._replace(action=0.1 * draws.action)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.ones_like(x) if path[-1].key == "norm_scale" else x, state.params
    )
    params["actor"]["out"]["action"]["mean"]["kernel"] *= 0.1
    params["actor"]["out"]["action"]["mean"]["bias"] *= 0.1
    params["cont"]["out"] = jax.tree.map(lambda x: 0.1 * x, params["cont"]["out"])
    hill = -0.1 * (jnp.arange(255.0) - 130.0) ** 2
    for name in ("reward", "critic"):
        params[name]["out"] = {"kernel": params[name]["out"]["kernel"], "bias": hill}

    def loss(actor):
        given = ({**params, "actor": actor}, state.slow, state.range_, start, draws)
        return jnp.mean(dreamer.imagine(cfg, model, *given).actor)

    value = jax.jit(loss)
    grad = jax.jit(jax.grad(loss))(params["actor"])
    for seed in range(3):
        # steep ways, so that little is lost to rounding
        way = jax.tree.map(lambda x, y: x * jnp.abs(y), grad, randomly(grad, seed))
        length = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(way)))
        slope = sum(jnp.sum(x * y) for x, y in zip(*map(jax.tree.leaves, (grad, way)), strict=True))
        ends = [value(moved(params["actor"], way, share / length)) for share in (0.05, -0.05)]
        assert slope / length > 1e-3
        np.testing.assert_allclose((ends[0] - ends[1]) / 0.1, slope / length, rtol=0.05)


def moved(params, way, share):
    return jax.tree.map(lambda x, y: x + share * y, params, way)


def test_reward_and_continue_are_learnt_in_a_chain_of_two_states():
    """The second state earns 5 and ends the task; a record of the first one follows."""
    cfg = changed(learning_rate=3e-3, warmup_updates=0.0, gamma=0.9)
    cfg = dataclasses.replace(cfg, size="nano")
    place = np.arange(T + 1) % 2
    obs = np.eye(3, dtype=np.float32)[place]
    flags = np.array([place == 0, place == 1, place == 1])
    first, last, terminal = (np.stack([x, x]) for x in flags)
    window = dreamer_records.Record(
        np.stack([obs, obs]), np.zeros((B, T + 1, 2), np.float32), 5.0 * last.astype(np.float32),
        first, last, terminal, np.zeros((B, T + 1, 128), np.float32),
        np.zeros((B, T + 1, 32), np.uint8),
    )  # fmt: skip
    state = jax.jit(partial(dreamer.init, cfg, SPEC))(jax.random.key(0))
    state, model = state._replace(replay=(), arrived=()), model_of(cfg, SPEC)

    @jax.jit
    def learn(state, key, number):
        draws = dreamer.draw(cfg, SPEC, key)
        state, learnt, metrics = dreamer.learn(cfg, SPEC, state, window, draws, number)
        return state, learnt.latent, metrics

    for number in range(150):
        key = jax.random.fold_in(jax.random.key(1), number)
        state, latent, metrics = learn(state, key, jnp.int32(number))
    reward = rssm_heads.head(state.params["reward"], *latent, model.dtype)
    reward = two_hot_mean(reward, symexp_bins())
    cont = jax.nn.sigmoid(rssm_heads.continues(state.params["cont"], *latent, model.dtype))
    np.testing.assert_allclose(reward, 5.0 * last[:, 1:], atol=0.3)
    np.testing.assert_allclose(cont, 0.9 * ~last[:, 1:], atol=0.06)
    assert metrics["rec_obs_loss"] < 0.05


@pytest.mark.parametrize("name", ["Breakout-MinAtar", "FrozenLake-misc", "Catch-bsuite"])
def test_observations_of_every_kind_are_reconstructed(name):
    """By shapes alone: an update and a step on binary images, integers, and boards of marks."""
    spec = make_env(name).spec
    cfg = AGENTS["dreamer"].config_for(spec, size="nano", num_envs=1, train_ratio=1024)
    agent = make_agent("dreamer", spec, cfg)
    state = jax.eval_shape(agent.init, jax.random.key(0))
    t, key = jnp.int32(2000), jax.random.key(0)
    after, metrics = jax.eval_shape(agent.update, state, key, t, t)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert "rec_obs_loss" in metrics
    kind = {"Breakout-MinAtar": "binary", "FrozenLake-misc": "discrete", "Catch-bsuite": "bits"}
    assert model_of(cfg, spec).obs[0].kind == kind[name]
    given = (state, agent.init_memory(2), spec.zero_obs(2), jnp.ones(2, bool), key, t)
    action, _, _ = jax.eval_shape(partial(agent.act, mode="train"), *given)
    assert (action.shape, action.dtype) == ((2,), jnp.int32)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"buffer_size": 2**30, "size": "200m"}, r"the state of 2 seeds takes .*replay.* GiB"),
        ({"train_ratio": 7}, "train_ratio = 7: .* whole updates is "),
        ({"start_windows": 10_000, "buffer_size": 1600}, "start_windows = 10000: expected at most"),
        ({"batch_length": 128, "buffer_size": 800, "batch_size": 8}, "buffer_size = 800: holds 50"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_compiles(fields, said, tmp_path):
    with pytest.raises(InputError, match=said):
        train("dreamer", make_env("CartPole-v1"), 40_000, 2, out=tmp_path / "run", **fields)
    assert not (tmp_path / "run").exists()
