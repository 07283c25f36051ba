"""What the search has beyond mctx: the tree's range of values, halving once, trees that go on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import search_reference as reference
from search_worlds import invalid_of, model, root_of, run, step_of, world

from mbrl_jax import search

by_tree = search.qtransform_by_tree_min_max


def reference_root(params, logits, i):
    return reference.Node(np.float64(logits), float(params["value"][i]), i, 0)


@pytest.mark.parametrize(
    ("num", "actions", "scale", "masked", "depth", "backend"),
    [
        pytest.param(50, 6, 1.0, False, None, "cpu", marks=pytest.mark.slow),
        (40, 9, 1e3, True, None, "cpu"),
        (30, 4, 1e-3, False, 3, "gpu"),
    ],
)
def test_puct_by_the_range_of_the_tree_visits_as_the_reference_does(
    num, actions, scale, masked, depth, backend, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    params, batch = world(num, actions, 0.9, scale), 4
    invalid = invalid_of(num, batch, actions) if masked else np.zeros((batch, actions), bool)
    out = run(search, "muzero_policy", params, batch, num, invalid, max_depth=depth,
              qtransform=functools.partial(by_tree, epsilon=1e-8))  # fmt: skip
    tree = out.search_tree
    for i in range(batch):
        node = reference_root(params, tree.children_prior_logits[i, 0], i)
        visits = reference.muzero(node, step_of(params), num, invalid[i], depth, tree_range=True)
        np.testing.assert_array_equal(tree.children_visits[i, 0], visits)
        np.testing.assert_allclose(tree.node_values[i, 0], node.value, rtol=1e-4, atol=1e-6)
    plain = run(search, "muzero_policy", params, batch, num, invalid, max_depth=depth)
    assert (tree.children_visits[:, 0] != plain.search_tree.children_visits[:, 0]).any()


def test_gumbel_refuses_the_range_of_the_tree():
    params = world(0, 4, 0.9, 1.0)
    with pytest.raises(ValueError, match="qtransform_by_tree_min_max: expected a transform that"):
        run(search, "gumbel_muzero_policy", params, 2, 4, qtransform=by_tree)


@pytest.mark.parametrize(
    ("num", "actions", "most", "masked"),
    [
        (50, 18, 16, False),
        pytest.param(37, 7, 5, False, marks=pytest.mark.slow),
        (100, 20, 16, True),
        pytest.param(16, 4, 1, False, marks=pytest.mark.slow),
    ],
)
def test_halving_once_visits_as_algorithm_2_does(num, actions, most, masked):
    params, batch = world(num, actions, 0.9, 1.0), 6
    invalid = invalid_of(num, batch, actions) if masked else None
    out = run(search, "gumbel_muzero_policy", params, batch, num, invalid,
              max_num_considered_actions=most, halve_once=True)  # fmt: skip
    noise = np.float64(out.search_tree.extra_data.root_gumbel)
    for i in range(batch):
        node = reference_root(params, out.search_tree.children_prior_logits[i, 0], i)
        bad = np.zeros(actions, bool) if invalid is None else invalid[i]
        visits, weights = reference.gumbel(
            node, step_of(params), num, noise[i], most, bad, halve_once=True
        )
        np.testing.assert_array_equal(out.search_tree.children_visits[i, 0], visits)
        np.testing.assert_allclose(out.action_weights[i], weights, atol=1e-4)


def go_on(params, tree, actions, num, **options):
    """Another search from the states that the actions lead to."""

    @jax.jit
    def advanced(params, key, tree, actions):
        state = params["next"][jnp.arange(actions.shape[0]), jnp.maximum(actions, 0)]
        root = search.RootFnOutput(
            prior_logits=params["logits"][state], value=params["value"][state], embedding=state
        )
        return search.muzero_policy(
            params, key, root, model, num, search_tree=search.advance(tree, actions),
            dirichlet_fraction=0.0, **options,
        )  # fmt: skip

    return advanced(params, jax.random.key(9), tree, jnp.asarray(actions))


@pytest.mark.parametrize(
    ("depth", "tree_range"),
    [
        pytest.param(None, False, marks=pytest.mark.slow),
        (3, True),
        pytest.param(3, False, marks=pytest.mark.slow),
        pytest.param(None, True, marks=pytest.mark.slow),
    ],
)
def test_a_search_that_goes_on_visits_as_the_reference_does(depth, tree_range):
    """From the most visited actions, from one not visited, and from nothing."""
    params, batch, num, actions = world(7, 5, 0.9, 1.0), 6, 60, 5
    options = {"max_depth": depth, **({"qtransform": by_tree} if tree_range else {})}
    first = run(search, "muzero_policy", params, batch, num, dirichlet_fraction=0.0, **options)
    visits = np.asarray(first.search_tree.children_visits[:, 0])
    chosen = visits.argmax(axis=1)
    chosen[0], chosen[1] = visits[0].argmin(), -1
    second = go_on(params, first.search_tree, chosen, num, **options)
    tree = jax.tree.map(np.asarray, second.search_tree)
    assert tree.node_visits.shape == (batch, num + 1)
    for i in range(batch):
        node = reference_root(params, params["logits"][i], i)
        valid = np.zeros(actions, bool)
        reference.muzero(node, step_of(params), num, valid, depth, tree_range)
        after = int(params["next"][i, max(chosen[i], 0)])
        child = node.children.get(int(chosen[i]))
        if child is None:
            child = reference_root(params, params["logits"][after], after)
            child.state = after
        want = reference.muzero(child, step_of(params), num, valid, depth, tree_range)
        np.testing.assert_array_equal(tree.children_visits[i, 0], want, err_msg=str(i))
        np.testing.assert_allclose(tree.node_values[i, 0], child.value, rtol=1e-4)
    kept = np.asarray(jax.jit(search.advance)(first.search_tree, chosen).node_visits)[:, 0]
    np.testing.assert_array_equal(kept[2:], visits.max(axis=1)[2:])
    assert (kept[2:] > 1).all()
    assert kept[1] == 0


def test_an_advanced_tree_is_the_part_below_the_action():
    params, batch = world(3, 5, 0.9, 1.0), 4
    tree = run(search, "gumbel_muzero_policy", params, batch, 40).search_tree
    action = np.argmax(tree.children_visits[:, 0], axis=1)
    part = jax.tree.map(np.asarray, jax.jit(search.advance)(tree, action))
    whole = jax.tree.map(np.asarray, tree)

    def same(i, a, b):
        for name in ("node_visits", "raw_values", "node_values", "embeddings", "children_visits",
                     "children_prior_logits", "children_values", "children_rewards"):  # fmt: skip
            np.testing.assert_array_equal(getattr(part, name)[i, a], getattr(whole, name)[i, b])
        seen = 1
        for choice in np.flatnonzero(whole.children_visits[i, b]):
            child = part.children_index[i, a, choice]
            assert part.parents[i, child] == a
            assert part.action_from_parent[i, child] == choice
            seen += same(i, child, whole.children_index[i, b, choice])
        return seen

    for i in range(batch):
        seen = same(i, 0, whole.children_index[i, 0, int(action[i])])
        assert (part.parents[i] >= 0).sum() == seen - 1
        assert part.parents[i, 0] == -1
        assert not part.node_visits[i, seen:].any()


@pytest.mark.slow
def test_seeds_under_vmap_go_on_as_single_searches_do():
    params, batch, num = world(5, 4, 0.9, 1.0), 3, 25
    first = run(search, "muzero_policy", params, 2 * batch, num).search_tree
    actions = jnp.argmax(first.children_visits[:, 0], axis=1)

    def one(key, tree, actions):
        state = jnp.take_along_axis(tree.embeddings, jnp.zeros((batch, 1), jnp.int32), axis=1)[:, 0]
        root = search.RootFnOutput(
            prior_logits=params["logits"][state], value=params["value"][state], embedding=state
        )
        tree = search.advance(tree, actions)
        out = search.muzero_policy(params, key, root, model, num, search_tree=tree)
        return out.action_weights, out.search_tree.node_values

    keys = jax.random.split(jax.random.key(1), 2)
    halves = jax.tree.map(lambda x: x.reshape(2, batch, *x.shape[1:]), (first, actions))
    together = jax.jit(jax.vmap(one))(jax.random.clone(keys), *halves)
    for i in range(2):
        alone = jax.jit(one)(keys[i], *jax.tree.map(lambda x, i=i: x[i], halves))
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5)


def test_trees_that_do_not_fit_are_refused():
    params = world(0, 4, 0.9, 1.0)
    tree = run(search, "muzero_policy", params, 2, 8).search_tree
    with pytest.raises(ValueError, match=r"search_tree of \(2, 9, 4\) .* expected \(2, 13, 4\)"):
        jax.jit(lambda key: search.muzero_policy(params, key, root_of(params, 2), model, 12,
                                               search_tree=tree))(jax.random.key(0))  # fmt: skip
    with pytest.raises(ValueError, match=r"action of shape \(3,\): expected \(2,\)"):
        search.advance(tree, jnp.zeros(3, jnp.int32))
