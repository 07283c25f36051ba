"""What users bring to a search: dtypes, closures, loops, ties, NaN."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from search_worlds import (
    STATES,
    chance_functions,
    first_actions,
    invalid_of,
    model,
    plain,
    root_of,
    run,
    searcher,
    world,
)

from mbrl_jax import search
from mbrl_jax.types import InputError

ACTIONS, BATCH, NUM = 5, 4, 24
POLICIES = ["gumbel_muzero_policy", "muzero_policy"]
by_tree = search.qtransform_by_tree_min_max


def stochastic(params, key, invalid=None):
    decide, answer = chance_functions(3)
    root = root_of(params, BATCH)
    return search.stochastic_muzero_policy(
        params, key,
        search.RootFnOutput(prior_logits=root.prior_logits[:, :3], value=root.value,
                            embedding=root.embedding),
        decide, answer, 8, None if invalid is None else invalid[:, :3],
    )  # fmt: skip


def sampled(params, key, invalid):
    def candidates(state):
        return jnp.broadcast_to(jnp.float32(jnp.arange(ACTIONS))[None], (state.shape[0], ACTIONS))

    def step(params, key, action, state):
        out, state = model(params, key, action.astype(jnp.int32), state)
        return search.SampledRecurrentFnOutput(
            reward=out.reward, discount=out.discount, value=out.value,
            prior_logits=out.prior_logits, actions=candidates(state),
        ), state  # fmt: skip

    root = root_of(params, BATCH)
    root = search.SampledRootFnOutput(
        actions=candidates(root.embedding), value=root.value, prior_logits=root.prior_logits,
        embedding=root.embedding,
    )  # fmt: skip
    return search.sampled_policy(params, key, root, step, 8, invalid)


def going_on(params, key, invalid):
    first = search.muzero_policy(params, key, root_of(params, BATCH), model, 8, max_depth=3)
    action = first.action
    state = params["next"][jnp.arange(BATCH, dtype=jnp.int32), action]
    root = search.RootFnOutput(
        prior_logits=params["logits"][state], value=params["value"][state], embedding=state
    )
    out = search.muzero_policy(
        params, jax.random.fold_in(key, 1), root, model, 8, invalid, max_depth=3,
        search_tree=search.advance(first.search_tree, action),
    )  # fmt: skip
    return out, search.search_metrics(out)


def with_parts(tree, index):
    values = tree.children_rewards[index] + tree.children_discounts[index]
    return jnp.where(tree.children_visits[index] > 0, values + tree.children_values[index], 0.0)


def plan(policy, **options):
    def planned(params, key, invalid):
        root = root_of(params, BATCH)
        return getattr(search, policy)(params, key, root, model, NUM, invalid, **options)

    return planned


SEARCHES = {
    "gumbel": plan("gumbel_muzero_policy", max_num_considered_actions=4),
    "once": plan("gumbel_muzero_policy", halve_once=True, max_depth=4),
    "read": plan("gumbel_muzero_policy", qtransform=with_parts),
    "puct": plan("muzero_policy"),
    "tree": plan("muzero_policy", qtransform=by_tree),
    "going_on": going_on,
    "stochastic": stochastic,
    "sampled": sampled,
}


@pytest.mark.parametrize("name", list(SEARCHES))
def test_no_array_is_of_64_bits_though_they_are_allowed(name):
    """Python's numbers are, until they meet an array."""
    params = world(3, ACTIONS, 0.9, 1.0)
    invalid = jnp.asarray(invalid_of(3, BATCH, ACTIONS))
    with jax.enable_x64(True):
        made, shapes = jax.make_jaxpr(SEARCHES[name], return_shape=True)(
            params, jax.random.key(0), invalid
        )
    assert not re.search(r"f64\[\d", str(made))
    assert not {"float64", "int64"} & {str(x.dtype) for x in jax.tree.leaves(shapes)}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_search_is_the_same_where_64_bits_are_allowed(policy):
    params = world(3, ACTIONS, 0.9, 1.0)
    invalid = invalid_of(3, BATCH, ACTIONS)
    want = plain(policy, BATCH, NUM)(params, invalid)
    with jax.enable_x64(True):
        plan = searcher(search, policy, BATCH, NUM)
        same = plan(params, invalid)
        double = {k: x.astype(jnp.float64) if x.dtype == jnp.float32 else x
                  for k, x in params.items()}  # fmt: skip
        wide = searcher(search, policy, BATCH, NUM)(double, invalid)
    for found in (same, wide):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("policy", [POLICIES[0], pytest.param(POLICIES[1], marks=pytest.mark.slow)])
def test_half_precision_comes_in_and_single_comes_out(policy):
    params = {k: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
              for k, x in world(3, ACTIONS, 0.9, 1.0).items()}  # fmt: skip
    full = {k: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for k, x in params.items()}
    found, want = (plain(policy, BATCH, NUM)(x) for x in (params, full))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("policy", POLICIES)
def test_vmapped_values_may_be_closed_over(policy):
    """By the recurrent function, also one under jit, and by the transform."""
    worlds = [world(seed, ACTIONS, 0.9, 1.0) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *worlds)
    epsilons = jnp.array([1e-8, 10.0])
    keys = jax.random.split(jax.random.key(0), 2)

    def closing(key, params, epsilon):
        step = jax.jit(lambda _, *args: model(params, *args))
        transform = functools.partial(search.qtransform_by_parent_and_siblings, epsilon=epsilon)
        out = getattr(search, policy)(
            None, key, root_of(params, BATCH), step, NUM, qtransform=transform
        )
        return out.action_weights, out.search_tree.children_visits

    found = jax.jit(jax.vmap(closing))(jax.random.clone(keys), stacked, epsilons)
    mapped = jax.vmap(jax.jit(closing))(jax.random.clone(keys), stacked, epsilons)
    alone = jax.jit(closing)
    for i in range(2):
        own = alone(jax.random.clone(keys)[i], worlds[i], epsilons[i])
        for a, b, want in zip(found, mapped, own, strict=True):
            np.testing.assert_allclose(a[i], want, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(b[i], want, rtol=1e-5, atol=1e-6)
    # the second epsilon does tell
    other = alone(keys[1], worlds[1], epsilons[0])
    assert (np.asarray(other[1]) != np.asarray(found[1][1])).any()


def python_loop(lower, upper, body, value):
    for i in range(lower, upper):
        value = body(i, value)
    return value


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_python_loop_makes_the_same_search(policy, masked):
    params = world(3, ACTIONS, 0.9, 1.0)
    invalid = invalid_of(3, BATCH, ACTIONS) if masked else None
    options = {"max_num_considered_actions": 4} if policy == POLICIES[0] else {}
    found, want = (
        run(search, policy, params, BATCH, 6, invalid, loop_fn=loop, **options)
        for loop in (python_loop, jax.lax.fori_loop)
    )
    np.testing.assert_array_equal(
        found.search_tree.children_visits[:, 0], want.search_tree.children_visits[:, 0]
    )
    np.testing.assert_allclose(found.action_weights, want.action_weights, rtol=1e-5, atol=1e-6)


def test_a_python_loop_goes_on_from_a_tree():
    params, key = world(3, ACTIONS, 0.9, 1.0), jax.random.key(0)
    tree = run(search, "muzero_policy", params, BATCH, 6).search_tree
    root = root_of(params, BATCH)
    action = np.argmax(tree.children_visits[:, 0], axis=1).astype(np.int32)
    tree = jax.jit(search.advance)(tree, action)
    found = [
        jax.jit(
            lambda key, loop=loop: (
                search.muzero_policy(
                    params, key, root, model, 6, search_tree=tree, loop_fn=loop
                ).search_tree.children_visits
            )
        )(jax.random.clone(key))
        for loop in (python_loop, jax.lax.fori_loop)
    ]
    np.testing.assert_array_equal(*(np.asarray(visits)[:, 0] for visits in found))


def test_a_python_loop_with_halve_once_is_refused():
    params = world(3, ACTIONS, 0.9, 1.0)
    with pytest.raises(InputError, match=r"halve_once=True with a loop_fn that takes Python ints"):
        run(search, POLICIES[0], params, BATCH, 6, halve_once=True, loop_fn=python_loop)


def test_a_lambda_around_the_range_of_the_tree_is_that_transform():
    params = world(3, ACTIONS, 0.9, 1.0)
    found, want = (
        run(search, "muzero_policy", params, BATCH, NUM, qtransform=transform).search_tree
        for transform in (lambda tree, i: by_tree(tree, i, epsilon=1e-8), by_tree)
    )
    np.testing.assert_array_equal(found.children_visits[:, 0], want.children_visits[:, 0])
    with pytest.raises(InputError, match=r"range of the whole tree.*expected a transform that"):
        run(search, POLICIES[0], params, BATCH, 4, qtransform=lambda tree, i: by_tree(tree, i))


def tied(num_actions=6, batch=400, **given):
    """A search among uniform priors and zero values."""
    logits = np.zeros((STATES, num_actions), np.float32)
    params = {**world(0, num_actions, 1.0, 0.0), "logits": logits}
    return plain("muzero_policy", batch, 18, dirichlet_fraction=0.0)(params, **given)


def test_ties_are_broken_anew_at_every_node():
    """What a child does first is not what its parent did."""
    num_actions, batch = 6, 400
    out = tied(num_actions, batch)
    own, first, root = first_actions(out.search_tree)
    assert len(own) > batch
    # of the child that a root takes first: 1 / 6 within four standard errors
    eldest = np.flatnonzero(np.diff(root, prepend=-1))
    assert len(eldest) == batch
    share = (own == first)[eldest].mean()
    assert abs(share - 1 / 6) < 4 * np.sqrt(5 / 36 / batch)
    counts = np.bincount(first, minlength=num_actions)
    assert ((counts - len(own) / 6) ** 2).sum() / (len(own) / 6) < 20.5  # chi2, 5 df, 0.1 %
    # two children of one root do not agree either
    same_root = root[1:] == root[:-1]
    again = (first[1:] == first[:-1])[same_root]
    assert len(again) > 300
    assert abs(again.mean() - 1 / 6) < 4 * np.sqrt(5 / 36 / len(again))


def test_another_key_breaks_ties_otherwise_and_the_same_one_the_same_way():
    keys = jax.random.split(jax.random.key(0), 2)
    first, second, again = (
        tied(key=jax.random.clone(keys)[i]).search_tree.children_index for i in (0, 1, 0)
    )
    assert (first != second).any()
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("name", ["gumbel", "puct", "stochastic"])
def test_a_root_with_nan_tells_so_and_leaves_the_others_alone(name):
    """NaN priors, an infinite one and a NaN value; NaN where an action is not allowed."""
    params = world(0, ACTIONS, 0.9, 1.0)
    invalid = np.zeros((BATCH, ACTIONS), bool)
    invalid[:, 0] = True
    planned = jax.jit(SEARCHES[name])

    def searched(**roots):
        tables = {k: np.array(params[k]) for k in roots}
        for k, (rows, x) in roots.items():
            tables[k][rows] = x
        out = planned({**params, **tables}, jax.random.key(0), jnp.asarray(invalid))
        return jax.tree.map(np.asarray, out)

    good = searched()
    for bad in (
        searched(logits=((1, 2), jnp.nan)),
        searched(logits=((1, 1), jnp.inf)),
        searched(logits=((1, slice(None)), jnp.nan)),
        searched(value=(1, jnp.nan)),
    ):
        assert np.isnan(bad.action_weights[1]).all()
        assert int(bad.action[1]) == 1
        for x in ("action", "action_weights"):
            keep = [0, 2, 3]
            np.testing.assert_array_equal(getattr(bad, x)[keep,], getattr(good, x)[keep,])
    harmless = searched(logits=((1, 0), jnp.nan))
    assert np.isfinite(harmless.action_weights).all()
    assert not harmless.search_tree.children_visits[:, 0, 0].any()
