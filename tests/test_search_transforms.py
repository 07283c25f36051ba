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
    root_of,
    searcher,
    step_of,
    world,
)

from mbrl_jax import search
from mbrl_jax.search import puct, schedule
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
    "tree": lambda x: lambda tree, i: search.qtransform_by_tree_min_max(tree, i, epsilon=1e-8),
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
    return {**params, "logits": params["logits"][:, :ACTIONS], "next": params["next"][:, :ACTIONS]}


def legal(params):
    """At least one action of every state, and what leads to none is not seen."""
    logits = np.array(params["logits"])
    logits[(logits == -1e9).all(axis=1), 0] = 0.0
    return {**params, "logits": jnp.asarray(logits)}


@pytest.mark.parametrize("transform", ["min_max", "siblings", "mixed", "raw"])
@pytest.mark.parametrize("machine", ["batches", pytest.param("alone", marks=pytest.mark.slow)])
def test_gumbel_with_every_transform_is_the_reference(transform, machine, monkeypatch):
    if machine == "alone":
        monkeypatch.setattr(schedule, "CPU", schedule.Machine(128, 1, 1))
    plan = searcher(
        search, "gumbel_muzero_policy", BATCH, NUM, OURS[transform], max_num_considered_actions=4
    )
    for params, invalid, x in cases(transform):
        params = legal(of_actions(params))
        out = plan(params, invalid, x)
        noise = np.float64(out.search_tree.extra_data.root_gumbel)
        logits = np.float64(out.search_tree.children_prior_logits[:, 0])
        for i in range(BATCH):
            node = reference.Node(logits[i], float(params["value"][i]), i, 0)
            visits, weights = reference.gumbel(
                node, step_of(params), NUM, noise[i], 4, invalid[i], transform=PLAIN[transform](x)
            )
            np.testing.assert_array_equal(out.search_tree.children_visits[i, 0], visits)
            np.testing.assert_allclose(out.action_weights[i], weights, atol=1e-4)
        assert_no_masked_action_below(out.search_tree)


@pytest.mark.parametrize("transform", list(OURS))
def test_puct_with_every_transform_is_the_reference(transform, monkeypatch):
    monkeypatch.setattr(puct, "tie_order", first_in_order)
    plan = searcher(search, "muzero_policy", BATCH, NUM, OURS[transform])
    for params, invalid, x in cases(transform):
        params = legal(of_actions(params))
        out = plan(params, invalid, x)
        logits = np.float64(out.search_tree.children_prior_logits[:, 0])
        for i in range(BATCH):
            node = reference.Node(logits[i], float(params["value"][i]), i, 0)
            visits = reference.muzero(
                node, step_of(params), NUM, invalid[i], tree_range=transform == "tree",
                transform=PLAIN[transform](x),
            )  # fmt: skip
            np.testing.assert_array_equal(out.search_tree.children_visits[i, 0], visits)
        if transform in ("min_max", "siblings", "tree"):
            assert_no_masked_action_below(out.search_tree)


@pytest.mark.parametrize(
    "transform",
    ["siblings", "tree",
     *(pytest.param(x, marks=pytest.mark.slow) for x in ("min_max", "mixed", "raw"))],
)  # fmt: skip
def test_stochastic_search_with_every_transform_is_the_reference(transform, monkeypatch):
    monkeypatch.setattr(puct, "tie_order", first_in_order)
    decide, answer = chance_functions(ACTIONS)

    @jax.jit
    def plan(params, key, invalid, x):
        wide = root_of(params, BATCH)
        root = search.RootFnOutput(
            prior_logits=wide.prior_logits[:, :ACTIONS], value=wide.value, embedding=wide.embedding
        )
        return search.stochastic_muzero_policy(
            params, key, root, decide, answer, NUM, invalid, qtransform=OURS[transform](x)
        )

    for params, invalid, x in cases(transform):
        both = np.split(np.array(params["logits"]), [ACTIONS], axis=1)
        parts = [np.asarray(legal({"logits": part})["logits"]) for part in both]
        params = {**params, "logits": jnp.asarray(np.concatenate(parts, axis=1))}
        tree = plan(params, jax.random.key(5), jnp.asarray(invalid), jnp.float32(x)).search_tree
        logits = np.float64(tree.children_prior_logits[:, 0])
        for i in range(BATCH):
            node = reference.Node(logits[i], float(params["value"][i]), i, 0)
            visits = reference.stochastic(
                node, *chance_steps_of(params, ACTIONS), NUM, invalid[i],
                tree_range=transform == "tree", transform=PLAIN[transform](x),
            )  # fmt: skip
            np.testing.assert_array_equal(tree.children_visits[i, 0], visits)


@pytest.mark.parametrize(
    "transform",
    ["siblings", *(pytest.param(x, marks=pytest.mark.slow) for x in ("min_max", "raw"))],
)
def test_sampled_search_with_every_transform_is_the_reference(transform):
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
            step, NUM, qtransform=OURS[transform](x),
        )  # fmt: skip

    for params, _, x in cases(transform):
        params = legal(of_actions(params))
        tree = plan(params, jax.random.key(5), jnp.float32(x)).search_tree
        noise = np.float64(tree.extra_data.root_gumbel)
        for i in range(BATCH):
            logits, nothing = np.float64(params["logits"][i]), np.zeros(ACTIONS, bool)
            node = reference.Node(logits, float(params["value"][i]), i, 0)
            visits, _ = reference.gumbel(
                node, step_of(params), NUM, noise[i], ACTIONS, nothing,
                transform=PLAIN[transform](x),
            )  # fmt: skip
            np.testing.assert_array_equal(tree.children_visits[i, 0], visits)


def assert_no_masked_action_below(tree):
    masked = np.asarray(tree.children_prior_logits[:, 1:]) < -80
    assert not np.asarray(tree.children_visits[:, 1:])[masked].any()


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
        assert (np.asarray(tree.parents[:, 1:]) > 0).sum() > batch * num / 2
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
    np.testing.assert_array_equal(
        *(np.asarray(out.search_tree.children_visits[:, 0]) for out in found)
    )
    assert (np.asarray(found[0].search_tree.children_visits[:, 0]) > 1).any()


def test_a_search_goes_on_with_rewards_and_discounts():
    params = world(5, ACTIONS, 0.9, 1.0)
    first = searcher(search, "muzero_policy", BATCH, NUM)(params).search_tree
    action = jnp.argmax(first.children_visits[:, 0], axis=1).astype(jnp.int32)

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
