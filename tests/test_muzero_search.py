"""MuZero's searches in the agent: batches, masks, two players, mctx, and what is reanalysed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.key_reuse._core import check_key_reuse
from muzero_reference import (
    FUNCTIONS,
    TINY,
    ball_spec,
    dict_spec,
    game_spec,
    random_obs,
    random_params,
    records,
    row_of,
    vector_spec,
    window_of,
)

from mbrl_jax import search
from mbrl_jax.agents import muzero, muzero_config
from mbrl_jax.agents import muzero_search as searches
from mbrl_jax.models import muzero_net
from mbrl_jax.models.latent import recurrent_fn, search_root
from mbrl_jax.models.muzero_net import Latent, Outcome, Prediction

MASKED = dict_spec("Masked-test", place=((3,), "float32"), action_mask=((3,), "bool"))
GUMBEL = TINY
PUCT = dataclasses.replace(TINY, search="puct", dirichlet_fraction=0.0)
SAMPLED = dataclasses.replace(
    TINY, search="sampled", num_candidates=5, wide_candidates=2, max_considered=5
)
FRESH = dataclasses.replace(TINY, reanalyse_policies=0.5, reanalyse_values=0.5)


@functools.partial(jax.jit, static_argnums=(1, 5))
def run(cfg, spec, params, key, obs, noise, temperature=0.0):
    net, bins = muzero_config.net_of(cfg, spec), muzero_config.support(cfg, spec)
    return searches.run(cfg, net, bins, params, key, obs, noise, temperature)


def params_of(cfg, spec, seed=0):
    return random_params(muzero_config.net_of(cfg, spec), seed)


def same_draws(cfg, prediction, key, wide):
    """`candidates_of` whose noise is the same for each row and node, whatever the batch."""
    rows = jax.tree.map(lambda x: x[:, None], prediction)
    drawn = jax.vmap(lambda row: ORIGINAL(cfg, row, jax.random.key(7), wide))(rows)
    return jax.tree.map(lambda x: x[:, 0], drawn)


ORIGINAL = searches.candidates_of


@pytest.mark.parametrize(
    ("cfg", "spec"), [(GUMBEL, game_spec()), (PUCT, MASKED), (SAMPLED, ball_spec())],
    ids=["gumbel", "puct", "sampled"],
)  # fmt: skip
def test_a_search_of_a_batch_is_searches_one_by_one(cfg, spec, monkeypatch):
    monkeypatch.setattr(searches, "candidates_of", same_draws)
    cfg = dataclasses.replace(cfg, gamma=0.95)  # its own trace, with the patch
    params, obs, key = params_of(cfg, spec), random_obs(spec, 4), jax.random.key(0)
    whole = run(cfg, spec, params, key, obs, False)
    for i in range(4):
        one = run(cfg, spec, params, key, row_of(obs, i), False)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a[i : i + 1], b, rtol=1e-3, atol=1e-4)


def test_acting_on_a_batch_is_acting_one_by_one():
    """In evaluations, whose actions are legal and need no key."""
    spec = game_spec()
    agent = muzero.make(TINY, spec)
    state = jax.jit(agent.init)(jax.random.key(0))._replace(params=params_of(TINY, spec))
    act = jax.jit(functools.partial(agent.act, mode="eval"))
    obs, first = random_obs(spec, 4, seed=3), jnp.zeros(4, bool)

    def acted(obs, first, key):
        before = agent.init_memory(first.shape[0])
        return act(state, before, obs, first, jax.random.key(key), jnp.int32(0))[0]

    whole = acted(obs, first, 0)
    one_by_one = [acted(row_of(obs, i), first[:1], i)[0]
                  for i in range(4)]  # fmt: skip
    np.testing.assert_array_equal(whole, one_by_one)
    np.testing.assert_array_equal(whole, acted(obs, first, 9))
    assert np.asarray(obs["action_mask"])[np.arange(4), np.asarray(whole)].all()


# masks


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("cfg", [GUMBEL, TINY, PUCT], ids=["gumbel", "few", "puct"])
def test_illegal_actions_have_no_part(cfg, noise):
    """At the root and in the target, also with one legal action or none (a final observation)."""
    if cfg is TINY:
        cfg = dataclasses.replace(cfg, max_considered=2)
    if noise and cfg.search == "puct":
        cfg = dataclasses.replace(cfg, dirichlet_fraction=0.5)
    spec = game_spec()
    obs = random_obs(spec, 6)
    mask = np.array(obs["action_mask"])
    mask[4], mask[5] = np.arange(9) == 8, False
    obs |= {"action_mask": jnp.asarray(mask)}
    found = run(cfg, spec, params_of(cfg, spec), jax.random.key(1), obs, noise, 1.0)
    weights = np.asarray(found.weights)
    assert np.isfinite(weights).all()
    assert np.isfinite(found.value).all()
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)
    assert np.all(weights[:5][~mask[:5]] == 0.0)
    assert mask[np.arange(5), np.asarray(found.action)[:5]].all()
    assert weights[4].tolist() == [0.0] * 8 + [1.0]
    assert found.action[4] == 8


@pytest.mark.parametrize("cfg", [GUMBEL, PUCT, SAMPLED], ids=["gumbel", "puct", "sampled"])
def test_equal_values_everywhere_are_no_division_by_zero(cfg):
    """As at the start: all heads 0, so that all values of the tree are equal."""
    spec = ball_spec() if cfg is SAMPLED else vector_spec()
    net = muzero_config.net_of(cfg, spec)
    params = jax.tree.map(jnp.zeros_like, params_of(cfg, spec))
    assert net.bins % 2
    found = run(cfg, spec, params, jax.random.key(0), random_obs(spec, 2), True, 1.0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    assert np.all(np.asarray(found.value) == 0.0)
    if cfg is GUMBEL:
        np.testing.assert_allclose(found.weights, np.full((2, 3), 1 / 3), rtol=1e-5)


# two players


def heap_model(net, gamma, wage=0.0):
    """A heap of which two players take 1 or 2 in turns; who takes the last wins. Nothing learned.

    A latent is how many are left; every state is worth 0 to the network. Each move earns `wage`.
    """

    def step(params, latent, action, key):
        left = latent.features - 1.0 - action.astype(jnp.float32)[:, None]
        reward = jnp.where(left[:, 0] == 0, 1.0, jnp.where(left[:, 0] < 0, -1.0, 0.0))
        reward = reward + wage
        came = Outcome(reward[:, None], jnp.where(left[:, 0] > 0, 200.0, -200.0))
        return Latent(left), reward, muzero_net.discount_of(net, came, gamma)

    def evaluate(params, latent):
        batch = latent.features.shape[0]
        return jnp.zeros((batch, 2)), jnp.zeros(batch)

    return muzero_net.LatentModel(lambda params, obs: Latent(obs), step, evaluate)


@pytest.mark.parametrize("kind", ["gumbel", "puct"])
def test_two_players_find_the_winning_move(kind, monkeypatch):
    """Left with a multiple of 3 one is lost; otherwise one leaves the other such a heap."""
    monkeypatch.setattr(muzero_net, "latent_model", lambda net, bins, gamma: heap_model(net, gamma))
    spec = dict_spec("Heap-test", 2, 2, place=((1,), "float32"), to_play=((), "int32"))
    cfg = dataclasses.replace(PUCT if kind == "puct" else GUMBEL, num_simulations=64, gamma=1.0)
    monkeypatch.setattr(type(spec), "legal", lambda self, obs: None)
    net, heaps = muzero_config.net_of(cfg, spec), jnp.float32([[1], [2], [4], [5], [3], [6]])

    @jax.jit
    def searched(heaps):
        return searches.run(cfg, net, None, {}, jax.random.key(0), heaps, False, 0.0)

    found = searched(heaps)
    assert found.action[:4].tolist() == [0, 1, 0, 1]
    assert np.argmax(found.weights[:4], axis=1).tolist() == [0, 1, 0, 1]
    if kind == "puct":  # whose visits go to the better action, where halving tries both
        value = np.asarray(found.value)
        assert np.all(value[:4] > 0.3)
        assert value[4] < -0.3
        assert value[5] < 0


def test_the_backup_flips_the_sign_of_later_rewards():
    """Every node's value is the mean of its own and its children's returns, seen by its mover."""
    spec = game_spec()
    net = muzero_config.net_of(GUMBEL, spec)
    model = heap_model(net, 1.0, wage=0.25)
    obs = jnp.float32([[3.0], [4.0]])
    given = search_root(model, {}, obs)
    tree = jax.jit(lambda: search.gumbel_muzero_policy(
        {}, jax.random.key(0), given, recurrent_fn(model), 12, gumbel_scale=0.0,
    ).search_tree)()  # fmt: skip
    tree = jax.tree.map(np.asarray, tree)
    for b in range(2):
        for n in range(13):
            total = float(tree.raw_values[b, n])
            for a in range(2):
                child = tree.children_index[b, n, a]
                if child < 0:
                    continue
                reward = tree.children_rewards[b, n, a]
                ends = tree.children_discounts[b, n, a] == 0
                assert ends or tree.children_discounts[b, n, a] == -1.0
                value = 0.0 if ends else -tree.node_values[b, child]
                total += tree.children_visits[b, n, a] * (reward + value)
            if tree.node_visits[b, n]:
                expected = total / tree.node_visits[b, n]
                np.testing.assert_allclose(tree.node_values[b, n], expected, atol=1e-5)


@pytest.mark.parametrize("cfg", [GUMBEL, PUCT], ids=["gumbel", "puct"])
def test_values_that_differ_by_rounding_are_no_advice(cfg):
    """From `least_range` on they are: the same search, stretched, takes sides."""
    cfg, spec, key = dataclasses.replace(cfg, num_simulations=12), vector_spec(), jax.random.key(0)
    params = muzero_net.init(muzero_config.net_of(cfg, spec), key)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    nearly = [x + 1e-6 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    params, obs = jax.tree.unflatten(tree, nearly), random_obs(spec, 6)
    uniform = 1 / spec.num_actions

    def bias(least_range):
        settings = dataclasses.replace(cfg, least_range=least_range, value_scale=1.0)
        weights = run(settings, spec, params, key, obs, False).weights
        return float(jnp.max(jnp.abs(weights - uniform)))

    assert bias(0.01) < 0.02
    assert bias(1e-9) > 0.1


# mctx


@pytest.mark.parametrize("spec", [MASKED, game_spec()], ids=["alone", "two players"])
def test_mctx_in_its_place_takes_the_same_actions(spec):
    """On the agent's own root and model, without noise and under the same noise."""
    mctx = pytest.importorskip("mctx")
    cfg, scales = dataclasses.replace(GUMBEL, num_simulations=16, max_considered=4), (0.0, 1.0)
    net, bins = muzero_config.net_of(cfg, spec), muzero_config.support(cfg, spec)
    params, obs = params_of(cfg, spec), random_obs(spec, 5)
    model = muzero_net.latent_model(net, bins, cfg.gamma)

    def searched(library):
        transform = functools.partial(
            library.qtransform_completed_by_mix_value, value_scale=cfg.value_scale,
            maxvisit_init=cfg.visit_offset,
        )  # fmt: skip

        @jax.jit
        def found(key, scale):
            root = search_root(model, params, obs)
            given = library.RootFnOutput(
                prior_logits=root.prior_logits, value=root.value, embedding=root.embedding
            )
            out = library.gumbel_muzero_policy(
                params, key, given, recurrent_fn(model), 16, ~spec.legal(obs),
                qtransform=transform, max_num_considered_actions=4, gumbel_scale=scale,
            )  # fmt: skip
            return out.action, out.search_tree.summary().visit_counts, out.action_weights

        return [found(jax.random.key(2), scale) for scale in scales]

    ours = searched(search)
    with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        theirs = searched(mctx)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
        np.testing.assert_allclose(one[2], other[2], atol=1e-3)
    own = run(cfg, spec, params, jax.random.key(5), obs, False)
    np.testing.assert_array_equal(own.action, theirs[0][0])


# reanalysis


def batch_of(cfg, spec):
    """A window of records that go on, with the weights and values of a search that acted."""
    rows = [records(["go"] * 9)[: muzero_config.window_length(cfg)]] * cfg.batch_size
    lead = (cfg.batch_size, muzero_config.window_length(cfg))
    return window_of(rows, obs=random_obs(spec, *lead, seed=4))


@functools.partial(jax.jit, static_argnums=1)
def searched(cfg, spec, params, window, key):
    return muzero.searched(cfg, spec, params, window, key)


@functools.partial(jax.jit, static_argnums=1)
def later_values(cfg, spec, target, window):
    return muzero.later_values(cfg, spec, target, window)


@pytest.mark.parametrize("noise", [False, True])
def test_reanalysed_policies_are_those_of_a_fresh_search(noise):
    """The first half of the batch, state by state; the others keep what acted."""
    spec, key = vector_spec(), jax.random.key(6)
    cfg = dataclasses.replace(FRESH, reanalyse_noise=noise)
    params, window = params_of(cfg, spec), batch_of(cfg, spec)
    weights, _, value = searched(cfg, spec, params, window, key)
    flat = window.obs[:2, :4].reshape(8, 3)
    fresh = run(cfg, spec, params, key, flat, noise)
    np.testing.assert_allclose(weights[:2], fresh.weights.reshape(2, 4, 3), atol=1e-5)
    np.testing.assert_allclose(value[:2], fresh.value.reshape(2, 4), atol=1e-5)
    np.testing.assert_array_equal(weights[2:], window.weights[2:, :4])
    np.testing.assert_array_equal(value[2:], window.value[2:, :4])
    quiet = run(cfg, spec, params, jax.random.key(77), flat, False)
    same = np.allclose(value[:2], quiet.value.reshape(2, 4), atol=1e-5)
    assert same != noise


@pytest.mark.parametrize(("share", "rows"), [(0, 0), (0.25, 1), (0.5, 2), (1, 4)])
def test_shares_of_reanalysis_are_rows_of_the_batch(share, rows):
    """Whatever the search that acted said stays where it is not replaced, and only there."""
    spec = vector_spec()
    cfg = dataclasses.replace(TINY, reanalyse_policies=share, reanalyse_values=share)
    params, window = params_of(cfg, spec), batch_of(cfg, spec)
    other = window._replace(weights=window.weights[..., ::-1], value=window.value + 100.0)
    found, moved = (searched(cfg, spec, params, x, jax.random.key(0)) for x in (window, other))
    fresh = np.all(np.isclose(found[2], moved[2]), axis=1)
    assert fresh.tolist() == [True] * rows + [False] * (4 - rows)
    assert np.all(np.isclose(found[0], moved[0]), axis=(1, 2)).tolist() == fresh.tolist()
    later, moved = (later_values(cfg, spec, params, x) for x in (window, other))
    assert np.all(np.isclose(later, moved), axis=1).tolist() == fresh.tolist()
    np.testing.assert_array_equal(later[rows:], window.value[rows:, 1:])
    represent, predict = FUNCTIONS[:2]
    net, bins = muzero_config.net_of(cfg, spec), muzero_config.support(cfg, spec)
    for b in range(rows):
        said = predict(net, params, represent(net, params, window.obs[b, 1:]))
        expected = muzero_net.expected(said.value, bins.value)
        np.testing.assert_allclose(later[b], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("which", ["target", "newest"])
def test_parameters_of_reanalysis_are_those_named(which):
    """Policies by the target network or by the newest; returns end in the target's values."""
    spec = vector_spec()
    cfg = dataclasses.replace(TINY, reanalyse_with=which, reanalyse_noise=False)
    window = batch_of(cfg, spec)
    pair = [params_of(cfg, spec, seed) for seed in (0, 1)]

    @jax.jit
    def made(params, target):
        state = muzero.State(params, target, None, None, None)
        return muzero.make_targets(cfg, spec, state, window, jnp.zeros(4), jax.random.key(0))[0]

    found, with_params, with_target = made(*pair), made(pair[1], pair[1]), made(pair[0], pair[0])
    policy = with_target.policy if which == "newest" else with_params.policy
    np.testing.assert_allclose(found.policy, policy, atol=1e-5)
    np.testing.assert_allclose(found.value, with_params.value, atol=1e-5)
    assert np.abs(with_params.policy - with_target.policy).max() > 1e-2
    assert np.abs(with_params.value - with_target.value).max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        # 4 sequences of 6 records, 3 steps unrolled
        ({"reanalyse_policies": 0, "reanalyse_values": 0}, [4]),
        ({"reanalyse_policies": 0.5, "reanalyse_values": 0}, [4, 2 * 4]),
        ({"reanalyse_policies": 0, "reanalyse_values": 0.5}, [4, 2 * 5]),
        ({"consistency": True}, [4, 4 * 3, 4 * 4, 4 * 5]),
    ],
)
def test_observations_are_represented_where_their_latents_are_used(changes, rows, monkeypatch):
    """Not whole sequences of which the first state is kept."""
    spec, counted = vector_spec(), []
    cfg = dataclasses.replace(TINY, updates=1, **changes)
    whole = muzero_net.represent

    def counting(net, params, obs):
        counted.append(obs.shape[0])
        return whole(net, params, obs)

    monkeypatch.setattr(muzero_net, "represent", counting)
    agent = muzero.make(cfg, spec)
    state = jax.eval_shape(agent.init, jax.random.key(0))
    number = jax.ShapeDtypeStruct((), "int32")
    jax.make_jaxpr(agent.update)(state, jax.random.key(0), number, number)
    assert sorted(counted) == sorted(rows)


@pytest.mark.parametrize("cfg", [GUMBEL, SAMPLED, PUCT], ids=["gumbel", "sampled", "puct"])
def test_no_key_is_used_twice(cfg):
    """In acting, in the draws of a batch, in its searches and its padding."""
    spec = ball_spec() if cfg is SAMPLED else MASKED
    agent = muzero.make(dataclasses.replace(cfg, prioritised=cfg is GUMBEL), spec)
    state = jax.eval_shape(agent.init, jax.random.key(0))
    obs, key = spec.example_obs(2), jax.random.key(0)
    flags, number = jax.ShapeDtypeStruct((2,), "bool"), jax.ShapeDtypeStruct((), "int32")
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (state, obs, flags, number))
    state, obs, flags, number = zeros

    def everything(key):
        keys = jax.random.split(key, 3)
        acted = [agent.act(state, agent.init_memory(2), obs, flags, k, number, mode)[0]
                 for k, mode in zip(keys[:2], ("train", "random"), strict=True)]  # fmt: skip
        return acted, agent.update(state, keys[2], number, number)[1]

    check_key_reuse(everything, key)


def test_candidates_are_those_of_the_policy_and_wider():
    """Priors correct for the mixture that they come from; those of a node below are equal."""
    mean, std = jnp.zeros((1, 2)), jnp.ones((1, 2))
    cfg = dataclasses.replace(SAMPLED, num_candidates=20_000, wide_candidates=10_000)
    draw = jax.jit(searches.candidates_of, static_argnums=3)
    points, logits = draw(cfg, Prediction((mean, std), None), jax.random.key(0), 10_000)
    np.testing.assert_allclose(points[0, :10_000].std(0), 1.0, atol=0.05)
    np.testing.assert_allclose(points[0, 10_000:].std(0), cfg.wide_factor, atol=0.1)
    weight = np.asarray(jax.nn.softmax(logits))[0]
    second = (weight[:, None] * np.asarray(points[0]) ** 2).sum(0)
    np.testing.assert_allclose(second, 1.0, atol=0.1)  # the policy's own, by importance
    _, below = draw(cfg, Prediction((mean, std), None), jax.random.key(0), 0)
    assert not np.any(below)
