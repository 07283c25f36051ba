"""The records of Dreamer's replay: in the loop as the authors' driver makes them, and in windows.

Checks that some fault would pass unseen are tried with the fault put in.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from goldens import golden, part

from mbrl_jax import InputError
from mbrl_jax.agents import AgentDef, dreamer, dreamer_records
from mbrl_jax.agents.dreamer_config import Config, model_of, rounds, schedule, window_length
from mbrl_jax.agents.dreamer_records import (
    Record,
    loaded,
    nothing_arrived,
    record_of,
    replay_of,
    stored,
    unstored,
)
from mbrl_jax.data import sequence
from mbrl_jax.envs.env import Env
from mbrl_jax.models import rssm
from mbrl_jax.runtime.loop import make_program
from mbrl_jax.runtime.plan import make_plan
from mbrl_jax.types import Agent, EnvSpec, Schedule, config

TICKS, ENVS = 40, 2
LENGTHS = jnp.array([3, 1, 5])


@struct.dataclass
class Place:
    env: jax.Array  # which environment this is; the force of an action tells
    episode: jax.Array
    time: jax.Array
    received: jax.Array  # [2] the action that led here, -1 at a start


class Scripted:
    """Episode k of environment i has LENGTHS[(k + i) % 3] steps and terminates where k + i is even.

    Reward 10 k + t; the observation is k, t and the action that led to it.
    """

    def reset_env(self, key, params):
        state = Place(jnp.int32(0), jnp.int32(0), jnp.int32(0), -jnp.ones(2))
        return self.obs(state), state

    def obs(self, state):
        return jnp.concatenate([jnp.stack([state.episode, state.time]) * 1.0, state.received])

    def step_env(self, key, state, action, params):
        env = (action[1] // 100).astype(jnp.int32)
        state = Place(env, state.episode, state.time + 1, action)
        ends = self.is_over(state) & ((state.episode + env) % 2 == 0)
        reward = 10.0 * state.episode + state.time
        return self.obs(state), state, reward, ends, {}

    def is_over(self, state):
        return state.time >= LENGTHS[(state.episode + state.env) % 3]

    def is_truncated(self, state, params):
        return self.is_over(state)

    def carry_over(self, state, reset_state):
        return reset_state.replace(env=state.env, episode=state.episode + 1)


SPEC = EnvSpec(
    "scripted", (4,), "float32", 9, action_low=(-np.inf,) * 2, action_high=(np.inf,) * 2
)  # fmt: skip
WORLD = Env(Scripted(), (), SPEC, SPEC.action_low, SPEC.action_high)


@config
class RecorderConfig:
    scale: float = 1.0


def replay_like(obs):
    """Holds all records; the latents are pairs of numbers."""
    number, flag = jax.ShapeDtypeStruct((), "float32"), jax.ShapeDtypeStruct((), "bool")
    pair = jax.ShapeDtypeStruct((2,), "float32")
    example = Record(obs, pair, number, flag, flag, flag, pair, None)
    return sequence.make(example, TICKS * ENVS, ENVS)


def recorder(cfg, spec):
    """Acts by the script, whatever it sees, and keeps its records."""
    replay = replay_like(spec.example_obs())
    envs = jnp.arange(ENVS)

    def act(state, memory, obs, is_first, key, t, mode):
        action = jnp.stack([1.0 + (t + 3 * envs) % 5, 0.1 + t + 100 * envs], -1)
        latent = jnp.stack([t + 0 * envs, envs], -1).astype(jnp.float32)
        return action, memory, {"action": action, "deter": latent}

    def observe(state, step, extras, t):
        # through the module, so that a fault may be put in
        record, arrived = dreamer_records.record_of(step, state[1], extras)
        return replay.add(state[0], record, t), arrived

    def update(state, key, t, n):
        return state, {}

    return Agent(
        lambda key: (replay.init(), nothing_arrived(ENVS)),
        lambda num_envs: (),
        act,
        observe,
        update,
        Schedule(ENVS, 0, 1, "delayed"),
    )


RECORDER = AgentDef("recorder", "acts by a script", RecorderConfig(), recorder, {})


def streams():
    """The records of 40 steps of the loop: a Record [TICKS, ENVS, ...]."""
    program = make_program(RECORDER, WORLD, RECORDER.config, TICKS * ENVS, TICKS * ENVS, 0)

    def run(key):
        start = program.init(key, RECORDER.config)
        return program.period(start, RECORDER.config, jnp.int32(0))[0].agent[0]

    rows = jax.jit(run)(jax.random.key(0))
    kept = replay_like(SPEC.example_obs()).ring.all(rows)
    return jax.tree.map(lambda x: np.asarray(x).reshape(TICKS, ENVS, *x.shape[1:]), kept)


@pytest.fixture(scope="module")
def made():
    return streams()


def check_streams(found):
    for env in range(ENVS):
        theirs = part(golden("g4_replay_driver"), f"stream.env{env}.")
        vector, starts = theirs["vector"].copy(), theirs["is_first"]
        vector[starts, 0] = 0  # a first observation does not know what is carried over
        np.testing.assert_array_equal(found.obs[:, env, :2], vector)
        np.testing.assert_array_equal(found.obs[:, env, 2], theirs["received_action"])
        np.testing.assert_array_equal(found.obs[:, env, 3], theirs["received_force"])
        np.testing.assert_array_equal(found.action[:, env, 0], theirs["action"])
        np.testing.assert_array_equal(found.action[:, env, 1:], theirs["force"])
        for name in ("reward", "is_first", "is_last", "is_terminal"):
            np.testing.assert_array_equal(getattr(found, name)[:, env], theirs[name], name)
        np.testing.assert_array_equal(found.deter[:, env, 0], np.arange(TICKS))


def test_the_loop_makes_the_records_of_the_authors_driver(made):
    check_streams(made)


def late_action(step, arrived, extras):
    """A fault: the action that led to an observation stands in its record."""
    record, after = record_of(step, arrived, extras)
    return record._replace(action=step.obs[:, 2:]), after


def own_reward(step, arrived, extras):
    """A fault: the reward of the action, which comes with the next observation."""
    record, after = record_of(step, arrived, extras)
    return record._replace(reward=step.reward), after


def timeout_is_terminal(step, arrived, extras):
    """A fault: a truncated episode counts as one whose task has ended."""
    record, after = record_of(step, arrived, extras)
    return record, after._replace(is_terminal=step.terminated | step.truncated)


def acts_at_the_end(step, arrived, extras):
    """A fault: the idle action of a final observation is kept."""
    record, after = record_of(step, arrived, extras)
    return record._replace(action=extras["action"]), after


@pytest.mark.parametrize("fault", [late_action, own_reward, timeout_is_terminal, acts_at_the_end])
def test_a_fault_in_the_records_is_seen(fault, monkeypatch):
    monkeypatch.setattr(dreamer_records, "record_of", fault)
    with pytest.raises(AssertionError):
        check_streams(streams())


def test_windows_are_loaded_as_the_authors_are(made):
    """All 72 windows of five records that lie in the replay after 40 steps."""
    got = golden("g4_replay_driver")
    env, start = got["valid.env_start_in_insert_order"].T
    index = start[:, None] + np.arange(5)
    window = loaded(jax.tree.map(lambda x: jnp.asarray(x)[index, env[:, None]], made))
    for name in ("is_first", "is_last", "is_terminal", "reward"):
        np.testing.assert_array_equal(getattr(window, name), got[f"window.{name}"], name)
    np.testing.assert_array_equal(window.action[..., 0], got["window.action"])
    np.testing.assert_array_equal(window.deter, got["window.stored_deter"])
    np.testing.assert_array_equal(window.deter[..., 0], got["window.tick"])


def test_an_episode_that_was_given_up_ends_in_its_window():
    got = part(golden("g4_replay_driver"), "abandoned.")
    index = got["window_start"][:, None] + np.arange(6)
    zero = jnp.zeros((3, 6))
    window = Record(
        zero, zero, zero,
        jnp.asarray(got["stream_is_first"])[index], jnp.asarray(got["stream_is_last"])[index],
        zero, None, None,
    )  # fmt: skip
    fixed = loaded(window)
    np.testing.assert_array_equal(fixed.is_first, got["window_is_first"])
    np.testing.assert_array_equal(fixed.is_last, got["window_is_last"])


# the schedule


@pytest.mark.parametrize(
    ("num_envs", "ratio", "behind"), [(16, 32, 0), (1, 512, 0), (16, 1024, 1), (1, 256, 0)]
)
def test_updates_come_when_the_authors_make_them(num_envs, ratio, behind):
    """With several updates to a step they come at its end, one fewer in all."""
    got = golden("g4_replay_driver")[f"schedule.envs{num_envs}_ratio{ratio}.step_updates"]
    records, done = got[:, 0], np.cumsum(got[:, 1])
    cfg = Config(num_envs=num_envs, train_ratio=ratio)
    steps, updates = rounds(cfg)
    plan = make_plan("dreamer", schedule(cfg), 8_000, 8_000)
    assert plan.warmup == 0, "the untrained policy acts from the first step on"
    ours = np.arange(1, plan.updates * plan.periods + 1)
    at = (plan.start + ours * steps) * num_envs
    for r in range(num_envs, records[-1] + 1, num_envs):
        theirs = done[records <= r][-1] if (records <= r).any() else 0
        made = updates * np.sum(at <= r)
        assert made == max(theirs - behind, 0), r


def test_the_first_update_needs_its_windows():
    cfg = Config(num_envs=2, batch_size=2, batch_length=4, train_ratio=4, start_windows=6)
    # windows of 5: 2 of them after 5 steps, 6 after 7
    assert window_length(cfg) == 5
    assert rounds(cfg) == (1, 1)
    assert schedule(cfg) == Schedule(2, 0, 1, "delayed", 12)
    burnt = dataclasses.replace(cfg, replay_context="burn_in", burn_in=3)
    assert window_length(burnt) == 8
    assert schedule(burnt) == Schedule(2, 0, 1, "delayed", 18)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"train_ratio": 33, "num_envs": 1}, r"train_ratio = 33: .*33/1024.* whole updates is 32"),
        ({"train_ratio": 1500, "num_envs": 1}, r"is 1024"),
        ({"train_ratio": 100, "num_envs": 16}, r"is 128|is 64"),
        ({"num_envs": 3, "buffer_size": 999}, r"nearest that makes whole updates is 1024"),
        ({"buffer_size": 512}, r"buffer_size = 512: holds 32 records.* expected at least 65"),
        ({"buffer_size": 16 * 100}, r"start_windows = 1024: expected at most 576"),
        ({"buffer_size": 10_001}, r"capacity = 10001 with num_envs = 16"),
    ],
)
def test_what_cannot_be_scheduled_or_held_is_refused_in_one_line(fields, said):
    spec = EnvSpec("plain", (3,), "float32", 9, num_actions=2)
    with pytest.raises(InputError, match=said) as error:
        dreamer.make(Config(**fields), spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (EnvSpec("flat", (3, 2, 2, 2), "float32", 9, num_actions=2), "cannot encode .*'obs'"),
        (
            EnvSpec("free", (3,), "float32", 9, action_low=(-1.0,), action_high=(float("inf"),)),
            "Dreamer needs bounded actions",
        ),
    ],
)
def test_environments_that_it_cannot_learn_are_refused(spec, said):
    with pytest.raises(InputError, match=said):
        dreamer.make(Config(), spec)


# latents in the replay


@pytest.mark.parametrize("latents", ["categorical", "gaussian"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_are_written_and_read_as_they_were(latents, dtype):
    cfg = Config(size="nano", latents=latents, dtype=dtype, num_envs=1, buffer_size=100)
    spec = EnvSpec("plain", (3,), "float32", 9, num_actions=2)
    model = model_of(cfg, spec)
    deter = jax.random.normal(jax.random.key(0), (2, 5, 128)).astype(dtype)
    stoch = jax.random.normal(jax.random.key(1), (2, 5, 32, 4)).astype(dtype)
    if latents == "categorical":
        stoch = jax.nn.one_hot(jnp.argmax(stoch, -1), 4, dtype=dtype)
    kept = stored(model, rssm.State(deter, stoch))
    assert kept["deter"].dtype == dtype
    assert kept["stoch"].dtype == (jnp.uint8 if latents == "categorical" else dtype)
    found = unstored(model, kept["deter"], kept["stoch"])
    np.testing.assert_array_equal(found.deter, deter)
    np.testing.assert_array_equal(found.stoch, stoch)
    width = 32 if latents == "categorical" else 128 * jnp.dtype(dtype).itemsize
    row = 12 + 4 + 4 + 3 + 128 * jnp.dtype(dtype).itemsize + width
    assert replay_of(cfg, spec).num_bytes == 100 * row


def test_the_stated_bytes_of_a_record():
    """Of the table in the paper's code: a bfloat16 for each deter, a byte for each class."""
    spec = EnvSpec("plain", (24,), "float32", 9, action_low=(-1.0,) * 6, action_high=(1.0,) * 6)
    for size, latent in (("1m", 1_056), ("12m", 4_128), ("200m", 16_416)):
        cfg = Config(size=size, dtype="bfloat16")
        record = 4 * (24 + 6 + 1) + 3
        assert replay_of(cfg, spec).ring.layout.row_bytes == latent + record
