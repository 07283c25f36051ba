"""Dreamer's posterior and imagination step by step by hand, each switch, and faults put in."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import randomly, zeros

from mbrl_jax.agents import dreamer, dreamer_losses, dreamer_records
from mbrl_jax.agents.dreamer_config import Config, model_of, window_length
from mbrl_jax.agents.dreamer_records import loaded, replay_of
from mbrl_jax.models import rssm, rssm_actions, rssm_codec, rssm_heads, rssm_latents
from mbrl_jax.nn.normaliser import Range
from mbrl_jax.nn.two_hot import symexp_bins, two_hot_mean
from mbrl_jax.types import EnvSpec

B, T, H = 2, 4, 3
SPEC = EnvSpec("plain", (3,), "float32", 9, action_low=(-1.0,) * 2, action_high=(1.0,) * 2)
DISCRETE = EnvSpec("classes", (3,), "float32", 9, num_actions=3)
CFG = Config(
    size="nano", batch_size=B, batch_length=T, horizon=H, num_envs=1, train_ratio=B * T,
    buffer_size=64, start_windows=2, dtype="float32", burn_in=3,
)  # fmt: skip


def changed(**fields):
    return dataclasses.replace(CFG, **fields)


@cache
def state_of(cfg, spec):
    """A state whose tensors are all random, without a compilation."""
    shapes = jax.eval_shape(partial(dreamer.init, cfg, spec), jax.random.key(0))
    params = jax.tree.map(lambda x: 0.3 * x, randomly(shapes.params, 1))
    slow = jax.tree.map(lambda x: 0.9 * x, params["critic"])
    range_ = Range(jnp.float32(-2), jnp.float32(1))
    return zeros(shapes)._replace(params=params, slow=slow, range_=range_)


def window_of(cfg, spec, seed=0, first=(2,)):
    """A window in which an episode begins with the records `first` of the last T."""
    shapes = jax.eval_shape(replay_of(cfg, spec).init)
    length, rng = window_length(cfg), np.random.default_rng(seed)
    example = replay_of(cfg, spec).ring.layout.unpack(
        {name: jnp.zeros((B, length, x.shape[-1]), x.dtype) for name, x in shapes.items()}
    )
    window = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), example)
    false = np.zeros((B, length), bool)
    is_first = false.copy()
    is_first[:, [length - T + place for place in first]] = True
    classes = (
        rng.integers(0, 4, window.stoch.shape)
        if cfg.latents == "categorical" and window.stoch is not None
        else None
    )
    action = rng.integers(0, 3, (B, length)).astype(np.int32) if spec.discrete else window.action
    stoch = window.stoch if classes is None else classes.astype(np.uint8)
    return window._replace(
        is_first=is_first, is_last=false, is_terminal=false, action=action, stoch=stoch
    )


def draws_of(cfg, spec, seed=3):
    return jax.jit(partial(dreamer.draw, cfg, spec))(jax.random.key(seed))


# the posterior


@cache
def posterior(cfg, spec):
    def run(params, window, noise):
        return dreamer.posterior_of(cfg, model_of(cfg, spec), params, window, noise)

    return jax.jit(run)


def by_hand(cfg, spec, params, window, noise):
    """[T] posteriors of the last T records, from `rssm.step` alone."""
    model, length = model_of(cfg, spec), window_length(cfg)
    start = length - T - (cfg.burn_in if cfg.replay_context == "burn_in" else 0)
    state = rssm.zero_state((B,), 128, 32, 4, model.dtype)
    if cfg.replay_context == "stored":
        state = dreamer_records.unstored(model, window.deter[:, 0], window.stoch[:, 0])
    step = jax.jit(partial(rssm.step, **model.latent))
    encode = jax.jit(lambda params, obs: rssm_codec.encode(params, obs, model.obs, model.dtype))
    vectors = rssm_actions.action_vector(window.action, model.actions)
    found = []
    for place in range(start, length):
        tokens = encode(params["enc"], window.obs[:, place])
        at = (tokens, vectors[:, place - 1], window.is_first[:, place], noise[:, place - 1])
        now = step(params, state, *at)
        state = rssm.State(now.deter, now.stoch)
        found.append(now)
    return [np.stack(x, 1) for x in zip(*found[-T:], strict=True)]


@pytest.mark.parametrize(
    ("context", "spec"),
    [("stored", SPEC), ("stored", DISCRETE), ("zero", SPEC), ("burn_in", SPEC)],
    ids=["stored", "stored, classes", "zero", "burn-in"],
)
def test_the_posterior_starts_as_the_context_says(context, spec):
    cfg = changed(replay_context=context)
    params, window = state_of(cfg, spec).params, window_of(cfg, spec)
    assert (window.deter is None) == (context != "stored")
    noise = draws_of(cfg, spec).posterior
    assert noise.shape[1] == window_length(cfg) - 1
    found = posterior(cfg, spec)(params, window, noise)
    expected = by_hand(cfg, spec, params, window, noise)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def check_resets():
    """From the record that opens an episode all is as in a fresh sequence; before it as without."""
    params, noise = state_of(CFG, SPEC).params, draws_of(CFG, SPEC).posterior
    run = posterior(CFG, SPEC)
    window, other = (window_of(CFG, SPEC, first=first) for first in ((2,), ()))
    found, without = (run(params, dreamer_records.loaded(w), noise) for w in (window, other))
    # another past
    past = window_of(CFG, SPEC, seed=9)
    mixed = jax.tree.map(lambda x, y: np.concatenate([y[:, :3], x[:, 3:]], 1), window, past)
    fresh = run(params, dreamer_records.loaded(mixed), noise)
    for x, y, z in zip(found, without, fresh, strict=True):
        np.testing.assert_allclose(x[:, :2], y[:, :2], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(x[:, 2:], z[:, 2:], rtol=1e-5, atol=1e-6)
        assert not np.allclose(x[:, 2:], y[:, 2:])
        assert not np.allclose(x[:, :2], z[:, :2])


def test_an_episode_within_a_window_starts_anew():
    check_resets()


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_reset_in_the_wrong_place_is_seen(shift, monkeypatch):
    def early_or_late(window):
        window = loaded(window)
        return window._replace(is_first=jnp.roll(window.is_first, shift, axis=1))

    monkeypatch.setattr(dreamer_records, "loaded", early_or_late)
    with pytest.raises(AssertionError):
        check_resets()


# imagination


@cache
def slow_imagination(cfg, spec):
    """(actor loss, critic loss, returns) [N], [N], [H, N], with loops over time."""
    state, latent, draws = state_of(cfg, spec), start_of(), draws_of(cfg, spec)
    model = model_of(cfg, spec)
    dtype, bins, params = model.dtype, symexp_bins(), state.params

    @jax.jit
    def at(params, slow, latent, noise):
        policy = rssm_actions.policy(
            rssm_heads.actor(params["actor"], *latent, dtype), cfg.policy_unimix
        )
        action = rssm_actions.sample_action(policy, noise, model.actions)
        heads = {
            name: rssm_heads.head(params[name], *latent, dtype) for name in ("reward", "critic")
        }
        heads["slow"] = rssm_heads.head(slow, *latent, dtype)
        cont = jax.nn.sigmoid(rssm_heads.continues(params["cont"], *latent, dtype))
        log_prob = rssm_actions.log_prob(policy, action, model.actions)
        means = {name: two_hot_mean(x, bins) for name, x in heads.items()}
        return action, log_prob, rssm_actions.policy_entropy(policy), cont, means, heads["critic"]

    @jax.jit
    def onward(params, latent, action, noise):
        deter = rssm.core(params, latent, action, dtype)
        logits = rssm.prior_logits(params, deter, 32, dtype)
        return rssm.State(deter, rssm_latents.sample(logits, noise, cfg.unimix, model.gaussian))

    seen = []
    for step in range(H + 1):
        seen.append(at(params, state.slow, latent, draws.action[step]))
        if step < H:
            latent = onward(params, latent, seen[-1][0], draws.prior[step])
    value = [x[4]["slow" if cfg.slow_target else "critic"] for x in seen]
    returns = [None] * H + [value[H]]
    for t in reversed(range(H)):
        reward, cont = seen[t + 1][4]["reward"], seen[t + 1][3]
        mixed = (1 - cfg.lam) * value[t + 1] + cfg.lam * returns[t + 1]
        returns[t] = np.float64(reward + cont * mixed)
    returns = np.stack(returns[:H])
    low, high = np.percentile(returns, [5, 95])
    ends = 0.99 * np.float64(state.range_) + 0.01 * np.array([low, high])
    scale = max(1.0, ends[1] - ends[0]) if cfg.normalise_returns else 1.0
    actor, critic, weight = 0.0, 0.0, 1.0
    for t, (_, log_prob, entropy, cont, means, logits) in enumerate(seen[:H]):
        weight = weight * np.float64(cont)
        advantage = (returns[t] - value[t]) / scale
        actor = actor - weight * (advantage * log_prob + cfg.entropy_scale * entropy)
        log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
        for target, share in ((returns[t], 1.0), (means["slow"], cfg.slow_scale)):
            code = np.array([np.interp(target, bins, row) for row in np.eye(255)]).T
            critic = critic - weight * share * np.sum(code * log_p, -1)
    return actor / H, critic / H, returns


def start_of():
    rng = np.random.default_rng(5)
    deter = rng.uniform(-1, 1, (B * T, 128)).astype(np.float32)
    stoch = np.eye(4, dtype=np.float32)[rng.integers(0, 4, (B * T, 32))]
    return rssm.State(jnp.asarray(deter), jnp.asarray(stoch))


def check_imagination(cfg=CFG, spec=SPEC):
    state = state_of(cfg, spec)

    def run(state, start, draws):
        given = (model_of(cfg, spec), state.params, state.slow, state.range_, start, draws)
        return dreamer.imagine(cfg, *given)

    found = jax.jit(run)(state, start_of(), draws_of(cfg, spec))
    actor, critic, returns = slow_imagination(cfg, spec)
    np.testing.assert_allclose(found.returns, returns, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.actor, actor, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.critic, critic, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "spec"),
    [
        ({}, SPEC),
        ({"policy_unimix": 0.3}, DISCRETE),
        ({"normalise_returns": False, "slow_target": True, "slow_scale": 0.5}, SPEC),
        ({"latents": "gaussian"}, SPEC),
    ],
    ids=["numbers", "classes", "by the slow critic", "normal latents"],
)
def test_imagination_is_what_loops_over_time_give(fields, spec):
    check_imagination(changed(**fields), spec)


def actions_of_the_next_state(*args, **kwargs):
    """A fault: the actor is told that it took an action one state later."""
    dreamt = rssm_imagine(*args, **kwargs)
    return dreamt._replace(actions=jnp.roll(dreamt.actions, 1, axis=0))


def weight_of_the_outcome(reward, cont, value, lam):
    """A fault: the weight holds the chance that the successor goes on."""
    returns, _ = imagined_returns(reward, cont, value, lam)
    return returns, jnp.cumprod(cont[1:], axis=0)


def weight_of_before(reward, cont, value, lam):
    """A fault: the weight leaves the state's own chance out."""
    returns, weight = imagined_returns(reward, cont, value, lam)
    return returns, weight / cont[:-1]


rssm_imagine, imagined_returns = rssm.imagine, dreamer_losses.imagined_returns


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [
        (rssm, "imagine", actions_of_the_next_state),
        (dreamer_losses, "imagined_returns", weight_of_the_outcome),
        (dreamer_losses, "imagined_returns", weight_of_before),
    ],
)
def test_a_fault_of_one_step_in_imagination_is_seen(module, name, fault, monkeypatch):
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(AssertionError):
        check_imagination()


# who learns from what


def movers(cfg, spec):
    """{loss: the modules to which it has a gradient}"""
    state, window, draws = state_of(cfg, spec), window_of(cfg, spec), draws_of(cfg, spec)

    def one(params, weights):
        given = (state.slow, state.range_, window, draws)
        _, learnt = dreamer.total_loss(cfg, spec, params, *given)
        means = {name: jnp.mean(loss) for name, loss in learnt.losses.items()}
        return sum(weights[name] * mean for name, mean in means.items()), means

    names = jax.eval_shape(one, state.params, dict.fromkeys(ALL_LOSSES, 0.0))[1]
    run, found = jax.jit(jax.grad(one, has_aux=True)), {}
    for name in names:
        grads, means = run(state.params, {other: float(other == name) for other in ALL_LOSSES})
        assert np.isfinite(list(means.values())).all()
        found[name] = {
            module for module, tree in grads.items() if any(x.any() for x in jax.tree.leaves(tree))
        }
    return found


ALL_LOSSES = ("rec_obs", "reward", "cont", "dyn", "rep", "actor", "critic", "replay_critic")
MODEL = {"enc", "core", "post"}


EXPECTED = {
    "rec_obs": MODEL | {"dec"},
    "reward": MODEL | {"reward"},
    "cont": MODEL | {"cont"},
    "dyn": MODEL | {"prior"},
    "rep": MODEL,
    "actor": {"actor"},
    "critic": {"critic"},
    "replay_critic": MODEL | {"critic"},
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "actor_gradient": "dynamics", "kl": "joint", "decoder": False, "replay_critic": False,
            "latents": "gaussian", "replay_context": "burn_in",
        },
    ],
    ids=["as published", "every switch"],
)  # fmt: skip
def test_each_loss_moves_what_it_should(fields):
    found = movers(changed(free_nats=0.0, **fields), SPEC)
    expected = dict(EXPECTED)
    if fields:
        for name in ("rec_obs", "rep", "replay_critic"):
            del expected[name]
    assert found == expected
