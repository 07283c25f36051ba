"""A small world with a dict of observations, and an agent that uses all of the contract."""

from typing import Any

import gymnax
import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces

from mbrl_jax import make_env
from mbrl_jax.agents import AgentDef
from mbrl_jax.data import sequence, windows
from mbrl_jax.types import Agent, InputError, Schedule, Transition, config

CELLS, ACTIONS, LIMIT = 4, 3, 5


@struct.dataclass
class Place(environment.EnvState):
    position: jax.Array


@struct.dataclass
class Parameters(environment.EnvParams):
    max_steps_in_episode: int = LIMIT


def legal(position):
    """[..., 3] bool: action i is illegal in cell i; in cell 3 all are legal."""
    actions = jnp.arange(ACTIONS).reshape((1,) * position.ndim + (-1,))
    return position[..., None] != actions


class Doors(environment.Environment):
    """A ring of four cells, in each of which one action is shut.

    Actions go on by as many cells and one; a shut one ends the task at a loss of 100. The reward is
    1 for coming to cell 0, which also ends the task once in a while: on the way of action 2.
    """

    num_players = 1

    @property
    def default_params(self) -> Parameters:
        return Parameters()

    def get_obs(self, state):
        place = jax.nn.one_hot(state.position, CELLS)
        # int8, as Gymnasium has masks
        return {"place": place, "action_mask": legal(state.position).astype(jnp.int8)}

    def reset_env(self, key, params):
        state = Place(time=jnp.int32(0), position=jax.random.randint(key, (), 0, CELLS))
        return self.get_obs(state), state

    def step_env(self, key, state, action, params):
        shut = ~legal(state.position)[action]
        position = (state.position + action + 1) % CELLS
        arrived = position == 0
        state = Place(time=state.time + 1, position=position)
        reward = jnp.where(shut, -100.0, arrived.astype(jnp.float32))
        ends = shut | (arrived & (action == 2))
        return self.get_obs(state), state, reward, ends, {}

    def is_truncated(self, state, params):
        return state.time >= params.max_steps_in_episode

    def observation_space(self, params):
        place = spaces.Box(0.0, 1.0, (CELLS,))
        return spaces.Dict({"place": place, "action_mask": spaces.Box(0, 1, (ACTIONS,), jnp.int8)})

    def action_space(self, params: Any = None):
        return spaces.Discrete(ACTIONS)


class Pieces(Doors):
    """As `Doors`, for two players in turns."""

    num_players = 2

    def get_obs(self, state):
        return {**super().get_obs(state), "to_play": state.time % 2}

    def observation_space(self, params):
        parts = super().observation_space(params).spaces
        return spaces.Dict({**parts, "to_play": spaces.Discrete(2)})


class Plain(Doors):
    """As `Doors`, with a dict but no mask: two arrays, one of them an integer with a count."""

    def get_obs(self, state):
        return {"place": state.position, "clock": jnp.float32(state.time)[None]}

    def observation_space(self, params):
        clock = spaces.Box(0.0, LIMIT, (1,))
        return spaces.Dict({"place": spaces.Discrete(CELLS), "clock": clock})


def make(factory, **kwargs):
    """The environment of a class above, through `make_env`."""
    name = f"{factory.__name__}-test"
    if name not in gymnax.registered_envs:
        gymnax.register(name, factory)
    try:
        return make_env(name, **kwargs)
    except InputError:  # one that is refused must not break `list envs` of another test
        gymnax.registered_envs.remove(name)
        del gymnax.registration._registry[name]
        raise


@config
class ToyConfig:
    # how far a value moves at an update
    rate: float = 0.5
    num_envs: int = 2
    warmup_steps: int = 6
    prefill_steps: int = 7
    steps_per_update: int = 2
    reset: str = "delayed"


SLOTS, LENGTH, LOG = 8, 3, 64


def make_toy(cfg, spec):
    """Learns the mean reward of windows, drawn by priority, and writes it back beside them.

    It logs what the loop does: the mode of each step, its flags, and when which update came.
    """
    step = Transition.example(spec)
    number, flag = step.reward, step.truncated  # shapes and dtypes
    example = {"obs": step.obs, "reward": number, "value": number, "is_last": flag}
    replay = sequence.make(example, SLOTS * cfg.num_envs, cfg.num_envs)
    queue = windows.make(replay.ring, LENGTH)

    def init(key):
        log = {name: jnp.full(LOG, -1, jnp.int32) for name in ("mode", "update", "action")}
        flags = {name: jnp.zeros((LOG, cfg.num_envs), bool) for name in ("legal", "last", "first")}
        return {
            "mean": jnp.float32(0), "rows": replay.init(), "priorities": queue.init(),
            "log": log | flags,
        }  # fmt: skip

    def act(state, memory, obs, is_first, key, t, mode):
        memory = jnp.where(is_first, 0, memory) + 1
        number = {"random": 0, "train": 1, "eval": 2}[mode]
        if mode == "random":
            action = spec.random_actions(key, obs)
        else:
            scores = jax.random.uniform(key, (obs["place"].shape[0], ACTIONS), jnp.float32)
            action = jnp.argmax(jnp.where(spec.legal(obs), scores, -1.0), axis=-1)
        action = action.astype(jnp.int32)
        return action, memory, {"value": state["mean"] + memory, "mode": jnp.int32(number)}

    def observe(state, step, extras, t):
        row = {
            "obs": step.obs, "reward": step.reward, "value": extras["value"],
            "is_last": step.is_last,
        }  # fmt: skip
        log, taken = state["log"], step.action[:, None]
        allowed = jnp.take_along_axis(step.obs["action_mask"], taken, axis=-1)[:, 0]
        log = log | {
            "mode": log["mode"].at[t].set(extras["mode"]),
            "action": log["action"].at[t].set(step.action[0]),
            "legal": log["legal"].at[t].set(allowed),
            "last": log["last"].at[t].set(step.is_last),
            "first": log["first"].at[t].set(step.is_first),
        }
        return state | {
            "rows": replay.add(state["rows"], row, t),
            "priorities": queue.add(state["priorities"], t),
            "log": log,
        }

    def update(state, key, t, n):
        start, _ = queue.sample(state["priorities"], key, 2)
        read, index = replay.read(state["rows"], start, LENGTH)
        error = read["reward"] - read["value"]
        value = read["value"] + cfg.rate * error
        rows = replay.set(state["rows"], index, {"value": value})
        urgent = jnp.mean(jnp.abs(error), axis=1) + 0.01
        state = state | {
            "mean": jnp.mean(value),
            "rows": rows,
            "priorities": queue.set(state["priorities"], start, urgent, t),
            "log": state["log"] | {"update": state["log"]["update"].at[t].set(n)},
        }
        return state, {"error": jnp.mean(jnp.abs(error)), "update": n.astype(jnp.float32)}

    return Agent(
        init=init,
        init_memory=lambda num_envs: jnp.zeros(num_envs, jnp.float32),
        act=act,
        observe=observe,
        update=update,
        schedule=Schedule(
            cfg.num_envs, cfg.warmup_steps, cfg.steps_per_update, cfg.reset, cfg.prefill_steps
        ),
    )


TOY = AgentDef("toy", "uses all of the contract", ToyConfig(), make_toy, {})


def judge(agent, state, key, t):
    """An evaluation of one's own: what the agent knows, and when it was asked."""
    obs = {"place": jnp.eye(CELLS), "action_mask": legal(jnp.arange(CELLS))}
    first = jnp.ones(CELLS, bool)
    action, _, extras = agent.act(state, agent.init_memory(CELLS), obs, first, key, t, "eval")
    allowed = jnp.take_along_axis(obs["action_mask"], action[:, None], axis=-1)
    return {
        "eval_return": state["mean"],
        "asked_at": t.astype(jnp.float32),
        "all_legal": jnp.all(allowed).astype(jnp.float32),
        "asked_in": extras["mode"].astype(jnp.float32),
    }
