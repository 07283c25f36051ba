"""The tabular models against plain Python books of what was seen."""

from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mbrl_jax.models import tabular
from mbrl_jax.models.tabular import Transition

S, A = 5, 3

transitions = st.lists(
    st.tuples(
        st.integers(0, S - 1),
        st.integers(0, A - 1),
        st.sampled_from([-1.0, 0.0, 0.5]),
        st.integers(0, S - 1),
        st.booleans(),
    ),
    max_size=30,
)


observe = jax.jit(lambda model, x, t: tabular.observe(model, x, A, t))
recall = jax.jit(tabular.recall)
choose = jax.jit(tabular.choose)


def learn(empty, seen):
    model = empty(S, A)
    for t, (s, a, r, ns, goes_on) in enumerate(seen):
        x = Transition(np.int32(s), np.int32(a), np.float32(r), np.int32(ns), np.float32(goes_on))
        model = observe(model, x, np.int32(t + 1))
    return jax.tree.map(np.asarray, model)


@settings(deadline=None, max_examples=30)
@given(transitions)
def test_visits_equal_a_python_book(seen):
    visits = learn(tabular.init_last_outcome, seen).visits
    pairs = [s * A + a for s, a, *_ in seen]
    first_pairs, first_states = (
        list(dict.fromkeys(pairs)),
        list(dict.fromkeys(p // A for p in pairs)),
    )
    assert visits.pairs[: visits.num_pairs].tolist() == first_pairs
    assert visits.states[: visits.num_states].tolist() == first_states
    assert visits.counts.tolist() == [pairs.count(pair) for pair in range(S * A)]
    last = {pair: t + 1 for t, pair in enumerate(pairs)}
    assert visits.last.tolist() == [last.get(pair, 0) for pair in range(S * A)]


@settings(deadline=None, max_examples=30)
@given(transitions)
def test_last_outcome_recalls_the_newest_and_counts_recall_the_mean(seen):
    newest, rewards, goes_on = {}, defaultdict(list), defaultdict(lambda: np.zeros(S))
    for s, a, r, ns, continues in seen:
        pair = s * A + a
        newest[pair] = (r, ns, float(continues))
        rewards[pair].append(r)
        goes_on[pair][ns] += continues
    pairs = np.arange(S * A, dtype=np.int32)
    last, mean = (
        jax.tree.map(np.asarray, recall(learn(empty, seen), pairs))
        for empty in (tabular.init_last_outcome, tabular.init_counts)
    )
    for pair in range(S * A):
        found = (last.reward[pair], last.next_state[pair], last.continues[pair])
        assert tuple(map(float, found)) == newest.get(pair, (0.0, pair // A, 1.0))
        count = len(rewards[pair])
        assert mean.reward[pair] == pytest.approx(
            np.mean(rewards[pair]) if count else 0.0, abs=1e-6
        )
        expected = goes_on[pair] / count if count else np.eye(S)[pair // A]
        np.testing.assert_allclose(mean.continues[pair], expected, rtol=1e-6)


def test_bootstrapped_is_the_same_for_one_and_for_many_and_for_a_certain_distribution():
    q = jax.random.normal(jax.random.key(0), (S * A,))
    seen = [(0, 1, 0.5, 3, True), (2, 2, -1.0, 1, False), (4, 0, 0.0, 4, True)]
    last, counts = (learn(f, seen) for f in (tabular.init_last_outcome, tabular.init_counts))
    pairs = jnp.array([1, 8, 12])
    values = np.asarray(q).reshape(S, A).max(axis=1)
    expected = [0.5 + 0.9 * values[3], -1.0, 0.9 * values[4]]
    many = tabular.bootstrapped(tabular.recall(last, pairs), q, A, 0.9)
    np.testing.assert_allclose(many, expected, rtol=1e-6)
    np.testing.assert_allclose(
        tabular.bootstrapped(tabular.recall(counts, pairs), q, A, 0.9), expected, rtol=1e-6
    )
    for pair, value in zip(pairs, many, strict=True):
        one = tabular.bootstrapped(tabular.recall(last, pair), q, A, 0.9)
        np.testing.assert_array_equal(one, value)


def test_leads_to_finds_predecessors_that_go_on():
    seen = [(0, 1, 0.0, 3, True), (2, 2, 0.0, 3, True), (4, 0, 1.0, 3, False), (1, 0, 0.0, 2, True)]
    for empty in (tabular.init_last_outcome, tabular.init_counts):
        model = learn(empty, seen)
        assert np.flatnonzero(tabular.leads_to(model, jnp.int32(3))).tolist() == [1, 8]
        assert not tabular.leads_to(model, jnp.int32(0)).any(), "an untried pair leads nowhere"


@pytest.mark.parametrize("sampler", ["pairs", "state_action", "any_action"])
def test_samplers_draw_what_they_say_with_equal_chance(sampler):
    seen = [(0, 1, 0.0, 1, True), (0, 2, 0.0, 1, True), (3, 0, 0.0, 1, True), (3, 0, 0.0, 1, True)]
    visits = learn(tabular.init_last_outcome, seen).visits
    drawn = tabular.sample_pairs(visits, jax.random.key(1), 6000, A, sampler)
    expected = {
        "pairs": {1: 1 / 3, 2: 1 / 3, 9: 1 / 3},
        "state_action": {1: 1 / 4, 2: 1 / 4, 9: 1 / 2},
        "any_action": dict.fromkeys((0, 1, 2, 9, 10, 11), 1 / 6),
    }[sampler]
    pairs, counts = np.unique(drawn, return_counts=True)
    assert pairs.tolist() == sorted(expected)
    chance = [6000 * expected[pair] for pair in pairs.tolist()]
    assert stats.chisquare(counts, chance).pvalue > 1e-4


@settings(deadline=None, max_examples=50)
@given(st.lists(st.booleans(), min_size=2, max_size=6), st.floats(0, 1 - 2**-24, width=32))
def test_choose_takes_a_true_entry_by_rank(mask, uniform):
    chosen = int(choose(np.array(mask), np.float32(uniform)))
    true = np.flatnonzero(mask)
    if true.size:
        assert chosen == true[min(int(np.float32(uniform) * np.float32(true.size)), true.size - 1)]
