"""Every transform with every policy against the plain reference, and what transforms may read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import search_reference as reference
from search_worlds import (
    chance_functions,
    chance_steps_of,
    first_in_order,
    invalid_of,
    model,
    plain,
    root_of,
    searcher,
    step_of,
    world,
)

from mbrl_jax import search
from mbrl_jax.search import backup, node, puct, schedule
from mbrl_jax.search.base import FEW, over_actions
from mbrl_jax.types import InputError

ACTIONS, OUTCOMES, BATCH, NUM = 5, 3, 4, 32
# transforms of a number, ours and the reference's
OURS = {
    "min_max": lambda x: functools.partial(search.qtransform_by_min_max, min_value=-x, max_value=x),
    "siblings": lambda x: search.qtransform_by_parent_and_siblings,
    "mixed": lambda x: functools.partial(search.qtransform_completed_by_mix_value, value_scale=x),
    "raw": lambda x: functools.partial(
        search.qtransform_completed_by_mix_value, value_scale=0.5, maxvisit_init=20,
        rescale_values=False, use_mixed_value=False,
    ),
}  # fmt: skip
PLAIN = {
    "min_max": lambda x: functools.partial(reference.min_max, low=-x, high=x),
    "siblings": lambda x: reference.parent_and_siblings,
    "mixed": lambda x: functools.partial(reference.completed, value_scale=x),
    "raw": lambda x: functools.partial(
        reference.completed, value_scale=0.5, maxvisit_init=20, rescale=False, mix=False
    ),
    "tree": lambda x: None,
}


def one_of(x):
    """The transform of number x[0], of the number x[1]: one program for all of them."""
    which, x = jnp.int32(x[0]), x[1]

    def transform(tree, index):
        branches = [functools.partial(make(x), tree, index) for make in OURS.values()]
        return jax.lax.switch(which, branches)

    return transform


def by_tree(x):
    return lambda tree, i: search.qtransform_by_tree_min_max(tree, i, epsilon=1e-8)


def chosen(transform, x):
    """`x` of `one_of` and of `by_tree`."""
    return [float(list(OURS).index(transform)) if transform in OURS else -1.0, x]


def cases(transform):
    """Worlds of other scales, discounts, masks and ties, and the number of the transform."""
    for seed, discount, scale, hidden, ties in (
        (0, 0.9, 1.0, False, False),
        (1, -1.0, 1e-3, True, False),
        (2, 1.0, 30.0, True, False),
        (3, 0.0, 1.0, True, False),
        (4, 0.9, 0.0, True, True),
    ):
        wide = ACTIONS + OUTCOMES
        x = {"min_max": 4.0 * scale + 1.0, "mixed": (0.1, 1.0)[seed % 2]}.get(transform, 0.0)
        yield world(seed, wide, discount, scale, ties, hidden), invalid_of(seed, BATCH, ACTIONS), x


def of_actions(params):
    cut = {name: np.asarray(params[name])[:, :ACTIONS] for name in ("logits", "next")}
    return jax.tree.map(np.asarray, {**params, **cut})


def legal(params):
    """At least one action of every state, and what leads to none is not seen."""
    logits = np.array(params["logits"])
    logits[(logits == -1e9).all(axis=1), 0] = 0.0
    return {**params, "logits": logits}


@functools.cache
def values_of_lanes(transform):
    """What a search adds to scores: (x, nodes) -> [A, L]; compiled once."""

    def values(x, nodes):
        found = node.transform_of(OURS[transform](x), ACTIONS)
        return node.values_of(found, found.for_roots(BATCH))(nodes)

    return jax.jit(values)


@jax.jit
def values_of_one(x, nodes):
    found = node.transform_of(one_of(x), ACTIONS)
    return node.values_of(found, found.for_roots(BATCH))(nodes)


@pytest.mark.parametrize("transform", list(OURS))
def test_values_of_many_nodes_are_those_of_each(transform):
    """Our own transforms take all nodes at once, others one after the other."""
    rng = np.random.default_rng(0)
    visits = rng.integers(0, 4, (ACTIONS, 12)).astype(np.int32)
    visits[:, 0] = 0
    total = 1 + visits.sum(axis=0, dtype=np.int32)
    prior = rng.dirichlet(np.ones(ACTIONS), 12).T
    qvalues = np.where(visits > 0, rng.normal(size=visits.shape), 0.0)
    raw, value = rng.normal(size=(2, 12))
    numbers = (np.float32(z) for z in (prior, qvalues, raw, value))
    prior, qvalues, raw, value = numbers
    nodes = node.Node(
        prior, visits, qvalues, qvalues, raw, value, total,
        np.int32(np.arange(12) % BATCH), np.int32(np.arange(12)),
    )  # fmt: skip
    for x in (0.1, 1.0):
        found = values_of_lanes(transform)(np.float32(x), nodes)
        same = values_of_one(np.float32(chosen(transform, x)), nodes)
        np.testing.assert_allclose(found, same, rtol=1e-6, atol=1e-6)
        for i in range(12):
            one = reference.Node(np.log(np.float64(prior[:, i])), float(raw[i]), i, 0)
            one.value, one.visits = float(value[i]), int(total[i])
            for action in np.flatnonzero(visits[:, i]):
                child = reference.Node(np.zeros(ACTIONS), float(qvalues[action, i]), i, 1, 0.0, 1.0)
                child.visits = int(visits[action, i])
                one.children[action] = child
            np.testing.assert_allclose(
                np.asarray(found)[:, i], PLAIN[transform](x)(one), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("machine", ["batches", pytest.param("alone", marks=pytest.mark.slow)])
def test_gumbel_with_every_transform_is_the_reference(machine, monkeypatch):
    if machine == "alone":
        monkeypatch.setattr(schedule, "CPU", schedule.Machine(128, 1, 1))
    plan = searcher(
        search, "gumbel_muzero_policy", BATCH, NUM, one_of, max_num_considered_actions=4
    )
    for transform in OURS:
        gumbel_as_reference(plan, transform)


def gumbel_as_reference(plan, transform):
    for params, invalid, x in cases(transform):
        params = legal(of_actions(params))
        out = plan(params, invalid, chosen(transform, x))
        noise = np.float64(out.search_tree.extra_data.root_gumbel)
        logits = np.float64(out.search_tree.children_prior_logits[:, 0])
        step = step_of(params)
        for i in range(BATCH):
            root = reference.Node(logits[i], float(params["value"][i]), i, 0)
            visits, weights = reference.gumbel(
                root, step, NUM, noise[i], 4, invalid[i], transform=PLAIN[transform](x)
            )
            np.testing.assert_array_equal(out.search_tree.children_visits[i, 0], visits)
            np.testing.assert_allclose(out.action_weights[i], weights, atol=1e-4)
        assert_no_masked_action_below(out.search_tree)


@pytest.mark.parametrize("transforms", [tuple(OURS), ("tree",)], ids=", ".join)
def test_puct_with_every_transform_is_the_reference(transforms, monkeypatch):
    monkeypatch.setattr(puct, "tie_order", first_in_order)
    make = by_tree if transforms == ("tree",) else one_of
    plan = searcher(search, "muzero_policy", BATCH, NUM, make)
    for transform in transforms:
        puct_as_reference(plan, transform)


def puct_as_reference(plan, transform):
    for params, invalid, x in cases(transform):
        params = legal(of_actions(params))
        out, step = plan(params, invalid, chosen(transform, x)), step_of(params)
        logits = np.float64(out.search_tree.children_prior_logits[:, 0])
        for i in range(BATCH):
            root = reference.Node(logits[i], float(params["value"][i]), i, 0)
            visits = reference.muzero(
                root, step, NUM, invalid[i], tree_range=transform == "tree",
                transform=PLAIN[transform](x),
            )  # fmt: skip
            np.testing.assert_array_equal(out.search_tree.children_visits[i, 0], visits)
        if transform in ("min_max", "siblings", "tree"):
            assert_no_masked_action_below(out.search_tree)


@pytest.mark.parametrize("transforms", [tuple(OURS), ("tree",)], ids=", ".join)
def test_stochastic_search_with_every_transform_is_the_reference(transforms, monkeypatch):
    monkeypatch.setattr(puct, "tie_order", first_in_order)
    decide, answer = chance_functions(ACTIONS)
    make = by_tree if transforms == ("tree",) else one_of

    @jax.jit
    def plan(params, key, invalid, x):
        wide = root_of(params, BATCH)
        root = search.RootFnOutput(
            prior_logits=wide.prior_logits[:, :ACTIONS], value=wide.value, embedding=wide.embedding
        )
        return search.stochastic_muzero_policy(
            params, key, root, decide, answer, NUM, invalid, qtransform=make(x)
        )

    for transform in transforms:
        stochastic_as_reference(plan, transform)


def stochastic_as_reference(plan, transform):
    for params, invalid, x in cases(transform):
        both = np.split(np.array(params["logits"]), [ACTIONS], axis=1)
        parts = [np.asarray(legal({"logits": part})["logits"]) for part in both]
        params = {**params, "logits": np.concatenate(parts, axis=1)}
        x_of = np.float32(chosen(transform, x))
        tree = plan(params, jax.random.key(5), jnp.asarray(invalid), x_of).search_tree
        tree, steps = jax.tree.map(np.asarray, tree), chance_steps_of(params, ACTIONS)
        logits = np.float64(tree.children_prior_logits[:, 0])
        for i in range(BATCH):
            root = reference.Node(logits[i], float(params["value"][i]), i, 0)
            visits = reference.stochastic(
                root, *steps, NUM, invalid[i],
                tree_range=transform == "tree", transform=PLAIN[transform](x),
            )  # fmt: skip
            np.testing.assert_array_equal(tree.children_visits[i, 0], visits)


def test_sampled_search_with_every_transform_is_the_reference():
    def step(params, key, action, state):
        out, state = model(params, key, action.astype(jnp.int32), state)
        return search.SampledRecurrentFnOutput(
            reward=out.reward, discount=out.discount, value=out.value,
            prior_logits=out.prior_logits, actions=candidates(state),
        ), state  # fmt: skip

    def candidates(state):
        actions = jnp.arange(ACTIONS, dtype=jnp.float32)[None]
        return jnp.broadcast_to(actions, (state.shape[0], ACTIONS))

    @jax.jit
    def plan(params, key, x):
        root = root_of(params, BATCH)
        return search.sampled_policy(
            params, key,
            search.SampledRootFnOutput(actions=candidates(root.embedding), value=root.value,
                                       prior_logits=root.prior_logits, embedding=root.embedding),
            step, NUM, qtransform=one_of(x),
        )  # fmt: skip

    for transform in ("min_max", "siblings", "raw"):
        sampled_as_reference(plan, transform)


def sampled_as_reference(plan, transform):
    for params, _, x in cases(transform):
        params = legal(of_actions(params))
        tree = plan(params, jax.random.key(5), np.float32(chosen(transform, x))).search_tree
        tree, step = jax.tree.map(np.asarray, tree), step_of(params)
        noise = np.float64(tree.extra_data.root_gumbel)
        for i in range(BATCH):
            nothing = np.zeros(ACTIONS, bool)
            logits = np.float64(params["logits"])[i]
            root = reference.Node(logits, float(params["value"][i]), i, 0)
            visits, _ = reference.gumbel(
                root, step, NUM, noise[i], ACTIONS, nothing,
                transform=PLAIN[transform](x),
            )  # fmt: skip
            np.testing.assert_array_equal(tree.children_visits[i, 0], visits)


def assert_no_masked_action_below(tree):
    masked = np.asarray(tree.children_prior_logits)[:, 1:] < -80
    assert not np.asarray(tree.children_visits)[:, 1:][masked].any()


def one_legal(params, key, action, state):
    """One legal action, a bad one, at all states that have a good value."""
    num = action.shape[0]
    mask = jnp.where(jnp.arange(ACTIONS)[None] == (state % ACTIONS)[:, None], 0.0, -1e9)
    return search.RecurrentFnOutput(
        reward=jnp.full(num, -1.0), discount=jnp.ones(num), prior_logits=mask, value=jnp.ones(num)
    ), state * 7 + action + 1  # fmt: skip


def test_gumbel_stays_among_legal_actions_whatever_the_scale_of_values():
    """A completed value of an illegal action stands far above those of the legal one."""
    batch, num = 8, 240

    @jax.jit
    def plan(key, value_scale):
        root = search.RootFnOutput(
            prior_logits=jnp.zeros((batch, ACTIONS)), value=jnp.ones(batch),
            embedding=jnp.arange(batch),
        )  # fmt: skip
        transform = functools.partial(
            search.qtransform_completed_by_mix_value, value_scale=value_scale
        )
        return search.gumbel_muzero_policy((), key, root, one_legal, num, qtransform=transform)

    for scale in (0.1, 1.0, 100.0):
        tree = plan(jax.random.key(0), jnp.float32(scale)).search_tree
        assert (np.asarray(tree.parents)[:, 1:] > 0).sum() > batch * num / 2
        assert_no_masked_action_below(tree)


def visited_q(read):
    """A transform by parent and siblings of the values that `read` takes from a tree."""

    def transform(tree, index):
        visited = tree.children_visits[index] > 0
        values = jnp.where(visited, read(tree, index), tree.raw_values[index])
        low, high = jnp.min(values), jnp.max(values)
        # the root's are twice as much worth
        scale = jnp.where(index == tree.ROOT_INDEX, 2.0, 1.0)
        return scale * jnp.where(visited, (values - low) / jnp.maximum(high - low, 1e-8), 0.0)

    return transform


def from_parts(tree, index):
    return (
        tree.children_rewards[index]
        + tree.children_discounts[index] * (tree.children_values[index])
    )


@pytest.mark.parametrize("policy", ["gumbel_muzero_policy", "muzero_policy"])
@pytest.mark.parametrize("machine", ["batches", pytest.param("alone", marks=pytest.mark.slow)])
def test_transforms_may_read_rewards_discounts_and_values(policy, machine, monkeypatch):
    if machine == "alone" and policy == "muzero_policy":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    elif machine == "alone":
        monkeypatch.setattr(schedule, "CPU", schedule.Machine(128, 1, 1))
    params, invalid = world(3, ACTIONS, 0.9, 1.0), invalid_of(3, BATCH, ACTIONS)
    found = [
        searcher(search, policy, BATCH, NUM, lambda _, read=read: visited_q(read))(params, invalid)
        for read in (from_parts, lambda tree, index: tree.qvalues(index))
    ]
    visits = [out.search_tree.children_visits[:, 0] for out in found]
    np.testing.assert_array_equal(*visits)
    assert (visits[0] > 1).any()


def test_a_search_goes_on_with_rewards_and_discounts():
    params = world(5, ACTIONS, 0.9, 1.0)
    first = plain("muzero_policy", BATCH, NUM)(params).search_tree
    action = np.argmax(first.children_visits[:, 0], axis=1).astype(np.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def plan(read, key, action):
        state = params["next"][jnp.arange(BATCH), action]
        root = search.RootFnOutput(
            prior_logits=params["logits"][state], value=params["value"][state], embedding=state
        )
        return search.muzero_policy(
            params, key, root, model, NUM, search_tree=search.advance(first, action),
            qtransform=visited_q(read),
        ).search_tree.children_visits[:, 0]  # fmt: skip

    found = [plan(read, jax.random.key(1), action)
             for read in (from_parts, lambda tree, index: tree.qvalues(index))]  # fmt: skip
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda tree, i: tree.node_values[0] + tree.qvalues(i),
         r"qtransform reads tree.node_values at \[0\]: .*expected the node_index"),
        (lambda tree, i: tree.children_visits[i - 1] * 1.0,
         r"qtransform reads tree.children_visits at \["),
        (lambda tree, i: tree.qvalues(0), r"qtransform reads tree.qvalues at \[0\]"),
        (lambda tree, i: jnp.max(tree.node_values) + tree.qvalues(i),
         "qtransform reads tree.node_values as a whole"),
        (lambda tree, i: tree.qvalues(i) + tree.parents[i],
         "qtransform reads tree.parents: .*expected qvalues.node_index. or one of node_visits"),
        (lambda tree, i: tree.summary().qvalues, "qtransform reads tree.summary"),
        (lambda tree, i: tree.qvalues(i)[:2], r"qtransform gives shape \(2,\): expected \(5,\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("policy", ["gumbel_muzero_policy", "muzero_policy"])
def test_what_a_transform_may_not_read_is_told_in_one_line(policy, transform, message):
    params = world(0, ACTIONS, 0.9, 1.0)
    with pytest.raises(InputError, match=message) as error:
        getattr(search, policy)(
            params, jax.random.key(0), root_of(params, 2), model, 4, qtransform=transform
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [1, 2, FEW, FEW + 1, 18])
def test_few_actions_and_many_are_reduced_and_looked_up_alike(count):
    """Beside numpy, with infinities; sums in the order of the actions, to the bit."""
    rng = np.random.default_rng(count)
    x = rng.normal(size=(count, 7)).astype(np.float32)
    x[0, :3] = -np.inf, np.inf, 0.0
    for ours, theirs in ((jnp.minimum, np.min), (jnp.maximum, np.max)):
        found = jax.jit(functools.partial(over_actions, ours))(x)
        np.testing.assert_array_equal(found, theirs(x, axis=0, keepdims=True))
    total = np.zeros((1, 7), np.float32)
    for row in x[:, 2:]:
        total[:, 2:] += row
    found = jax.jit(functools.partial(over_actions, jnp.add))(x[:, 2:])
    np.testing.assert_array_equal(found, total[:, 2:])
    rows = rng.integers(0, 99, (7, 4 * (count + 2))).astype(np.int32)
    action = rng.integers(0, count, 7).astype(np.int32)
    cells = jax.jit(backup.cell_of, static_argnums=2)(rows, action, count)
    np.testing.assert_array_equal(cells, rows.reshape(7, -1, 4)[np.arange(7), action])
