"""MuZero's three functions: latents, heads, supports, action planes and the value prefix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from muzero_reference import (
    FUNCTIONS,
    TINY,
    ball_spec,
    dict_spec,
    first_params,
    game_spec,
    random_obs,
    random_params,
    slow_transform,
    slow_two_hot,
    small_net,
    vector_spec,
)

from mbrl_jax.agents import muzero_config, muzero_losses
from mbrl_jax.models import muzero_layers, muzero_net
from mbrl_jax.models.latent import recurrent_fn, search_root
from mbrl_jax.models.muzero_net import Latent, Outcome
from mbrl_jax.types import InputError

represent, predict, transition, _ = FUNCTIONS
SUPPORT = muzero_net.support_of(11, 2.0, 10.0)
WORLDS = {
    "vector": vector_spec(),
    "one-hot integer": vector_spec(obs_shape=(), obs_dtype="int32", num_obs=5),
    "grid 3x3": game_spec(),
    "grid 6x7": vector_spec(obs_shape=(6, 7, 2), num_actions=7),
    "grid 10x10 of brightness": vector_spec(obs_shape=(10, 10, 3), obs_dtype="uint8"),
    "dict of two": dict_spec("Two-test", place=((2,), "float32"), cell=((), "int32", 4),
                             action_mask=((3,), "bool")),
    "continuous actions": ball_spec(),
}  # fmt: skip


def vectors(net, batch, seed=0):
    rng = np.random.default_rng(seed)
    if net.spec.discrete:
        num = net.spec.num_actions
        return jax.nn.one_hot(rng.integers(0, num, batch), num)
    return jnp.asarray(rng.uniform(-1, 1, (batch, *net.spec.action_shape)), jnp.float32)


@pytest.mark.parametrize("name", WORLDS)
def test_latents_are_in_the_unit_and_heads_start_at_nothing(name):
    """Uniform policy, value exactly 0, reward 0, and a task that goes on with 0.95."""
    net = small_net(WORLDS[name])
    assert net.grid == name.startswith("grid")
    params, obs = first_params(net), random_obs(net.spec, 3)
    latent = represent(net, params, obs)
    part = muzero_net.part_of(net.spec)
    expected = (3, *part.shape[:2], 8) if net.grid else (3, 8)
    for _ in range(2):
        assert latent.features.shape == expected
        assert latent.features.dtype == jnp.float32
        rows = np.asarray(latent.features).reshape(3, -1)
        np.testing.assert_allclose(rows.min(1), 0.0, atol=1e-6)
        np.testing.assert_allclose(rows.max(1), 1.0, atol=1e-6)
        said = predict(net, params, latent)
        assert np.all(np.asarray(muzero_net.expected(said.value, SUPPORT.value)) == 0.0)
        if net.spec.discrete:
            assert said.policy.shape == (3, net.spec.num_actions)
            assert np.all(np.asarray(said.policy) == 0.0)
        else:
            np.testing.assert_allclose(said.policy[0], np.zeros((3, 2)))
            np.testing.assert_allclose(said.policy[1], np.full((3, 2), 0.7), rtol=1e-6)
        latent, came = transition(net, params, SUPPORT, latent, vectors(net, 3))
        assert np.all(np.asarray(muzero_net.expected(came.reward, SUPPORT.reward)) == 0.0)
        np.testing.assert_allclose(jax.nn.sigmoid(came.continues), 0.9526, atol=1e-4)


@pytest.mark.parametrize("name", ["vector", "grid 3x3"])
def test_a_sample_does_not_depend_on_its_batch(name):
    """The root of one game is represented as it was in training: no statistics of a batch."""
    net = small_net(WORLDS[name])
    params, obs = random_params(net), random_obs(net.spec, 256)
    obs = jax.tree.map(lambda x: x * 3 if x.dtype == jnp.float32 else x, obs)
    one = jax.tree.map(lambda x: x[7:8], obs)
    action = vectors(net, 256)
    whole, single = represent(net, params, obs), represent(net, params, one)
    np.testing.assert_allclose(whole.features[7:8], single.features, atol=1e-5)
    whole, came = transition(net, params, SUPPORT, whole, action)
    single, alone = transition(net, params, SUPPORT, single, action[7:8])
    np.testing.assert_allclose(whole.features[7:8], single.features, atol=1e-5)
    np.testing.assert_allclose(came.reward[7:8], alone.reward, atol=1e-4)
    value = predict(net, params, whole).value[7:8]
    np.testing.assert_allclose(value, predict(net, params, single).value, atol=1e-4)


def test_reserved_names_and_brightness():
    """Mask and player are none of the latent; uint8 is divided by 255."""
    net = small_net(game_spec())
    obs = random_obs(net.spec, 3)
    other = obs | {"action_mask": ~obs["action_mask"], "to_play": 1 - obs["to_play"]}
    params = random_params(net)
    a, b = represent(net, params, obs), represent(net, params, other)
    np.testing.assert_array_equal(a.features, b.features)
    bright = small_net(vector_spec(obs_shape=(3, 4, 2), obs_dtype="uint8"))
    image = random_obs(bright.spec, 3)
    params = random_params(bright)
    a = represent(bright, params, image)
    b = represent(bright, params, image.astype(jnp.float32) / 255.0)
    np.testing.assert_allclose(a.features, b.features, atol=1e-6)


def test_unit_scaling_by_hand_and_its_gradient():
    x = jnp.float32([[2.0, 4.0, 3.0], [7.0, 7.0, 7.0], [-1.0, 0.0, 1.0]])
    found = muzero_layers.unit_scaled(x)
    np.testing.assert_allclose(found, [[0, 1, 0.5], [0, 0, 0], [0, 0.5, 1]])
    grid = muzero_layers.unit_scaled(x.reshape(1, 3, 3, 1))
    np.testing.assert_allclose(grid.reshape(3, 3), (x + 1) / 8)
    # of the middle number of the first row by hand: (c - a) / (b - a)
    slope = jax.grad(lambda x: muzero_layers.unit_scaled(x)[0, 2])(x)
    np.testing.assert_allclose(slope[0], [-0.25, -0.25, 0.5], atol=1e-6)
    assert np.isfinite(jax.jacobian(muzero_layers.unit_scaled)(x)).all()


# supports


@pytest.mark.parametrize("num", [2, 10, 11, 51])
def test_supports_are_even_and_symmetric_up_to_their_limits(num):
    support = muzero_net.support_of(num, 3.0, 250.0)
    for bins, limit in ((support.reward, 3.0), (support.value, 250.0)):
        assert bins.shape == (num,)
        assert bins.dtype == jnp.float32
        np.testing.assert_array_equal(bins, -bins[::-1])
        np.testing.assert_allclose(np.diff(bins), 2 * slow_transform(limit) / (num - 1), rtol=1e-5)
        np.testing.assert_allclose(bins[-1], slow_transform(limit), rtol=1e-6)
        assert (0.0 in np.asarray(bins)) == bool(num % 2)
        uniform = muzero_net.expected(jnp.zeros(num), bins)
        assert float(uniform) == 0.0


@pytest.mark.parametrize("num", [2, 10, 51, 601])
def test_targets_are_the_means_of_their_codes(num):
    """Over +-1e4 against float64: the loss of any logits, and the scalar that the code means."""
    bins = muzero_net.support_of(num, 1.0, 1e4).value
    sizes = np.concatenate([[0.0], np.logspace(-3, 4, 40)])
    targets = np.float32(np.concatenate([sizes, -sizes]))
    logits = np.random.default_rng(0).normal(size=(len(targets), num)).astype(np.float32)
    loss = jax.jit(muzero_net.distribution_loss)(logits, targets, bins)
    log = np.float64(logits)
    log = log - np.log(np.exp(log).sum(-1, keepdims=True))
    codes = np.stack([slow_two_hot(slow_transform(float(x)), bins) for x in targets])
    np.testing.assert_allclose(loss, -(codes * log).sum(-1), rtol=2e-4, atol=2e-4)
    back = jax.jit(muzero_net.expected)(np.float32(np.log(np.maximum(codes, 1e-30))), bins)
    np.testing.assert_allclose(back, targets, rtol=1e-3, atol=1e-3)


def test_targets_beyond_the_support_are_clipped_and_counted():
    """10 in the transformed scale holds 117, not the values of CartPole."""
    limit = float(muzero_net.signed_parabolic(jnp.float32(10.0)))
    assert limit == pytest.approx(117.6, abs=1.0)
    bins = muzero_net.support_of(21, 1.0, limit).value
    targets = jnp.float32([0.0, 100.0, limit, -limit, 125.0, -125.0, 260.0])
    counted = muzero_net.is_clipped(targets, bins)
    assert counted.tolist() == [False] * 4 + [True] * 3
    logits = jnp.broadcast_to(jnp.arange(21.0)[None], (2, 21))
    loss = muzero_net.distribution_loss(logits, jnp.float32([limit, 260.0]), bins)
    np.testing.assert_allclose(loss[0], loss[1], rtol=1e-5)


def test_the_default_support_holds_every_value_of_an_episode():
    spec = vector_spec(episode_limit=500)
    bins = muzero_config.support(TINY, spec)
    values = jnp.float32([(1 - 0.997**500) / 0.003])
    assert not muzero_net.is_clipped(values, bins.value)[0]
    assert muzero_net.is_clipped(values * 1.05, bins.value)[0]
    # a game is decided once
    np.testing.assert_allclose(
        muzero_config.support(TINY, game_spec()).value[-1], slow_transform(1.0)
    )


# actions


def planes(spec, action, height, width):
    action = jax.nn.one_hot(jnp.int32(action), spec.num_actions)
    return np.asarray(muzero_layers.action_planes(action, jnp.zeros((1, height, width, 4))))[0]


def test_actions_of_cells_and_columns_mark_them():
    cells = vector_spec(num_actions=6)
    marked = planes(cells, [4], 2, 3)
    assert marked.shape == (2, 3, 1)
    assert marked[1, 1, 0] == 1
    assert marked.sum() == 1
    with_pass = vector_spec(num_actions=7)
    np.testing.assert_array_equal(planes(with_pass, [4], 2, 3), marked)
    assert not planes(with_pass, [6], 2, 3).any()
    columns = planes(vector_spec(num_actions=3), [1], 2, 3)
    assert columns.shape == (2, 3, 1)
    assert columns[:, 1].all()
    assert columns.sum() == 2


def test_other_actions_have_planes_of_their_own():
    found = planes(vector_spec(num_actions=4), [2], 2, 3)
    assert found.shape == (2, 3, 4)
    assert found[..., 2].all()
    assert found.sum() == 6
    action = jnp.float32([[0.25, -1.0, 0.5]])
    size = muzero_layers.action_planes(action, jnp.zeros((1, 2, 4, 4)))
    np.testing.assert_allclose(size[0, ..., 0], np.full((2, 4), 0.25))
    np.testing.assert_allclose(size[0, ..., 1], np.full((2, 4), -1.0))


def test_a_reward_may_come_from_an_action_that_changes_nothing():
    """With weights by which actions shift all features alike, the next state is the same."""
    net = small_net(vector_spec(), blocks=0)
    params = random_params(net)
    kernel = params["dynamics"]["params"]["Dense_0"]["kernel"]
    shifts = jnp.broadcast_to(jnp.float32([[0.0], [1.0], [-2.0]]), (3, 8))
    params["dynamics"]["params"]["Dense_0"]["kernel"] = kernel.at[8:].set(shifts)
    latent = represent(net, params, jnp.ones((3, 3)))
    after, came = transition(net, params, SUPPORT, latent, jnp.eye(3))
    np.testing.assert_allclose(after.features[1:], after.features[:2], atol=1e-5)
    assert np.abs(np.diff(np.asarray(came.reward), axis=0)).max(axis=1).min() > 1e-2


# the value prefix


@pytest.mark.parametrize("period", [1, 2, 3])
def test_the_prefix_sums_and_starts_anew(period):
    """In the search as in the loss; rewards are what a step adds to the sum."""
    net = small_net(vector_spec(), prefix_period=period)
    params, batch, steps = random_params(net, scale=1.0), 3, 7
    obs = random_obs(net.spec, batch)
    actions = vectors(net, batch * steps).reshape(batch, steps, 3)
    unroll = jax.jit(muzero_losses.unroll, static_argnums=0)
    outcomes = unroll(net, params, SUPPORT, obs, actions).outcome
    latent, before = represent(net, params, obs), np.zeros(batch)
    for k in range(steps):
        assert latent.prefix.steps.tolist() == [k % period] * batch
        np.testing.assert_allclose(latent.prefix.total, before, rtol=1e-4, atol=1e-5)
        if k % period == 0:
            for x in latent.prefix.hidden:
                assert not np.any(x)
        after, came = transition(net, params, SUPPORT, latent, actions[:, k])
        np.testing.assert_allclose(came.reward, outcomes.reward[k], rtol=1e-3, atol=1e-4)
        total = np.asarray(muzero_net.expected(came.reward, SUPPORT.reward))
        reward = muzero_net.reward_of(SUPPORT, latent, came)
        np.testing.assert_allclose(reward, total - before, rtol=1e-3, atol=1e-4)
        before = np.zeros(batch) if (k + 1) % period == 0 else total
        latent = after


def test_a_prefix_remembers_what_came_before():
    """The second sum of a period depends on the first action, the first of the next does not."""
    net = small_net(vector_spec(), prefix_period=2)
    params = random_params(net)
    seen = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 8)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def logits(net, first):
        prefix, found = muzero_layers.empty_prefix(net, 2), []
        for given in (first, seen[1], seen[2]):
            came, prefix = muzero_net.outcome(net, params, SUPPORT, given, prefix)
            found.append(came.reward)
        return found

    one, other = logits(net, seen[0]), logits(net, seen[3])
    assert np.abs(one[1] - other[1]).min(axis=-1).max() > 1e-4
    np.testing.assert_allclose(one[2], other[2], atol=1e-6)


# the contract of latent models


@pytest.mark.parametrize(("spec", "sign"), [(vector_spec(), 1.0), (game_spec(), -1.0)])
def test_the_model_as_a_search_meets_it(spec, sign):
    net = small_net(spec)
    params, obs = random_params(net), random_obs(spec, 4)
    model = muzero_net.latent_model(net, SUPPORT, 0.9)

    @jax.jit
    def searched(params, obs, action, key):
        root = search_root(model, params, obs)
        return root, recurrent_fn(model)(params, key, action, root.embedding)

    action = jnp.int32([0, 1, 2, 0])
    root, (out, after) = searched(params, obs, action, jax.random.key(0))
    assert root.prior_logits.shape == out.prior_logits.shape == (4, spec.num_actions)
    assert root.value.shape == out.value.shape == out.reward.shape == out.discount.shape == (4,)
    assert jax.tree.structure(after) == jax.tree.structure(root.embedding)
    latent = represent(net, params, obs)
    vector = muzero_net.action_vector(spec, action)
    moved, came = transition(net, params, SUPPORT, latent, vector)
    np.testing.assert_allclose(out.discount, sign * 0.9 * jax.nn.sigmoid(came.continues), rtol=1e-5)
    np.testing.assert_allclose(after.features, moved.features, atol=1e-6)
    expected = muzero_net.expected(predict(net, params, moved).value, SUPPORT.value)
    np.testing.assert_allclose(out.value, expected, rtol=1e-3, atol=1e-4)


def test_a_task_that_ends_has_no_discount():
    found = Outcome(jnp.zeros((2, 11)), jnp.float32([-200.0, 200.0]))
    alone = muzero_net.discount_of(small_net(vector_spec()), found, 0.5)
    assert np.asarray(alone).tolist() == [0.0, 0.5]


@pytest.mark.parametrize("by_loss", ["policy", "value", "reward", "continues"])
def test_each_loss_moves_the_functions_that_it_should(by_loss):
    """Policy and value move no reward head, rewards move no prediction; all move the others."""
    net = small_net(vector_spec())
    params, action = random_params(net), vectors(net, 4)
    obs = random_obs(net.spec, 4)

    def loss(params):
        latent = muzero_net.represent(net, params, obs)
        latent, came = muzero_net.transition(net, params, SUPPORT, latent, action)
        said = muzero_net.predict(net, params, Latent(latent.features))
        logits = {"policy": said.policy, "value": said.value, "reward": came.reward,
                  "continues": came.continues}[by_loss]  # fmt: skip
        return jnp.sum(jnp.sin(logits))

    slopes = jax.jit(jax.grad(loss))(params)
    moved = {name for name, x in slopes.items() if any(np.any(leaf) for leaf in jax.tree.leaves(x))}
    head = "prediction" if by_loss in ("policy", "value") else "outcome"
    assert moved == {"representation", "dynamics", head}


# refusals


@pytest.mark.parametrize(
    ("spec", "grid", "said"),
    [
        (vector_spec(obs_shape=(25, 10, 3)), False, r"\(25, 10, 3\).*3 to 24 cells.*dreamer"),
        (vector_spec(obs_shape=(84, 84, 4), obs_dtype="uint8"), True, r"'obs'.*\(84, 84, 4\)"),
        (dict_spec("Big-test", view=((64, 64, 3), "uint8")), False, r"'view'.*\(64, 64, 3\)"),
        (vector_spec(), True, r"torso = 'grid' with Vector-test.*torso = 'vector'"),
        (WORLDS["dict of two"], True, "one observation"),
    ],
)  # fmt: skip
def test_observations_that_no_torso_fits_are_refused(spec, grid, said):
    with pytest.raises(InputError, match=said) as error:
        muzero_net.check_observations(spec, grid)
    assert "\n" not in str(error.value)


def test_grids_are_told_from_vectors():
    assert muzero_net.takes_grid(game_spec())
    assert muzero_net.takes_grid(vector_spec(obs_shape=(24, 3, 1)))
    assert not muzero_net.takes_grid(vector_spec(obs_shape=(2, 5, 5)))
    assert not muzero_net.takes_grid(vector_spec(obs_shape=(25, 3, 1)))
    assert not muzero_net.takes_grid(dict_spec("T", a=((3, 3, 1), "float32"), b=((2,), "float32")))
