"""Environments of one's own, registered with gymnax: their actions, observations and limits."""

import itertools
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from gymnax.environments import spaces

from mbrl_jax import InputError, make_env, train
from mbrl_jax.__main__ import main
from mbrl_jax.agents import make_agent

NUMBERS = itertools.count()
INF, HUGE = np.inf, np.finfo(np.float32).max


@struct.dataclass
class Params:
    max_steps_in_episode: Any = 4


@struct.dataclass
class State:
    action: Any  # the last one, as the environment received it
    time: jax.Array


class Room(gymnax.environments.environment.Environment):
    """Tells the numbers of the last action; ends after some steps."""

    actions: Any = spaces.Box(-1.0, 1.0, (1,))
    observations: Any = None  # a Box with the numbers of an action
    limit: Any = 4

    @property
    def default_params(self):
        return Params(max_steps_in_episode=self.limit)

    def idle(self):
        shape = getattr(self.actions, "shape", ())
        return jnp.zeros(() if isinstance(shape, tuple) and not shape else shape)

    def see(self, action):
        return jnp.asarray(action, jnp.float32).reshape(-1)

    def reset_env(self, key, params):
        state = State(self.idle(), jnp.int32(0))
        return self.see(state.action), state

    def step_env(self, key, state, action, params):
        if isinstance(self.actions, spaces.Box):
            assert action.shape == tuple(self.actions.shape)
            assert action.dtype == jnp.float32
        state = State(jnp.asarray(action, jnp.float32), state.time + 1)
        reward = -jnp.sum(jnp.square(jnp.clip(self.see(action), -9.0, 9.0)))
        return self.see(action), state, reward, jnp.bool_(False), {}

    def is_truncated(self, state, params):
        return state.time >= params.max_steps_in_episode

    def action_space(self, params):
        return self.actions

    def observation_space(self, params):
        size = int(np.prod(getattr(self.actions, "shape", ()) or (1,)))
        return self.observations or spaces.Box(-INF, INF, (size,))


@pytest.fixture
def register():
    """Registers a `Room` with other members under a name that is free again afterwards."""
    names = []

    def room(**members):
        name = f"Room-{next(NUMBERS)}-of-the-tests"  # `make_env` remembers every name
        gymnax.registration.register(name, type("Room", (Room,), members))
        names.append(name)
        return name

    yield room
    for name in names:
        del gymnax.registration._registry[name]
        gymnax.registered_envs.remove(name)


def step(env, action):
    state, _ = env.reset(jax.random.key(0))
    state, after = env.step(jax.random.key(1), state, jnp.asarray(action, jnp.float32))
    return state.action, after


# bounds


BOUNDS = {
    "free": ((-INF, INF), 1, [-7.0, 0.5, 7.0], [-7.0, 0.5, 7.0]),
    "huge": ((-HUGE, HUGE), 1, [-7.0, 0.5, 7.0], [-7.0, 0.5, 7.0]),
    "from below": ((0.0, INF), 1, [-7.0, 0.5, 7.0], [0.0, 0.5, 7.0]),
    "from above": ((-INF, 2.0), 1, [-7.0, 0.5, 7.0], [-7.0, 0.5, 2.0]),
    "one of two": (
        ([-INF, 2.0], [INF, 4.0]),
        2,
        [[9.0, 9.0], [0.5, 0.0]],
        [[9.0, 4.0], [0.5, 3.0]],
    ),
    "equal": ((2.0, 2.0), 1, [-1.0, 0.0, 9.0], [2.0, 2.0, 2.0]),
    "wide": ((-1e29, 1e29), 1, [-1.0, 0.0, 1.0], [-1e29, 0.0, 1e29]),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_actions_of_every_kind_of_bounds_arrive(name, register):
    (low, high), size, given, arrived = BOUNDS[name]
    box = spaces.Box(jnp.asarray(low), jnp.asarray(high), (size,))
    room = register(actions=box)
    env = make_env(room)
    given, arrived = (np.reshape(x, (-1, size)).astype(np.float32) for x in (given, arrived))
    for one, expected in zip(given, arrived, strict=True):
        np.testing.assert_allclose(step(env, one)[0], expected, rtol=1e-6)
    np.testing.assert_allclose(env.native_action(given), arrived, rtol=1e-6)
    native = make_env(room, rescale_actions=False)
    np.testing.assert_allclose(native.native_action(arrived), arrived, rtol=1e-6)


@pytest.mark.parametrize("rescale", [True, False])
def test_a_spec_tells_the_bounds_that_actions_have(rescale, register):
    box = spaces.Box(jnp.array([-INF, 2.0, 0.0]), jnp.array([INF, 4.0, INF]), (3,))
    spec = make_env(register(actions=box), rescale_actions=rescale).spec
    low, high = (-1.0, 1.0) if rescale else (2.0, 4.0)
    assert spec.action_low == (-INF, low, 0.0)
    assert spec.action_high == (INF, high, INF)


@pytest.mark.parametrize("name", ["free", "huge", "from below", "from above", "one of two"])
def test_agents_that_need_bounds_refuse_others(name, register, tmp_path):
    (low, high), size, *_ = BOUNDS[name]
    room = register(actions=spaces.Box(jnp.asarray(low), jnp.asarray(high), (size,)))
    env = make_env(room)
    said = rf"needs bounded actions; {room} has .*inf.* wrap it so that they are finite"
    for agent in ("ppo", "sac", "pets", "mbpo"):
        with pytest.raises(InputError, match=said):
            make_agent(agent, env.spec)
        with pytest.raises(InputError, match=said):
            train(agent, env, 100, out=tmp_path / "run")
    with pytest.raises(InputError, match=said):
        env.spec.random_action(jax.random.key(0))
    assert not list(tmp_path.iterdir())


def test_the_command_line_refuses_unbounded_actions_in_one_line(register, tmp_path, capfd):
    room = register(actions=spaces.Box(-INF, INF, (2,)))
    args = ["train", "ppo", "--env", room, "--total-steps", "100", "--out", str(tmp_path / "run")]
    assert main(args) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: PPO needs bounded actions")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("low", "high"), [(1.0, -1.0), (np.nan, 1.0), (-1.0, np.nan)])
def test_bounds_that_bound_nothing(low, high, register):
    with pytest.raises(InputError, match="expected lower bounds that are not above"):
        make_env(register(actions=spaces.Box(low, high, (2,))))


# shapes


@pytest.mark.parametrize("shape", [(2, 3), (), (1,), (1, 1, 2)])
@pytest.mark.parametrize("rescale", [True, False])
def test_the_environment_receives_the_shape_of_its_box(shape, rescale, register):
    size = int(np.prod(shape))
    low = -jnp.arange(1.0, 1.0 + size).reshape(shape)  # all different
    env = make_env(register(actions=spaces.Box(low, -low, shape)), rescale_actions=rescale)
    assert env.spec.action_shape == (size,)
    unit = np.linspace(-0.5, 0.75, size, dtype=np.float32)
    action = unit if rescale else unit * np.arange(1.0, 1.0 + size)
    received, after = step(env, action)
    np.testing.assert_allclose(
        received, (unit * np.arange(1.0, 1.0 + size)).reshape(shape), rtol=1e-6
    )
    np.testing.assert_allclose(after.obs, received.reshape(-1))


def test_an_agent_trains_on_a_box_of_two_axes(register):
    env = make_env(register(actions=spaces.Box(-1.0, 1.0, (2, 3))))
    fields = {"hidden": (8,), "num_envs": 2, "num_steps": 4, "minibatches": 1, "epochs": 1}
    result = train("ppo", env, 32, eval_every=16, eval_episodes=2, **fields)
    assert np.isfinite(result.history["eval_return"]).all()


def test_bounds_of_another_shape(register):
    box = spaces.Box(jnp.zeros((3, 2)), jnp.ones((3, 2)), (2, 3))
    with pytest.raises(InputError, match="bounds of the actions"):
        make_env(register(actions=box))


# other spaces


class MultiDiscrete(spaces.Space):
    shape = (2,)
    dtype = jnp.int32


ACTIONS = {
    "Tuple": spaces.Tuple([spaces.Discrete(2), spaces.Box(-1.0, 1.0, (1,))]),
    "Dict": spaces.Dict({"a": spaces.Discrete(2)}),
    "MultiDiscrete": MultiDiscrete(),
    "Box of int32": spaces.Box(0, 3, (2,), jnp.int32),
    "Box of uint8": spaces.Box(0, 255, (2,), jnp.uint8),
}


@pytest.mark.parametrize("kind", ACTIONS)
def test_other_actions_are_refused(kind, register):
    room = register(actions=ACTIONS[kind], idle=lambda self: jnp.zeros(1))
    with pytest.raises(InputError) as error:
        make_env(room)
    assert str(error.value) == (
        f"{room}: actions are a {kind}: expected one Discrete, or one Box of floats; wrap the "
        "environment so that it takes one of these"
    )


BOX = spaces.Box(-1.0, 1.0, (1,))
OBSERVATIONS = {
    "tuple": (spaces.Tuple([BOX, BOX]), lambda x: (x, x), "observations are a tuple in a Tuple"),
    "tuple in a box": (BOX, lambda x: (x, x), "observations are a tuple in a Box"),
    "dict in a box": (BOX, lambda x: {"a": x}, "observations are a dict in a Box"),
    "array in a dict": (spaces.Dict({"a": BOX}), lambda x: x, "observation space has ['a']"),
    "dict in a dict": (
        spaces.Dict({"a": spaces.Dict({"b": BOX})}),
        lambda x: {"a": {"b": x}},
        "observation 'a' is no array",
    ),
    "tuple in a dict": (
        spaces.Dict({"a": spaces.Tuple([BOX])}),
        lambda x: {"a": (x,)},
        "observation 'a' is no array",
    ),
}


@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_other_observations_are_refused(kind, register):
    space, see, said = OBSERVATIONS[kind]
    room = register(observations=space, see=lambda self, x: see(Room.see(self, x)))
    with pytest.raises(InputError) as error:
        make_env(room)
    assert str(error.value).startswith(f"{room}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


# limits


@pytest.mark.parametrize("value", [INF, np.nan, 2.5, 0, -3, 2**31, "long", None, True])
def test_an_episode_limit_that_is_no_number_of_steps(value, register):
    with pytest.raises(InputError, match=r"max_steps_in_episode = .*expected") as error:
        make_env(register(), max_steps_in_episode=value)
    assert "\n" not in str(error.value)
    for id in ("Pendulum-v1", register(limit=200.0)):  # a default that is a float
        with pytest.raises(InputError, match=r"max_steps_in_episode = .*expected"):
            make_env(id, max_steps_in_episode=value)


@pytest.mark.parametrize("value", [INF, np.nan, 2.5, 0, -3, 2**40, None, np.float32(INF)])
def test_an_episode_limit_that_the_environment_itself_lacks(value, register):
    room = register(limit=value)
    with pytest.raises(InputError, match=r"expected a whole number from 1 to 2147483647; give one"):
        make_env(room)
    if not isinstance(value, (type(None), np.generic)):
        assert make_env(room, max_steps_in_episode=7).spec.episode_limit == 7


@pytest.mark.parametrize("value", [4, 4.0, np.int32(4), np.float32(4.0)])
def test_an_episode_limit_of_any_type(value, register):
    assert make_env(register(limit=value)).spec.episode_limit == 4


@pytest.mark.parametrize("value", [INF, -INF, np.nan, 2**31, -(2**31)])
def test_other_whole_numbers(value):
    with pytest.raises(InputError, match=r"switch_step = .*expected a whole number"):
        make_env("ShortcutMaze-sutton", switch_step=value)


def test_a_number_that_is_none():
    with pytest.raises(InputError, match="gravity = nan, expected a number"):
        make_env("CartPole-v1", gravity=np.nan)


# what a constructor asks for


def test_a_constructor_with_a_required_argument():
    class Sized(Room):
        def __init__(self, size):
            super().__init__()
            self.actions = spaces.Box(-1.0, 1.0, (size,))

    gymnax.registration.register("Sized-of-the-tests", Sized)
    try:
        assert make_env("Sized-of-the-tests", size=3).spec.action_shape == (3,)
        with pytest.raises(InputError, match=r"Sized-of-the-tests: .*size"):
            make_env("Sized-of-the-tests")
        with pytest.raises(InputError, match="did you mean 'size'"):
            make_env("Sized-of-the-tests", size=3, sice=4)
    finally:
        del gymnax.registration._registry["Sized-of-the-tests"]
        gymnax.registered_envs.remove("Sized-of-the-tests")


def test_a_run_and_its_command_line_on_an_environment_of_ones_own(register, tmp_path):
    room, out = (
        register(actions=spaces.Discrete(3), see=lambda self, x: jnp.ones(2)),
        tmp_path / "run",
    )
    command = (
        f"train ppo --env {room} --total-steps 32 --eval-every 16 --eval-episodes 1 "
        "--agent.hidden 8 --agent.num-envs 2 --agent.num-steps 4 --agent.minibatches 1"
    )
    args = [*command.split(), "--out", str(out)]
    assert main([*args, "--env-args", "max_steps_in_episode=3"]) == 0
    assert main(["evaluate", str(out), "--episodes", "2"]) == 0
