"""Tree search against a plain reference, and what it does with bad input."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import search_reference as reference
from search_worlds import (
    MACHINES,
    STATES,
    first_in_order,
    invalid_of,
    model,
    plain,
    root_of,
    run,
    step_of,
    world,
)

from mbrl_jax import search
from mbrl_jax.search import backup, puct, schedule

CASES = [
    # simulations, actions, considered, discount, scale, masked, depth
    (1, 1, 16, 0.9, 1.0, False, None),
    # the last visit of one root falls into a round in which others have two
    (61, 5, 6, -1.0, 1e-3, True, None),
    (50, 18, 16, 1.0, 1.0, False, None),
    (32, 9, 16, 0.9, 1e-3, True, None),
    (24, 5, 3, 0.9, 1.0, True, 2),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            (16, 4, 16, 0.9, 1.0, False, None),
            (37, 7, 5, -1.0, 1e3, False, None),
            (20, 6, 6, 0.0, 1.0, False, 1),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gumbel_visits_as_the_reference_does(case):
    gumbel_as_reference(*case)


@pytest.mark.parametrize(
    ("machine", "case"),
    [
        ("alone", (24, 5, 3, 0.9, 1.0, True, 2)),
        ("whole", (50, 18, 16, 1.0, 1.0, True, None)),
        *(
            pytest.param(machine, case, marks=pytest.mark.slow)
            for machine in MACHINES
            for case in ((61, 5, 6, -1.0, 1e-3, True, None), (50, 18, 16, 1.0, 1.0, False, None))
        ),
    ],
    ids=str,
)
def test_batches_of_any_width_make_the_same_visits(machine, case, monkeypatch):
    """One simulation after the other, and whole rounds; three lanes back up a large table."""
    monkeypatch.setattr(schedule, "CPU", MACHINES[machine])
    monkeypatch.setattr(backup, "WALKERS", 3)
    monkeypatch.setattr(backup, "SMALL", 0)
    gumbel_as_reference(*case)


def gumbel_as_reference(num, actions, most, discount, scale, masked, depth):
    params, batch = world(num, actions, discount, scale), 4
    invalid = invalid_of(num, batch, actions) if masked else None
    out = run(search, "gumbel_muzero_policy", params, batch, num, invalid, max_depth=depth,
              max_num_considered_actions=most)  # fmt: skip
    noise = np.float64(out.search_tree.extra_data.root_gumbel)
    logits = np.float64(out.search_tree.children_prior_logits[:, 0])
    for i in range(batch):
        node = reference.Node(logits[i], float(params["value"][i]), i, 0)
        bad = np.zeros(actions, bool) if invalid is None else invalid[i]
        visits, weights = reference.gumbel(node, step_of(params), num, noise[i], most, bad, depth)
        np.testing.assert_array_equal(out.search_tree.children_visits[i, 0], visits)
        np.testing.assert_allclose(out.action_weights[i], weights, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_puct_visits_as_the_reference_does(case, monkeypatch):
    monkeypatch.setattr(backup, "WALKERS", 3)
    monkeypatch.setattr(backup, "SMALL", 0)
    num, actions, _, discount, scale, masked, depth = case
    invalid = invalid_of(num, 4, actions) if masked else None
    puct_as_reference(world(num, actions, discount, scale), 4, num, actions, invalid, depth)


@pytest.mark.parametrize("as_reference", ["gumbel", "puct"])
def test_accelerators_make_the_same_visits(as_reference, monkeypatch):
    """Their batches are others, all of one is backed up at once, and a turn is two levels."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    if as_reference == "gumbel":
        gumbel_as_reference(50, 18, 16, 1.0, 1.0, True, None)
    else:
        params = world(3, 9, 0.9, 1.0)
        puct_as_reference(params, 4, 32, 9, invalid_of(3, 4, 9))


def test_rounding_does_not_choose_among_equal_values(monkeypatch):
    """Root 4 of this world sees one value alone, which its mean has to keep to the last bit."""
    monkeypatch.setattr(puct, "tie_order", first_in_order)
    puct_as_reference(world(1024, 57, -1.0, 1e-3, ties=True), 5, 38, 57)


def puct_as_reference(params, batch, num, actions, invalid=None, depth=None):
    out = run(search, "muzero_policy", params, batch, num, invalid, max_depth=depth)
    logits = np.float64(out.search_tree.children_prior_logits[:, 0])
    for i in range(batch):
        node = reference.Node(logits[i], float(params["value"][i]), i, 0)
        bad = np.zeros(actions, bool) if invalid is None else invalid[i]
        visits = reference.muzero(node, step_of(params), num, bad, depth)
        np.testing.assert_array_equal(out.search_tree.children_visits[i, 0], visits)


@pytest.mark.parametrize("policy", ["gumbel_muzero_policy", "muzero_policy"])
def test_tree_adds_up(policy):
    params = world(0, 5, 0.9, 1.0)
    tree = plain(policy, 4, 33)(params, np.zeros((4, 5))).search_tree
    assert tree.num_simulations == 33
    assert tree.num_actions == 5
    np.testing.assert_array_equal(tree.node_visits[:, 0], 34)
    np.testing.assert_array_equal(tree.node_visits, 1 + tree.children_visits.sum(-1))
    child = np.asarray(tree.children_index)
    assert ((child >= 0) == np.asarray(tree.children_visits > 0)).all()
    np.testing.assert_array_equal(np.sort(child[child >= 0].reshape(4, -1), -1),
                                  np.tile(np.arange(1, 34), (4, 1)))  # fmt: skip
    visits, q = (
        np.asarray(tree.children_visits),
        np.asarray(tree.children_rewards + tree.children_discounts * tree.children_values),
    )
    mean = (tree.raw_values + (visits * q).sum(-1)) / tree.node_visits
    np.testing.assert_allclose(tree.node_values, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tree.qvalues(np.zeros(4, int)), tree.summary().qvalues, rtol=1e-6)


def test_sampled_search_over_all_actions_is_the_discrete_one():
    """Candidates that are the actions themselves, in another order at every node."""
    num_actions, batch = 6, 4
    params = world(4, num_actions, 0.9, 1.0)

    def candidates(state):
        order = (jnp.arange(num_actions)[None] + state[:, None]) % num_actions
        logits = jnp.take_along_axis(params["logits"][state], order, axis=1)
        return order[..., None].astype(jnp.float32), logits

    def step(params, key, action, state):
        out, state = model(params, key, action[:, 0].astype(jnp.int32), state)
        actions, logits = candidates(state)
        return search.SampledRecurrentFnOutput(
            reward=out.reward, discount=out.discount, value=out.value, actions=actions,
            prior_logits=search.sampled_logits(logits, jnp.zeros(logits.shape)),
        ), state  # fmt: skip

    root = root_of(params, batch)
    actions, logits = candidates(root.embedding)
    found = jax.jit(lambda key: search.sampled_policy(
        params, key,
        search.SampledRootFnOutput(actions=actions, prior_logits=logits, value=root.value,
                                   embedding=root.embedding),
        step, 40, gumbel_scale=0.0))(jax.random.key(0))  # fmt: skip
    discrete = run(search, "gumbel_muzero_policy", params, batch, 40, gumbel_scale=0.0)
    np.testing.assert_array_equal(np.asarray(found.action)[:, 0], discrete.action)
    order = np.int32(actions[..., 0])
    for a, b in (
        (
            np.asarray(found.search_tree.children_visits)[:, 0],
            discrete.search_tree.children_visits[:, 0],
        ),
        (found.action_weights, discrete.action_weights),
    ):
        np.testing.assert_allclose(a, np.take_along_axis(b, order, axis=1), rtol=1e-4)
    with pytest.raises(ValueError, match=r"root.actions of shape \(4, 6, 1\): expected \(4, 5\)"):
        search.sampled_policy(
            params, jax.random.key(0),
            search.SampledRootFnOutput(actions=actions, prior_logits=logits[:, :5],
                                       value=root.value, embedding=root.embedding), step, 4,
        )  # fmt: skip


def test_metrics_tell_what_a_plain_walk_tells():
    params, batch = world(2, 5, 0.9, 1.0), 4
    out = plain("gumbel_muzero_policy", batch, 33)(params, invalid_of(4, batch, 5))
    found = {name: np.asarray(x) for name, x in jax.jit(search.search_metrics)(out).items()}
    tree = jax.tree.map(np.asarray, out.search_tree)
    for i in range(batch):
        depths = []
        for node in np.flatnonzero(tree.parents[i] >= 0):
            depth = 0
            while node != 0:
                node, depth = tree.parents[i, node], depth + 1
            depths.append(depth)
        assert found["depth_max"][i] == max(depths)
        np.testing.assert_allclose(found["depth_mean"][i], np.mean(depths), rtol=1e-6)
        visits = tree.children_visits[i, 0]
        shares = visits[visits > 0] / visits.sum()
        np.testing.assert_allclose(
            found["visit_entropy"][i], -(shares * np.log(shares)).sum(), rtol=1e-5
        )
        prior = np.exp(np.float64(tree.children_prior_logits[i, 0]))
        prior /= prior.sum()
        seen = visits > 0
        q = tree.children_rewards[i, 0] + tree.children_discounts[i, 0] * tree.children_values[i, 0]
        mean = (prior * q)[seen].sum() / prior[seen].sum()
        mixed = (tree.raw_values[i, 0] + visits.sum() * mean) / (1 + visits.sum())
        gain = ((out.action_weights[i] - prior) * np.where(seen, q, mixed)).sum()
        np.testing.assert_allclose(found["policy_improvement"][i], gain, rtol=1e-3, atol=1e-5)
    assert (found["policy_improvement"] > 0).all()


@pytest.mark.parametrize(
    ("policy", "masked"),
    [
        ("gumbel_muzero_policy", True),
        pytest.param("muzero_policy", False, marks=pytest.mark.slow),
        pytest.param("gumbel_muzero_policy", False, marks=pytest.mark.slow),
        pytest.param("muzero_policy", True, marks=pytest.mark.slow),
    ],
)
def test_seeds_under_vmap_are_single_searches(policy, masked):
    num_seeds, batch = 3, 4
    worlds = [world(seed, 6, 0.9, 1.0) for seed in range(num_seeds)]
    invalid = invalid_of(1, batch, 6) if masked else None
    keys = jax.random.split(jax.random.key(0), num_seeds)

    def one(params, key):
        mask = None if invalid is None else jnp.asarray(invalid)
        out = getattr(search, policy)(
            params, key, root_of(params, batch), model, 24, invalid_actions=mask
        )
        return out.action, out.action_weights, out.search_tree

    together = jax.jit(jax.vmap(one))(
        jax.tree.map(lambda *x: np.stack(x), *worlds), jax.random.clone(keys)
    )
    single = jax.jit(one)
    for i in range(num_seeds):
        alone = single(worlds[i], jax.random.clone(keys)[i])
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(np.asarray(a)[i], b, rtol=1e-5, atol=1e-6)
    # two axes, and parameters that all share
    grid = jax.random.clone(keys).reshape(3, 1)
    shared = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (None, 0)))(worlds[0], grid)
    alone = single(worlds[0], keys[1])
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(np.asarray(a)[1, 0], b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["gumbel_muzero_policy", "muzero_policy"])
@pytest.mark.parametrize(
    ("batch", "seeds"), [(8, 2), (1, 1), (256, 1), pytest.param(8, 1, marks=pytest.mark.slow)]
)
def test_no_buffer_is_copied(policy, batch, seeds):
    """Neither in the loops of one search nor in those of a vmapped one; nor read on two cores."""
    num, actions = 40, 7
    params = world(0, actions, 0.9, 1.0)

    def one(key):
        out = getattr(search, policy)(
            None, key, root_of(params, batch), lambda _, *args: model(params, *args), num
        )
        return out.action, out.action_weights

    keys = jax.random.split(jax.random.key(0), seeds)
    text = jax.jit(jax.vmap(one)).lower(keys).compile().as_text()
    rows = max(int(n) for n in re.findall(r"s32\[(\d+),40\]", text))
    assert rows >= batch * seeds * (num + 1)  # 40 = 4 * (7 edges + 2 for priors + 1)
    # the empty table is a constant, copied once before the loops
    loops = [part for part in re.split(r"\n(?=%)", text.split("\nENTRY")[0]) if "while" in part]
    assert len(loops) > 2
    for part in loops:
        assert not re.search(rf"s32\[({rows},40|{rows * 10},4)\]\S* (copy|select)\(", part)
        assert f"s32[{rows},40]{{0,1}}" not in part  # which is one with its axes turned around
    scatter = rf"= s32\[{rows * 10},4\]\S* fusion\(.*/scatter"
    walks = [part for part in loops if re.search(scatter, part)]
    assert walks
    for part in walks:
        spread = [line for line in part.splitlines() if "outer_dimension_partitions" in line]
        assert not [line for line in spread if not re.search(scatter, line)]


@pytest.mark.parametrize("policy", ["gumbel_muzero_policy", "muzero_policy"])
def test_poisoned_lane_stays_alone(policy):
    params = world(0, 5, 0.9, 1.0)

    def poisoned(given, key, action, state):
        params, poison = given
        out, after = model(params, key, action, state[:, 0])
        bad = state[:, 1] > 0
        return search.RecurrentFnOutput(
            reward=out.reward, discount=out.discount,
            prior_logits=jnp.where(bad[:, None], poison, out.prior_logits),
            value=jnp.where(bad, poison, out.value),
        ), jnp.stack([after, state[:, 1]], axis=1)  # fmt: skip

    @jax.jit
    def searched(bad, poison):
        root = root_of(params, 3)
        state = jnp.stack([root.embedding, bad], axis=1)
        root = search.RootFnOutput(
            prior_logits=root.prior_logits, value=root.value, embedding=state
        )
        return getattr(search, policy)((params, poison), jax.random.key(0), root, poisoned, 20)

    good = searched(np.zeros(3, np.int32), 0.0)
    for poison in (np.nan, -np.inf):
        bad = searched(np.int32([0, 1, 0]), poison)
        for name in ("action", "action_weights"):
            got, want = (np.asarray(getattr(out, name))[::2] for out in (bad, good))
            np.testing.assert_array_equal(got, want)
        assert 0 <= int(np.asarray(bad.action)[1]) < 5


def test_row_without_valid_actions_takes_action_zero():
    params = world(0, 5, 0.9, 1.0)
    invalid = np.zeros((4, 5), bool)
    invalid[1] = True
    nothing = np.zeros((4, 5), bool)
    for policy in ("gumbel_muzero_policy", "muzero_policy"):
        made = plain(policy, 4, 33)
        out, free = made(params, invalid), made(params, nothing)
        assert int(out.action[1]) == 0
        others = [
            tree.children_visits[[0, 2, 3], 0] for tree in (out.search_tree, free.search_tree)
        ]
        np.testing.assert_array_equal(*others)


def test_ties_are_broken_at_random():
    params = {**world(0, 18, 1.0, 0.0), "logits": np.zeros((STATES, 18), np.float32)}
    out = run(search, "muzero_policy", params, 256, 1, dirichlet_fraction=0.0)
    first = np.argmax(out.search_tree.children_visits[:, 0], axis=-1)
    counts = np.bincount(first, minlength=18)
    assert counts.min() > 0
    assert counts.max() < 4 * 256 / 18


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_simulations": 0}, "num_simulations = 0: expected 1 or more"),
        ({"max_depth": 0}, "max_depth = 0: expected 1 or more"),
        ({"max_num_considered_actions": 0}, "max_num_considered_actions = 0: expected 1 or more"),
        ({"logits": (2, 0)}, r"root.prior_logits of shape \(2, 0\)"),
        ({"logits": (3,)}, r"root.prior_logits of shape \(3,\)"),
        ({"value": (3,)}, r"root.value of shape \(3,\): expected \(2,\)"),
        ({"embedding": (3,)}, "root.embedding of shape .*expected 2 rows"),
        ({"invalid_actions": (2, 3)}, r"invalid_actions of shape \(2, 3\): expected \(2, 4\)"),
        ({"reward": (1,)}, r"recurrent_fn: reward of shape \(1,\), expected"),
        ({"prior_logits": (2, 5)}, r"recurrent_fn: prior_logits of shape .*expected"),
        ({"new": (2, 2)}, "recurrent_fn: embedding .*expected"),
    ],
)
def test_bad_input(changes, message):
    shapes = {"logits": (2, 4), "value": (2,), "embedding": (2,), **changes}
    root = search.RootFnOutput(
        prior_logits=jnp.zeros(shapes["logits"]), value=jnp.zeros(shapes["value"]),
        embedding=jnp.zeros(shapes["embedding"]),
    )  # fmt: skip

    def function(params, key, action, embedding):
        num = action.shape[0]
        return search.RecurrentFnOutput(
            reward=jnp.zeros(changes.get("reward", num)), discount=jnp.ones(num),
            prior_logits=jnp.zeros(changes.get("prior_logits", (num, 4))), value=jnp.zeros(num),
        ), jnp.zeros(changes.get("new", num))  # fmt: skip

    options = {k: v for k, v in changes.items() if k in ("max_depth", "max_num_considered_actions")}
    if "invalid_actions" in changes:
        options["invalid_actions"] = jnp.zeros(changes["invalid_actions"])
    num = changes.get("num_simulations", 4)
    with pytest.raises(ValueError, match=message):
        search.gumbel_muzero_policy((), jax.random.key(0), root, function, num, **options)
