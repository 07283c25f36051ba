"""Rules of rollouts: what is cut, what is kept, and how long a rollout is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl_jax.data import ring
from mbrl_jax.models import rollout, rollout_rules
from mbrl_jax.models.dynamics import DynamicsModel, Prediction
from mbrl_jax.models.rollout_rules import Config, Lengths, make_rules
from mbrl_jax.types import EnvSpec, InputError, Transition

SPEC = EnvSpec("walk", (2,), "float32", 9, action_low=(-1.0,), action_high=(1.0,))
LENGTHS = Lengths((1, 15), (20_000, 150_000), 20)


def walk(drift, obs, action, key):
    """s' = s + a + drift; |s| is the disagreement."""
    next_obs = obs + action + drift
    return Prediction(next_obs, next_obs[:, 0], next_obs[:, 0] > 3.0, jnp.abs(obs[:, 0]))


WALK = DynamicsModel(walk)
REPLAY = ring.make(Transition.example(SPEC), 60, 3)


def rolled(config, starts, memory=None, length=4):
    """A rollout under the rules of `config` from [B] first coordinates: mask and reward [T, B],
    and the memory after it."""
    made = make_rules(config, LENGTHS, WALK, REPLAY)
    memory = made.init() if memory is None else memory
    obs = jnp.stack([jnp.float32(starts), jnp.zeros(len(starts))], axis=-1)

    def write(carry, depth, row, score, mask):
        memory, masks, rewards = carry
        memory = made.remember(memory, depth, score)
        return memory, masks.at[depth].set(mask), rewards.at[depth].set(row.reward)

    empty = jnp.zeros((length, len(starts)))
    (memory, mask, reward), _ = rollout.unroll(
        WALK, 0.0, obs, lambda obs, key, depth: jnp.full((len(starts), 1), 0.5),
        jax.random.key(0), length, write, (memory, empty > 0, empty),
        made.rules(memory, jnp.int32(length)),
    )  # fmt: skip
    return np.asarray(mask), np.asarray(reward), memory


def test_without_a_rule_the_model_gives_no_score_and_everything_counts():
    made = make_rules(Config(), LENGTHS, WALK, REPLAY)
    assert made.score == "none"
    assert made.init() == ()
    mask, _, memory = rolled(Config(), [-9.0, -5.0, 0.0])
    assert mask.all()
    assert memory == ()


def test_a_threshold_cuts_before_the_uncertain_transition():
    config = Config(truncation="threshold", score="std", threshold=1.2)
    assert make_rules(config, LENGTHS, WALK, REPLAY).score == "std"
    mask, _, _ = rolled(config, [-1.0, 0.5, -3.0])
    assert mask.T.tolist() == [[True] * 4, [True, True, False, False], [False] * 4]


def test_macura_cuts_at_the_mean_of_percentiles_of_first_scores():
    config = Config(truncation="macura", macura_factor=1.5, macura_percentile=50.0)
    first = [-1.0, -0.5, 0.0, 0.5, 1.4]
    mask, _, memory = rolled(config, first)
    assert int(memory.added) == 1, "only the first depth adds to the history"
    assert float(memory.values[0]) == pytest.approx(0.75)
    x = np.float32(first)
    alive = np.ones(5, bool)
    for depth in range(4):
        alive &= np.abs(x + 0.5 * depth) < 0.75
        assert mask[depth].tolist() == alive.tolist()
    second = [-3.0, -3.0, -1.2, -3.0]
    mask, _, memory = rolled(config, second, memory)
    assert float(memory.values[1]) == pytest.approx(4.5)
    # the mean of 0.75 and 4.5 is the threshold
    assert mask[0].tolist() == [False, False, True, False]


def test_macuras_history_is_a_ring():
    history, seen = rollout_rules.empty_history(3), []
    rng = np.random.default_rng(0)
    for _ in range(5):
        scores = np.float32(rng.uniform(size=20))
        seen.append(2.0 * np.percentile(scores, 95))
        kappa, history = rollout_rules.macura_threshold(history, jnp.array(scores), 2.0, 95.0)
        assert float(kappa) == pytest.approx(np.mean(seen[-3:]), rel=1e-5)


def test_m2ac_keeps_a_falling_share_and_lowers_uncertain_rewards():
    config = Config(truncation="m2ac", m2ac_penalty=0.1)
    starts = np.float32(np.linspace(-9.0, -2.0, 20))
    mask, reward, _ = rolled(config, starts)
    for depth in range(4):
        share = (4 - depth) / (2 * 5)
        order = np.argsort(np.abs(starts + 0.5 * depth), kind="stable")
        assert sorted(np.flatnonzero(mask[depth])) == sorted(order[: int(np.ceil(20 * share))])
        now = starts + 0.5 * depth
        np.testing.assert_allclose(reward[depth], now + 0.5 - 0.1 * np.abs(now), rtol=1e-5)
    shares = [float(rollout_rules.m2ac_share(jnp.int32(i), 10)) for i in (0, 4, 9)]
    np.testing.assert_allclose(shares, [10 / 22, 6 / 22, 1 / 22], rtol=1e-6)


def test_the_scheduled_length_is_that_of_the_paper():
    """Its code: k0 + (k1 - k0) (epoch - e0) / (e1 - e0), cut to its ends and rounded down."""
    bounds, growth = LENGTHS[:2]
    made = make_rules(Config(), LENGTHS, WALK, REPLAY)
    for steps in (0, 1, 19_999, 20_000, 29_285, 29_286, 90_000, 149_999, 150_000, 2**31 - 1):
        share = min(max((steps - growth[0]) / (growth[1] - growth[0]), 0), 1)
        expected = int(np.floor(1 + share * 14))
        assert rollout_rules.scheduled_length(bounds, growth, jnp.int32(steps)) == expected
        assert made.length(0.0, {}, jax.random.key(0), jnp.int32(3), jnp.int32(steps)) == expected
    assert rollout_rules.scheduled_length((3, 3), (5, 5), jnp.int32(7)) == 3
    # products beyond int32
    for steps in (0, 10**9, 2 * 10**9, 2**31 - 1):
        got = rollout_rules.scheduled_length((1, 25), (0, 2 * 10**9), jnp.int32(steps))
        assert got == 1 + min(steps * 24 // (2 * 10**9), 24)


def test_the_measured_length_ends_before_the_first_large_error():
    errors = jnp.array([0.1, 0.15, 0.3, 0.1])
    assert rollout_rules.length_of_small_error(errors, 0.2, 1) == 2
    assert rollout_rules.length_of_small_error(errors, 0.05, 1) == 1
    assert rollout_rules.length_of_small_error(errors, 1.0, 1) == 4
    assert rollout_rules.length_of_small_error(jnp.array([jnp.inf, 0.0]), 1.0, 1) == 1
    assert rollout_rules.length_of_small_error(jnp.array([jnp.nan, 0.0]), 1.0, 1) == 1


@pytest.mark.parametrize("steps", [13, 20, 47])
def test_fresh_errors_are_those_of_a_biased_model_over_the_newest_windows(steps):
    """The ring holds 20 batched steps of 3 environments; the true walk has no drift."""
    rows, rng = REPLAY.init(), np.random.default_rng(0)
    obs, kept = np.float32(rng.normal(size=(3, 2))), []
    for t in range(steps):
        action = np.float32(rng.uniform(-1, 1, size=(3, 1)))
        after = obs + action
        cut = np.full(3, t % 7 == 6)
        row = Transition(obs, action, after[:, 0], after, np.zeros(3, bool), cut)
        rows = REPLAY.add(rows, jax.tree.map(jnp.asarray, row), jnp.int32(t))
        kept.append(obs)
        obs = np.float32(rng.normal(size=(3, 2))) if cut[0] else after
    got = rollout_rules.fresh_errors(
        WALK, jnp.array([[0.1, -0.2]]), REPLAY, rows, jax.random.key(0), jnp.int32(steps - 1), 3, 9
    )
    spread = np.concatenate(kept[-20:]).var(0)
    square = np.square([0.1, -0.2]) / spread
    expected = [np.sqrt(np.mean(k**2 * square)) for k in (1, 2, 3)]
    np.testing.assert_allclose(got, expected, rtol=1e-3)
    for limit, length in ((expected[0] * 0.9, 1), (expected[1] * 1.1, 2), (expected[2] * 1.1, 3)):
        made = make_rules(
            Config(length_by="error", error_limit=float(limit)), Lengths((1, 3), (0, 1), 9), WALK,
            REPLAY,
        )  # fmt: skip
        drift, key = jnp.array([[0.1, -0.2]]), jax.random.key(1)
        assert made.length(drift, rows, key, jnp.int32(steps - 1), jnp.int32(0)) == length


def test_a_length_that_no_fresh_step_can_show_is_refused():
    with pytest.raises(InputError, match="a rollout length of 15 where the error decides: expecte"):
        make_rules(Config(length_by="error"), LENGTHS._replace(fresh=14), WALK, REPLAY)
