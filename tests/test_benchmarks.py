"""The benchmarks run, and the loops that they compare with learn as ours do."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mbrl_jax import AGENTS, envs, make_env, make_train
from mbrl_jax.models import tabular
from mbrl_jax.runtime.logs import config_fields
from mbrl_jax.runtime.train import make_job

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of benchmarks/; its `common` is another than that of experiments/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    other = sys.modules.pop("common", None)
    yield importlib.import_module
    sys.modules.pop("common", None)
    if other is not None:
        sys.modules["common"] = other


@pytest.mark.slow
def test_bench_dyna_writes_a_row_for_every_cell(tmp_path):
    script = [sys.executable, str(BENCHMARKS / "bench_dyna.py")]
    options = ["--quick", "--repeats", "1", "--seeds", "1", "4", "--out", str(tmp_path)]
    done = subprocess.run(script + options, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench_dyna.json").read_text())["rows"]
    peers = ["numpy rows", "Python lists"]
    if importlib.util.find_spec("numba"):
        peers += ["numba, one core", "numba, all cores"]
    ours = ["mbrl_jax", "mbrl_jax"]  # one seed and four, in the faster mode
    assert [(row["n"], row["loop"].split(", map")[0].split(", vmap")[0]) for row in rows] == [
        (n, loop) for n in (0, 5, 50) for loop in peers + ours
    ]
    assert all(row["env_steps_per_s"] > 0 for row in rows)
    for row in rows:
        assert list(row.get("against", {})) == (peers if row["loop"].startswith("mbrl_jax") else [])


LOOPS = ["numpy_rows", "python_lists", "array_loop", "numba_loop"]


def loop_of(benchmark, name):
    """A loop of peer_dyna.py; what numba compiles also as plain Python."""
    if name == "numba_loop":
        pytest.importorskip("numba")
    peer_dyna = benchmark("peer_dyna")
    if name == "array_loop":
        return lambda world, *rest: peer_dyna.Learnt(*peer_dyna.array_loop(*world, *rest))
    return getattr(peer_dyna, name)


@pytest.mark.parametrize("name", LOOPS)
def test_the_loops_of_others_learn_the_lake(lake, benchmark, name):
    peer_dyna = benchmark("peer_dyna")
    learnt = loop_of(benchmark, name)(peer_dyna.tabulate(lake), 20, 6000, 1)
    exact = envs.value_iteration(envs.tabular(lake), peer_dyna.GAMMA)[1]
    np.testing.assert_allclose(learnt.q[0].max(), exact[0].max(), atol=0.02)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("n", [0, 3])
def test_the_loops_of_others_update_as_the_book_does(benchmark, name, n):
    """Worlds where nothing is left to chance, against the reference of the tabular models."""
    peer_dyna = benchmark("peer_dyna")
    # without planning a chain that ends, of one action; with it the one pair that there is
    chain = (np.array([[1], [2], [0]]), np.array([[1.0], [-0.5], [2.0]]), np.array([[0], [0], [1]]))
    alone = (np.array([[0]]), np.array([[1.5]]), np.array([[0]]))
    successor, reward, ends = alone if n else chain
    world = peer_dyna.World(successor, reward, ends.astype(bool), 0)
    steps = 130  # beyond the limit of an episode
    learnt = loop_of(benchmark, name)(world, n, steps, 0)

    @jax.jit
    def target(q, *outcome):
        return tabular.bootstrapped(tabular.Outcome(*outcome, 1.0), q, 1, peer_dyna.GAMMA)

    q, state, length, lengths, returns = np.zeros(len(reward)), 0, 0, [], [0.0]
    for _ in range(steps):
        after, end = int(successor[state, 0]), bool(ends[state, 0])
        for _ in range(1 + n):
            outcome = np.float32(reward[state, 0]), np.int32(after), np.float32(1 - end)
            goal = float(target(np.float32(q), *outcome))
            q[state] += peer_dyna.ALPHA * (goal - q[state])
        length, returns[-1] = length + 1, returns[-1] + reward[state, 0]
        state = after
        if end or length == peer_dyna.LIMIT:
            lengths.append(length)
            returns.append(0.0)
            state = length = 0
    np.testing.assert_allclose(learnt.q[:, 0], q, rtol=2e-5)
    assert (learnt.episodes, learnt.steps) == (len(lengths), sum(lengths))
    assert learnt.returns == pytest.approx(sum(returns[:-1]))


@pytest.mark.parametrize("name", LOOPS[:2] + LOOPS[3:])
def test_the_loops_of_others_behave_as_ours(lake, benchmark, name):
    """Steps and returns of an episode, means over seeds, within their standard errors."""
    peer_dyna, loop = benchmark("peer_dyna"), loop_of(benchmark, name)
    steps, n, seeds = 1_000, 5, 24
    fields = {"step_size": peer_dyna.ALPHA, "gamma": peer_dyna.GAMMA, "planning_steps": n}
    config = AGENTS["dyna_q"].config_for("", epsilon=peer_dyna.EPSILON, **fields)
    train = make_train("dyna_q", lake, steps, steps, eval_episodes=0)
    keys = jax.random.split(jax.random.key(0), 96)
    history = jax.jit(jax.vmap(lambda key: train(key, config)[1]))(keys)
    world = peer_dyna.tabulate(lake)
    learnt = [loop(world, n, steps, seed) for seed in range(seeds)]
    theirs = {
        "train_episodes": [one.episodes for one in learnt],
        "train_length": [one.steps / one.episodes for one in learnt],
        "train_return": [one.returns / one.episodes for one in learnt],
    }
    for measure, values in theirs.items():
        own = np.asarray(history[measure]).ravel()
        error = np.hypot(own.std() / len(own) ** 0.5, np.std(values) / seeds**0.5)
        assert abs(own.mean() - np.mean(values)) < 4 * error, measure


def test_numba_shares_seeds_out_among_threads(lake, benchmark):
    pytest.importorskip("numba")
    peer_dyna = benchmark("peer_dyna")
    world = peer_dyna.tabulate(lake)
    alone = [peer_dyna.numba_loop(world, 5, 300, seed) for seed in range(5)]
    for one, other in zip(alone, peer_dyna.numba_threads(world, 5, 300, 5, 3), strict=True):
        np.testing.assert_array_equal(one.q, other.q)
        assert one[1:] == other[1:]


def test_sides_are_measured_in_turn(benchmark, tmp_path, monkeypatch):
    common, calls = benchmark("common"), []

    def side(name, times):
        return lambda: calls.append(name) or times[calls.count(name) - 1]

    own, peer = side("ours", [1.0, 2.0, 4.0]), side("theirs", [3.0, 2.0, 4.0])
    row = common.against(own, peer, 3, scale=2.0)
    assert calls == ["ours", "theirs"] * 3
    assert row["peer_seconds"] == [6.0, 4.0, 8.0]
    # the median of the pairs' ratios, not the ratio of the medians
    assert (row["ratio"], row["ratio_min"], row["ratio_max"]) == (2.0, 2.0, 6.0)
    assert common.ratio_text(row, ".1f") == "2.0 (2.0 to 6.0)"
    calls.clear()
    alone = common.against(own, None, 2)
    assert alone == {"seconds": [1.0, 2.0]}
    assert common.ratio_text(alone) == "-"
    assert common.markdown(["a", "b"], [[1, "x"]]) == "| a | b |\n|---|---|\n| 1 | x |"

    args = common.options("What it is.\n\nMore.", "quick").parse_args(["--out", str(tmp_path)])
    assert (args.repeats, args.quick) == (5, False)
    assert not hasattr(args, "no_peers")
    record = common.Record(args, "bench", devices=2)
    record.add(alone)
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert (stored["rows"], stored["devices"], stored["repeats"]) == ([alone], 2, 5)
    assert {"versions", "device", "date", "command", "load_average"} <= stored["made"].keys()
    # a row that JSON cannot hold, and a cut before the new record is in its place
    with pytest.raises(TypeError):
        record.add({"seconds": object()})
    record.data["rows"] = [alone] * 2
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            record.write()
    assert json.loads((tmp_path / "bench.json").read_text()) == stored


def test_every_benchmark_takes_its_options_from_one_place(benchmark):
    common = (BENCHMARKS / "common.py").read_text()
    for path in sorted(BENCHMARKS.glob("bench_*.py")):
        text = path.read_text()
        for word in ("argparse.ArgumentParser(", "json.dumps", "describe_machine", '"--repeats"'):
            assert word in common
            assert word not in text, path.name


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
    rows = run_bench_model_free(tmp_path, "--agents", "dqn", "--seeds", "1")
    assert [row["draw"] for row in rows] == ["own", "uniform"]
    for row in rows:
        assert (row["peer"]["env_steps"], row["peer"]["updates"]) == (1002, 2)
        assert row["ratio"] > 0


def test_the_cells_of_bench_model_free_are_runs_of_ours(benchmark):
    peer_cells = benchmark("peer_cells")
    for cell in peer_cells.CELLS:
        steps, env = cell.total_steps(16, quick=False), make_env(cell.env)
        fields = cell.fields(steps)
        job = make_job(AGENTS[cell.agent], env, steps, 1, 0, steps, 0, None, "auto", fields)
        plan = job.program.plan
        assert plan.env_steps(plan.periods - 1) == steps, cell.name
        per_round = cell.epochs * cell.minibatches if cell.agent == "ppo" else cell.updates
        assert plan.periods * plan.updates * per_round == cell.num_updates(steps), cell.name
        # more seeds than 16 take as many steps, or few would come after the warm-up
        assert cell.total_steps(256, quick=False) == steps, cell.name
        assert cell.total_steps(1, False) >= cell.total_steps(4, False) >= steps, cell.name


def test_an_accelerator_takes_all_seeds_in_one_batch(benchmark, monkeypatch):
    common = benchmark("common")
    assert [common.seed_modes(n) for n in (1, 4)] == [("map",), ("map", "vmap")]
    assert common.seed_modes(4, quick=True) == ("map",)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [common.seed_modes(n) for n in (1, 4)] == [("vmap",)] * 2


@pytest.mark.slow
def test_bench_search_writes_a_row_for_every_cell(tmp_path):
    script = [sys.executable, str(BENCHMARKS / "bench_search.py"), "--repeats", "1"]
    grid = ["--batches", "2", "--simulations", "4", "--actions", "3", "--out", str(tmp_path)]
    done = subprocess.run(script + grid, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench_search.json").read_text())["rows"]
    assert len(rows) == 6
    assert all(row["ratio"] > 0 and row["same_visits"] == 1 for row in rows)


@pytest.mark.slow
def test_bench_muzero_writes_a_row_for_every_cell_and_its_parts(tmp_path, benchmark):
    script = [sys.executable, str(BENCHMARKS / "bench_muzero.py"), "--quick", "--repeats", "1"]
    grid = ["--searches", "gumbel", "puct", "--reanalyse", "1", "--seeds", "1", "2"]
    done = subprocess.run(
        [*script, *grid, "--out", str(tmp_path)], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "bench_muzero.json").read_text())
    assert [(row["search"], row["seeds"]) for row in record["rows"]] == [
        ("gumbel", 1), ("gumbel", 2), ("puct", 1), ("puct", 2),
    ]  # fmt: skip
    for row in record["rows"]:
        assert row["ratio"] > 0
        # two rounds of a step of two environments and an update of 4 sequences of 3 states
        assert [row[name] for name in ("env_steps", "updates", "searches")] == [4, 2, 4 + 2 * 12]
        assert row["searches_per_s"] == pytest.approx(7 * row["env_steps_per_s"])
    parts = benchmark("bench_muzero").PARTS
    assert [row["search"] for row in record["parts"]] == ["gumbel", "puct"]
    for row in record["parts"]:
        assert list(row["ms"]) == [*parts, "rest"]
        assert sum(row["share"].values()) == pytest.approx(1.0)
        assert all(row["ms"][name] > 0 for name in parts)


@pytest.mark.parametrize("name", ["gumbel", "puct"])
def test_muzero_acts_alike_with_the_searches_of_mctx(benchmark, monkeypatch, name):
    """In the place of ours while something is traced inside, and no longer."""
    import mctx

    bench = benchmark("bench_muzero")
    env, called = make_env("CartPole-v1"), []
    policy = {"gumbel": "gumbel_muzero_policy", "puct": "muzero_policy"}[name]
    original = getattr(mctx, policy)
    monkeypatch.setattr(mctx, policy, lambda *x, **y: called.append(name) or original(*x, **y))
    cfg = AGENTS["muzero"].config_for(
        env.spec, **bench.TINY, search=name, num_simulations=6, batch_size=4
    )
    agent = bench.muzero.make(cfg, env.spec)
    state = agent.init(jax.random.key(0))
    obs = jax.random.normal(jax.random.key(1), (2, 4))

    def act():
        def run(key):
            before, first = agent.init_memory(2), np.zeros(2, bool)
            return agent.act(state, before, obs, first, key, np.int32(0), "eval")

        with jax.numpy_rank_promotion("allow"):  # mctx relies on it
            action, _, advice = jax.jit(run)(jax.random.key(2))
        return action, advice.weights, advice.value

    before = act()
    assert called == []
    with bench.searched_by_mctx():
        theirs = act()
    assert called == [name]
    for ours, other in zip(before, theirs, strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-5)
    for ours, other in zip(before, act(), strict=True):
        np.testing.assert_array_equal(ours, other)
    assert called == [name]


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


def test_the_robot_of_bench_mbpo_has_the_settings_of_the_preset(benchmark):
    bench_mbpo = benchmark("bench_mbpo")
    size = bench_mbpo.PAPER["HalfCheetah-v5"]
    found, preset = (
        config_fields(config)
        for config in (bench_mbpo.config(size), AGENTS["mbpo"].config_for("HalfCheetah-v5"))
    )
    # the replay holds the steps that are measured, and no more
    assert found == {**preset, "buffer_size": size["warmup"] + size["steps"]}
    assert size["steps"] % found["model_period"] == 0


WORKER = """
import peer_process

def load(request):
    print("no answer")
    return {"doubled": 2 * request["number"]}, lambda: 1 / request["number"]

peer_process.serve(load)
"""


def test_a_peer_answers_and_tells_why_it_ended(tmp_path, benchmark):
    peer_process = benchmark("peer_process")
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
