"""SAC and its variants against slow float64 versions of the published formulas."""

import dataclasses
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from probes import assert_near, first_gradient, randomly, slopes, zeros
from scipy import stats

from mbrl_jax import AGENTS, make_agent, make_env, make_train
from mbrl_jax.agents import sac, sac_learner
from mbrl_jax.data import ring
from mbrl_jax.types import EnvSpec, InputError, NStep, Step, Transition

SPEC = EnvSpec("none", (3,), "float32", 50, action_low=(-1.0, 0.5), action_high=(1.0, 3.5))
BATCH, SIZE = 6, 2  # transitions of a gradient step, dimensions of an action
UPDATE = jax.jit(lambda config, *args: sac.make_learner(config, SPEC).update(*args))


def config(**fields):
    small = {"hidden": (4,), "critic_hidden": (5,), "activation": "tanh"}
    return AGENTS["sac"].config_for("", **{**small, **fields})


def batches(seed):
    """A batch for one gradient step."""
    rng = np.random.default_rng(seed)
    obs, next_obs = jnp.float32(rng.normal(size=(2, 1, BATCH, 3)))
    action = jnp.float32(rng.uniform(-1, 1, size=(1, BATCH, SIZE)))
    reward = jnp.float32(rng.normal(size=(1, BATCH)))
    discount = jnp.float32(0.9 * (rng.random((1, BATCH)) < 0.7))
    return NStep(obs, action, reward, next_obs, discount)


def start(cfg, seed=0):
    """Random parameters, with target critics of their own; nothing is compiled."""
    learner = sac.make_learner(cfg, SPEC)
    shapes = jax.eval_shape(learner.init, jax.random.key(0))
    params = randomly(shapes.params, seed)
    params = params._replace(log_temperature=jnp.log(jnp.float32(cfg.temperature)))
    stats = jax.tree.map(jnp.abs, randomly(shapes.stats, seed))
    return sac.LearnerState(params, randomly(shapes.target, seed + 1), stats, zeros(shapes.opt))


class Slow:
    """One gradient step of Haarnoja et al. (2018), Chen et al. (2021) and Bhatt et al. (2024)."""

    def __init__(self, cfg):
        self.cfg = cfg

    def net(self, params, x, moving=None):
        """`moving` None normalises by the batch and notes its means."""
        layers = params["MLP_0"]

        def normalise(x, number):
            name = f"BatchRenorm_{number}"
            if name not in layers:
                return x
            if moving is None:
                self.means.append(x.mean(0))
                mean, var = x.mean(0), x.var(0)
            else:
                mean, var = (np.float64(moving["MLP_0"][name][key]) for key in ("mean", "var"))
            x = (x - mean) / np.sqrt(var + 1e-3)
            return x * layers[name]["scale"] + layers[name]["bias"]

        x = normalise(x, 0)
        x = x @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"]
        if "LayerNorm_0" in layers:
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * layers["LayerNorm_0"]["scale"] + layers["LayerNorm_0"]["bias"]
        x = normalise(np.tanh(x), 1)
        heads = [layers["Dense_1"]] if "Dense_1" in layers else [params["mean"], params["log_std"]]
        return np.concatenate([x @ head["kernel"] + head["bias"] for head in heads], axis=-1)

    def policy(self, params, obs, noise):
        out = self.net(params["params"], obs)
        mean, log_std = out[:, :SIZE], np.clip(out[:, SIZE:], -20, 2)
        u = mean + np.exp(log_std) * noise
        density = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - np.log(1 - np.tanh(u) ** 2)
        return np.tanh(u), density.sum(-1)

    def values(self, critic, obs, action, stats=None):
        """[n, B]; `stats` are the running statistics of the members."""
        count = critic["MLP_0"]["Dense_0"]["bias"].shape[0]
        x, self.means = np.concatenate([obs, action], axis=1), []
        rows = []
        for i in range(count):
            params, moving = jax.tree.map(lambda leaf, i=i: leaf[i], (critic, stats))
            rows.append(self.net(params, x, moving)[:, 0])
        return np.stack(rows)

    def critic_loss(self, critic, state, batch, noise, subset):
        """The target from `state`, the values from `critic`."""
        action, log_prob = self.policy(state.params.actor, batch.next_obs, noise)
        if self.cfg.critic == "batch_renorm":
            obs = np.concatenate([batch.obs, batch.next_obs])
            action = np.concatenate([batch.action, action])
            q = self.values(critic, obs, action)[:, :BATCH]
            next_q = self.values(state.params.critic, obs, action)[subset, BATCH:]
        else:
            q = self.values(critic, batch.obs, batch.action)
            next_q = self.values(state.target, batch.next_obs, action)[subset]
        total = 0.0
        for b in range(BATCH):
            soft = min(next_q[:, b]) - np.exp(state.params.log_temperature) * log_prob[b]
            target = self.cfg.reward_scale * batch.reward[b] + batch.discount[b] * soft
            total += sum(0.5 * (q[j, b] - target) ** 2 for j in range(len(q)))
        return total / BATCH

    def actor_loss(self, actor, state, temperature, batch, noise):
        """`state` after the step of the critics."""
        action, log_prob = self.policy(actor, batch.obs, noise)
        moving = state.stats.get("batch_stats")
        q = self.values(state.params.critic, batch.obs, action, moving)
        q = q.min(0) if self.cfg.actor_value == "min" else q.mean(0)
        return np.mean(temperature * log_prob - q)


VARIANTS = [
    {},
    {
        "num_critics": 4, "target_subset": 2, "actor_value": "mean", "layer_norm": True,
        "learn_temperature": False, "temperature": 0.2, "reward_scale": 2.5,
    },
    {"critic": "batch_renorm", "adam_b1": 0.5, "num_critics": 3, "target_subset": 1},
]  # fmt: skip


@pytest.mark.parametrize("fields", VARIANTS, ids=["sac", "redq", "crossq"])
def test_a_gradient_step_equals_the_slow_one(fields):
    cfg = config(tau=0.25, critic_learning_rate=0.02, **fields)
    state = start(cfg)
    layers = state.params.critic["MLP_0"]
    assert ("LayerNorm_0" in layers) == cfg.layer_norm
    assert ("BatchRenorm_1" in layers) == (cfg.critic == "batch_renorm")
    assert (state.target is None) == (cfg.critic == "batch_renorm"), "CrossQ has no target network"
    data, key = batches(0), jax.random.key(8)
    after, metrics = UPDATE(cfg, state, data, key, jnp.int32(0))
    noise_key, subset_key, _ = jax.random.split(jax.random.key(8), 3)
    noise = np.float64(jax.random.normal(noise_key, (1, 2, BATCH, SIZE)))[0]
    uniform = jax.random.uniform(subset_key, (1, cfg.num_critics))[0]
    subset = np.argsort(uniform)[: cfg.target_subset]
    before, after64 = jax.tree.map(np.float64, (state, after))
    batch, slow = jax.tree.map(lambda x: np.float64(x[0]), data), Slow(cfg)

    def critic_loss(critic, subset=subset):
        return slow.critic_loss(critic, before, batch, noise[0], subset)

    loss = critic_loss(before.params.critic)
    if len(subset) < cfg.num_critics:
        least = critic_loss(before.params.critic, range(cfg.num_critics))
        assert abs(least / loss - 1) > 0.01, "the choice matters"
    np.testing.assert_allclose(metrics["critic_loss"] * cfg.num_critics, loss, rtol=1e-4)
    grads = first_gradient(after.opt.critic, cfg.adam_b1)
    assert_near(grads, slopes(critic_loss, before.params.critic))

    temperature = np.exp(before.params.log_temperature)
    middle = after64._replace(params=before.params._replace(critic=after64.params.critic))

    def actor_loss(actor):
        return slow.actor_loss(actor, middle, temperature, batch, noise[1])

    np.testing.assert_allclose(metrics["actor_loss"], actor_loss(before.params.actor), rtol=1e-3)
    grads = first_gradient(after.opt.actor, cfg.adam_b1)
    assert_near(grads, slopes(actor_loss, before.params.actor))

    entropy = -slow.policy(before.params.actor, batch.obs, noise[1])[1].mean()
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-4)
    if cfg.learn_temperature:
        grad = first_gradient(after.opt.log_temperature, cfg.adam_b1)
        np.testing.assert_allclose(grad, entropy - cfg.target_entropy * SIZE, rtol=1e-3)
    else:
        assert after.params.log_temperature == state.params.log_temperature
    if cfg.critic == "batch_renorm":
        check_crossq_statistics(slow, state, after, before, batch, noise[0])
    else:
        pairs = after.params.critic, state.target
        expected = jax.tree.map(lambda new, old: 0.25 * new + 0.75 * old, *pairs)
        assert_near(after.target, expected, rtol=1e-5)


def check_crossq_statistics(slow, state, after, before, batch, noise):
    """They move by a hundredth towards the batch of both halves."""
    slow.critic_loss(before.params.critic, before, batch, noise, [0])
    for i in range(3):
        for number in range(2):
            name = f"BatchRenorm_{number}"
            new, old = (s.stats["batch_stats"]["MLP_0"][name] for s in (after, state))
            expected = 0.99 * old["mean"][i] + 0.01 * slow.means[2 * i + number]
            np.testing.assert_allclose(new["mean"][i], expected, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(new["steps"][i], old["steps"][i] + 1, rtol=1e-6)


def test_losses_equal_the_formulas():
    rng = np.random.default_rng(0)
    reward, log_prob, q = rng.normal(size=(3, 7))
    next_q, values = rng.normal(size=(2, 3, 7))
    discount = 0.97 * (rng.random(7) < 0.6)
    target = sac_learner.critic_target(*map(jnp.float32, (reward, discount, next_q, log_prob, 0.3)))
    slow = [reward[b] + discount[b] * (min(next_q[:, b]) - 0.3 * log_prob[b]) for b in range(7)]
    np.testing.assert_allclose(target, slow, rtol=1e-5, atol=1e-6)
    loss = sac_learner.critic_loss(jnp.float32(values), target)
    expected = sum(0.5 * np.mean((values[j] - slow) ** 2) for j in range(3))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    loss = sac_learner.actor_loss(jnp.float32(log_prob), jnp.float32(q), 0.3)
    np.testing.assert_allclose(loss, np.mean(0.3 * log_prob - q), rtol=1e-4)
    value, (grad, to_policy) = jax.value_and_grad(sac_learner.temperature_loss, (0, 1))(
        jnp.float32(-0.5), jnp.float32(log_prob), -2.0
    )
    np.testing.assert_allclose(value, 0.5 * np.mean(log_prob - 2.0), rtol=1e-5)
    np.testing.assert_allclose(grad, -np.mean(log_prob - 2.0), rtol=1e-5)
    assert not np.any(to_policy), "the policy learns nothing from it"


def constant(critic, values):
    """Critics that answer `values` [n] to everything."""
    blank = jax.tree.map(jnp.zeros_like, critic)
    blank["MLP_0"]["Dense_1"]["bias"] = jnp.float32(values)[:, None]
    return blank


def test_dropout_acts_in_the_critics_and_at_rate_zero_does_nothing():
    plain = config()
    dropped = dataclasses.replace(plain, critic="dropout")
    state = start(plain)

    def metrics(cfg, seed, **fields):
        cfg = dataclasses.replace(cfg, **fields)
        return UPDATE(cfg, state, batches(1), jax.random.key(seed), jnp.int32(0))[1]

    expected = metrics(plain, 0)
    off, on = metrics(dropped, 0, dropout=0.0), metrics(dropped, 0, dropout=0.5)
    for name in ("critic_loss", "actor_loss", "q"):
        np.testing.assert_allclose(off[name], expected[name], rtol=1e-4)
        assert abs(on[name] - expected[name]) > 1e-3, name
    np.testing.assert_allclose(on["entropy"], expected["entropy"], rtol=1e-5)
    assert on["q"] != metrics(dropped, 1, dropout=0.5)["q"]


def test_the_temperature_follows_the_entropy_within_its_bounds():
    cfg = config(temperature=0.5, temperature_min=0.1, temperature_max=2.0)
    state, data = start(cfg), batches(2)
    up, down = (0.5 * np.exp(x) for x in (0.01, -0.01))
    cases = (0.01, 30.0, up), (0.01, -30.0, down), (50.0, 30.0, 2.0), (50.0, -30.0, 0.1)
    for rate, aim, expected in cases:
        fields = {"temperature_learning_rate": rate, "target_entropy": aim}
        cfg = dataclasses.replace(cfg, **fields)
        after, metrics = UPDATE(cfg, state, data, jax.random.key(1), jnp.int32(0))
        assert abs(metrics["entropy"]) < 30 * SIZE
        assert metrics["temperature"] == pytest.approx(0.5), "of the step, not after it"
        np.testing.assert_allclose(jnp.exp(after.params.log_temperature), expected, rtol=1e-4)


def steps(seed=0, **flags):
    """Random steps of two environments; their ends only as told."""
    rng, no = np.random.default_rng(seed), jnp.zeros(2, bool)
    obs, next_obs = jnp.float32(rng.normal(size=(2, 2, 3)))
    action = jnp.float32(rng.uniform(SPEC.action_low, SPEC.action_high, size=(2, SIZE)))
    reward = jnp.float32(rng.normal(size=2))
    return Step(obs, action, reward, next_obs, no, no, no, no)._replace(**flags)


# one program for all that is asked of the whole agent: REDQ with two gradient steps every second
# step, and the actor at every fifth
WHOLE = config(
    num_envs=2, buffer_size=8, batch_size=BATCH, updates=2, steps_per_update=2, policy_period=5,
    num_critics=4, target_subset=2, gamma=0.5, tau=1e-9, critic_learning_rate=1e-9,
    learning_rate=0.01, temperature=1e-12, learn_temperature=False,
)  # fmt: skip
OBSERVE = jax.jit(lambda config, *args: sac.make(config, SPEC).observe(*args))


def _update(config, state, key, t):
    return sac.make(config, SPEC).update(state, key, t, t // config.steps_per_update)


WHOLE_UPDATE = jax.jit(_update)


def whole(worth):
    """The agent's state with critics of zero and target critics that answer `worth` [4]."""
    shapes = jax.eval_shape(sac.make(WHOLE, SPEC).init, jax.random.key(0))
    learner = start(WHOLE)
    critic = learner.params.critic
    params = learner.params._replace(critic=constant(critic, np.zeros(4)))
    learner = learner._replace(params=params, target=constant(critic, worth))
    return sac.State(learner, zeros(shapes.replay))


def test_truncation_bootstraps_and_termination_does_not():
    yes, no = jnp.ones(2, bool), jnp.zeros(2, bool)
    for terminated, truncated, target in ((no, no, 4.0), (no, yes, 4.0), (yes, no, 0.0)):
        state = whole([8.0, 8.0, 8.0, 8.0])
        for t in range(2):
            step = steps(terminated=terminated, truncated=truncated, reward=jnp.zeros(2))
            state = OBSERVE(WHOLE, state, step, (), jnp.int32(t))
        _, metrics = WHOLE_UPDATE(WHOLE, state, jax.random.key(1), jnp.int32(1))
        np.testing.assert_allclose(metrics["critic_loss"], 0.5 * target**2, rtol=1e-5)


def test_redq_takes_the_least_of_two_random_critics_at_each_gradient_step():
    """Targets of 1, 3, 9 and 27 tell which of the four critics made them."""
    cfg, worth, draws = dataclasses.replace(WHOLE, gamma=1.0), 3.0 ** np.arange(4), 600
    state = whole(worth)
    for t in range(2):
        state = OBSERVE(cfg, state, steps(reward=jnp.zeros(2)), (), jnp.int32(t))
    runs = [WHOLE_UPDATE(cfg, state, jax.random.key(i), jnp.int32(1))[1] for i in range(draws)]
    sums = 4 * np.array([run["critic_loss"] for run in runs])  # both targets' squares
    pairs = worth[:, None] ** 2 + worth[None] ** 2
    found = np.isclose(sums[:, None, None], pairs[None], rtol=1e-3)
    counts = found.sum(0)[np.triu_indices(4)]
    assert counts.sum() == draws
    # the least of two of four, without repetition
    least = np.array([math.comb(3 - j, 1) / math.comb(4, 2) for j in range(4)])
    expected = (np.outer(least, least) * (2 - np.eye(4)))[np.triu_indices(4)]
    assert not counts[expected == 0].any(), "no critic is taken twice"
    test = stats.chisquare(counts[expected > 0], draws * expected[expected > 0])
    assert test.pvalue > 1e-4


def test_the_actor_moves_at_every_fifth_gradient_step_over_all_updates():
    state, critics, actors, weights = whole(np.ones(4)), [], [], []
    for t in range(20):
        state = OBSERVE(WHOLE, state, steps(t), (), jnp.int32(t))
        if t % 2 == 0:
            continue
        state, _ = WHOLE_UPDATE(WHOLE, state, jax.random.key(t), jnp.int32(t))
        for counts, part in ((critics, "critic"), (actors, "actor")):
            opt = getattr(state.learner.opt, part)
            counts.append(int(optax.tree_utils.tree_get(opt, "count")))
        weights.append(np.asarray(jax.tree.leaves(state.learner.params.actor)[0]))
    # two gradient steps at a time; 4, 9, 14 and 19 since the start are the actor's
    assert critics == list(range(2, 22, 2))
    assert actors == [0, 0, 1, 1, 2, 2, 2, 3, 3, 4]
    moved = [bool(np.any(a != b)) for a, b in zip(weights[1:], weights[:-1], strict=True)]
    np.testing.assert_array_equal(moved, np.diff(actors) > 0)


def acting(agent, actor, memory, obs, first, key, mode):
    """(actions, memory) of an actor without a learner."""
    learner = sac.LearnerState(sac_learner.Params(actor, None, None), None, None, None)
    return agent.act(sac.State(learner, None), memory, obs, first, key, jnp.int32(0), mode)[:2]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_actions_lie_within_the_bounds_and_reach_them(mode):
    native = make_env("Pendulum-v1", rescale_actions=False).spec
    assert native.action_high == (2.0,)
    obs = jnp.float32(np.random.default_rng(0).normal(size=(200, 3)))
    for spec in (SPEC, native):
        agent = sac.make(config(), spec)
        low, high = np.array(spec.action_low), np.array(spec.action_high)
        actor = randomly(jax.eval_shape(agent.init, jax.random.key(0)).learner.params.actor, 0)
        act = jax.jit(partial(acting, agent), static_argnums=5)
        for factor in (1.0, 300.0):
            scaled = jax.tree.map(lambda x, f=factor: x * f, actor)
            args = (agent.init_memory(200), obs, jnp.ones(200, bool), jax.random.key(2))
            action = np.asarray(act(scaled, *args, mode)[0])
            assert action.shape == (200, len(low))
            assert ((low - 1e-6 <= action) & (action <= high + 1e-6)).all()
        assert ((action.max(0) > high - 0.01) & (action.min(0) < low + 0.01)).all()


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_the_noise_of_exploration_sways_as_told_and_begins_anew_with_an_episode(rho):
    cfg, num = config(noise_correlation=rho), 4000
    agent, actor, obs = sac.make(cfg, SPEC), start(cfg).params.actor, jnp.zeros((num, 3))
    act = jax.jit(partial(acting, agent), static_argnums=5)
    memory, noise = agent.init_memory(num), []
    for step in range(6):
        first = jnp.full(num, step in (0, 5))
        action, memory = act(actor, memory, obs, first, jax.random.key(step), "train")
        noise.append(np.asarray(memory))
    policy = sac.make_learner(cfg, SPEC).policy(actor, obs)
    expected = SPEC.from_unit(policy.from_noise(memory)[0])
    np.testing.assert_allclose(action, expected, rtol=1e-5, atol=1e-5)
    for values in noise:
        assert stats.kstest(values.ravel(), "norm").pvalue > 1e-4
    together = [np.mean(a * b) for a, b in itertools.pairwise(noise)]
    np.testing.assert_allclose(together, [rho] * 4 + [0.0], atol=0.06)


def test_unit_actions_and_native_ones_are_inverses_and_the_replay_keeps_unit_ones():
    unit = jnp.linspace(-1.0, 1.0, 10).reshape(5, 2)
    np.testing.assert_allclose(SPEC.from_unit(jnp.ones((1, 2)))[0], [1.0, 3.5], rtol=1e-6)
    np.testing.assert_allclose(SPEC.from_unit(-jnp.ones((1, 2)))[0], [-1.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(SPEC.to_unit(SPEC.from_unit(unit)), unit, atol=1e-6)
    step = steps()
    kept = OBSERVE(WHOLE, whole(np.ones(4)), step, (), jnp.int32(0)).replay
    row = ring.make(Transition.example(SPEC), 8, 2).get(kept, jnp.arange(2))
    expected = (np.asarray(step.action) - [0.0, 2.0]) / [1.0, 1.5]
    np.testing.assert_allclose(row.action, expected, atol=1e-6)
    np.testing.assert_array_equal(row.obs, step.obs)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_subset": 3}, "target_subset = 3: expected at most num_critics = 2"),
        ({"batch_size": 100, "buffer_size": 99}, "batch_size = 100"),
        ({"num_envs": 3, "buffer_size": 1000}, "capacity = 1000 with num_envs = 3"),
        ({"num_critics": 0}, "num_critics = 0"),
        ({"tau": 0.0}, "tau = 0.0"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"critic": "ensemble"}, "'plain', 'dropout', 'batch_renorm'"),
    ],
)
def test_bad_fields_are_named(fields, said):
    with pytest.raises(InputError, match=said):
        make_agent("sac", SPEC, config(**fields))


def test_environments_without_bounded_continuous_actions_are_refused(lake):
    with pytest.raises(InputError, match="SAC needs continuous actions; FrozenLake"):
        make_train("sac", lake, 10_000)
    endless = dataclasses.replace(SPEC, action_high=(1.0, float("inf")))
    with pytest.raises(InputError, match="SAC needs bounded actions"):
        make_agent("sac", endless, config())
