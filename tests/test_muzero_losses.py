"""MuZero's unrolled loss against a loop over samples and steps, and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from muzero_reference import (
    ball_spec,
    game_spec,
    random_obs,
    random_params,
    slow_losses,
    slow_total,
    small_net,
    vector_spec,
)

from mbrl_jax.agents import muzero, muzero_losses
from mbrl_jax.agents.muzero_targets import Targets
from mbrl_jax.models import muzero_net
from mbrl_jax.models.muzero_net import Latent, Prediction

BATCH, STEPS = 4, 3
SUPPORT = muzero_net.support_of(11, 2.0, 10.0)
COEFS = {"value": 0.25, "entropy": -0.1, "consistency": 2.0, "commitment": 0.25}
WEIGHT = jnp.float32([1.0, 0.5, 0.25, 2.0])
KINDS = {
    "vector": (vector_spec(), {}),
    "consistency": (vector_spec(), {"projection": 16}),
    "prefix": (vector_spec(), {"prefix_period": 2}),
    "game": (game_spec(), {"projection": 8, "prefix_period": 1}),
    "sampled": (ball_spec(), {}),
    "chance": (vector_spec(), {"chance": 4, "projection": 8}),
}


def drawn(spec, seed=0):
    """Observations, actions and targets of which every mask and number differs."""
    rng = np.random.default_rng(seed)
    obs, later = random_obs(spec, BATCH, seed=1), random_obs(spec, BATCH, STEPS, seed=2)
    candidates: object = ()
    if spec.discrete:
        num = spec.num_actions
        action = jax.nn.one_hot(rng.integers(0, num, (BATCH, STEPS)), num)
    else:
        num = 5
        action = jnp.asarray(rng.uniform(-1, 1, (BATCH, STEPS, 2)), jnp.float32)
        candidates = jnp.asarray(rng.standard_normal((BATCH, STEPS + 1, num, 2)), jnp.float32)
    policy = rng.dirichlet(np.ones(num), (BATCH, STEPS + 1))
    policy[0, 0] = np.eye(num)[0]  # of a mask with one legal action
    running = np.float32([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    known = np.float32([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    return obs, later, action, Targets(
        policy=jnp.asarray(policy, jnp.float32), candidates=candidates,
        value=jnp.asarray(rng.uniform(-15, 15, (BATCH, STEPS + 1)), jnp.float32),
        reward=jnp.asarray(rng.uniform(-3, 3, (BATCH, STEPS)), jnp.float32),
        continues=jnp.float32([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]),
        policy_mask=jnp.asarray(running), value_mask=jnp.asarray(known),
        step_mask=jnp.asarray(known[:, :STEPS]), likeness_mask=jnp.asarray(running[:, :STEPS]),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def parts_of(net, params, obs, action, made, later):
    return muzero_losses.unrolled_losses(net, params, SUPPORT, obs, action, made, later)


@functools.partial(jax.jit, static_argnums=0)
def slopes_of(net, params, obs, action, made, later):
    def loss(params):
        parts, _ = muzero_losses.unrolled_losses(net, params, SUPPORT, obs, action, made, later)
        return muzero_losses.total_loss(parts, COEFS, 1.0)

    return jax.grad(loss)(params)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_a_loop_over_samples_and_steps(kind):
    spec, changes = KINDS[kind]
    net = small_net(spec, **changes)
    params = random_params(net)
    obs, later, action, made = drawn(spec)
    later = later if net.projection or net.chance else None
    parts, predictions = parts_of(net, params, obs, action, made, later)
    slow = slow_losses(net, params, SUPPORT, obs, action, made, later)
    assert parts.keys() == slow.keys()
    for name, expected in slow.items():
        np.testing.assert_allclose(parts[name], expected, rtol=2e-4, atol=2e-5, err_msg=name)
        assert parts[name].shape == (BATCH, STEPS + (name in ("policy", "value", "entropy")))
    assert predictions.value.shape == (STEPS + 1, BATCH, net.bins)
    total = muzero_losses.total_loss(parts, COEFS, WEIGHT)
    np.testing.assert_allclose(total, slow_total(slow, COEFS, np.asarray(WEIGHT)), rtol=2e-4)


def test_the_first_state_counts_whole_and_later_steps_a_share():
    ones = {"policy": jnp.ones((2, 5)), "reward": jnp.ones((2, 4))}
    np.testing.assert_allclose(muzero_losses.total_loss(ones, {}, 1.0), 2.0 + 1.0)
    first = {"policy": jnp.eye(5)[:1], "reward": jnp.zeros((1, 4))}
    np.testing.assert_allclose(muzero_losses.total_loss(first, {}, 1.0), 1.0)
    last = {"policy": jnp.eye(5)[4:], "reward": jnp.zeros((1, 4))}
    np.testing.assert_allclose(muzero_losses.total_loss(last, {}, 1.0), 0.25)


def test_sequences_count_by_their_importance():
    parts = {"policy": jnp.zeros((3, 3)), "reward": jnp.float32([[1, 0], [0, 4], [8, 8]])}
    weight = jnp.float32([1.0, 0.5, 0.0])
    np.testing.assert_allclose(muzero_losses.total_loss(parts, {}, weight), (0.5 + 1.0) / 3)


def test_there_is_no_reward_at_the_first_state():
    """Nor continuation: of the targets of a step, one for each action, all enter once."""
    spec = vector_spec()
    net = small_net(spec)
    obs, _, action, made = drawn(spec)
    parts, _ = parts_of(net, random_params(net), obs, action, made, None)
    assert parts["reward"].shape == parts["continues"].shape == (BATCH, STEPS)
    # where only the first state counts, the functions of steps learn nothing
    alone = made._replace(
        policy_mask=made.policy_mask.at[:, 1:].set(0), value_mask=made.value_mask.at[:, 1:].set(0),
        step_mask=jnp.zeros_like(made.step_mask),
    )  # fmt: skip
    slopes = slopes_of(net, random_params(net), obs, action, alone, None)
    for name in ("dynamics", "outcome"):
        assert not any(np.any(x) for x in jax.tree.leaves(slopes[name])), name
    assert any(np.any(x) for x in jax.tree.leaves(slopes["representation"]))


def test_nothing_is_learned_behind_the_masks():
    """Whatever stands in the targets, the observations and the actions of sequences past an end."""
    spec = vector_spec()
    net = small_net(spec, projection=8)
    params = random_params(net)
    obs, later, action, made = drawn(spec)
    # sample 2: its first step ends at a time limit; sample 3: nothing counts
    moved = made._replace(
        policy=made.policy.at[1, 2:].set(0.2).at[2, 1:].set(0.1).at[3].set(0.3),
        value=made.value.at[2, 1:].set(7.0).at[3].set(-7.0),
        reward=made.reward.at[2, 1:].set(1.0).at[3].set(-1.0),
        continues=made.continues.at[2, 1:].set(1.0).at[3].set(0.0),
    )  # fmt: skip
    others = later.at[1, 2:].add(5.0).at[2, 1:].add(5.0).at[3].add(5.0)
    elsewhere = action.at[2, 1:].set(1.0 - action[2, 1:]).at[3].set(1.0 - action[3])
    first = slopes_of(net, params, obs, action, made, later)
    second = slopes_of(net, params, obs, elsewhere, moved, others)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), first, second)


# the gradient


def halved_by_hand(net, params, constants, obs, action, made):
    """The loss with each latent on its way into the dynamics replaced by 0.5 x + 0.5 constant."""
    latent = muzero_net.represent(net, params, obs)
    parts = {name: [] for name in ("policy", "value", "entropy", "reward", "continues")}
    for k in range(STEPS + 1):
        said = muzero_net.predict(net, params, latent)
        policy = muzero_losses.policy_loss(said, made.policy[:, k], ())
        value = muzero_net.distribution_loss(said.value, made.value[:, k], SUPPORT.value)
        parts["policy"].append(policy * made.policy_mask[:, k])
        parts["value"].append(value * made.value_mask[:, k])
        parts["entropy"].append(muzero_losses.entropy_of(said) * made.policy_mask[:, k])
        if k == STEPS:
            break
        given = Latent(0.5 * latent.features + 0.5 * constants[k], latent.prefix)
        latent, came = muzero_net.transition(net, params, SUPPORT, given, action[:, k])
        reward = muzero_net.distribution_loss(came.reward, made.reward[:, k], SUPPORT.reward)
        sure = jnp.where(made.continues[:, k] > 0, came.continues, -came.continues)
        parts["reward"].append(reward * made.step_mask[:, k])
        parts["continues"].append(-jax.nn.log_sigmoid(sure) * made.step_mask[:, k])
    parts = {name: jnp.stack(x, axis=1) for name, x in parts.items()}
    return muzero_losses.total_loss(parts, COEFS, 1.0)


@pytest.mark.parametrize("kind", ["vector", "game"])
def test_half_of_the_gradient_passes_each_step(kind):
    """Along random directions, by finite differences of a loss whose other half is constant."""
    spec = KINDS[kind][0]
    net = small_net(spec)
    params = random_params(net, scale=0.2)
    obs, _, action, made = drawn(spec)
    made_by = jax.jit(muzero_losses.unroll, static_argnums=0)(net, params, SUPPORT, obs, action)
    slopes = slopes_of(net, params, obs, action, made, None)
    loss = jax.jit(halved_by_hand, static_argnums=0)
    rng = np.random.default_rng(3)
    for name in ("representation", "dynamics", "prediction"):
        leaves, shape = jax.tree.flatten(params[name])
        way = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in leaves]
        step = 3e-3 / float(jnp.sqrt(sum(jnp.sum(x * x) for x in way)))
        sides = []
        for size in (step, -step):
            moved = [x + size * d for x, d in zip(leaves, way, strict=True)]
            given = params | {name: jax.tree.unflatten(shape, moved)}
            sides.append(float(loss(net, given, made_by.features, obs, action, made)))
        difference = (sides[0] - sides[1]) / (2.0 * step)
        slope = zip(jax.tree.leaves(slopes[name]), way, strict=True)
        along = sum(float(jnp.sum(a * b)) for a, b in slope)
        assert along == pytest.approx(difference, rel=0.02, abs=0.02), name


def test_halving_changes_no_number_and_halves_the_gradient():
    tree = {"a": jnp.float32([1.5, -2.0]), "n": jnp.int32(3)}
    same = muzero_net.halve_gradient(tree)
    np.testing.assert_array_equal(same["a"], tree["a"])
    assert same["n"] == 3
    slope = jax.grad(lambda x: jnp.sum(muzero_net.halve_gradient(x) * x))(tree["a"])
    np.testing.assert_allclose(slope, 1.5 * tree["a"])


def test_the_gradient_through_k_steps_is_halved_k_times():
    """Of the latent after k steps with regard to the first observation; not only at the first."""
    spec = vector_spec()
    net = small_net(spec)
    params, (obs, _, action, _) = random_params(net), drawn(spec)

    @jax.jit
    def slopes(obs):
        def ours(obs, k):
            along = muzero_losses.unroll(net, params, SUPPORT, obs, action)
            return jnp.sum(along.features[k] ** 2)

        def whole(obs, k):
            latent = muzero_net.represent(net, params, obs)
            for i in range(k):
                latent, _ = muzero_net.transition(net, params, SUPPORT, latent, action[:, i])
            return jnp.sum(latent.features**2)

        return [(jax.grad(ours)(obs, k), jax.grad(whole)(obs, k)) for k in range(STEPS + 1)]

    for k, (found, whole) in enumerate(slopes(obs)):
        np.testing.assert_allclose(found, whole * 0.5**k, rtol=1e-3, atol=1e-6)


# policies


def test_policies_of_candidates_go_by_slot():
    """The weight of a candidate is its own: with both permuted nothing changes."""
    rng = np.random.default_rng(0)
    mean, std = jnp.zeros((3, 2)), jnp.full((3, 2), 0.7)
    points = jnp.asarray(rng.standard_normal((3, 6, 2)), jnp.float32)
    weights = jnp.asarray(rng.dirichlet(np.ones(6), 3), jnp.float32)
    said, order = Prediction((mean, std), None), rng.permutation(6)
    loss = muzero_losses.policy_loss(said, weights, points)
    both = muzero_losses.policy_loss(said, weights[:, order], points[:, order])
    one = muzero_losses.policy_loss(said, weights, points[:, order])
    np.testing.assert_allclose(both, loss, rtol=1e-5)
    assert np.all(np.abs(one - loss) > 1e-3)


def test_where_the_weight_lies_the_policy_goes():
    """A step against the gradient moves the mean to the best candidate, whatever its slot."""
    points = jnp.float32([[[1.0, -1.0], [-2.0, 0.5], [0.0, 2.0]]])
    for slot in range(3):
        weights = jnp.eye(3)[slot][None]

        def loss(mean, weights=weights):
            said = Prediction((mean, jnp.ones((1, 2))), None)
            return jnp.sum(muzero_losses.policy_loss(said, weights, points))

        np.testing.assert_allclose(-jax.grad(loss)(jnp.zeros((1, 2))), points[:, slot], rtol=1e-5)


def test_illegal_actions_of_weight_zero_cost_nothing():
    """Not even where the network thinks them impossible; and they are pushed down elsewhere."""
    said = Prediction(jnp.float32([[0.0, 1.0, -1e9]]), None)
    weights = jnp.float32([[0.25, 0.75, 0.0]])
    loss = muzero_losses.policy_loss(said, weights, ())
    expected = np.log(1 + np.e) - 0.75
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)
    slope = jax.grad(lambda x: muzero_losses.policy_loss(Prediction(x, None), weights, ())[0])
    assert slope(jnp.zeros((1, 3)))[0, 2] > 0.3


# actions past an end


@pytest.mark.parametrize("spec", [vector_spec(), ball_spec()], ids=["discrete", "continuous"])
def test_actions_past_the_end_are_random(spec):
    """Not repeated, not 0; those of the episode stay as they are."""
    running = jnp.tile(jnp.float32([[1, 1, 0, 0, 0, 0, 0, 0]]), (500, 1))
    shape = (500, 7, *spec.action_shape)
    action = jnp.ones(shape, jnp.int32 if spec.discrete else jnp.float32)
    found = np.asarray(muzero.padded_actions(spec, action, running, jax.random.key(0)))
    np.testing.assert_array_equal(found[:, :2], muzero_net.action_vector(spec, action)[:, :2])
    past = found[:, 2:]
    if spec.discrete:
        np.testing.assert_allclose(past.mean((0, 1)), 1 / 3, atol=0.05)
        np.testing.assert_array_equal(past.sum(-1), 1.0)
        past = past.argmax(-1)
    else:
        assert past.min() < -0.9
        assert past.max() > 0.9
        np.testing.assert_allclose(past.mean((0, 1)), 0.0, atol=0.05)
    assert np.std(past, axis=0).min() > 0.3
    assert np.mean(past[:, 1:] == past[:, :-1]) < 0.5
