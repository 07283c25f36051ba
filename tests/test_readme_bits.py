"""The README's two calls give the same bits, at the level of optimisation that users have."""

import os
import subprocess
import sys
import traceback
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


def same(ours, theirs):
    """Structure and bits of two trees."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    different = sum(not np.array_equal(x, y, equal_nan=True) for x, y in pairs)
    assert different == 0, f"{different} of {len(pairs)} leaves differ"


def compare(name):
    """One program against the driver's chunks on the same keys: vmapped seeds, and one alone."""
    env_id, fields, steps = SMALL[name]
    env = mbrl_jax.make_env(env_id)
    definition = mbrl_jax.AGENTS[name]
    if hasattr(definition.config, "warmup_steps"):
        fields = {**fields, "warmup_steps": 32, "batch_size": 16, "buffer_size": 128}
    definition = definition._replace(config=definition.config_for(env_id, **fields), presets={})
    options = {"eval_every": steps // 2, "eval_episodes": 1, "eval_max_steps": 5}
    train = mbrl_jax.make_train(definition, env, steps, **options)
    keys = jax.random.split(jax.random.key(0), 2)
    for mode, (state, history) in (
        ("vmap", jax.jit(jax.vmap(train))(keys)),
        ("map", jax.jit(train)(keys[0])),
    ):
        result = mbrl_jax.train(definition, env, steps, 2, seed_mode=mode, **options)
        row = slice(None) if mode == "vmap" else 0
        same(state, jax.tree.map(lambda x, row=row: x[row], result.state))
        del history["env_steps"]
        same(history, {metric: result.history[metric][row] for metric in history})


def compare_all(folder):
    """Writes what each comparison said, nothing where it passed."""
    for name in SMALL:
        said = ""
        try:
            compare(name)
        except Exception:
            said = traceback.format_exc()
        (Path(folder) / name).write_text(said)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """The folder of `compare_all`, after a process of its own."""
    folder = tmp_path_factory.mktemp("bits")
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(mbrl_jax.__file__).parents[1])])
    # conftest lowers the level, and has eight devices
    code = f"import test_readme_bits; test_readme_bits.compare_all({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", SMALL)
def test_make_train_and_the_driver_agree(name, said):
    error = (said / name).read_text()
    assert not error, error[-3000:]
