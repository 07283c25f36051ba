"""The contract between loop and agent: modes, prefill, dicts of observations, masks, evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from helpers import assert_same, train_until
from scipy import stats
from toys import ACTIONS, CELLS, LIMIT, TOY, judge

from mbrl_jax import AGENTS, InputError, make_agent, make_env, make_train, train
from mbrl_jax.envs.env import reset_batch, step_batch
from mbrl_jax.nn.networks import Torso
from mbrl_jax.runtime.plan import make_plan
from mbrl_jax.types import ArraySpec, EnvSpec, Schedule, Step, Transition, env_steps, nth_legal

RUN = {"total_steps": 61, "eval_every": 16, "eval_episodes": 0, "evaluate": judge}


@pytest.fixture(scope="module")
def doors():
    return toys.make(toys.Doors)


@pytest.fixture(scope="module")
def whole(doors):
    """The toy's uncut run of three seeds, vmapped."""
    keys = jax.random.split(jax.random.key(0), 3)
    return jax.jit(jax.vmap(make_train(TOY, doors, **RUN)))(keys)


def test_a_dict_of_observations_is_described_and_cast(doors):
    assert doors.spec.obs_parts == (
        ("action_mask", ArraySpec((ACTIONS,), "bool")), ("place", ArraySpec((CELLS,), "float32")),
    )  # fmt: skip
    assert (doors.spec.obs_shape, doors.spec.obs_dtype, doors.spec.num_players) == ((), "dict", 1)
    plain = toys.make(toys.Plain).spec
    assert dict(plain.obs_parts)["place"] == ArraySpec((), "int32", CELLS)
    pieces = toys.make(toys.Pieces).spec
    assert pieces.num_players == 2
    assert dict(pieces.obs_parts)["to_play"] == ArraySpec((), "int32", 2)
    _, obs = doors.reset(jax.random.key(0))
    like = doors.spec.example_obs()
    assert {k: (x.shape, x.dtype) for k, x in obs.items()} == {
        k: (x.shape, x.dtype) for k, x in like.items()
    }
    one = EnvSpec("one", (3,), "float32", 9).example_obs(5)
    assert (one.shape, one.dtype) == ((5, 3), np.float32)


class Nested(toys.Doors):
    def get_obs(self, state):
        return {"in": super().get_obs(state)}

    def observation_space(self, params):
        return toys.spaces.Dict({"in": super().observation_space(params)})


class Other(toys.Doors):
    def get_obs(self, state):
        return {"elsewhere": jnp.zeros(2)}


class Narrow(toys.Doors):
    def get_obs(self, state):
        return {**super().get_obs(state), "action_mask": jnp.ones(ACTIONS + 1, bool)}


class Turns(toys.Pieces):
    def get_obs(self, state):
        return {**super().get_obs(state), "to_play": jnp.zeros(2, jnp.int32)}


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (Nested, "'in' is no array; expected a flat dict"),
        (Other, r"a reset gives \['elsewhere'\], its observation space has \['action_mask', "),
        (Narrow, r"action_mask has shape \(4,\): expected discrete actions and one entry"),
        (Turns, r"to_play has shape \(2,\): expected one number"),
    ],
)
def test_a_dict_that_cannot_be_served_is_refused_in_one_line(factory, said):
    with pytest.raises(InputError, match=said):
        toys.make(factory)


def test_true_successors_pass_through_resets_as_dicts(doors):
    batch = reset_batch(doors, jax.random.key(0), 4)
    step_all = jax.jit(step_batch)
    seen = []
    for i in range(3 * LIMIT):
        action = doors.spec.random_actions(jax.random.key(i), batch.obs)
        after, step = step_all(doors, jax.random.key(100 + i), batch, action)
        assert isinstance(step, Step)
        for row in range(4):
            place = int(np.argmax(step.obs["place"][row]))
            there = (place + int(action[row]) + 1) % CELLS
            assert int(np.argmax(step.next_obs["place"][row])) == there
            assert int(action[row]) != place, "a random action is legal"
        assert not step.is_last.any()
        seen.append(np.asarray(step.terminated | step.truncated))
        batch = after
    assert np.any(seen)


@pytest.mark.parametrize("mask", [[True, False, True], [False, True, False], [True] * 3])
def test_random_actions_are_uniform_over_the_legal_ones(doors, mask):
    num = 6_000
    obs = {"place": jnp.zeros((num, CELLS)), "action_mask": jnp.tile(jnp.array(mask), (num, 1))}
    drawn = np.asarray(jax.jit(doors.spec.random_actions)(jax.random.key(0), obs))
    counts = np.bincount(drawn, minlength=ACTIONS)
    assert counts[~np.array(mask)].sum() == 0
    if sum(mask) > 1:
        assert stats.chisquare(counts[mask]).pvalue > 1e-4
    nothing = obs | {"action_mask": jnp.zeros((num, ACTIONS), bool)}
    assert (doors.spec.random_actions(jax.random.key(0), nothing) == 0).all()


def test_the_nth_legal_action():
    legal = jnp.array([[True, False, True, True], [False, False, True, False]])
    assert nth_legal(legal, jnp.array([2, 0])).tolist() == [3, 2]
    assert nth_legal(legal, jnp.array([3, 1])).tolist() == [0, 0], "so many are not legal"


def test_modes_prefill_and_updates_are_counted(whole):
    state, history = whole
    # 6 steps of warm-up and 7 of prefill are 3 and 4 batched ones of two environments; 48 are left,
    # 3 periods of 4 updates after every second step
    modes = [0] * 3 + [1] * (4 + 24)
    for log in range(3):
        mode = np.asarray(state["log"]["mode"][log])
        assert mode[:31].tolist() == modes
        assert (mode[31:] == -1).all()
        update = np.asarray(state["log"]["update"][log])
        assert update[8:31:2].tolist() == list(range(12)), "numbered over the periods"
        assert (np.delete(update, np.arange(8, 31, 2)) == -1).all()
    assert history["env_steps"][0].tolist() == [30, 46, 62]
    np.testing.assert_allclose(history["update"][0], [1.5, 5.5, 9.5])


def test_only_legal_actions_are_taken_and_the_last_record_is_told(whole):
    log = jax.tree.map(lambda x: np.asarray(x)[:, :31], whole[0]["log"])
    assert (log["legal"] | log["last"]).all()
    last, first = log["last"], log["first"]
    assert last.any()
    np.testing.assert_array_equal(first[:, 1:], last[:, :-1])
    assert not (first & last).any()


def test_an_evaluation_of_ones_own_takes_the_place_of_episodes(whole):
    _, history = whole
    assert history["asked_at"][0].tolist() == [15.0, 23.0, 31.0]
    assert (history["all_legal"] == 1).all()
    assert (history["asked_in"] == 2).all()
    assert "eval_length" not in history
    np.testing.assert_array_equal(history["eval_return"][:, -1], whole[0]["mean"])


def test_values_and_priorities_are_written_back(whole):
    rows = whole[0]["rows"]
    # a value that was never written back is a memory count plus an old mean: more than 1 at least
    assert np.isfinite(rows["float32"]).all()
    values = np.asarray(whole[0]["priorities"].levels[0]).reshape(3, -1)
    assert len(np.unique(values)) > 3, "priorities of their own"


def test_chunks_resume_and_seeds_give_the_same_bits(doors, whole, tmp_path):
    state, history = whole
    fields = {"seeds": 3, "seed_mode": "vmap", **RUN}
    ran = train(TOY, doors, **fields)
    assert_same(ran.state, state)
    for name in ("asked_at", "eval_return", "error", "update"):
        np.testing.assert_array_equal(ran.history[name], history[name])
    train_until(2, TOY, doors, out=tmp_path / "run", **fields)
    resumed = train(TOY, doors, out=tmp_path / "run", resume=True, **fields)
    assert_same(resumed.state, state)
    one_by_one = train(TOY, doors, **fields | {"seed_mode": "map"})
    assert_same(one_by_one.state, state)


def test_an_evaluation_of_ones_own_is_named_in_the_run(doors, tmp_path):
    train(TOY, doors, out=tmp_path / "run", **RUN)
    with pytest.raises(InputError, match="evaluate"):
        train(TOY, doors, out=tmp_path / "run", resume=True, **RUN | {"evaluate": None})


@pytest.mark.parametrize(
    ("name", "world", "said"),
    [
        ("dyna_q", toys.Doors, "a tabular agent cannot use 'action_mask'"),
        ("dyna_q", toys.Plain, "a tabular agent needs one array .*clock, place"),
        ("dqn", toys.Pieces, "DQN plays alone; Pieces-test has 2 players"),
        ("ppo", toys.Pieces, "PPO plays alone"),
        ("pets", toys.Plain, "PETS needs one array"),
    ],
)
def test_an_agent_that_cannot_use_an_observation_refuses(name, world, said):
    with pytest.raises(InputError, match=said):
        make_agent(name, toys.make(world).spec)


@pytest.mark.parametrize(("name", "named"), [("sac", "SAC"), ("mbpo", "MBPO"), ("pets", "PETS")])
def test_continuous_agents_refuse_dicts_that_they_cannot_use(name, named):
    parts = (("action_mask", ArraySpec((2,), "bool")), ("place", ArraySpec((3,), "float32")))
    spec = EnvSpec("odd", (), "dict", 9, action_low=(-1.0,), action_high=(1.0,), obs_parts=parts)
    with pytest.raises(InputError, match=f"{named} cannot use 'action_mask'"):
        make_agent(name, spec)


def test_features_of_a_dict_stand_side_by_side_without_the_reserved_ones():
    spec = toys.make(toys.Pieces).spec
    obs = {
        "place": jnp.eye(CELLS)[:2], "action_mask": jnp.ones((2, ACTIONS), bool),
        "to_play": jnp.zeros(2, jnp.int32),
    }  # fmt: skip
    net = Torso(spec)
    features = net.apply(net.init(jax.random.key(0), obs), obs)
    np.testing.assert_array_equal(features, np.eye(CELLS)[:2])
    spec = toys.make(toys.Plain).spec
    obs = {"place": jnp.array([2, 0]), "clock": jnp.array([[3.0], [4.0]])}
    net = Torso(spec)
    features = net.apply(net.init(jax.random.key(0), obs), obs)
    np.testing.assert_array_equal(features, [[3, 0, 0, 1, 0], [4, 1, 0, 0, 0]])


DEEP = {
    "dqn": {"hidden": (16,), "num_envs": 4, "warmup_steps": 64, "buffer_size": 4_000,
            "learning_rate": 3e-3, "steps_per_update": 1, "epsilon_steps": 2_000.0,
            "target_period": 1, "tau": 0.05},
    "ppo": {"hidden": (16,), "num_envs": 8, "num_steps": 16, "learning_rate": 3e-3},
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
def test_agents_learn_with_masks_and_never_break_them(name):
    """Action 2 in cell 1 and the like: the best legal way comes to cell 0 at every second step."""
    env = toys.make(toys.Doors)
    cfg = AGENTS[name].config_for(env.spec, **DEEP[name])
    history = jax.jit(make_train(name, env, 6_000, eval_every=2_000, eval_episodes=32))(
        jax.random.key(1), cfg
    )[1]
    # a shut action costs 100, and no period sums up to less than nothing
    assert (history["train_reward"] > 0).all()
    assert history["eval_return"][-1] > 1.5


def test_masked_targets_take_the_best_legal_action():
    from mbrl_jax.agents import dqn

    legal = jnp.array([[True, False, True], [False, False, False]])
    q = jnp.array([[1.0, 9.0, 2.0], [3.0, 4.0, 5.0]])
    assert dqn.greedy_actions(q, legal).tolist() == [2, 0]
    target = dqn.q_target(jnp.zeros(2), jnp.array([0.5, 0.0]), q, q, legal)
    assert target.tolist() == [1.0, 0.0]
    assert dqn.greedy_actions(q).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("total", "every", "periods", "taken"),
    [(10_000, 9_000, 2, 10_000), (10_000, 10_000, 1, 10_000), (10_001, 5_000, 3, 10_002),
     (100, None, 20, 100), (30, 100, 1, 30), (100, 7, 15, 105)],
)  # fmt: skip
def test_a_budget_is_overshot_by_less_than_an_update_a_period(total, every, periods, taken):
    plan = make_plan("any", Schedule(), total, every)
    assert (plan.periods, plan.env_steps(plan.periods - 1)) == (periods, taken)
    plan = make_plan("any", Schedule(4, 10, 8, prefill_steps=9), total + 1_000, every)
    over = plan.env_steps(plan.periods - 1) - total - 1_000
    assert 0 <= over < plan.periods * 32
    assert plan.start == 3 + 3


def test_environment_steps_beyond_int32_are_counted():
    assert env_steps(jnp.int32(2**31 - 1), 64) == pytest.approx(64 * 2.0**31, rel=1e-6)
    plan = make_plan("any", Schedule(64, 0, 128), 5_000_000_000, 500_000_000)
    assert plan.env_steps(plan.periods - 1) >= 5_000_000_000
    with pytest.raises(InputError, match="batched steps fit"):
        make_plan("any", Schedule(1), 5_000_000_000, 500_000_000)


@pytest.mark.parametrize("name", ["dqn", "ppo"])
def test_schedules_go_on_beyond_2_to_the_31_environment_steps(name):
    """64 environments after 5e9 steps: epsilon and the step size have long arrived."""
    spec = make_env("CartPole-v1").spec
    late = jnp.int32(5_000_000_000 // 64)
    if name == "dqn":
        from mbrl_jax.agents import dqn

        cfg = AGENTS["dqn"].config_for(spec, num_envs=64, buffer_size=6_400)
        assert dqn.epsilon(cfg, late) == pytest.approx(cfg.epsilon_final)
        return
    from mbrl_jax.agents import ppo

    cfg = AGENTS["ppo"].config_for(spec, num_envs=64, anneal_steps=1e6)
    grads = {"w": jnp.ones(3)}
    optimise = ppo.optimiser(cfg, env_steps(late, 64))
    moves, _ = optimise.update(grads, optimise.init(grads), grads)
    np.testing.assert_array_equal(moves["w"], 0.0)


MODES = [
    ("dyna_q", "FrozenLake-misc", {}),
    ("dqn", "CartPole-v1", {"hidden": (8,)}),
    ("ppo", "CartPole-v1", {"hidden": (8,)}),
    ("ppo", "Pendulum-v1", {"hidden": (8,)}),
    ("sac", "Pendulum-v1", {"hidden": (8,), "critic_hidden": (8,)}),
    ("pets", "Pendulum-v1", {}),
    ("mbpo", "Pendulum-v1", {}),
    ("dreamer", "CartPole-v1", {"size": "nano"}),
    ("dreamer", "Pendulum-v1", {"size": "nano"}),
]


@pytest.mark.parametrize(("name", "world", "fields"), MODES, ids=str)
def test_random_mode_is_uniform_and_calls_no_network(name, world, fields):
    """Memory and extras belong to the action: the log-probability is that of a uniform draw.

    Dreamer's networks are called, since its records hold the latents of random steps too.
    """
    spec = make_env(world).spec
    agent = make_agent(name, spec, AGENTS[name].config_for(spec, **fields))
    state = jax.eval_shape(agent.init, jax.random.key(0))
    num = 2_000
    obs, first = spec.zero_obs(num), jnp.zeros(num, bool)
    memory = agent.init_memory(num)

    def act(key, state, t):
        return agent.act(state, memory, obs, first, key, t, "random")

    key, now = jax.random.key(3), jnp.int32(7)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    program = str(jax.make_jaxpr(act)(key, zeros, now))
    assert ("dot_general" in program) == (name == "dreamer")
    action, after, extras = jax.jit(act)(key, zeros, now)
    assert jax.tree.structure(after) == jax.tree.structure(memory)
    if spec.discrete:
        assert action.dtype == jnp.int32
        assert stats.chisquare(np.bincount(action, minlength=spec.num_actions)).pvalue > 1e-4
    else:
        low, high = spec.action_low[0], spec.action_high[0]
        assert stats.kstest(np.asarray(action)[:, 0], "uniform", (low, high - low)).pvalue > 1e-4
    if name == "ppo":
        choices = spec.num_actions or 2.0 ** len(spec.action_low)
        np.testing.assert_allclose(extras, -np.log(choices), rtol=1e-6)
        assert extras.shape == (num,)
    if name == "dreamer":
        done = jax.nn.one_hot(action, spec.num_actions) if spec.discrete else spec.to_unit(action)
        np.testing.assert_array_equal(after.action, done)
        np.testing.assert_array_equal(extras["deter"], after.latent.deter)


def test_transitions_are_built_by_name():
    step = Step(*range(8))
    assert Transition.of(step) == Transition(0, 1, 2, 3, 4, 5)
    assert Transition.of(step)._fields == Step._fields[:6]
    spec = dataclasses.replace(toys.make(toys.Doors).spec)
    example = Transition.example(spec)
    assert example.obs["action_mask"].dtype == bool
    assert example.action.dtype == np.int32
