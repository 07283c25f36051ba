"""The benchmarks run, and the textbook loop that they compare with learns."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from mbrl_jax import envs

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_bench_dyna_writes_a_row_for_every_cell(tmp_path):
    script = [sys.executable, str(BENCHMARKS / "bench_dyna.py")]
    options = ["--quick", "--repeats", "1", "--seeds", "1", "4", "--out", str(tmp_path)]
    done = subprocess.run(script + options, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench_dyna.json").read_text())["rows"]
    assert [(row["n"], row["seeds"]) for row in rows] == [
        (n, seeds) for n in (0, 5, 50) for seeds in (1, 1, 4)
    ]
    assert all(row["env_steps_per_s"] > 0 for row in rows)


def test_the_textbook_loop_learns_the_lake(lake, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_dyna

    q = bench_dyna.textbook(bench_dyna.tables(lake), 20, 6000, seed=1)
    exact = envs.value_iteration(envs.tabular(lake), bench_dyna.GAMMA)[1]
    np.testing.assert_allclose(q[0].max(), exact[0].max(), atol=0.02)
