"""PPO against slow float64 versions of its formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probes import assert_near, first_gradient, randomly, slopes, zeros
from scipy import special, stats

from mbrl_jax import AGENTS, make_agent, make_env
from mbrl_jax.agents import ppo
from mbrl_jax.nn import normaliser
from mbrl_jax.types import EnvSpec, InputError, Step

T, N = 3, 2
DISCRETE = EnvSpec("none", (3,), "float32", 50, num_actions=3)
BOX = EnvSpec("none", (3,), "float32", 50, action_low=(-1.0, 0.5), action_high=(1.0, 3.5))
SPECS = {"discrete": DISCRETE, "continuous": BOX}
SMALL = {"hidden": (4,), "num_envs": N, "num_steps": T, "epochs": 1, "minibatches": 1}
PLAIN = AGENTS["ppo"].config_for("", **SMALL, normalise_advantage=False)
FULL = AGENTS["ppo"].config_for("", **SMALL, normalise_obs=True, normalise_reward=True)
ACT = jax.jit(
    lambda config, spec, *args: ppo.make(config, spec).act(*args), static_argnums=(1, 8)
)  # fmt: skip
UPDATE = jax.jit(
    lambda config, spec, *args: ppo.make(config, spec).update(*args, jnp.int32(0)), static_argnums=1
)
OBSERVE = jax.jit(
    lambda config, spec, *args: ppo.make(config, spec).observe(*args), static_argnums=1
)


def start(cfg, spec, seed=0):
    """Random parameters and statistics; nothing is compiled."""
    shapes = jax.eval_shape(ppo.make(cfg, spec).init, jax.random.key(0))
    state = zeros(shapes)._replace(params=randomly(shapes.params, seed))
    if cfg.normalise_obs:
        moments = normaliser.Stats(jnp.array([0.1, 0.2, -0.3]), jnp.array([0.5, 1.5, 2.0]), 9.0)
        state = state._replace(obs_stats=moments)
    if cfg.normalise_reward:
        moments = normaliser.Stats(jnp.float32(0.4), jnp.float32(2.5), jnp.float32(9.0))
        state = state._replace(return_stats=moments, returns=jnp.array([0.7, -0.2]))
    return state


def random_steps(spec, seed, num=T):
    rng = np.random.default_rng(seed)
    for _ in range(num):
        ends = rng.integers(4, size=N)
        action = rng.uniform(spec.action_low, spec.action_high, (N, 2)) if spec is BOX else None
        yield Step(
            obs=jnp.float32(rng.normal(size=(N, 3))),
            action=jnp.int32(rng.integers(3, size=N)) if action is None else jnp.float32(action),
            reward=jnp.float32(rng.normal(size=N)),
            next_obs=jnp.float32(rng.normal(size=(N, 3))),
            terminated=jnp.asarray(ends == 0),
            truncated=jnp.asarray(ends == 1),
            is_first=jnp.zeros(N, bool),
            is_last=jnp.zeros(N, bool),
        )


def filled(cfg, spec, seed, state=None):
    """A state whose rollout is full, its old log-probabilities drawn at random: (state, steps)."""
    state, rng = start(cfg, spec) if state is None else state, np.random.default_rng(seed)
    steps = list(random_steps(spec, seed))
    for t, step in enumerate(steps):
        old = rng.normal(-2.0 if spec is BOX else -1.1, 0.5, size=N)
        state = OBSERVE(cfg, spec, state, step, jnp.float32(old), jnp.int32(t))
        steps[t] = (step, old)
    return state, steps


def net(params, x):
    layers = params["params"]["MLP_0"]
    x = np.tanh(x @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"])
    return x @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"]


def head(critic):
    return float(critic["params"]["MLP_0"]["Dense_1"]["bias"][0])


def slow_policy(actor, spec, obs, action):
    """(log-probability of the action in unit scale, entropy), each [B]."""
    out = net(actor, obs)
    if spec is DISCRETE:
        log_p = special.log_softmax(out, axis=-1)
        return log_p[np.arange(len(obs)), action], -np.sum(np.exp(log_p) * log_p, axis=-1)
    std = np.exp(actor["params"]["log_std"])
    unit = (action - np.array([0.0, 2.0])) / np.array([1.0, 1.5])
    entropy = stats.norm.entropy(out, std).sum(-1)
    return stats.norm.logpdf(unit, out, std).sum(-1), entropy


def slow_gae(reward, value, next_value, terminated, truncated, gamma, lam):
    """Sums of temporal-difference errors, each forwards to its episode's end; one environment."""
    advantage = np.zeros(len(reward))
    for t in range(len(reward)):
        factor = 1.0
        for k in range(t, len(reward)):
            onward = 0.0 if terminated[k] else gamma * next_value[k]
            advantage[t] += factor * (reward[k] + onward - value[k])
            if terminated[k] or truncated[k]:
                break
            factor *= gamma * lam
    return advantage


GAE = jax.jit(ppo.gae)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    ends=st.floats(0, 1),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
)
def test_gae_equals_the_slow_sum(seed, ends, gamma, lam):
    rng = np.random.default_rng(seed)
    reward, value, next_value = np.float32(rng.normal(size=(3, 11, 2)))
    kind = np.where(rng.random((11, 2)) < ends, rng.integers(1, 3, (11, 2)), 0)
    args = (reward, value, next_value, kind == 1, kind == 2)
    got = GAE(*args, gamma, lam)
    for env in range(2):
        expected = slow_gae(*(np.float64(x[:, env]) for x in args), gamma, lam)
        np.testing.assert_allclose(got[:, env], expected, rtol=1e-4, atol=1e-5)


def test_gae_continues_a_truncated_episode_by_the_value_of_its_last_observation():
    no, yes = np.array([[False]]), np.array([[True]])
    one = [np.full((1, 1), x, np.float32) for x in (1.0, 2.0, 10.0)]
    assert GAE(*one, no, yes, 0.5, 0.9) == pytest.approx(1 + 0.5 * 10 - 2)
    assert GAE(*one, no, no, 0.5, 0.9) == pytest.approx(1 + 0.5 * 10 - 2)
    assert GAE(*one, yes, no, 0.5, 0.9) == pytest.approx(1 - 2)


def test_policy_loss_and_where_its_gradient_stops():
    rng = np.random.default_rng(0)
    log_prob, old, advantage = np.float32(rng.normal(size=(3, 40)) * 0.5)
    value, grad = jax.value_and_grad(ppo.policy_loss)(jnp.asarray(log_prob), old, advantage, 0.2)
    total, slopes = 0.0, []
    for new, before, a in zip(*np.float64([log_prob, old, advantage]), strict=True):
        ratio = np.exp(new - before)
        total += min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
        stops = (ratio > 1.2 and a > 0) or (ratio < 0.8 and a < 0)
        slopes.append(0.0 if stops else -ratio * a / 40)
    assert 5 < np.sum(np.array(slopes) == 0) < 35
    np.testing.assert_allclose(value, -total / 40, rtol=1e-5)
    np.testing.assert_allclose(grad, slopes, rtol=1e-4, atol=1e-7)


def test_value_loss_takes_the_worse_of_the_clipped_and_the_plain_error():
    rng = np.random.default_rng(1)
    value, old, target = np.float32(rng.normal(size=(3, 40)))
    plain = 0.5 * np.mean((np.float64(value) - target) ** 2)
    np.testing.assert_allclose(ppo.value_loss(value, old, target, None), plain, rtol=1e-5)
    total = 0.0
    for v, o, goal in zip(*np.float64([value, old, target]), strict=True):
        near = min(max(v, o - 0.3), o + 0.3)
        total += 0.5 * max((v - goal) ** 2, (near - goal) ** 2) / 40
    assert abs(total - plain) > 0.01
    np.testing.assert_allclose(ppo.value_loss(value, old, target, 0.3), total, rtol=1e-5)


def test_discounted_returns_restart_after_an_end():
    rng = np.random.default_rng(2)
    reward, done = np.float32(rng.normal(size=(9, 2))), rng.random((9, 2)) < 0.3
    begin = np.float32([3.0, -1.0])
    last, returns = jax.jit(ppo.discounted_returns)(reward, done, begin, 0.9)
    running = np.float64(begin)
    for t in range(9):
        running = reward[t] + 0.9 * running
        np.testing.assert_allclose(returns[t], running, rtol=1e-5, atol=1e-6)
        running = np.where(done[t], 0.0, running)
    np.testing.assert_allclose(last, running, rtol=1e-5, atol=1e-6)


CASES = [
    (DISCRETE, dataclasses.replace(PLAIN, entropy_coef=0.1, gamma=0.9)),
    (BOX, dataclasses.replace(FULL, entropy_coef=0.05, gamma=0.9)),
]


@pytest.mark.parametrize(("spec", "cfg"), CASES, ids=SPECS)
def test_a_gradient_step_equals_the_slow_one(spec, cfg):
    cfg = dataclasses.replace(cfg, max_grad_norm=1e6, gae_lambda=0.8)
    state, steps = filled(cfg, spec, 0)
    after, metrics = UPDATE(cfg, spec, state, jax.random.key(1), jnp.int32(T - 1))
    params = jax.tree.map(np.float64, state.params)
    obs, action, reward, next_obs, terminated, truncated = (
        np.stack([np.asarray(step[i]) for step, _ in steps]) for i in range(6)
    )
    obs, next_obs, reward = np.float64(obs), np.float64(next_obs), np.float64(reward)
    if cfg.normalise_obs:
        mean, var = np.float64(state.obs_stats.mean), np.float64(state.obs_stats.var)
        obs, next_obs = ((x - mean) / np.sqrt(var) for x in (obs, next_obs))
        reward = reward / np.sqrt(2.5)
    value, next_value = net(params.critic, obs)[..., 0], net(params.critic, next_obs)[..., 0]
    advantage = np.zeros((T, N))
    for env in range(N):
        by_step = (reward, value, next_value, terminated, truncated)
        advantage[:, env] = slow_gae(*(x[:, env] for x in by_step), 0.9, 0.8)
    target = (advantage + value).ravel()
    chosen = advantage.ravel()
    if cfg.normalise_advantage:
        chosen = (chosen - chosen.mean()) / chosen.std()
    old = np.concatenate([old for _, old in steps])
    obs, action = obs.reshape(T * N, 3), action.reshape(T * N, *action.shape[2:])

    def parts(params):
        log_prob, entropy = slow_policy(params.actor, spec, obs, action)
        ratio = np.exp(log_prob - old)
        gain = np.minimum(ratio * chosen, np.clip(ratio, 0.8, 1.2) * chosen)
        error = np.mean((net(params.critic, obs)[:, 0] - target) ** 2)
        return -gain.mean(), 0.5 * error, entropy.mean(), ratio

    policy_loss, value_loss, entropy, ratio = parts(params)
    assert metrics["policy_loss"] == pytest.approx(policy_loss, rel=1e-3)
    assert metrics["value_loss"] == pytest.approx(value_loss, rel=1e-3)
    assert metrics["entropy"] == pytest.approx(entropy, rel=1e-4)
    assert metrics["kl"] == pytest.approx(np.mean(ratio - 1 - np.log(ratio)), rel=1e-3)
    assert metrics["clipped"] == pytest.approx(np.mean(np.abs(ratio - 1) > 0.2))
    assert metrics["clipped"] > 0

    def loss(params):
        policy_loss, value_loss, entropy, _ = parts(params)
        return policy_loss + 0.5 * value_loss - cfg.entropy_coef * entropy

    grads = [first_gradient(opt) for opt in after.opt]
    assert_near(np.concatenate(grads), slopes(loss, params), atol=5e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_actions_carry_their_log_probability_and_the_first_ratio_is_one(spec):
    cfg = dataclasses.replace(PLAIN if spec is DISCRETE else FULL, learning_rate=1e-9)
    state = start(cfg, spec)
    if cfg.normalise_obs:
        state = state._replace(obs_stats=normaliser.init((3,)))
    actor, drawn = jax.tree.map(np.float64, state.params.actor), []
    for t, step in enumerate(random_steps(spec, 3)):
        action, _, log_prob = ACT(
            cfg, spec, state, (), step.obs, step.is_first, jax.random.key(t), jnp.int32(t), "train"
        )  # fmt: skip
        expected = slow_policy(actor, spec, np.float64(step.obs), np.asarray(action))[0]
        np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-5)
        drawn.append(action)
        state = OBSERVE(cfg, spec, state, step._replace(action=action), log_prob, jnp.int32(t))
    assert drawn[0].dtype == (jnp.int32 if spec is DISCRETE else jnp.float32)
    _, metrics = UPDATE(cfg, spec, state, jax.random.key(9), jnp.int32(T - 1))
    assert abs(metrics["kl"]) < 1e-6
    assert metrics["clipped"] == 0
    greedy, _, _ = ACT(
        cfg, spec, state, (), step.obs, step.is_first, jax.random.key(0), jnp.int32(T), "eval"
    )
    out = net(actor, np.float64(step.obs))
    best = out.argmax(-1) if spec is DISCRETE else out * [1.0, 1.5] + [0.0, 2.0]
    np.testing.assert_allclose(greedy, best, rtol=1e-4, atol=1e-5)


def test_every_sample_is_used_once_in_each_epoch():
    """Squared errors of 8**k, summed over all minibatches, tell in base 8 how often each came."""
    cfg = dataclasses.replace(PLAIN, epochs=2, minibatches=3, learning_rate=1e-12, gamma=0.0)
    state = start(cfg, DISCRETE)
    state = state._replace(params=state.params._replace(critic=zeros(state.params.critic)))
    for t, step in enumerate(random_steps(DISCRETE, 4)):
        reward = 8.0 ** (np.arange(N) / 2 + t * N / 2)
        step = step._replace(reward=jnp.float32(reward))
        state = OBSERVE(cfg, DISCRETE, state, step, jnp.zeros(N), jnp.int32(t))
    for seed in range(20):
        _, metrics = UPDATE(cfg, DISCRETE, state, jax.random.key(seed), jnp.int32(T - 1))
        total = round(float(metrics["value_loss"]) * 2 * 2 * T * N)
        assert [total // 8**k % 8 for k in range(T * N)] == [2] * (T * N)
    # the order matters once the parameters move
    cfg = dataclasses.replace(cfg, learning_rate=0.1, max_grad_norm=1e6)
    ends = [UPDATE(cfg, DISCRETE, state, jax.random.key(seed), jnp.int32(2))[0] for seed in (0, 1)]
    weights = [head(end.params.critic) for end in (*ends, state)]
    assert len(set(weights)) == 3


def test_the_step_size_falls_linearly_to_zero_and_gradients_are_clipped():
    cfg = dataclasses.replace(PLAIN, learning_rate=0.01, max_grad_norm=1e6)
    state, _ = filled(cfg, DISCRETE, 5)

    def moved(t, **fields):
        """How far the critic's bias went in the update at step `t`, and the gradients' norms."""
        new = dataclasses.replace(cfg, **fields)
        after, _ = UPDATE(new, DISCRETE, state, jax.random.key(0), jnp.int32(t))
        distance = abs(head(after.params.critic) - head(state.params.critic))
        return distance, [np.linalg.norm(first_gradient(opt)) for opt in after.opt]

    whole, norms = moved(2)
    assert whole == pytest.approx(0.01, rel=0.01), "Adam's first step"
    # 6 environment steps an update, 24 in all
    sizes = [moved(t, anneal_steps=24.0)[0] for t in (2, 5, 8, 11, 14)]
    np.testing.assert_allclose(np.array(sizes) / whole, [1.0, 0.75, 0.5, 0.25, 0.0], atol=1e-3)
    # the actor's and the critic's, each by itself
    between = float(np.mean(norms))
    assert np.ptp(norms) > 0.1 * between
    expected = np.minimum(norms, between)
    np.testing.assert_allclose(moved(2, max_grad_norm=between)[1], expected, rtol=1e-4)


def test_the_statistics_are_those_of_all_rollouts():
    cfg = dataclasses.replace(FULL, gamma=0.9)
    shapes = jax.eval_shape(ppo.make(cfg, BOX).init, jax.random.key(0))
    state = start(cfg, BOX)._replace(
        obs_stats=normaliser.init((3,)), return_stats=normaliser.init(()), returns=jnp.zeros(N)
    )
    assert jax.tree.structure(state) == jax.tree.structure(shapes)
    seen, returns, running = [], [], np.zeros(N)
    for rollout in range(4):
        state, steps = filled(cfg, BOX, 10 + rollout, state)
        for step, _ in steps:
            seen.append(np.float64(step.obs))
            running = np.float64(step.reward) + 0.9 * running
            returns.append(running)
            running = np.where(step.terminated | step.truncated, 0.0, running)
        time = jnp.int32((rollout + 1) * T - 1)
        state, _ = UPDATE(cfg, BOX, state, jax.random.key(rollout), time)
    rows = np.concatenate(seen)
    assert state.obs_stats.seen == state.return_stats.seen == 4 * T * N
    np.testing.assert_allclose(state.obs_stats.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.obs_stats.var, rows.var(0), rtol=1e-4)
    np.testing.assert_allclose(state.return_stats.var, np.var(returns), rtol=1e-4)
    np.testing.assert_allclose(state.returns, running, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"minibatches": 4}, "minibatches = 4: expected a divisor of num_envs . num_steps = 6"),
        ({"epochs": 0}, "epochs = 0"),
        ({"gae_lambda": 1.1}, "gae_lambda = 1.1"),
        ({"clip_eps": 0.0}, "clip_eps = 0.0"),
        ({"hidden": (4.0,)}, "hidden"),
        ({"value_clip": 1}, "value_clip = 1: expected True or False"),
    ],
)
def test_bad_fields_are_named(fields, said):
    with pytest.raises(InputError, match=said):
        make_agent("ppo", DISCRETE, AGENTS["ppo"].config_for("", **{**SMALL, **fields}))


def test_what_cannot_be_normalised_or_bounded_is_refused(lake):
    with pytest.raises(InputError, match="normalise_obs = True: FrozenLake-misc has integer"):
        make_agent("ppo", lake.spec, FULL)
    assert make_env("Pendulum-v1", rescale_actions=False).spec.action_high == (2.0,)
    endless = dataclasses.replace(BOX, action_high=(1.0, float("inf")))
    with pytest.raises(InputError, match="bounded"):  # NaN actions otherwise
        make_agent("ppo", endless, PLAIN)
