"""What the tests of runs share: the command line as a process, and what a run folder holds."""

import csv
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from mbrl_jax import train
from mbrl_jax.runtime import logs
from mbrl_jax.runtime.checkpoint import Checkpoints
from mbrl_jax.runtime.train import Stopped, load_job

SHORT = {"total_steps": 300, "seeds": 2, "eval_every": 50, "eval_episodes": 2}
# fields with which the deep agents are trained in no time
SMALL = {
    "dqn": {"hidden": (8,), "batch_size": 8, "buffer_size": 64, "warmup_steps": 16},
    "ppo": {"hidden": (8,), "num_envs": 4, "num_steps": 8, "minibatches": 2, "epochs": 2},
    "sac": {
        "hidden": (8,),
        "critic_hidden": (8,),
        "batch_size": 8,
        "buffer_size": 64,
        "warmup_steps": 16,
        "steps_per_update": 2,
        "updates": 2,
    },
    "pets": {
        "model": {"hidden": (8,), "weight_decay": (1e-5,)},
        "num_members": 2,
        "particles": 2,
        "training": {"batch_size": 8, "max_epochs": 2},
        "horizon": 3,
        "num_samples": 8,
        "num_elites": 2,
        "iterations": 2,
        "buffer_size": 64,
        "warmup_steps": 16,
        "steps_per_update": 8,
    },
    "mbpo": {
        "model": {"hidden": (8,), "weight_decay": (1e-5,)},
        "num_members": 2,
        "num_elites": 2,
        "training": {"batch_size": 8, "max_epochs": 2},
        "sac": {"hidden": (8,), "critic_hidden": (8,)},
        "batch_size": 8,
        "buffer_size": 64,
        "warmup_steps": 16,
        "model_period": 8,
        "rollouts_per_step": 2,
        "updates": 2,
        "rollout_length": (1, 2),
        "rollout_growth": (20, 60),
        "retained": 2,
    },
    "dreamer": {
        "size": "nano",
        "num_envs": 2,
        "batch_size": 2,
        "batch_length": 4,
        "horizon": 2,
        "train_ratio": 1,
        "buffer_size": 64,
        "start_windows": 4,
        "warmup_updates": 0.0,
    },
    "muzero": {
        "width": 8,
        "hidden": (8,),
        "bins": 5,
        "num_simulations": 4,
        "num_envs": 2,
        "unroll": 2,
        "n_step": 2,
        "batch_size": 4,
        "updates": 1,
        "buffer_size": 64,
        "warmup_steps": 16,
    },
}
SMALL["muzero_plain"] = SMALL["muzero"]
CONTINUOUS = ("sac", "mbpo")  # agents that cannot take discrete actions  # fmt: skip
COLLECTIVES = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|partition-id"
# every program of a short run comes from the compilation cache
ENVIRONMENT = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

# limits the size of files to argument 1, while the state after step 150 is about to be saved
LIMITED = """
import resource, sys
from mbrl_jax.__main__ import main
from mbrl_jax.runtime import logs

def update(self, env_steps, *args):
    if env_steps == 150:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))

logs.Display.update = update
sys.exit(main(sys.argv[2:]))
"""
FULL_DISK = ("-c", LIMITED)


def start(*args, script=("-m", "mbrl_jax")):
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *script, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )


def finish(process, seconds=120):
    """-> (exit code, stdout, stderr); a process that hangs is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


def leaves(tree):
    """Names to numpy arrays, typed keys as their words."""

    def plain(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return {jax.tree_util.keystr(p): plain(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(a, b):
    """Bit for bit; NaNs are equal where their bits are."""
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def saved(out, step=None):
    """The whole state in a checkpoint of a run, the newest by default."""
    job = load_job(out)
    checkpoints = Checkpoints(out / "checkpoints", job.run, write=False)
    state = checkpoints.restore(checkpoints.newest() if step is None else step, job.like())
    checkpoints.close()
    return state


def steps(out):
    """The finished checkpoints of a run, oldest first."""
    folder = out / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def assert_same_results(a, b):
    """Two run folders that hold the same run: rows, newest checkpoint and configuration."""
    assert rows(a) == rows(b)
    assert_same(saved(a), saved(b))
    config = [json.loads((out / "config.json").read_text())["run"] for out in (a, b)]
    assert config[0] == config[1]


def rows(out):
    """metrics.csv as rows of text, without the wall seconds."""
    with (out / "metrics.csv").open(newline="") as lines:
        return [row[:2] + row[3:] for row in csv.reader(lines)]


def contents(folder):
    """All files below, with their bytes and times."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def train_until(periods, *args, signum=signal.SIGINT, **kwargs):
    """Trains, with a signal while period number `periods` is about to be saved; -> Stopped."""
    update, calls = logs.Display.update, []

    def send(self, *args):
        update(self, *args)
        calls.append(args)
        if len(calls) == periods:
            os.kill(os.getpid(), signum)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs.Display, "update", send)
        with pytest.raises(Stopped, match="--resume") as stopped:
            train(*args, **kwargs)
    assert stopped.value.signum == signum
