"""DQN and its switches against slow float64 versions of the published formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from probes import assert_near, first_gradient, randomly, slopes, zeros
from scipy import stats

from mbrl_jax import AGENTS, make_agent, make_env, make_train
from mbrl_jax.agents import dqn
from mbrl_jax.data import prioritised, ring
from mbrl_jax.types import EnvSpec, InputError, Step, Transition

N, ACTIONS, BATCH = 2, 3, 5
SPEC = EnvSpec("none", (3,), "float32", 50, num_actions=ACTIONS)
SMALL = {
    "hidden": (4, 3), "activation": "tanh", "num_envs": N, "buffer_size": 12, "batch_size": BATCH,
    "warmup_steps": 6, "max_grad_norm": 1e6, "gamma": 0.9, "learning_rate": 0.01,
}  # fmt: skip
# Rainbow's parts at once, and none of them
RAINBOW = AGENTS["dqn"].config_for(
    "", **SMALL, steps_per_update=1, target_period=1, tau=0.3, importance_steps=40.0
)
PLAIN = AGENTS["dqn"].config_for(
    "", **SMALL, double=False, duelling=False, n_step=1, prioritised=False, loss="square",
    steps_per_update=2, updates=2, target_period=3,
)  # fmt: skip
OBSERVE = jax.jit(lambda config, *args: dqn.make(config, SPEC).observe(*args))


def _update(config, state, key, t):
    return dqn.make(config, SPEC).update(state, key, t, t // config.steps_per_update)


UPDATE = jax.jit(_update)
SAMPLE = jax.jit(prioritised.make(12).sample, static_argnums=2)


def start(cfg, seed=0):
    """Random parameters and a target network of its own; nothing is compiled."""
    shapes = jax.eval_shape(dqn.make(cfg, SPEC).init, jax.random.key(0))
    state = zeros(shapes)._replace(
        params=randomly(shapes.params, seed), target=randomly(shapes.target, seed + 1)
    )
    if cfg.prioritised:
        state = state._replace(priorities=prioritised.make(12).init())
    return state


def random_steps(num, seed):
    rng = np.random.default_rng(seed)
    steps = []
    for _ in range(num):
        ends = rng.integers(5, size=N)
        steps.append(Step(
            obs=np.float32(rng.normal(size=(N, 3))),
            action=np.int32(rng.integers(ACTIONS, size=N)),
            reward=np.float32(rng.normal(size=N) * 2),
            next_obs=np.float32(rng.normal(size=(N, 3))),
            terminated=ends == 0,
            truncated=ends == 1,
            is_first=np.zeros(N, bool),
            is_last=np.zeros(N, bool),
        ))  # fmt: skip
    return steps


def played(cfg, steps, state=None):
    state = start(cfg) if state is None else state
    for t, step in enumerate(steps):
        state = OBSERVE(cfg, state, step, (), jnp.int32(t))
    return state


def net(params, x, duelling):
    nets = params["params"]
    if not duelling:
        layers = nets["MLP_0"]
        for number in range(2):
            x = np.tanh(x @ layers[f"Dense_{number}"]["kernel"] + layers[f"Dense_{number}"]["bias"])
        return x @ layers["Dense_2"]["kernel"] + layers["Dense_2"]["bias"]
    x = np.tanh(x @ nets["MLP_0"]["Dense_0"]["kernel"] + nets["MLP_0"]["Dense_0"]["bias"])
    heads = []
    for name in ("MLP_1", "MLP_2"):
        first, last = nets[name]["Dense_0"], nets[name]["Dense_1"]
        hidden = np.tanh(x @ first["kernel"] + first["bias"])
        heads.append(hidden @ last["kernel"] + last["bias"])
    return heads[0] + heads[1] - heads[1].mean(-1, keepdims=True)


def mixture(new, old, tau):
    return jax.tree.map(lambda a, b: tau * a + (1 - tau) * b, new, old)


def slow_window(steps, row, n, gamma):
    """(obs, action, return, last successor, discount) of the newest step in `row`."""
    env, slot = row % N, row // N
    t = max(t for t in range(len(steps)) if t % 6 == slot)
    total, power = 0.0, 1.0
    for step in steps[t : t + n]:
        total, power = total + power * float(step.reward[env]), power * gamma
        if step.terminated[env] or step.truncated[env]:
            break
    discount = 0.0 if step.terminated[env] else power
    return steps[t].obs[env], steps[t].action[env], total, step.next_obs[env], discount


def slow_loss(cfg, params, state, steps, index, weight):
    """(mean weighted loss, errors), the values from `params`, the targets from `state`."""
    errors, losses = [], []
    for row, w in zip(index, weight, strict=True):
        obs, action, reward, next_obs, discount = slow_window(steps, int(row), cfg.n_step, 0.9)
        next_q = net(state.target, next_obs, cfg.duelling)
        chooser = net(state.params, next_obs, cfg.duelling) if cfg.double else next_q
        error = net(params, obs, cfg.duelling)[action]
        error -= reward + discount * next_q[np.argmax(chooser)]
        square = 0.5 * error**2
        huber = square if abs(error) <= 1 else abs(error) - 0.5
        errors.append(error)
        losses.append(w * (huber if cfg.loss == "huber" else square))
    return np.mean(losses), np.array(errors)


def test_a_rainbow_step_equals_the_slow_one():
    """Double, duelling, three-step returns and prioritised replay at once."""
    steps = random_steps(9, 0)
    assert any((step.terminated | step.truncated).any() for step in steps)
    state = played(RAINBOW, steps)
    # priorities of all kinds
    values = prioritised.make(12).set(
        state.priorities, jnp.arange(12), state.priorities.levels[0][0, :12] * jnp.arange(1.0, 13.0)
    )
    state = state._replace(priorities=values)
    after, metrics = UPDATE(RAINBOW, state, jax.random.key(3), jnp.int32(8))
    key = jax.random.split(jax.random.key(3), 1)[0]
    index, _ = SAMPLE(state.priorities, key, BATCH)
    leaves = np.float64(state.priorities.levels[0][0])
    beta = 0.4 + 0.6 * 18 / 40  # 18 environment steps
    weight = (12 * leaves[index] / leaves.sum()) ** -beta
    weight /= weight.max()
    assert weight.min() < 0.9
    before = jax.tree.map(np.float64, state)

    def loss(params):
        return slow_loss(RAINBOW, params, before, steps, index, weight)[0]

    value, errors = slow_loss(RAINBOW, before.params, before, steps, index, weight)
    assert metrics["loss"] == pytest.approx(value, rel=1e-4)
    assert (np.abs(errors) > 1).any()
    assert (np.abs(errors) < 1).any()
    assert_near(first_gradient(after.opt), slopes(loss, before.params))
    assert_near(after.target, mixture(after.params, state.target, 0.3), rtol=1e-5)
    expected = leaves.copy()
    expected[index] = np.sqrt(np.abs(errors))
    np.testing.assert_allclose(after.priorities.levels[0][0], expected, rtol=1e-3, atol=2e-3)
    # the exponent is the config's
    other = dataclasses.replace(RAINBOW, priority_exponent=2.0)
    again, _ = UPDATE(other, state, jax.random.key(3), jnp.int32(8))
    expected[index] = np.abs(errors) ** 2
    np.testing.assert_allclose(again.priorities.levels[0][0], expected, rtol=1e-3, atol=1e-4)


def test_two_plain_steps_equal_the_slow_ones():
    cfg = dataclasses.replace(PLAIN, learning_rate=1e-12)
    steps = random_steps(8, 1)
    state = played(cfg, steps)
    after, metrics = UPDATE(cfg, state, jax.random.key(4), jnp.int32(7))
    replay = ring.make(Transition.example(SPEC), 12, N)
    index = replay.sample_index(jax.random.key(4), 2 * BATCH, jnp.int32(8), 1).reshape(2, BATCH)
    before, ones = jax.tree.map(np.float64, state), np.ones(BATCH)
    # gradient steps 6 and 7 leave the target network as it is
    parts, values = [], []
    for rows in np.asarray(index):

        def loss(params, rows=rows):
            return slow_loss(cfg, params, before, steps, rows, ones)[0]

        values.append(loss(before.params))
        parts.append(slopes(loss, before.params))
    assert metrics["loss"] == pytest.approx(np.mean(values), rel=1e-4)
    assert_near(first_gradient(after.opt), 0.9 * parts[0] + parts[1])


@pytest.mark.parametrize("double", [True, False])
def test_targets_equal_the_formula(double):
    rng = np.random.default_rng(0)
    reward, discount = np.float32(rng.normal(size=(2, 30)))
    next_q, online = np.float32(rng.normal(size=(2, 30, 4)))
    choice = online if double else next_q
    got = dqn.q_target(reward, discount, next_q, choice)
    expected = [
        float(reward[b]) + float(discount[b]) * float(next_q[b, np.argmax(choice[b])])
        for b in range(30)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    if not double:
        best = reward + discount * next_q.max(-1)
        np.testing.assert_allclose(got, best, rtol=1e-6)


def test_losses_equal_optax_and_the_formula():
    rng = np.random.default_rng(1)
    q, target, weight = rng.normal(size=(9, 4)) * 2, rng.normal(size=9), rng.random(9)
    action = rng.integers(4, size=9)
    taken = q[np.arange(9), action]
    args = (jnp.float32(q), jnp.int32(action), jnp.float32(target), jnp.float32(weight))
    for kind, theirs in (("huber", optax.huber_loss), ("square", optax.l2_loss)):
        value, error = dqn.q_loss(*args, kind)
        np.testing.assert_allclose(error, taken - target, rtol=1e-5, atol=1e-6)
        each = theirs(jnp.float32(taken), jnp.float32(target))
        np.testing.assert_allclose(value, np.mean(weight * each), rtol=1e-5)
    grad = jax.grad(lambda q: dqn.q_loss(q, *args[1:], "huber")[0])(args[0])
    expected = np.zeros((9, 4))
    expected[np.arange(9), action] = weight * np.clip(taken - target, -1, 1) / 9
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-7)


def test_duelling_heads_are_told_apart_by_the_mean():
    """The mean of the action values is the value; a constant in the advantages is nothing."""
    network = dqn.QNetwork(SPEC, (4, 3), "tanh", True)
    obs = jnp.float32(np.random.default_rng(2).normal(size=(7, 3)))
    shapes = jax.eval_shape(network.init, jax.random.key(0), obs)
    params = randomly(shapes, 3)
    q = network.apply(params, obs)
    expected = net(*jax.tree.map(np.float64, (params, obs)), True)
    np.testing.assert_allclose(q, expected, rtol=1e-4, atol=1e-5)
    heads = params["params"]
    lifted = jax.tree.map(lambda x: x, params)
    lifted["params"]["MLP_2"]["Dense_1"]["bias"] = heads["MLP_2"]["Dense_1"]["bias"] + 5.0
    np.testing.assert_allclose(network.apply(lifted, obs), q, atol=1e-5)
    lifted["params"]["MLP_1"]["Dense_1"]["bias"] = heads["MLP_1"]["Dense_1"]["bias"] + 5.0
    np.testing.assert_allclose(network.apply(lifted, obs), q + 5.0, atol=1e-5)
    assert np.ptp(q, axis=-1).min() > 0.01


def test_the_target_network_moves_at_every_third_gradient_step_over_all_updates():
    for tau in (1.0, 0.25):
        cfg = dataclasses.replace(PLAIN, tau=tau)
        state = played(cfg, random_steps(6, 5))
        moved = []
        for t in range(1, 12, 2):  # gradient steps 0 and 1, 2 and 3, ..., 10 and 11
            before = state
            state, _ = UPDATE(cfg, state, jax.random.key(t), jnp.int32(t))
            same = jax.tree.map(lambda a, b: bool(np.all(a == b)), before.target, state.target)
            moved.append(not all(jax.tree.leaves(same)))
            if t in (5, 11):  # the second step of these updates moves it
                assert_near(state.target, mixture(state.params, before.target, tau), rtol=1e-5)
            if t in (3, 9):  # the first one does, before the last change of the parameters
                new, old = (jax.tree.leaves(x)[0] for x in (state.target, state.params))
                assert np.any(new != old)
        assert moved == [False, True, True, False, True, True]


def test_epsilon_falls_linearly_and_greedy_actions_are_the_best():
    cfg = dataclasses.replace(PLAIN, epsilon=0.9, epsilon_final=0.1, epsilon_steps=80.0)
    state = start(cfg)
    bias = jnp.array([0.0, 1.0, 0.5])
    params = zeros(state.params)
    params["params"]["MLP_0"]["Dense_2"]["bias"] = bias
    agent = dqn.make(cfg, SPEC)

    @jax.jit
    def act(state, key, t):
        obs = jnp.zeros((30_000, 3))
        return agent.act(state, (), obs, None, key, t, "train")[0]

    step = random_steps(1, 6)[0]
    for t, epsilon in ((0, 0.88), (19, 0.5), (39, 0.1), (1000, 0.1)):
        state = OBSERVE(cfg, state._replace(params=params), step, (), jnp.int32(t))
        action = np.asarray(act(state, jax.random.key(t), jnp.int32(t + 1)))
        counts = np.bincount(action, minlength=ACTIONS)
        chances = np.array([epsilon / 3, 1 - epsilon * 2 / 3, epsilon / 3])
        assert stats.chisquare(counts, 30_000 * chances).pvalue > 1e-4
        metrics = UPDATE(cfg, played(cfg, random_steps(6, 7)), jax.random.key(0), jnp.int32(t))[1]
        assert metrics["epsilon"] == pytest.approx(epsilon)
    now = jnp.int32(5)
    greedy, _, _ = agent.act(state, (), jnp.zeros((50, 3)), None, jax.random.key(0), now, "eval")
    assert greedy.dtype == jnp.int32
    assert greedy.tolist() == [1] * 50


def test_rows_without_a_whole_window_have_no_priority_and_new_ones_the_largest():
    state = start(RAINBOW)
    for t, step in enumerate(random_steps(15, 8)):
        if t == 9:
            raised = prioritised.make(12).set(
                state.priorities, jnp.array([0]), jnp.array([7.0])
            )  # fmt: skip
            state = state._replace(priorities=raised)
        state = OBSERVE(RAINBOW, state, step, (), jnp.int32(t))
        whole = {
            time % 6 * N + env for time in range(max(0, t - 5), t - 1) for env in range(N)
        }  # fmt: skip
        leaves = np.asarray(state.priorities.levels[0]).ravel()
        assert set(np.flatnonzero(leaves)) == whole, t
        if whole:
            index = np.asarray(SAMPLE(state.priorities, jax.random.key(t), 64)[0])
            assert set(index) <= whole, t
        if t == 8:
            assert set(leaves[sorted(whole)]) == {1.0}
        if t >= 9:
            newest = (t - 2) % 6 * N
            assert set(leaves[newest : newest + N]) == {7.0}
    # and no update gives such a row a priority
    after, _ = UPDATE(RAINBOW, state, jax.random.key(0), jnp.int32(14))
    assert set(np.flatnonzero(after.priorities.levels[0])) == whole


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch_size": 13}, "batch_size = 13: expected at most buffer_size = 12"),
        ({"n_step": 7}, "buffer_size = 12: expected at least n_step . num_envs = 14"),
        ({"warmup_steps": 5}, "warmup_steps = 5: expected at least n_step . num_envs = 6"),
        ({"buffer_size": 13}, "capacity = 13 with num_envs = 2"),
        ({"hidden": ()}, "hidden = .*: expected a width, or duelling = False"),
        ({"n_step": 0}, "n_step = 0"),
        ({"epsilon": 1.5}, "epsilon = 1.5"),
        ({"loss": "l1"}, "'huber', 'square'"),
        ({"target_period": 2.0}, "target_period = 2.0: expected a whole number"),
    ],
)
def test_bad_fields_are_named(fields, said):
    with pytest.raises(InputError, match=said):
        make_agent("dqn", SPEC, AGENTS["dqn"].config_for("", **{**SMALL, **fields}))


def test_continuous_actions_are_refused():
    with pytest.raises(InputError, match="DQN needs discrete actions; Pendulum-v1"):
        make_train("dqn", make_env("Pendulum-v1"), 10_000)
