"""MBPO: lengths, batches, rounds of rollouts and their truncation."""

import contextlib
import dataclasses
import json
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL
from scipy import stats
from test_fit import selected_in_gradient_steps
from test_pets import batch

from mbrl_jax import AGENTS, InputError, make_env, train
from mbrl_jax.agents import make_agent, mbpo
from mbrl_jax.models import dynamics
from mbrl_jax.runtime.train import Job
from mbrl_jax.types import EnvSpec, Transition

PENDULUM = make_env("Pendulum-v1").spec
POLE = make_env("ContinuousCartPole-v0").spec
FIRST, PERIOD = 16, 8  # of SMALL: the step of the first training, and those between two


def config(**fields):
    return AGENTS["mbpo"].config_for("Pendulum-v1", **{**SMALL["mbpo"], **fields})


def trained(spec=PENDULUM, trainings=1, **fields):
    """States after each training, on random steps; and the agent, whose update is compiled."""
    agent = make_agent("mbpo", spec, config(**fields))
    agent = agent._replace(update=jax.jit(agent.update))
    return after_trainings(agent, spec, trainings, agent.update), agent


def after_trainings(agent, spec, trainings, update):
    last = FIRST + PERIOD * (trainings - 1)
    rows = [batch(spec, 1, t) for t in range(last + 1)]

    @jax.jit
    def observed(state, rows, first):
        def one(i, state):
            return agent.observe(state, jax.tree.map(lambda x: x[i], rows), (), first + i)

        return jax.lax.fori_loop(0, rows.reward.shape[0], one, state)

    state, states, done = jax.jit(agent.init)(jax.random.key(0)), [], 0
    for i in range(trainings):
        t = FIRST + PERIOD * i
        some = jax.tree.map(lambda *x: np.stack(x), *rows[done : t + 1])
        n = jnp.int32(PERIOD * i)
        state, _ = update(observed(state, some, done), jax.random.key(i), jnp.int32(t), n)
        states.append(state)
        done = t + 1
    return states


@pytest.fixture(scope="module")
def plain():
    """Four trainings with the fields of SMALL."""
    return trained(trainings=4)


def unpacked(state, spec=PENDULUM):
    layout = mbpo.ring.make(mbpo.Transition.example(spec), 1).layout
    return Transition(*map(np.asarray, layout.unpack(state.imagined.rows)))


def test_imagined_rows_are_drawn_uniformly_over_all_rounds():
    counts, capacity = jnp.array([3, 0, 5]), 8
    rows = np.asarray(mbpo.sample_imagined(jax.random.key(0), 16_000, counts, capacity))
    expected = [0, 1, 2, 16, 17, 18, 19, 20]
    assert sorted(set(rows.tolist())) == expected
    assert stats.chisquare(np.bincount(rows)[expected]).pvalue > 1e-3
    nothing = mbpo.sample_imagined(jax.random.key(0), 5, jnp.array([0, 0]), capacity)
    assert ((nothing >= 0) & (nothing < 16)).all()


@pytest.mark.parametrize(("ratio", "num_real"), [(0.05, 12), (0.0, 0), (1.0, 256), (0.5, 128)])
def test_each_batch_has_the_same_share_of_real_rows(ratio, num_real):
    """Janner et al. take floor(0.05 * 256) = 12."""
    real, dreamt = (Transition(*[jnp.full((512, 2), x)] * 6) for x in (1.0, 0.0))
    got = mbpo.mixed(real, dreamt, ratio, 256)
    assert got.obs.shape == (2, 256, 2)
    assert got.reward[..., 0].sum(1).tolist() == [num_real] * 2


def test_rounds_of_rollouts_start_at_real_states_and_the_oldest_goes(plain):
    states, _ = plain
    num = 2 * PERIOD  # rollouts of a round
    capacity = 2 * num
    assert [state.imagined.counts.tolist() for state in states] == [
        [num, 0], [num, num], [num, num], [num, num],
    ]  # fmt: skip
    real = np.concatenate([batch(PENDULUM, 1, t).obs for t in range(FIRST + 1)])
    first = unpacked(states[0])
    starts = first.obs[:num]
    assert (np.abs(starts[:, None] - real[None]).max(-1).min(1) < 1e-6).all()
    assert not first.obs[num:].any()
    assert not first.terminated.any()
    low, high = map(np.asarray, dynamics.obs_limits(states[0].params.scaling, 1.0))
    inside = (first.next_obs[:num] >= low - 1e-5) & (first.next_obs[:num] <= high + 1e-5)
    assert inside.all()
    for i, slot in ((1, 1), (2, 0), (3, 1)):  # which round was replaced
        before, after = unpacked(states[i - 1]).obs, unpacked(states[i]).obs
        for j in range(2):
            rows = slice(j * capacity, j * capacity + num)
            assert np.array_equal(before[rows], after[rows]) == (j != slot)


@pytest.fixture(scope="module")
def by_threshold():
    """States after so many trainings, of rollouts that grow and end at a threshold."""
    fields = {"truncation": "threshold", "score": "std", "rollout_growth": (10, 20)}
    cfg = config(rollout_length=(1, 3), **fields)

    def agent(threshold):
        return make_agent("mbpo", PENDULUM, dataclasses.replace(cfg, threshold=threshold))

    update = jax.jit(lambda threshold, *args: agent(threshold).update(*args))

    def states(trainings, threshold):
        known = partial(update, np.float32(threshold))
        return after_trainings(agent(threshold), PENDULUM, trainings, known)

    return states


def test_the_length_of_rollouts_grows_with_the_steps_after_the_warm_up(by_threshold):
    """Janner et al. count epochs from the end of the random steps."""
    states = by_threshold(4, 1e9)
    # 0, 8, 16 and 24 steps after the warm-up
    lengths = [float(state.report["rollout_limit"]) for state in states]
    assert lengths == [1, 1, 1 + (16 - 10) * 2 // 10, 3]
    cfg = config(num_envs=4, rollout_growth=(1_000, 10**9))
    for n, steps in ((0, 0), (7, 28), (10**8, 4 * 10**8), (2**31 - 1, 10**9 + 4)):
        assert mbpo.scheduled_steps(cfg, jnp.int32(n)) == steps, "without overflow"


def test_what_is_stored_is_what_the_known_functions_say_of_it():
    """Predictions of a model that has seen little leave the range of its data and are clipped."""
    spec = EnvSpec(
        "line", (2,), "float32", 99, action_low=(-1.0,), action_high=(1.0,),
        reward_fn=lambda obs, action, next_obs: next_obs[..., 0] - next_obs[..., 1],
        termination_fn=lambda obs, action, next_obs: jnp.abs(next_obs[..., 0]) > 1.05,
    )  # fmt: skip
    known = {"hidden": (8,), "weight_decay": (0.0,), "reward": "known", "termination": "known"}
    (state,), _ = trained(spec, rollout_length=(5, 5), clip_margin=0.1, model=known)
    rows = unpacked(state, spec)
    rows = jax.tree.map(lambda x: x[: int(state.imagined.counts[0])], rows)
    low, high = map(np.asarray, dynamics.obs_limits(state.params.scaling, 0.1))
    clipped = (np.isclose(rows.next_obs, low) | np.isclose(rows.next_obs, high)).any(axis=1)
    assert clipped.sum() > 5
    reward = rows.next_obs[:, 0] - rows.next_obs[:, 1]
    np.testing.assert_allclose(rows.reward, reward, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rows.terminated, np.abs(rows.next_obs[:, 0]) > 1.05)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_batch_is_made_of_stored_rows_in_units_of_the_learner(plain, ratio):
    state = plain[0][0]
    cfg, t = config(real_ratio=ratio), jnp.int32(FIRST)
    drawn = jax.jit(lambda *x: mbpo.batches(cfg, PENDULUM, *x))(state, jax.random.key(3), t)
    got = jax.tree.map(np.asarray, drawn)
    assert got.obs.shape == (cfg.updates, cfg.batch_size, 3)
    assert np.abs(got.action).max() <= 1.0
    num_real = int(cfg.batch_size * ratio)
    real = np.concatenate([batch(PENDULUM, 1, t).obs for t in range(FIRST + 1)])
    imagined = unpacked(state)
    imagined = jax.tree.map(lambda x: x[: int(state.imagined.counts[0])], imagined)
    for rows in got.next_obs[:, num_real:]:
        found = np.abs(np.asarray(rows)[:, None] - imagined.next_obs[None]).max(-1) < 1e-6
        assert found.any(axis=1).all()
    for rows in got.obs[:, :num_real]:
        found = np.abs(np.asarray(rows)[:, None] - real[None]).max(-1) < 1e-6
        assert found.any(axis=1).all()
    assert (got.discount == np.float32(cfg.sac.gamma)).all(), "Pendulum has no end"


def test_training_of_four_vmapped_seeds_selects_no_parameters():
    cfg = config(model={"hidden": (13, 11), "weight_decay": (1e-5,)}, training={"batch_size": 7})
    agent = make_agent("mbpo", PENDULUM, cfg)
    keys = jax.random.split(jax.random.key(0), 4)
    states = jax.eval_shape(jax.vmap(agent.init), keys)
    update = jax.vmap(agent.update, (0, 0, None, None))
    jaxpr = jax.make_jaxpr(update)(states, keys, jnp.int32(FIRST), jnp.int32(0)).jaxpr
    assert selected_in_gradient_steps(jaxpr, states.params.net) == (1, [])


def test_between_trainings_the_model_stays_and_the_policy_learns(plain):
    (state, *_), agent = plain
    state = jax.jit(agent.observe)(state, batch(PENDULUM, 1, 99), (), jnp.int32(FIRST + 1))
    after, metrics = agent.update(state, jax.random.key(1), jnp.int32(FIRST + 1), jnp.int32(1))
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, after.imagined, state.imagined)
    assert metrics["holdout_error"] == state.report["holdout_error"]
    pair = zip(*(jax.tree.leaves(s.learner.params.actor) for s in (state, after)), strict=True)
    assert max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in pair) > 0


def test_a_threshold_that_truncates_everything_leaves_real_batches(by_threshold):
    (state,) = by_threshold(1, 1e-12)
    assert state.imagined.counts.tolist() == [0, 0]
    assert state.report["rollout_steps"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.learner))


def test_macura_and_m2ac_keep_what_their_papers_keep():
    (state, later), _ = trained(trainings=2, truncation="macura", macura_percentile=50.0,
                                macura_factor=1.0, rollout_length=(4, 4))  # fmt: skip
    # at the first depth the median cuts half of the rollouts
    assert 0 < state.imagined.counts[0] <= 4 * PERIOD
    assert (state.memory.added, later.memory.added) == (1, 2)
    assert state.memory.values[0] > 0
    (state,), _ = trained(truncation="m2ac", rollout_length=(4, 4))
    shares = [(4 - i) / (2 * (4 + 1)) for i in range(4)]
    assert state.imagined.counts[0] == sum(np.ceil(share * 2 * PERIOD) for share in shares)


def test_the_measured_error_of_a_model_that_knows_nothing_gives_the_shortest_rollouts():
    def agent(limit):
        return make_agent("mbpo", PENDULUM, dataclasses.replace(cfg, error_limit=limit))

    cfg = config(length_by="error", rollout_length=(1, 3))
    update = jax.jit(lambda limit, *args: agent(limit).update(*args))
    for limit, length in ((1e-3, 1), (1e9, 3)):
        known = partial(update, np.float32(limit))
        (state,) = after_trainings(agent(limit), PENDULUM, 1, known)
        assert state.report["rollout_limit"] == length


def test_an_unknown_termination_is_learned_and_said():
    spec = EnvSpec("mine", (3,), "float32", 99, action_low=(-1.0,), action_high=(1.0,))
    with pytest.warns(UserWarning, match="mine has no known termination function; MBPO learns it"):
        (state,), _ = trained(spec, real_ratio=0.5)
    assert state.imagined.counts[0] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.learner, state.report)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_agent("mbpo", POLE, config())
        make_agent("mbpo", spec, config(model={**SMALL["mbpo"]["model"], "termination": "never"}))


@pytest.mark.parametrize("known", [True, False])
def test_a_run_folder_records_the_termination_that_was_used(known, tmp_path, monkeypatch):
    """It does so before anything is compiled, where this ends."""

    class Compiled(Exception):
        pass

    def functions(job):
        raise Compiled

    monkeypatch.setattr(Job, "functions", functions)
    env = make_env("ContinuousCartPole-v0")
    if not known:
        env = dataclasses.replace(env, spec=dataclasses.replace(env.spec, termination_fn=None))
    said = contextlib.nullcontext()
    if not known:
        said = pytest.warns(UserWarning, match="has no known termination function; MBPO learns it")
    with said, pytest.raises(Compiled):
        train("mbpo", env, 20, out=tmp_path / "run", eval_episodes=1, eval_max_steps=3,
              **SMALL["mbpo"])  # fmt: skip
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["run"]["config"]
    assert recorded["model"]["termination"] == ("known" if known else "learned")


def test_what_mbpo_cannot_do_is_refused():
    discrete = make_env("CartPole-v1").spec
    cases = [
        (discrete, {}, "SAC needs continuous actions; CartPole-v1 has 2 discrete ones"),
        (PENDULUM, {"rollout_length": (5, 1)}, r"rollout_length = \(5, 1\): expected two numbers"),
        (PENDULUM, {"rollout_growth": (9, 1)}, r"rollout_growth = \(9, 1\): expected two numbers"),
        (PENDULUM, {"rollout_length": (1,)}, r"rollout_length = \(1,\): expected two numbers"),
        (PENDULUM, {"real_ratio": 1.5}, r"real_ratio = 1.5: expected a value in \[0, 1\]"),
        (PENDULUM, {"warmup_steps": 4}, "warmup_steps = 4: too few for a holdout of 0.2"),
        (PENDULUM, {"num_elites": 3}, "num_elites = 3: expected 1 to num_members = 2"),
        (PENDULUM, {"length_by": "error", "rollout_length": (1, 9)}, "at most 8, the steps"),
        (
            PENDULUM,
            {
                "truncation": "macura",
                "model": {"hidden": (8,), "weight_decay": (0.0,), "probabilistic": False},
            },
            "score = 'jensen_shannon': expected model.probabilistic = True",
        ),
    ]  # fmt: skip
    for spec, fields, said in cases:
        with pytest.raises(InputError, match=said):
            make_agent("mbpo", spec, config(**fields))


def test_rollouts_that_do_not_fit_are_refused_with_their_bytes(tmp_path):
    fields = {**SMALL["mbpo"], "retained": 10**8}
    with pytest.raises(InputError, match=r"takes [\d.]+ GiB \(.*imagined.* GiB a seed\), expected"):
        train("mbpo", "Pendulum-v1", 64, 2, out=tmp_path / "run", **fields)
    assert not (tmp_path / "run").exists()


def test_the_memory_of_a_seed_is_that_of_its_rows():
    cfg = config(rollouts_per_step=50, buffer_size=5_000)
    state = jax.eval_shape(make_agent("mbpo", PENDULUM, cfg).init, jax.random.key(0))
    row = 4 * (2 * 3 + 1 + 1) + 2  # two observations, action, reward, two flags
    found = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.imagined.rows))
    # retained trainings x rollouts a step x steps between trainings x longest rollout
    assert found == 2 * 50 * PERIOD * 2 * row
    found = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.replay))
    assert found == 5_000 * row


def test_presets_hold_for_the_environments_there_are():
    for env_id in mbpo.PRESETS:
        cfg = AGENTS["mbpo"].config_for(env_id)
        if not env_id.endswith(("-v5",)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make_agent("mbpo", make_env(env_id).spec, cfg)
