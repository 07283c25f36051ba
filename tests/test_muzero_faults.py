"""Training faults that MuZero has had elsewhere, each with the tests that fail with it.

The faults are numbered as in the table, which names what went wrong and where it is tested; what
has no other place is tested here.
"""

import ast
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from muzero_reference import (
    TINY,
    assert_targets,
    ball_spec,
    dict_spec,
    made_targets,
    random_obs,
    random_params,
    records,
    slow_targets,
    vector_spec,
    window_of,
)

from mbrl_jax import prng
from mbrl_jax.agents import muzero, muzero_config, muzero_losses
from mbrl_jax.agents import muzero_search as searches
from mbrl_jax.agents.muzero_search import Advice
from mbrl_jax.data import prioritised
from mbrl_jax.models import muzero_net
from mbrl_jax.models.muzero_net import Latent, Outcome
from mbrl_jax.types import InputError, Step, env_steps

T, N, L, S, F = (f"test_muzero_{name}.py" for name in
                 ("targets", "net", "losses", "search", "faults"))  # fmt: skip
FAULTS = {
    1: ("rewards shifted by a step, or to the other player",
        [(T, "test_reward_k_is_that_of_the_action_taken_in_state_k")]),
    2: ("rewards read from the next state alone",
        [(N, "test_a_reward_may_come_from_an_action_that_changes_nothing")]),
    3: ("a reward loss at the first state", [(L, "test_there_is_no_reward_at_the_first_state")]),
    4: ("past the end: values, policies, consistency, repeated actions",
        [(T, "test_a_window_that_starts_on_the_last_step_trains_its_policy_and_its_reward"),
         (L, "test_nothing_is_learned_behind_the_masks"),
         (L, "test_actions_past_the_end_are_random")]),
    5: ("a time limit taken for an end", [(T, "test_a_time_limit_is_no_end")]),
    6: ("windows that start on the last step train nothing",
        [(T, "test_a_window_that_starts_on_the_last_step_trains_its_policy_and_its_reward")]),
    7: ("games shorter than a window are not sampled, or padded across their ends",
        [(F, "test_every_step_of_games_shorter_than_a_window_is_trained_on")]),
    8: ("values at the end of a window lose their tail",
        [(T, "test_the_last_unrolled_state_has_its_whole_tail")]),
    9: ("returns end in values as old as the replay",
        [(S, "test_shares_of_reanalysis_are_rows_of_the_batch")]),
    10: ("signs counted from the start of a slice",
         [(T, "test_values_of_decided_games_have_the_sign_of_the_winner")]),
    11: ("signs of rewards not turned in the tree",
         [(S, "test_the_backup_flips_the_sign_of_later_rewards"),
          (S, "test_two_players_find_the_winning_move")]),
    12: ("signs by parity where a player moves twice",
         [(T, "test_bootstrap_has_the_sign_of_who_is_to_move")]),
    13: ("a win by the last possible move lost",
         [(T, "test_values_of_decided_games_have_the_sign_of_the_winner"),
          (F, "test_a_win_at_the_longest_length_is_no_draw"),
          ("test_boards.py", "test_who_completes_a_line_has_won")]),
    14: ("strength measured against oneself",
         [("test_players.py", "test_the_perfect_player_takes_each_of_the_best_moves_as_often"),
          ("test_players.py", "test_the_uniform_player_is_uniform_over_legal_moves"),
          (S, "test_acting_on_a_batch_is_acting_one_by_one")]),
    15: ("returns of the wrong player",
         [(T, "test_values_of_decided_games_have_the_sign_of_the_winner"),
          (S, "test_two_players_find_the_winning_move")]),
    16: ("searches of a batch leak into each other",
         [(S, "test_a_search_of_a_batch_is_searches_one_by_one"),
          (S, "test_acting_on_a_batch_is_acting_one_by_one")]),
    17: ("infinite values where masked; weights of samples by another order",
         [(S, "test_illegal_actions_have_no_part"), (L, "test_policies_of_candidates_go_by_slot"),
          (F, "test_weights_of_samples_stand_in_their_slots")]),
    18: ("illegal actions at the root or in the target",
         [(S, "test_illegal_actions_have_no_part"),
          (L, "test_illegal_actions_of_weight_zero_cost_nothing")]),
    19: ("equal values divided by their range",
         [(S, "test_equal_values_everywhere_are_no_division_by_zero"),
          (S, "test_values_that_differ_by_rounding_are_no_advice")]),
    20: ("the value prefix begins anew at other steps in the search than in training",
         [(N, "test_the_prefix_sums_and_starts_anew"),
          (T, "test_sums_of_rewards_start_anew_and_stop_at_the_end")]),
    21: ("the gradient not halved, or losses not divided by K",
         [(L, "test_half_of_the_gradient_passes_each_step"),
          (L, "test_the_gradient_through_k_steps_is_halved_k_times"),
          (L, "test_the_first_state_counts_whole_and_later_steps_a_share")]),
    22: ("importance weights ignored, priorities of something else, new data drawn late",
         [(L, "test_sequences_count_by_their_importance"),
          (F, "test_priorities_are_errors_of_first_values_and_weights_count"),
          ("test_windows.py", "test_windows_are_open_while_they_are_whole")]),
    23: ("a support that clips in silence",
         [(N, "test_targets_beyond_the_support_are_clipped_and_counted"),
          (N, "test_the_default_support_holds_every_value_of_an_episode"),
          (F, "test_metrics_of_targets_are_those_by_hand")]),
    24: ("statistics of a batch in the networks",
         [(N, "test_a_sample_does_not_depend_on_its_batch")]),
    25: ("noise in reanalysis that cannot be turned off, rows mixed up",
         [(S, "test_reanalysed_policies_are_those_of_a_fresh_search")]),
    26: ("long runs stall unseen, or their step size ends at 0",
         [(F, "test_metrics_of_targets_are_those_by_hand"),
          (F, "test_the_step_size_does_not_end_at_nothing"),
          (F, "test_an_update_reports_what_tells_of_a_stall")]),
    27: ("as many updates for a short episode as for a long one",
         [(F, "test_updates_are_counted_by_steps_and_not_by_episodes")]),
    28: ("a key used twice; whole sequences represented for their first state",
         [(S, "test_no_key_is_used_twice"),
          (S, "test_observations_are_represented_where_their_latents_are_used")]),
}  # fmt: skip


def test_every_fault_has_its_tests():
    assert list(FAULTS) == list(range(1, 29))
    for _, tests in FAULTS.values():
        for file, name in tests:
            body = ast.parse((Path(__file__).parent / file).read_text()).body
            assert name in {node.name for node in body if isinstance(node, ast.FunctionDef)}


# replay


def played(cfg, spec, rows, seed=0):
    """A state whose replay holds `rows`, a list of rows for each environment."""
    agent = muzero.make(cfg, spec)
    state = jax.jit(agent.init)(jax.random.key(seed))
    params = random_params(muzero_config.net_of(cfg, spec), seed, 0.2)
    target = random_params(muzero_config.net_of(cfg, spec), seed + 1, 0.2)
    state = state._replace(params=params, target=target)
    window = window_of(rows, spec, seed=seed)
    observe = jax.jit(agent.observe)
    for t in range(len(rows[0])):
        now = jax.tree.map(lambda x: x[:, t], window)  # noqa: B023
        step = Step(now.obs, now.action, now.reward, now.obs, now.terminated, now.truncated,
                    now.is_last, now.is_last)  # fmt: skip
        advice = Advice(now.action, now.weights, (), now.value)
        state = observe(state, step, advice, jnp.int32(t))
    return agent, state, window


def test_every_step_of_games_shorter_than_a_window_is_trained_on():
    """Games of 1 to 3 steps in windows of 6 records: each opens one, with its own targets."""
    spec = vector_spec()
    rows = [
        records(["end", "go", "end", "go", "go", "end"] * 2 + ["go"] * 2, rewards=range(1, 30)),
        records(["go", "end", "end", "go", "cut", "end"] * 2 + ["go"] * 4, rewards=range(1, 30)),
    ]
    rows = [one[:20] for one in rows]  # fmt: skip
    _, state, window = played(TINY, spec, rows)
    replay, length = muzero.replay(TINY, spec), muzero_config.window_length(TINY)
    index = replay.ring.sample_index(jax.random.key(0), 600, jnp.int32(20), length)
    starts = set(
        zip((np.asarray(index) // 2).tolist(), (np.asarray(index) % 2).tolist(), strict=True)
    )
    assert starts == {(t, env) for t in range(20 - length + 1) for env in range(2)}
    read, _ = replay.read(state.replay, index[:50], length)
    later = np.random.default_rng(0).normal(size=(50, length - 1)).astype(np.float32)
    cfg = dataclasses.replace(TINY, value_target="n_step", gamma=0.9)
    made, _ = made_targets(cfg, spec, read, later, jnp.zeros((50, 4)), jnp.zeros(50))
    for b, row in enumerate(np.asarray(index[:50])):
        t, env = divmod(int(row), 2)
        one = rows[env][t : t + length]
        np.testing.assert_array_equal(read.obs[b], window.obs[env, t : t + length])
        assert_targets(made, b, slow_targets(one, later[b], 3, 0.9, 2))


def test_a_win_at_the_longest_length_is_no_draw():
    """The step that wins is the last that the limit allows: an end, whose value is 1."""
    pair = dict_spec("Pair-test", 2, 3, place=((2,), "float32"), to_play=((), "int32"))
    rows = [{"to_play": i % 2} for i in range(20)]
    rows[-1] |= {"terminated": True, "reward": 1.0}
    rows = [*rows, {"is_last": True, "to_play": 0}, *({"to_play": i % 2} for i in range(6))][17:23]
    cfg = dataclasses.replace(TINY, value_target="n_step", gamma=1.0)
    later = jnp.full((1, 5), 9.0)
    made, _ = made_targets(cfg, pair, window_of([rows]), later, jnp.zeros((1, 4)), jnp.zeros(1))
    assert made.value[0, 1:3].tolist() == [-1.0, 1.0]
    assert made.reward[0].tolist() == [0.0, 0.0, 1.0]
    assert made.continues[0].tolist() == [1.0, 1.0, 0.0]


def test_priorities_are_errors_of_first_values_and_weights_count():
    """One update of a prioritised replay, done again part by part."""
    spec, key = vector_spec(), jax.random.key(3)
    cfg = dataclasses.replace(TINY, prioritised=True, updates=1, priority_exponent=0.7,
                              importance_exponent=0.6, value_target="n_step")  # fmt: skip
    rows = [records(["go", "go", "end"] * 9, rewards=(0.5, 1.0, -1.0))[:24],
            records(["go"] * 30, rewards=(0.2, -0.4))[:24]]  # fmt: skip
    agent, state, _ = played(cfg, spec, rows)
    queue, replay = muzero.queue(cfg, spec), muzero.replay(cfg, spec)
    spread = jnp.linspace(0.2, 3.0, 12)
    priorities = queue.tree.set(state.priorities, jnp.arange(0, 24, 2), spread)
    state = state._replace(priorities=priorities)
    t, n = jnp.int32(23), jnp.int32(0)
    after, metrics = jax.jit(agent.update)(state, key, t, n)

    @jax.jit
    def again(state, key):
        keys = prng.fold_in(key, jnp.arange(3, dtype=jnp.int32))
        index, chance = queue.sample(state.priorities, keys[0], cfg.batch_size)
        count = env_steps(t + 1, cfg.num_envs)
        weight = prioritised.importance_weights(chance, count, cfg.importance_exponent)
        window, _ = replay.read(state.replay, index, muzero_config.window_length(cfg))
        made, _ = muzero.make_targets(cfg, spec, state, window, jnp.zeros(4), keys[1])
        net, bins = muzero_config.net_of(cfg, spec), muzero_config.support(cfg, spec)
        action = muzero.padded_actions(spec, window.action[:, :3], made.policy_mask, keys[2])
        obs = window.obs[:, 0]
        parts, said = muzero_losses.unrolled_losses(
            net, state.params, bins, obs, action, made, None
        )
        coefs = {"value": cfg.value_coef, "entropy": -cfg.entropy_coef}
        losses = [muzero_losses.total_loss(parts, coefs, w) for w in (weight, 1.0)]
        value = muzero_net.expected(said.value[0], bins.value)
        return index, jnp.abs(value - made.value[:, 0]) * made.policy_mask[:, 0], losses

    index, error, losses = again(state, key)
    found = after.priorities.levels[0].reshape(-1)[index]
    np.testing.assert_allclose(found, (np.asarray(error) + 1e-6) ** 0.7, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], losses[0], rtol=1e-3)
    assert abs(losses[0] - losses[1]) > 1e-2 * abs(losses[1])
    rest = np.setdiff1d(np.arange(48), index)
    before = state.priorities.levels[0].reshape(-1)[rest]
    np.testing.assert_array_equal(after.priorities.levels[0].reshape(-1)[rest], before)
    # what is whole next is drawn soon
    window = window_of([[{}], [{}]], spec)
    now = jax.tree.map(lambda x: x[:, 0], window)
    step = Step(now.obs, now.action, now.reward, now.obs, *[now.is_last] * 4)
    advice = Advice(now.action, now.weights, (), now.value)
    fresh = jax.jit(agent.observe)(after, step, advice, jnp.int32(24)).priorities
    opened = replay.ring.index(jnp.int32(24 - 5), jnp.arange(2, dtype=jnp.int32))
    np.testing.assert_allclose(fresh.levels[0].reshape(-1)[opened], 3.0)


def test_weights_of_samples_stand_in_their_slots(monkeypatch):
    """In a world whose reward is the action itself, the largest candidates weigh most."""

    def transition(net, params, support, latent, action):
        return Latent(latent.features), Outcome(action[:, :1], jnp.zeros(action.shape[0]))

    monkeypatch.setattr(muzero_net, "transition", transition)
    monkeypatch.setattr(muzero_net, "reward_of", lambda bins, latent, found: found.reward[:, 0])
    monkeypatch.setattr(muzero_net, "discount_of", lambda net, found, gamma: 0.0 * found.continues)
    spec = ball_spec()
    cfg = dataclasses.replace(TINY, search="sampled", num_candidates=5, wide_candidates=0,
                              max_considered=5, num_simulations=10)  # fmt: skip
    net, bins = muzero_config.net_of(cfg, spec), muzero_config.support(cfg, spec)
    params, obs = random_params(net), random_obs(spec, 6)
    found = jax.jit(lambda key: searches.run(cfg, net, bins, params, key, obs, False))(
        jax.random.key(0)
    )
    first = np.asarray(found.candidates)[..., 0]
    np.testing.assert_array_equal(np.argsort(found.weights, axis=1), np.argsort(first, axis=1))
    best = np.take_along_axis(np.asarray(found.candidates), first.argmax(1)[:, None, None], axis=1)
    np.testing.assert_array_equal(found.action, best[:, 0])


# what is told of training


def test_metrics_of_targets_are_those_by_hand():
    """Clipped targets, the errors of roots, entropies: over what counts alone."""
    spec = vector_spec()
    cfg = dataclasses.replace(TINY, value_target="n_step", gamma=0.9, value_limit=2.0,
                              reanalyse_policies=0, reanalyse_values=0)  # fmt: skip
    rewards = (3.0, 0.5, 0.25, 0.5, 0.25, 0.5)
    rows = [records(kinds, last, rewards)[:6] for last, kinds in
            ((False, ["go"] * 6), (False, ["end"] + ["go"] * 6), (True, ["go"] * 6),
             (False, ["go", "cut"] + ["go"] * 6))]  # fmt: skip
    window = window_of(rows, spec)
    params = random_params(muzero_config.net_of(cfg, spec))
    state = muzero.State(params, params, None, None, None)
    age = jnp.float32([1.0, 2.0, 3.0, 6.0])
    make = jax.jit(functools.partial(muzero.make_targets, cfg, spec))
    made, found = make(state, window, age, jax.random.key(0))
    made, value = jax.tree.map(np.asarray, made), np.asarray(window.value, np.float64)
    slow = [slow_targets(one, value[b, 1:], 3, 0.9, 2) for b, one in enumerate(rows)]
    values = [x for one in slow for x in one["value"] if x is not None]
    rewards = [x for one in slow for x in one["reward"] if x is not None]
    assert found["value_clipped"] == pytest.approx(np.mean(np.abs(values) > 2.0))
    assert found["reward_clipped"] == pytest.approx(np.mean(np.abs(rewards) > 1.0))
    assert 0 < found["value_clipped"] < 1
    assert 0 < found["reward_clipped"] < 1
    assert found["value_target"] == pytest.approx(np.mean(values), abs=1e-4)
    assert found["age"] == 3.0
    running = np.float64([one["policy_mask"] for one in slow])
    weights = np.asarray(window.weights, np.float64)[:, :4]
    entropy = -(weights * np.log(weights)).sum(-1)
    expected = (entropy * running).sum() / running.sum()
    assert found["search_entropy"] == pytest.approx(expected, rel=1e-4)
    whole = [slow_targets(rows[b], value[b, 1:], 0, 0.9, 5)["value"][0] for b in (0, 1, 3)]
    expected = np.mean(np.abs(value[[0, 1, 3], 0] - whole))
    assert found["root_value_error"] == pytest.approx(expected, rel=1e-4)


def test_the_step_size_does_not_end_at_nothing():
    cfg = dataclasses.replace(TINY, learning_rate=1e-2, learning_rate_final=1e-3,
                              decay_updates=100.0, weight_decay=0.0)  # fmt: skip
    params = {"w": jnp.ones(3)}

    def size(number):
        opt = muzero.optimiser(cfg, jnp.int32(number))
        moves, _ = opt.update({"w": jnp.ones(3)}, opt.init(params), params)
        return -float(moves["w"][0])

    for number, expected in ((0, 1e-2), (50, 5.5e-3), (100, 1e-3), (10**8, 1e-3)):
        assert size(number) == pytest.approx(expected, rel=1e-2)


def test_an_update_reports_what_tells_of_a_stall():
    agent = muzero.make(dataclasses.replace(TINY, consistency=True), vector_spec())
    state = jax.eval_shape(agent.init, jax.random.key(0))
    number = jax.ShapeDtypeStruct((), "int32")
    _, metrics = jax.eval_shape(agent.update, state, jax.random.key(0), number, number)
    assert metrics.keys() >= {
        "policy_entropy", "search_entropy", "root_value_error", "policy_agreement", "value_error",
        "value_clipped", "reward_clipped", "age", "grad_norm", "policy_loss", "value_loss",
        "reward_loss", "continues_loss", "consistency_loss",
    }  # fmt: skip
    assert all(x.shape == () for x in metrics.values())


# the schedule


def test_updates_are_counted_by_steps_and_not_by_episodes():
    """As many gradient steps whether all episodes have one step or none ends."""
    spec = vector_spec()
    cfg = dataclasses.replace(TINY, steps_per_update=3, updates=2)
    for limit in (3, 20, 10_000):
        schedule = muzero.make(cfg, vector_spec(episode_limit=limit)).schedule
        assert (schedule.steps_per_update, schedule.warmup_steps) == (3, cfg.warmup_steps)
        assert schedule.reset == "delayed"
    rows = [records(["end"] * 20)[:12], records(["go"] * 20)[:12]]
    for one in (rows[:1] * 2, rows[1:] * 2):
        agent, state, _ = played(cfg, spec, one)
        after, _ = jax.jit(agent.update)(state, jax.random.key(0), jnp.int32(11), jnp.int32(4))
        counts = [x for x in jax.tree.leaves(after.opt) if x.dtype == jnp.int32 and x.ndim == 0]
        assert [int(x) for x in counts] == [2] * len(counts)
        assert counts


def test_an_unroll_longer_than_an_episode_is_refused():
    with pytest.raises(InputError, match=r"unroll = 3: expected at most 2, .* Vector-test"):
        muzero.make(TINY, vector_spec(episode_limit=2))
