"""The XLA flags that the command line sets for an agent, and that the user's win."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jaxprs import loops

from mbrl_jax import AGENTS, make_env
from mbrl_jax.runtime import devices

WORLDS = {"sac": "Pendulum-v1", "pets": "Pendulum-v1", "mbpo": "Pendulum-v1", "dqn": "CartPole-v1",
          "ppo": "CartPole-v1"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_agents_say_whether_data_tell_the_length_of_their_loops(name):
    env = make_env(WORLDS.get(name, "FrozenLake-misc"))
    agent = AGENTS[name].make(AGENTS[name].config_for(env.spec), env.spec)
    key = jax.random.key(0)
    state = jax.eval_shape(agent.init, key)
    program = jax.make_jaxpr(agent.update)(state, key, jnp.int32(0), jnp.int32(0))
    kinds = {loop.primitive.name for loop, _ in loops(program.jaxpr)}
    assert ("while" in kinds) == AGENTS[name].dynamic_loops


@pytest.mark.parametrize(("agent", "asked"), [
    ("dyna_q", ["kernels"]), ("mbpo", ["graphs"]), ("sac", []),
])  # fmt: skip
def test_the_command_line_asks_before_the_backend_starts(agent, asked, monkeypatch):
    from mbrl_jax import __main__ as command_line

    calls = []
    monkeypatch.setattr(devices, "loops_as_kernels", lambda: calls.append("kernels"))
    monkeypatch.setattr(devices, "loops_as_graphs", lambda: calls.append("graphs"))
    monkeypatch.setattr(command_line, "_start_backend", lambda *_: calls.append("started"))
    monkeypatch.setattr(command_line, "_train_with", lambda *_: 0)
    command = ["train", agent, "--env", "Pendulum-v1", "--total-steps", "10", "--out", "runs/x"]
    assert command_line.main(command) == 0
    assert calls == [*asked, "started"]


SCRIPT = """
import json, os
import jax
from mbrl_jax import xla
from mbrl_jax.runtime import devices
def flags():
    return os.environ.get("XLA_FLAGS", "").replace(xla.FLAG, "").split()
found = [flags()]
devices.loops_as_graphs()
found.append(flags())
assert float(jax.numpy.ones(2).sum()) == 2.0  # XLA knows the flags
os.environ.pop("XLA_FLAGS", None)
devices.loops_as_graphs()
print(json.dumps([*found, flags()]))
"""


@pytest.mark.parametrize(("given", "made"), [
    ([], [devices.GRAPHS]),
    (["--xla_gpu_autotune_level=0"], ["--xla_gpu_autotune_level=0", devices.GRAPHS]),
    (["--xla_gpu_enable_command_buffer="], ["--xla_gpu_enable_command_buffer="]),
])  # fmt: skip
def test_graphs_are_asked_for_once_and_the_users_flag_wins(given, made):
    variables = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    variables |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(given)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=variables, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # after the backend has started nothing is asked for
    assert json.loads(done.stdout) == [given, made, []]
