"""The benchmarks run, and the textbook loop that they compare with learns."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mbrl_jax import AGENTS, envs, make_env
from mbrl_jax.runtime.train import make_job

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
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


def run_bench_model_free(out, *options):
    script = [sys.executable, str(BENCHMARKS / "bench_model_free.py"), "--quick", "--repeats", "1"]
    done = subprocess.run(
        [*script, *options, "--out", str(out)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "bench_model_free.json").read_text())["rows"]


@pytest.mark.slow
def test_bench_model_free_writes_a_row_for_every_agent(tmp_path):
    rows = run_bench_model_free(tmp_path, "--no-peers", "--seeds", "2")
    assert [(row["agent"], row["seeds"]) for row in rows] == [("dqn", 2), ("ppo", 2), ("sac", 2)]
    assert all(row["env_steps_per_s"] > 0 and row["updates_per_s"] > 0 for row in rows)


@pytest.mark.skipif(
    not (BENCHMARKS / ".venv-rejax").exists(), reason="bench_model_free.py has not made it here"
)
def test_rejax_makes_as_many_steps_and_updates(tmp_path):
    (row,) = run_bench_model_free(tmp_path, "--agents", "dqn", "--seeds", "1")
    assert (row["peer"]["env_steps"], row["peer"]["updates"]) == (1002, 2)
    assert row["ratio"] > 0


def test_the_cells_of_bench_model_free_are_runs_of_ours(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peer_cells

    for cell in peer_cells.CELLS:
        steps, env = cell.total_steps(16, quick=False), make_env(cell.env)
        fields = cell.fields(steps)
        job = make_job(AGENTS[cell.agent], env, steps, 1, 0, steps, 0, None, "auto", fields)
        plan = job.program.plan
        assert plan.env_steps(plan.periods - 1) == steps, cell.name
        per_round = cell.epochs * cell.minibatches if cell.agent == "ppo" else cell.updates
        assert plan.periods * plan.updates * per_round == cell.num_updates(steps), cell.name


@pytest.mark.slow
def test_bench_search_writes_a_row_for_every_cell(tmp_path):
    script = [sys.executable, str(BENCHMARKS / "bench_search.py"), "--repeats", "1"]
    grid = ["--batches", "2", "--simulations", "4", "--actions", "3", "--out", str(tmp_path)]
    done = subprocess.run(script + grid, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench_search.json").read_text())["rows"]
    assert len(rows) == 6
    assert all(row["ratio"] > 0 and row["same_visits"] == 1 for row in rows)


def run_bench_models(out, *options):
    script = [sys.executable, str(BENCHMARKS / "bench_models.py"), "--quick", "--repeats", "1"]
    done = subprocess.run(
        [*script, *options, "--out", str(out)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "bench_models.json").read_text())


@pytest.mark.slow
def test_bench_models_writes_a_row_for_every_part(tmp_path):
    record = run_bench_models(tmp_path, "--no-peers")
    assert [row["name"].split(",")[0] for row in record["rows"]] == [
        *["training"] * 2, *["rollouts"] * 3, *["planning"] * 2,
    ]  # fmt: skip
    assert all(row["seconds"][0] > 0 and row["gflop_per_s"] > 0 for row in record["rows"])
    assert record["ceiling_gflop_per_s"] > 0


@pytest.mark.skipif(
    not (BENCHMARKS / ".venv-mbrl-lib").exists(), reason="bench_models.py has not made it here"
)
def test_mbrl_lib_and_rl_blox_take_part(tmp_path):
    record = run_bench_models(tmp_path)
    peers = {row["peer_name"] for row in record["rows"] if "ratio" in row}
    assert {"mbrl-lib", "rl-blox"} <= peers


def run_bench_mbpo(out, *options):
    script = [sys.executable, str(BENCHMARKS / "bench_mbpo.py"), "--quick", "--repeats", "1"]
    script += ["--sizes", "Pendulum", "--seeds", "2"]
    done = subprocess.run(
        [*script, *options, "--out", str(out)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((out / "bench_mbpo.json").read_text())["rows"]
    return row


@pytest.mark.slow
def test_bench_mbpo_tells_the_whole_and_its_parts(tmp_path):
    row = run_bench_mbpo(tmp_path, "--no-peers")
    assert row["seeds"] == 2
    assert row["seconds"][0] > 0
    assert list(row["parts"]) == ["model training", "rollouts", "policy updates", "environment"]
    assert all(seconds > 0 for seconds in row["parts"].values())


@pytest.mark.skipif(
    not (BENCHMARKS / ".venv-mbrl-lib").exists(), reason="bench_models.py has not made it here"
)
def test_mbrl_libs_mbpo_takes_part(tmp_path):
    assert run_bench_mbpo(tmp_path)["ratio"] > 0


WORKER = """
import peer_process

def load(request):
    print("no answer")
    return {"doubled": 2 * request["number"]}, lambda: 1 / request["number"]

peer_process.serve(load)
"""


def test_a_peer_answers_and_tells_why_it_ended(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peer_process

    script = tmp_path / "worker.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\n{WORKER}")
    peer = peer_process.Peer(sys.executable, script, number=4)
    assert peer.info == {"doubled": 8}
    assert [peer.seconds(), peer.seconds()] == [0.25, 0.25]
    peer.close()
    peer = peer_process.Peer(sys.executable, script, number=0)
    with pytest.raises(peer_process.PeerError, match="ZeroDivisionError"):
        peer.seconds()
    peer.close()
    assert not peer_process.has(tmp_path / "nowhere", {"rejax": "0.1.3"})
