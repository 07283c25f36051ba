"""JAX_ENABLE_X64=1 changes nothing: agents, environments and models compute in 32 bits.

The checks run in one process that has the flag; the process of the other tests has not.
"""

import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mbrl_jax
from mbrl_jax import planning, prng
from mbrl_jax.agents import AGENTS
from mbrl_jax.data import prioritised, ring
from mbrl_jax.envs import boards
from mbrl_jax.models import diagnostics, dynamics, ensemble, fit, oracle, rollout, tabular
from mbrl_jax.nn import networks, normaliser, optimiser, schedules
from mbrl_jax.types import EnvSpec, Transition

MODEL = {"hidden": (4,), "weight_decay": (0.0,)}
MUZERO = {"width": 4, "hidden": (4,), "num_simulations": 2, "num_envs": 2, "unroll": 2, "n_step": 2,
          "buffer_size": 64}  # fmt: skip
SMALL = {
    "q_learning": ("FrozenLake-misc", {}),
    "dyna_q": ("FrozenLake-misc", {}),
    "dyna_q_plus": ("FrozenLake-misc", {}),
    "prioritised_sweeping": ("FrozenLake-misc", {}),
    "dqn": ("CartPole-v1", {"hidden": (4, 4), "buffer_size": 64}),
    "ppo": ("Breakout-MinAtar", {"hidden": (4,), "num_envs": 2, "num_steps": 16}),
    "sac": ("Pendulum-v1", {"hidden": (4,), "critic_hidden": (4,), "buffer_size": 64}),
    "pets": ("Pendulum-v1", {"model": MODEL, "buffer_size": 64}),
    "mbpo": ("Pendulum-v1", {"model": MODEL, "buffer_size": 64}),
    "dreamer": (
        "Pendulum-v1",
        {
            "size": "nano",
            "num_envs": 2,
            "batch_length": 4,
            "train_ratio": 16,
            "buffer_size": 64,
            "start_windows": 4,
            "horizon": 2,
        },
    ),
    "muzero": (
        "Pendulum-v1",
        {**MUZERO, "search": "sampled", "num_candidates": 4, "wide_candidates": 2},
    ),
    "muzero_plain": ("Breakout-MinAtar", MUZERO),
}
KEYS = jax.random.split(jax.random.key(0), 2)


def trainer(name):
    env_id, fields = SMALL[name]
    definition = AGENTS[name]
    if hasattr(definition.config, "warmup_steps"):
        fields = {**fields, "warmup_steps": 40}
    if hasattr(definition.config, "batch_size"):
        fields = {**fields, "batch_size": 8}
    config = definition.config_for(env_id, **fields)
    definition = definition._replace(config=config, presets={})
    # an evaluation would trace the planner once more
    episodes = 0 if name in ("pets", "mbpo") else 1
    return mbrl_jax.make_train(definition, mbrl_jax.make_env(env_id), 64, 64, episodes, 5)


def lowered(name):
    train = trainer(name)
    return jax.jit(jax.vmap(lambda key: train(key))).lower(KEYS)


def text(lowered):
    """The program, with the counters of loops as in 32 bits: JAX itself writes them."""
    return re.sub(r"\bi64\b|xi64\b", lambda match: match[0].replace("64", "32"), lowered.as_text())


def plain_dirichlet(key, alpha, shape, dtype):
    """Any draws: JAX traces the rule of its own, of gamma, when it lowers, under the flag."""
    return jax.nn.softmax(jax.random.normal(key, (*shape, alpha.shape[-1]), dtype))


@mock.patch("jax.random.dirichlet", plain_dirichlet)
def check_every_agent_is_the_same_program():
    assert set(SMALL) == set(AGENTS)
    for name in SMALL:
        with jax.enable_x64(False):
            expected = text(lowered(name))
        got = text(lowered(name))
        assert "f64" not in got, name
        assert got == expected, name


def equal(got, expected):
    """The same structure, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_array_equal(x, y)


def check_runs_are_the_same_bits(out):
    """Whole, from the host, and in a folder that a second command goes on with."""
    with jax.enable_x64(False):
        expected = lowered("q_learning").compile()(KEYS)
    equal(lowered("q_learning").compile()(KEYS), expected)
    options = {"total_steps": 60, "seeds": 2, "eval_every": 20, "eval_episodes": 1}
    with jax.enable_x64(False):
        expected = mbrl_jax.train("q_learning", "FrozenLake-misc", **options)
    mbrl_jax.train("q_learning", "FrozenLake-misc", out=out, **{**options, "total_steps": 40})
    result = mbrl_jax.train("q_learning", "FrozenLake-misc", out=out, resume=True, **options)
    equal(result.state, expected.state)


SPEC = EnvSpec("toy", (3,), "float32", 9, action_low=(-1.0,) * 2, action_high=(1.0,) * 2)


def rows(number, dtype):
    draws = np.random.default_rng(0).uniform(-1, 1, (number, 9)).astype(np.float32).astype(dtype)
    ends = np.zeros(number, bool)
    return Transition(draws[:, :3], draws[:, 3:5], draws[:, 5], draws[:, 6:], ends, ends)


ENVS = (
    "Pendulum-v1",
    "Breakout-MinAtar",
    "FrozenLake-misc",
    "FourRooms-misc",
    *sorted(boards.GAMES if boards.available() else ()),
)


def arrays(dtype):
    """What a user may hand over: numpy's, of float64 if nothing is said."""
    return {
        "data": rows(40, dtype),
        "low": np.full(2, -1, dtype),
        "high": np.full(2, 1, dtype),
        "actions": np.zeros((4, 40, 2), dtype),
        "stored": rows(2, np.float32),  # a replay has the dtypes of its example
    }


def environments_and_agents(key, given):
    results = []
    for env_id in ENVS:
        env = mbrl_jax.make_env(env_id)
        state, obs = env.reset(key)
        results.append((state, obs, env.step(key, state, env.spec.random_action(key))))
    agent = mbrl_jax.make_agent("sac", mbrl_jax.make_env("Pendulum-v1").spec)
    state, memory, first = agent.init(key), agent.init_memory(1), jnp.ones(1, bool)
    results.append(agent.act(state, memory, given["data"].obs[:1], first, key, 0, "train"))
    return results


def planners(key, given):
    low, high = given["low"], given["high"]

    def value(candidates, key):
        return -jnp.sum(jnp.square(candidates - 0.25), axis=(1, 2))

    return [
        planning.random_shooting(value, key, 4, low, high),
        planning.cem(value, key, planning.start_cem(4, low, high), low, high),
        planning.mppi(value, key, planning.start_mppi(4, low, high), low, high),
        planning.icem(value, key, planning.start_icem(4, low, high, 6), low, high),
    ]


def of_models(key, given):
    data = given["data"]
    config = dynamics.Config(hidden=(4,), weight_decay=(0.0,), termination="never")
    models = ensemble.make(config, SPEC, 3, 2)
    params = models.init(key)
    training = fit.Config(batch_size=8, max_epochs=2)
    params, _, curves = models.fit(params, models.init_opt(params), training, data, 40, key)
    model = models.model("ts1", "std")
    true = oracle.oracle(mbrl_jax.make_env("Pendulum-v1"))
    pendulum = mbrl_jax.make_env("Pendulum-v1").params
    every = models.predict(params, data.obs, data.action)
    return [
        (params, curves),
        rollout.rollout(model, params, data.obs, given["actions"], key),
        rollout.returns(model, params, data.obs, given["actions"], key),
        true.predict(pendulum, data.obs, data.action[:, :1], key),
        diagnostics.calibration(every, jnp.zeros((40, 4), data.obs.dtype)),
        (tabular.init_counts(4, 2), tabular.init_last_outcome(4, 2)),
    ]


def replay_and_networks(key, given):
    buffer = ring.make(Transition.example(SPEC), 64, 2)
    held = buffer.add(buffer.init(), given["stored"], 3)
    sums = prioritised.make(100)
    values = sums.set(sums.init(), jnp.arange(5), jnp.ones(5, jnp.float32))
    net = networks.MLP((4,), 2, kernel_init="orthogonal", batch_renorm=True)
    variables = net.init(key, jnp.ones((2, 3), jnp.float32))
    rule = optimiser.adam(1e-3, max_grad_norm=1.0)
    return [
        (held, buffer.n_step(held, buffer.sample_index(key, 5, 20), 2, 0.9)),
        sums.sample(values, key, 3),
        (prng.split(key), prng.uniform(key, 5), prng.shuffles(key, 2, 9)),
        normaliser.update(normaliser.init((3,)), given["data"].obs),
        schedules.linear(1.0, 0.0, 10.0, 3),
        (variables, rule.update(variables["params"], rule.init(variables["params"]))),
    ]


def check_parts_are_the_same():
    """What the README calls by itself, within a jit of the user's."""
    key = jax.random.key(0)
    for env_id in ENVS:
        mbrl_jax.make_env(env_id)  # outside of jit, where some cannot be built
    for part in (environments_and_agents, planners, of_models, replay_and_networks):
        with jax.enable_x64(False):
            expected = jax.eval_shape(lambda *args, part=part: part(*args), key, arrays(np.float32))
        got = jax.eval_shape(part, key, arrays(np.float64))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(
            lambda x: (x.shape, x.dtype), expected
        ), part
    for part in (planners, of_models):
        wrapped = jax.jit(lambda *args, part=part: part(*args))
        with jax.enable_x64(False):
            expected = text(wrapped.lower(key, arrays(np.float32)))
        assert text(wrapped.lower(key, arrays(np.float32))) == expected
    for draw in (prng.split, lambda k: prng.uniform(k, 5), lambda k: prng.shuffles(k, 2, 9)):
        with jax.enable_x64(False):
            expected = draw(key)
        equal(draw(key), expected)


CHECKS = (
    check_every_agent_is_the_same_program,
    check_runs_are_the_same_bits,
    check_parts_are_the_same,
)


def run_checks(folder):
    """Writes what each check said, nothing where it passed, in a process that has the flag."""
    assert jax.config.jax_enable_x64
    for check in CHECKS:
        said = ""
        try:
            check(Path(folder) / "run") if check is check_runs_are_the_same_bits else check()
        except Exception:
            said = traceback.format_exc()
        (Path(folder) / check.__name__).write_text(said)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """The folder of `run_checks`, after a process with JAX_ENABLE_X64=1."""
    folder = tmp_path_factory.mktemp("x64")
    code = f"import test_x64; test_x64.run_checks({str(folder)!r})"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(mbrl_jax.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_nothing_changes_with_the_flag(check, said):
    error = (said / check.__name__).read_text()
    assert not error, error[-3000:]
