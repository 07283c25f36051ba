"""Tree search against mctx, where that is installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from search_worlds import (
    MACHINES,
    STATES,
    chance_functions,
    first_actions,
    first_in_order,
    invalid_of,
    run,
    searcher,
    world,
)

from mbrl_jax import search
from mbrl_jax.search import backup, puct, schedule

mctx = pytest.importorskip("mctx")


def transform_of(library, name, x):
    """A transform of a library; x is the scale of values."""
    if name == "min_max":
        return functools.partial(library.qtransform_by_min_max, min_value=-x, max_value=x)
    if name == "mixed":
        return functools.partial(library.qtransform_completed_by_mix_value, value_scale=x)
    if name == "raw":
        return functools.partial(
            library.qtransform_completed_by_mix_value, value_scale=x, maxvisit_init=5.0,
            rescale_values=False, use_mixed_value=False,
        )  # fmt: skip
    return library.qtransform_by_parent_and_siblings


def against_mctx(
    policy, batch, num, worlds, machine=schedule.CPU, walkers=2, transform=None, **options
):
    """Searches of both libraries in each world, (params, invalid or None, x of the transform)."""
    # mctx promotes ranks and uses keys twice
    lenient = (jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False))
    with pytest.MonkeyPatch.context() as patch, lenient[0], lenient[1]:
        patch.setattr(puct, "tie_order", first_in_order)
        patch.setattr(schedule, "CPU", machine)
        patch.setattr(backup, "WALKERS", walkers)
        ours, theirs = (
            searcher(
                lib, policy, batch, num, **options,
                transform=transform and functools.partial(transform_of, lib, transform),
            )
            for lib in (search, mctx)
        )  # fmt: skip
        found = [ours(*one) for one in worlds]
        # mctx breaks ties of PUCT by a noise at every visit
        if policy == "muzero_policy":
            patch.setattr(jax.random, "uniform", lambda key, shape, **_: jnp.zeros(shape))
        pairs = [(a, theirs(*one)) for a, one in zip(found, worlds, strict=True)]
    for a, b in pairs:
        np.testing.assert_array_equal(
            a.search_tree.summary().visit_counts, b.search_tree.summary().visit_counts
        )
        np.testing.assert_allclose(a.action_weights, b.action_weights, atol=1e-4)
    return pairs


@pytest.mark.parametrize("policy", ["gumbel_muzero_policy", "muzero_policy"])
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tree_is_that_of_mctx(policy, masked):
    """Node by node, up to the numbering of the nodes."""
    invalid = invalid_of(3, 5, 6) if masked else None
    ((ours, theirs),) = against_mctx(policy, 5, 40, [(world(3, 6, 0.9, 1.0), invalid)])
    np.testing.assert_array_equal(ours.action, theirs.action)
    trees = [jax.tree.map(np.asarray, out.search_tree) for out in (ours, theirs)]
    for i in range(5):
        same_node(*trees, i, 0, 0)


def same_node(ours, theirs, i, a, b):
    for name in ("node_visits", "raw_values", "node_values", "embeddings"):
        np.testing.assert_allclose(
            getattr(ours, name)[i, a], getattr(theirs, name)[i, b], 1e-4, 1e-5
        )
    visits = ours.children_visits[i, a]
    for name in ("visits", "rewards", "discounts", "values"):
        first, second = (getattr(t, f"children_{name}")[i] for t in (ours, theirs))
        np.testing.assert_allclose(first[a], second[b], 1e-4, 1e-5)
    for action in np.flatnonzero(visits):
        children = [int(t.children_index[i, n, action]) for t, n in ((ours, a), (theirs, b))]
        assert int(ours.parents[i, children[0]]) == a
        assert int(ours.action_from_parent[i, children[0]]) == action
        same_node(ours, theirs, i, *children)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["gumbel_muzero_policy", "muzero_policy"])
@settings(max_examples=67, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    batch=st.integers(1, 8), num=st.integers(1, 200), actions=st.integers(1, 82),
    considered=st.integers(1, 20), masked=st.booleans(),
    depth=st.sampled_from([None, None, 1, 2, 5]),
    machine=st.sampled_from([schedule.CPU, schedule.ACCELERATOR, *MACHINES.values()]),
    walkers=st.sampled_from([3, 64]),
    transform=st.sampled_from([None, None, "siblings", "min_max", "mixed", "raw"]),
    worlds=st.lists(
        st.tuples(st.integers(0, 10_000), st.sampled_from([-1.0, 0.0, 0.9, 1.0]),
                  st.sampled_from([1e-3, 1.0, 1e3]), st.booleans(), st.booleans(),
                  st.sampled_from([0.01, 0.1, 1.0])),
        min_size=3, max_size=3,
    ),
)  # fmt: skip
def test_visits_are_those_of_mctx(
    policy, batch, num, actions, considered, masked, depth, machine, walkers, transform, worlds
):
    """201 settings, three to a compilation: masks below the root and scales of values too."""
    options = {"max_depth": depth, "machine": machine, "walkers": walkers, "transform": transform}
    if policy == "gumbel_muzero_policy":
        options["max_num_considered_actions"] = considered
    cases = [
        (world(seed, actions, discount, scale, ties, hidden),
         invalid_of(seed, batch, actions) if masked else None,
         4 * scale if transform == "min_max" else value_scale)
        for seed, discount, scale, ties, hidden, value_scale in worlds
    ]  # fmt: skip
    against_mctx(policy, batch, num, cases, **options)
    jax.clear_caches()


def test_chance_nodes_are_those_of_mctx():
    num_actions, outcomes, batch = 5, 3, 6
    params = world(1, num_actions + outcomes, 0.9, 1.0)
    decide, answer = chance_functions(num_actions)

    def searched(library):
        state = jnp.arange(batch, dtype=jnp.int32)
        root = library.RootFnOutput(
            prior_logits=params["logits"][state, :num_actions], value=params["value"][state],
            embedding=state,
        )  # fmt: skip
        invalid = jnp.asarray(invalid_of(2, batch, num_actions), jnp.float32)
        return jax.jit(lambda key: library.stochastic_muzero_policy(
            params, key, root, decide, answer, 40, invalid))(jax.random.key(3))  # fmt: skip

    ours = searched(search)
    with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        theirs = searched(mctx)
    np.testing.assert_array_equal(
        ours.search_tree.summary().visit_counts, theirs.search_tree.summary().visit_counts
    )
    np.testing.assert_array_equal(ours.action, theirs.action)
    np.testing.assert_allclose(ours.action_weights, theirs.action_weights, atol=1e-4)
    assert ours.search_tree.num_actions == num_actions


def test_gumbel_shows_transforms_the_value_of_the_root():
    """50 simulations by parent and siblings, whose range has the node's own value in it."""
    against_mctx(
        "gumbel_muzero_policy", 32, 50, [(world(0, 6, 0.9, 1.0), None)], transform="siblings"
    )


@pytest.mark.slow
def test_ties_are_broken_as_often_as_in_mctx():
    """Uniform priors and zero values: how often a first child first takes its own action."""
    num_actions, batch = 6, 400
    params = {**world(0, num_actions, 1.0, 0.0), "logits": jnp.zeros((STATES, num_actions))}
    shares = []
    with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        for library in (search, mctx):
            tree = run(
                library, "muzero_policy", params, batch, 18, dirichlet_fraction=0.0
            ).search_tree
            own, first, root = first_actions(tree)
            eldest = np.flatnonzero(np.diff(root, prepend=-1))
            shares.append((own == first)[eldest].mean())
    # mctx's noise has few numbers, so that its first actions come more often
    np.testing.assert_allclose(shares, 1 / 6, atol=0.1)


def test_every_name_of_mctx_is_there_or_in_the_table():
    for name in (*mctx.__all__, "SearchSummary"):
        if name in search.__all__:
            assert getattr(search, name) is not None
        else:
            assert f"`{name}`" in search.__doc__, name
