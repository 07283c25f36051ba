"""MuZero's targets against a walk through one window, step by step, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from muzero_reference import (
    TINY,
    assert_targets,
    dict_spec,
    made_targets,
    records,
    slow_mean,
    slow_targets,
    vector_spec,
    window_of,
)

from mbrl_jax.agents import muzero_targets as targets

SPEC = vector_spec()
PAIR = dict_spec("Pair-test", 2, 3, place=((2,), "float32"), to_play=((), "int32"))
REWARDS = (0.5, -1.0, 0.25, 1.0, 0.75, -0.5, 2.0)
GO, END, CUT = "go", "end", "cut"


def settings_of(**changes):
    return dataclasses.replace(TINY, gamma=0.9, value_target="n_step", **changes)


def compared(cfg, spec, windows, seed=0):
    """The code's targets of windows of rows, each against the slow ones; -> the targets."""
    length = cfg.unroll + cfg.n_step + 1
    rows = [one[:length] for one in windows]
    assert all(len(one) == length for one in rows)
    window = window_of(rows, seed=seed)
    later = np.random.default_rng(seed).normal(size=(len(rows), length - 1)).astype(np.float32)
    root, age = jnp.zeros((len(rows), cfg.unroll + 1)), jnp.zeros(len(rows))
    made, whole = made_targets(cfg, spec, window, later, root, age)
    lam = cfg.lam if cfg.value_target == "lambda" else None
    for b, one in enumerate(rows):
        players = one if spec.num_players == 2 else [{**row, "to_play": 0} for row in one]
        slow = slow_targets(players, later[b], cfg.unroll, cfg.gamma, cfg.n_step, lam,
                            cfg.prefix_period)  # fmt: skip
        assert_targets(made, b, slow)
        if not one[0].get("is_last"):
            expected = slow_mean(players, later[b], 0, 1.0, cfg.gamma)
            np.testing.assert_allclose(whole[b], expected, rtol=1e-4, atol=1e-4)
    return jax.tree.map(np.asarray, made)


WINDOWS = {
    "no end": (False, [GO] * 9),
    "first step ends": (False, [END, *[GO] * 9]),
    "first step cut": (False, [CUT, *[GO] * 9]),
    "second step ends": (False, [GO, END, *[GO] * 9]),
    "second step cut": (False, [GO, CUT, *[GO] * 9]),
    "last unrolled step ends": (False, [GO, GO, END, *[GO] * 9]),
    "last unrolled step cut": (False, [GO, GO, CUT, *[GO] * 9]),
    "ends beyond the unroll": (False, [GO, GO, GO, END, *[GO] * 9]),
    "cut beyond the unroll": (False, [GO, GO, GO, CUT, *[GO] * 9]),
    "last step ends": (False, [GO] * 4 + [END, GO, GO, GO]),
    "ends twice": (False, [END, END, END, END, GO, GO]),
    "cut, then ends": (False, [CUT, END, GO, CUT, GO, GO]),
    "ends, then cut": (False, [END, CUT, GO, END, GO, GO]),
    "opens with a final record": (True, [GO] * 9),
    "opens with a final record, then ends": (True, [END, GO, END, GO, GO]),
    "opens with a final record, then cut": (True, [GO, CUT, GO, GO, GO]),
}


@pytest.mark.parametrize("prefix_period", [0, 2])
@pytest.mark.parametrize("value_target", ["n_step", "lambda"])
@pytest.mark.parametrize("spec", [SPEC, PAIR], ids=["alone", "two players"])
def test_targets_are_those_of_the_walk(spec, value_target, prefix_period):
    cfg = dataclasses.replace(
        settings_of(prefix_period=prefix_period, n_step=3), value_target=value_target, lam=0.8
    )
    windows = [
        records(kinds, opens_last, REWARDS, (0, 1, 1, 0, 1))
        for opens_last, kinds in WINDOWS.values()
    ]
    compared(cfg, spec, windows)


rows = st.tuples(
    st.booleans(), st.lists(st.sampled_from([GO, GO, GO, END, CUT]), min_size=8, max_size=8),
    st.lists(st.floats(-2, 2, width=32), min_size=7, max_size=7),
    st.lists(st.integers(0, 1), min_size=8, max_size=8),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    windows=st.lists(rows, min_size=3, max_size=3), seed=st.integers(0, 99), two=st.booleans(),
    which=st.sampled_from(["n_step", "lambda"]), prefix_period=st.sampled_from([0, 2, 3]),
)  # fmt: skip
def test_random_windows(windows, seed, two, which, prefix_period):
    cfg = dataclasses.replace(settings_of(prefix_period=prefix_period), value_target=which, lam=0.7)
    given = [records(kinds, last, rewards, players) for last, kinds, rewards, players in windows]
    compared(cfg, PAIR if two else SPEC, given, seed)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_n_step_returns_of_any_length(n):
    cfg = dataclasses.replace(settings_of(), n_step=n)
    compared(cfg, SPEC, [records([GO] * 4 + [kind] + [GO] * 9, rewards=REWARDS)
                         for kind in (GO, END, CUT)])  # fmt: skip


# what a fault would change, by name


def test_a_window_that_starts_on_the_last_step_trains_its_policy_and_its_reward():
    """Nothing but that step: absorbing states follow, and the next episode stays out of it."""
    made = compared(settings_of(), SPEC, [records([END, *[GO] * 9], rewards=(1.0, -5.0, 5.0))])
    assert made.reward[0].tolist() == [1.0, 0.0, 0.0]
    assert made.value[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert made.continues[0].tolist() == [0.0, 0.0, 0.0]
    assert made.policy_mask[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert made.value_mask[0].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert made.step_mask[0].tolist() == [1.0, 1.0, 1.0]
    assert made.likeness_mask[0].tolist() == [1.0, 0.0, 0.0]


def test_a_time_limit_is_no_end():
    """The value of the final observation is taken, the task goes on, nothing is asked beyond."""
    window = window_of([records([GO, CUT, *[GO] * 9], rewards=(1.0,))[:6]])
    later = jnp.float32([[9.0, 7.0, 9.0, 9.0, 9.0]])
    made, _ = made_targets(settings_of(), SPEC, window, later, jnp.zeros((1, 4)), jnp.zeros(1))
    np.testing.assert_allclose(made.value[0, :2], [1.0 + 0.9 * (1.0 + 0.9 * 7.0), 1.0 + 0.9 * 7.0])
    assert made.continues[0, :2].tolist() == [1.0, 1.0]
    assert made.value_mask[0].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert made.step_mask[0].tolist() == [1.0, 1.0, 0.0]
    assert made.policy_mask[0].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert made.likeness_mask[0].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("value_target", ["n_step", "lambda"])
def test_the_last_unrolled_state_has_its_whole_tail(value_target):
    """Its return reaches the last record of the window and the value there."""
    cfg = dataclasses.replace(settings_of(), value_target=value_target, lam=1.0)
    window = window_of([records([GO] * 9, rewards=(1.0,))[:6]])
    later = jnp.float32([[0.0, 0.0, 0.0, 0.0, 5.0]])
    made, _ = made_targets(cfg, SPEC, window, later, jnp.zeros((1, 4)), jnp.zeros(1))
    np.testing.assert_allclose(made.value[0, 3], 1.0 + 0.9 * (1.0 + 0.9 * 5.0), rtol=1e-6)


def test_nothing_trains_from_a_final_record():
    made = compared(settings_of(), SPEC, [records([GO] * 9, True, REWARDS)])
    for mask in (made.policy_mask, made.value_mask, made.step_mask, made.likeness_mask):
        assert not mask.any()


def test_reward_k_is_that_of_the_action_taken_in_state_k():
    """In the eyes of the player who took it, whoever moves next."""
    given = records([GO] * 9, rewards=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0), players=(0, 1))
    made = compared(settings_of(), PAIR, [given])
    assert made.reward[0].tolist() == [1.0, 2.0, 3.0]


def test_sums_of_rewards_start_anew_and_stop_at_the_end():
    cfg = dataclasses.replace(settings_of(prefix_period=2), unroll=5)
    made = compared(cfg, SPEC, [records([GO] * 9, rewards=(1.0,)),
                                records([GO, GO, GO, END, *[GO] * 9], rewards=(1.0,))])  # fmt: skip
    assert made.reward[0].tolist() == [1.0, 2.0, 1.0, 2.0, 1.0]
    assert made.reward[1].tolist() == [1.0, 2.0, 1.0, 2.0, 0.0]


@pytest.mark.parametrize("value_target", ["search", "mixed"])
def test_search_values_as_targets(value_target):
    """Of all windows, or of those older than `mixed_age`; past the end they are 0 all the same."""
    cfg = dataclasses.replace(settings_of(mixed_age=100.0), value_target=value_target)
    window = window_of([records([GO, END, *[GO] * 9], rewards=(1.0,))[:6]] * 3)
    root = jnp.full((3, 4), 7.0)
    made, _ = made_targets(cfg, SPEC, window, jnp.zeros((3, 5)), root, jnp.float32([0, 100, 101]))
    returns = [1.9, 1.0, 0.0, 0.0]
    searched = [7.0, 7.0, 0.0, 0.0]
    expected = [searched] * 3 if value_target == "search" else [returns, returns, searched]
    np.testing.assert_allclose(made.value, expected, rtol=1e-6)


# two players


def game(length, first=0, twice=None, reward=1.0):
    """A game of `length` moves decided by the last; the mover `twice` moves again after it."""
    players, player = [], first
    for i in range(length):
        players.append(player)
        if i != twice:
            player = 1 - player
    rows = [{"to_play": player} for player in players]
    rows[-1] |= {"terminated": True, "reward": reward}
    return [*rows, {"is_last": True, "to_play": player}]


@pytest.mark.parametrize("value_target", ["n_step", "lambda"])
@pytest.mark.parametrize("reward", [1.0, -1.0])
@pytest.mark.parametrize("twice", [None, 0, 1, 3])
def test_values_of_decided_games_have_the_sign_of_the_winner(value_target, reward, twice):
    """Games of 1 to 9 moves, from every start and at every offset, whoever began."""
    cfg = dataclasses.replace(
        settings_of(), value_target=value_target, lam=1.0, gamma=1.0, n_step=9
    )
    windows, expected = [], []
    for length in range(1, 10):
        for first in (0, 1):
            one, others = game(length, first, twice, reward), game(4, 1) + game(5, 0) + game(5, 1)
            mover = one[length - 1]["to_play"]
            winner = mover if reward > 0 else 1 - mover
            for start in range(length):
                windows.append((one + others)[start : start + 13])
                signs = [1.0 if row["to_play"] == winner else -1.0 for row in one[start:length]]
                expected.append((signs + [0.0] * 4)[:4])
    # values of the network must not matter in games that are played out
    later = np.random.default_rng(0).normal(size=(len(windows), 12)).astype(np.float32)
    nothing = jnp.zeros((len(windows), 4)), jnp.zeros(len(windows))
    made, whole = made_targets(cfg, PAIR, window_of(windows), later, *nothing)
    np.testing.assert_array_equal(made.value, np.float32(expected))
    np.testing.assert_array_equal(whole, np.float32(expected)[:, 0])


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bootstrap_has_the_sign_of_who_is_to_move(n):
    """By players, not by parity: where one moves twice, the sign stays."""
    cfg = dataclasses.replace(settings_of(), n_step=n, gamma=1.0)
    players = (0, 1, 1, 0, 1, 1, 0, 0)
    window = window_of([records([GO] * 9, players=players)[: n + 4]])
    later = jnp.full((1, n + 3), 1.0)
    made, _ = made_targets(cfg, PAIR, window, later, jnp.zeros((1, 4)), jnp.zeros(1))
    expected = [1.0 if players[k] == players[k + n] else -1.0 for k in range(4)]
    np.testing.assert_array_equal(made.value[0], expected)


def test_discounts_by_hand():
    terminated = jnp.asarray([[False, False, True, False]])
    alone = targets.discounts(terminated, None, 0.9)
    np.testing.assert_allclose(alone, [[0.9, 0.9, 0.0, 0.9]])
    to_play = jnp.int32([[0, 1, 1, 0, 1]])
    np.testing.assert_allclose(
        targets.discounts(terminated, to_play, 0.9), [[-0.9, 0.9, 0.0, -0.9]]
    )
