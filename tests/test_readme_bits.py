"""The README's two calls agree at the level of optimisation that users have."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import mbrl_jax

SMALL = {
    "sac": ("Pendulum-v1", {"hidden": (8,), "critic_hidden": (8,)}, 100),
    "dqn": ("CartPole-v1", {"hidden": (8,)}, 100),
    "ppo": ("CartPole-v1", {"hidden": (8,), "num_envs": 2, "num_steps": 16}, 96),
}


def compare(name):
    """The call of the README in one program, and the driver's chunks, on the same seeds."""
    env_id, fields, steps = SMALL[name]
    env = mbrl_jax.make_env(env_id)
    definition = mbrl_jax.AGENTS[name]
    if hasattr(definition.config, "warmup_steps"):
        fields = {**fields, "warmup_steps": 32, "batch_size": 16, "buffer_size": 128}
    definition = definition._replace(config=definition.config_for(env_id, **fields), presets={})
    options = {"eval_every": steps // 2, "eval_episodes": 1, "eval_max_steps": 5}
    train = mbrl_jax.make_train(definition, env, steps, **options)
    keys = jax.random.split(jax.random.key(0), 2)
    state, history = jax.jit(jax.vmap(train))(keys)
    result = mbrl_jax.train(definition, env, steps, 2, seed_mode="vmap", **options)
    assert jax.tree.structure(state) == jax.tree.structure(result.state)
    ours, theirs = jax.tree.leaves(state), jax.tree.leaves(result.state)
    # XLA joins products and sums in one of the two programs that it keeps apart in the other
    same = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for x, y in zip(ours, theirs, strict=True):
        same(np.asarray(x), np.asarray(y))
    for metric, values in result.history.items():
        expected = history[metric][0] if metric == "env_steps" else history[metric]
        same(values, expected, err_msg=metric)


@pytest.mark.parametrize("name", SMALL)
def test_make_train_and_the_driver_agree(name):
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(mbrl_jax.__file__).parents[1])])
    # conftest lowers the level, and has eight devices
    done = subprocess.run(
        [sys.executable, "-c", f"import test_readme_bits; test_readme_bits.compare({name!r})"],
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
