"""The sums that XLA gets wrong on a CPU are right once the package is imported."""

import json
import os
import subprocess
import sys

import jaxlib
import pytest

from mbrl_jax import xla

SUMS = """
import json, os
import mbrl_jax
import jax, numpy as np
rng = np.random.default_rng(0)
x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 64, 64, 2), (64, 64, 2)))
sums = jax.jit(jax.vmap(lambda x, w: (w * x).sum(-1) + ((w - 1) * x).sum(-1), (0, None)))
error = np.abs(np.asarray(sums(x, w)) - (w * x).sum(-1) - ((w - 1) * x).sum(-1)).max()
print(json.dumps([float(error), os.environ.get("XLA_FLAGS", "")]))
"""


def run(flags):
    variables = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    variables |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    variables |= {"XLA_FLAGS": flags} if flags else {}
    done = subprocess.run(
        [sys.executable, "-c", SUMS], capture_output=True, text=True, env=variables, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_sums_of_a_batch_are_right():
    error, flags = run("--xla_backend_optimization_level=3")
    assert error < 1e-5
    assert flags.startswith("--xla_backend_optimization_level=3")


@pytest.mark.skipif(jaxlib.__version__ != xla.FAULTY, reason="this jaxlib has not the fault")
def test_the_fault_is_there_and_the_users_flag_wins():
    error, flags = run(f"{xla.OPTION}=LIBRARY_FUSION_TYPE_REDUCE")
    assert flags == f"{xla.OPTION}=LIBRARY_FUSION_TYPE_REDUCE"
    assert error > 1


def test_other_versions_are_left_alone(monkeypatch):
    monkeypatch.setattr(xla, "FAULTY", "0.0.1")
    monkeypatch.setenv("XLA_FLAGS", "--a")
    xla.avoid_wrong_sums()
    assert os.environ["XLA_FLAGS"] == "--a"
    monkeypatch.setattr(xla, "FAULTY", jaxlib.__version__)
    xla.avoid_wrong_sums()
    xla.avoid_wrong_sums()
    assert os.environ["XLA_FLAGS"] == f"--a {xla.FLAG}"
