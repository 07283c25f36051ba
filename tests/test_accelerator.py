"""The queue of device jobs: what is due, what fits, and that no job takes others along."""

import functools
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
MACHINE = {"backend": "gpu", "device": "1 x a GPU", "versions": {"jax": "0"}, "cpus": 2}


@pytest.fixture
def accelerator(monkeypatch):
    """The module; its `common` is another than that of experiments/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    other = sys.modules.pop("common", None)
    module = importlib.import_module("accelerator")
    monkeypatch.setattr(module, "GRACE", 0.5)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield module
    for number, handler in handlers.items():  # `main` sets its own
        signal.signal(number, handler)
    sys.modules.pop("common", None)
    if other is not None:
        sys.modules["common"] = other


def make_job(accelerator, tmp_path, name, body, minutes=1.0, **fields):
    """A job whose script has `out`, the folder of its record, and `write(rows)`."""
    script = tmp_path / f"{name}.py"
    script.write_text(
        "import json, os, signal, subprocess, sys, time\n"
        "out = sys.argv[sys.argv.index('--out') + 1]\n"
        "def write(rows):\n"
        "    path = os.path.join(out, 'record.json')\n"
        "    open(path + '.partial', 'w').write(json.dumps({'rows': rows}))\n"
        "    os.replace(path + '.partial', path)\n" + body
    )
    code = fields.pop("code", ("mbrl_jax/prng.py",))
    return accelerator.Job(name, "a test", str(script), "", "", minutes, code, **fields)


GOOD = "write([1, 2])\n"
FAILS = "write([1])\nraise ValueError('no such thing')\n"
HANGS = (
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "write([1, 2, 3])\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
    "open({pid!r}, 'w').write(str(child.pid))\n"
    "time.sleep(300)\n"
)


def alive(pid):
    """Whether the process runs; one that nobody has waited for is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def dies(pid):
    until = time.monotonic() + 10
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pid)


def read(path):
    return json.loads(path.read_text())


def test_jobs_are_chosen_by_value_among_those_that_fit(accelerator):
    def job(name, minutes, least=None):
        return accelerator.Job(name, "", "", "", "", minutes, (), least=least)

    whole, rows, short = job("whole", 5.0), job("rows", 20.0, least=4.0), job("short", 1.0)
    jobs = [whole, rows, short]
    assert accelerator.choose(jobs, 30.0) == (whole, 10.0)  # twice what is expected
    assert accelerator.choose(jobs, 6.0) == (whole, 6.0)  # but never more than is left
    assert accelerator.choose(jobs, 5.0) == (whole, 5.0)
    # too long as a whole; the next gives rows in any time from 4 minutes on
    assert accelerator.choose(jobs, 4.9) == (rows, 4.9)
    assert accelerator.choose(jobs, 3.9) == (short, 2.0)
    assert accelerator.choose(jobs, 0.9) is None
    assert accelerator.choose([], 60.0) is None
    # what was tried with this code waits for all that was not, whatever its value
    states = {"whole": "failed", "rows": "stale", "short": "missing"}
    assert accelerator.in_order(jobs, states) == [rows, short, whole]
    assert accelerator.in_order(jobs, dict.fromkeys(states, "measured")) == []
    states |= {"rows": "cut", "short": "measured"}
    assert accelerator.in_order(jobs, states) == [whole, rows]


def test_the_hash_tells_every_change_of_the_files_and_of_no_others(accelerator, tmp_path):
    def code_hash(*paths):
        return accelerator.code_hash(paths, tmp_path)

    for name in ("a/one.py", "a/b/two.py", "other.py", "a/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    first = code_hash("a", "other.py")
    assert code_hash("other.py", "a") == first
    assert code_hash("a") != first
    (tmp_path / "a/notes.md").write_text("no code")
    assert code_hash("a", "other.py") == first
    (tmp_path / "a/b/two.py").write_text("changed")
    changed = code_hash("a", "other.py")
    assert changed != first
    (tmp_path / "a/b/two.py").rename(tmp_path / "a/b/three.py")
    assert code_hash("a", "other.py") not in (first, changed)
    # what moves from one file to the next is a change too
    (tmp_path / "x1.py").write_text("ab")
    (tmp_path / "x2.py").write_text("c")
    before = code_hash("x1.py", "x2.py")
    (tmp_path / "x1.py").write_text("a")
    (tmp_path / "x2.py").write_text("bc")
    assert code_hash("x1.py", "x2.py") != before
    with pytest.raises(FileNotFoundError):
        code_hash("nowhere.py")


def test_a_job_is_due_when_missing_or_older_than_its_code(accelerator, tmp_path, monkeypatch):
    results = tmp_path / "results" / "accelerator"
    job = make_job(accelerator, tmp_path, "good", GOOD)
    assert accelerator.state(job, results) == ("missing", "missing")
    about = accelerator.run(job, 60.0, results, MACHINE)
    assert (about["state"], about["exit"], about["rows"]) == ("done", 0, 2)
    stored = read(results / "good.json")
    assert stored["record"] == {"rows": [1, 2]}
    assert stored["job"]["command"] == f"python {job.script}"
    assert stored["job"]["machine"] == MACHINE
    assert {"date", "seconds", "limit_seconds", "measures"} <= stored["job"].keys()
    day = stored["job"]["date"]
    measured = ("measured", f"measured {day} on 1 x a GPU")
    assert accelerator.state(job, results) == measured

    other = job._replace(code=("mbrl_jax/lazy.py",))
    found = accelerator.state(other, results)
    assert found == ("stale", f"older than its code ({day} on 1 x a GPU)")
    # a failure with the new code, beside a good record of the old one
    fails = make_job(accelerator, tmp_path, "good", FAILS, code=other.code)
    accelerator.run(fails, 60.0, results, MACHINE)
    assert accelerator.state(other, results) == ("failed", f"failed {day} on 1 x a GPU, 1 row")
    assert read(results / "good.json") == stored
    assert accelerator.state(job, results) == measured
    # the queue was cut while it ran
    unfinished = read(results / "good.unfinished.json")
    unfinished["job"]["state"] = "running"
    (results / "good.unfinished.json").write_text(json.dumps(unfinished))
    assert accelerator.state(other, results).name == "cut"

    earlier = {"made": {"date": "2026-11-26", "device": "1 x an old GPU"}, "rows": []}
    (results.parent / "old.json").write_text(json.dumps(earlier))
    job = job._replace(name="another", earlier="old.json")
    text = "older than its code (2026-11-26 on 1 x an old GPU)"
    assert accelerator.state(job, results) == ("stale", text)
    monkeypatch.setattr(accelerator, "lacking", lambda extra: ["mujoco.mjx"] if extra else [])
    shown = accelerator.table([job._replace(extra="envs")], results)
    assert f"| {text}; needs the extra envs (mujoco.mjx not installed) |" in shown


def test_a_job_that_hangs_or_fails_does_not_stop_the_queue(accelerator, tmp_path, capsys):
    pid = tmp_path / "pid"
    jobs = [
        make_job(accelerator, tmp_path, "hangs", HANGS.format(pid=str(pid)), minutes=0.025),
        make_job(accelerator, tmp_path, "fails", FAILS),
        make_job(accelerator, tmp_path, "silent", "pass\n"),
        make_job(accelerator, tmp_path, "long", GOOD, minutes=100.0),
        make_job(accelerator, tmp_path, "good", GOOD),
    ]
    ended = accelerator.queue(jobs, 3.0, tmp_path, MACHINE)
    states = {about["name"]: about["state"] for about in ended}
    assert states == {"hangs": "cut", "fails": "failed", "silent": "failed", "good": "done"}
    assert dies(int(pid.read_text()))
    cut = read(tmp_path / "hangs.unfinished.json")
    assert cut["record"] == {"rows": [1, 2, 3]}  # those that it wrote before it hung
    assert 1.0 < cut["job"]["seconds"] < 30.0
    failed = read(tmp_path / "fails.unfinished.json")
    assert failed["job"]["exit"] == 1
    assert "ValueError: no such thing" in failed["job"]["output_tail"]
    assert failed["record"] == {"rows": [1]}
    assert read(tmp_path / "silent.unfinished.json")["record"] == {}
    assert not (tmp_path / "fails.json").exists()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["start", "cut", "start", "failed", "start",
                                                 "failed", "start", "done", "1"]  # fmt: skip
    assert said[3].endswith("exit 1: ValueError: no such thing")
    assert said[-1].startswith("1 jobs wait, none of which fits")
    # the next attempt ends well, and takes the place of the one that did not
    mended = make_job(accelerator, tmp_path, "fails", GOOD)
    accelerator.run(mended, 60.0, tmp_path, MACHINE)
    assert (tmp_path / "fails.json").exists()
    assert not (tmp_path / "fails.unfinished.json").exists()


def test_a_job_runs_with_its_variables_and_the_flags_of_the_user(
    accelerator, tmp_path, monkeypatch
):
    body = "write([os.environ['XLA_FLAGS'], os.environ['SIZE']])\n"
    own = {"XLA_FLAGS": "--own=1", "SIZE": "2"}
    job = make_job(accelerator, tmp_path, "flags", body, environment=own)
    monkeypatch.setenv("XLA_FLAGS", "--users=3 --own=4")
    about = accelerator.run(job, 60.0, tmp_path, MACHINE)
    assert read(tmp_path / "flags.json")["record"]["rows"] == ["--own=1 --users=3 --own=4", "2"]
    wanted = f"XLA_FLAGS='--own=1 --users=3 --own=4' SIZE='2' python {job.script}"
    assert about["command"] == wanted


def test_fewer_rows_of_the_same_code_do_not_replace_more(accelerator, tmp_path):
    stop = "write(list(range({n})))\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)\n"
    for n, rows in ((5, 5), (2, 5), (7, 7)):
        job = make_job(accelerator, tmp_path, "cut", stop.format(n=n))
        assert accelerator.run(job, 60.0, tmp_path, MACHINE)["state"] == "cut"
        assert len(read(tmp_path / "cut.unfinished.json")["record"]["rows"]) == rows
    job = make_job(accelerator, tmp_path, "cut", stop.format(n=1), code=("mbrl_jax/lazy.py",))
    accelerator.run(job, 60.0, tmp_path, MACHINE)
    assert len(read(tmp_path / "cut.unfinished.json")["record"]["rows"]) == 1


def test_records_are_whole_at_any_time(accelerator, tmp_path):
    body = (
        "for n in range(1, 41):\n"
        "    write([{'n': i, 'text': 'x' * 5_000} for i in range(n)])\n"
        "    time.sleep(0.1)\n"
    )
    job = make_job(accelerator, tmp_path, "grows", body)
    seen, ended = set(), threading.Event()

    def look():
        while not ended.is_set():
            for path in tmp_path.glob("grows*.json"):
                try:
                    stored = read(path)
                except FileNotFoundError:  # the other name has taken its place
                    continue
                assert stored["job"]["rows"] == len(stored["record"].get("rows", []))
                seen.add(stored["job"]["rows"])

    errors = []

    def watch():
        try:
            look()
        except Exception as error:
            errors.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    accelerator.run(job, 60.0, tmp_path, MACHINE)
    time.sleep(0.2)
    ended.set()
    watcher.join()
    assert not errors
    assert 40 in seen
    assert len(seen) >= 3  # rows were there while it ran


def test_jobs_beside_one_another_share_a_lock(accelerator, tmp_path):
    """Each waits until the other has started, and then holds the lock alone."""
    body = (
        "import fcntl\n"
        "own, other = sys.argv[1:3]\n"
        "open(own, 'w').close()\n"
        "while not os.path.exists(other):\n"
        "    time.sleep(0.05)\n"
        "with open(os.environ['MBRL_JAX_BENCHMARK_LOCK'], 'a') as file:\n"
        "    fcntl.flock(file, fcntl.LOCK_EX)\n"
        "    begun = time.time()\n"
        "    time.sleep(0.3)\n"
        "    write([begun, time.time(), os.environ['XLA_PYTHON_CLIENT_PREALLOCATE']])\n"
    )
    here, there = tmp_path / "here", tmp_path / "there"
    jobs = [
        make_job(accelerator, tmp_path, name, body)._replace(options=f"{own} {other}")
        for name, own, other in (("one", here, there), ("two", there, here))
    ]
    ended = accelerator.queue(jobs, 3.0, tmp_path, MACHINE, beside=2)
    assert {about["state"] for about in ended} == {"done"}
    assert all("BENCHMARK_LOCK" not in about["command"] for about in ended)
    rows = sorted(read(tmp_path / f"{job.name}.json")["record"]["rows"] for job in jobs)
    assert rows[0][1] <= rows[1][0]
    assert {row[2] for row in rows} == {"false"}


def test_a_signal_to_jobs_beside_one_another_ends_them_all(accelerator, tmp_path):
    pids = [tmp_path / f"pid{n}" for n in range(2)]
    jobs = [
        make_job(accelerator, tmp_path, f"hangs{n}", HANGS.format(pid=str(pid)))
        for n, pid in enumerate(pids)
    ]
    before = signal.signal(signal.SIGALRM, accelerator.stop)
    signal.setitimer(signal.ITIMER_REAL, 2.5)
    try:
        with pytest.raises(SystemExit):
            accelerator.queue(jobs, 3.0, tmp_path, MACHINE, beside=2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for n, pid in enumerate(pids):
        assert dies(int(pid.read_text()))
        stored = read(tmp_path / f"hangs{n}.unfinished.json")
        assert (stored["job"]["state"], stored["record"]) == ("cut", {"rows": [1, 2, 3]})


def test_a_signal_to_the_queue_ends_its_job_and_keeps_the_rows(accelerator, tmp_path):
    pid = tmp_path / "pid"
    job = make_job(accelerator, tmp_path, "hangs", HANGS.format(pid=str(pid)))

    before = signal.signal(signal.SIGALRM, accelerator.stop)
    signal.setitimer(signal.ITIMER_REAL, 2.5)
    try:
        with pytest.raises(SystemExit):
            accelerator.run(job, 60.0, tmp_path, MACHINE)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert dies(int(pid.read_text()))
    stored = read(tmp_path / "hangs.unfinished.json")
    assert (stored["job"]["state"], stored["record"]) == ("cut", {"rows": [1, 2, 3]})


def test_a_signal_reaches_the_job_in_every_mode(accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "smoke", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        accelerator.main(["--smoke", "--out", str(tmp_path)])
    assert ended.value.code == 128 + signal.SIGTERM


def test_a_toy_of_several_jobs_runs_once(accelerator, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "machine", lambda smoke: MACHINE)
    body = "write([os.environ['JAX_PLATFORMS'], *sys.argv[1:-2]])\n"
    one = make_job(accelerator, tmp_path, "one", body)._replace(options="--full", toy="--toy 1")
    two = one._replace(name="two", toy="--toy 2")
    three = one._replace(name="three", options="--other")
    ended = accelerator.smoke([one, two, three], tmp_path)
    assert [about["name"] for about in ended] == ["one", "two"]
    assert read(tmp_path / "one.json")["record"]["rows"] == ["cpu", "--toy", "1"]
    said = capsys.readouterr().out.splitlines()
    assert said[2] == "done three: the same toy as one"


def test_the_list_names_every_job_and_no_run_starts_without_an_accelerator(
    accelerator, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(accelerator, "machine", functools.cache(accelerator.machine))
    out = tmp_path / "accelerator"
    assert accelerator.main(["--list", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("no accelerator here; ")
    names = re.findall(r"^\| \d+ \| (\w+) \|", shown, re.MULTILINE)
    assert names == [job.name for job in accelerator.JOBS]
    assert shown.count("| missing") == len(names)
    assert accelerator.main(["--minutes", "5", "--out", str(out)]) == 2
    refused = capsys.readouterr()
    assert (refused.out, len(refused.err.splitlines())) == ("", 1)
    assert "no accelerator" in refused.err
    assert not out.exists()
    out.mkdir()
    (out / "models.json").write_text("<<<<<<< HEAD")
    with pytest.raises(SystemExit, match=r"models\.json is damaged .* mend or remove it"):
        accelerator.main(["--list", "--out", str(out)])


def test_bad_options_are_refused(accelerator, capsys):
    committed = str(BENCHMARKS / "results" / "accelerator")
    for options, word in (
        (["--minutes", "0"], "--minutes 0"),
        (["--minutes", "nan"], "--minutes nan"),
        (["--minutes", "5", "--beside", "0"], "--beside 0"),
        (["--minutes", "5", "--only", "nothing"], "--only nothing"),
        (["--smoke", "--out", committed], "committed"),
        (["--smoke", "--list"], "--list"),
        ([], "required"),
    ):
        with pytest.raises(SystemExit) as ended:
            accelerator.main(options)
        assert ended.value.code == 2
        assert word in capsys.readouterr().err


class Parsed(Exception):
    pass


def test_the_scripts_take_the_options_of_every_job(accelerator, monkeypatch, tmp_path):
    import argparse

    import tyro

    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "experiments")])
    original = argparse.ArgumentParser.parse_args

    def parse(self, *args):
        original(self, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    assert len({job.name for job in accelerator.JOBS}) == len(accelerator.JOBS)
    for job in accelerator.JOBS:
        assert accelerator.code_hash(job.code)
        assert job.extra in ("", *importlib.import_module("accelerator_jobs").EXTRAS)
        module = importlib.import_module(Path(job.script).stem)
        for smoke in (False, True):
            words = accelerator.command(job, 300.0, tmp_path, smoke)
            assert words[0] == job.script
            assert "{" not in " ".join(words)
            options = [*words[1:], "--out", str(tmp_path)]
            if job.script.startswith("experiments"):
                found = tyro.cli(module.Options, args=options)
                assert found.seconds is None or found.seconds == 210.0  # before it is killed
                continue
            monkeypatch.setattr(sys, "argv", [job.script, *options])
            with pytest.raises(Parsed):
                module.main()


def smoke(tmp_path, *names):
    script = [sys.executable, str(BENCHMARKS / "accelerator.py"), "--smoke"]
    done = subprocess.run(
        [*script, "--out", str(tmp_path), *names], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_job_runs_at_toy_size_on_the_cpu(tmp_path):
    (line,) = smoke(tmp_path, "--only", "search_gumbel_trivial")
    assert re.match(r"done search_gumbel_trivial: 1 row in \d+ s, ", line)
    stored = read(tmp_path / "search_gumbel_trivial.json")
    assert stored["record"]["rows"][0]["same_visits"] == 1
    assert stored["job"]["machine"]["backend"] == "cpu"
    assert (stored["record"]["seeds"], stored["record"]["levels"]) == ([], [])
    words = [word for word in shlex.split(stored["job"]["command"]) if "=" not in word]
    assert words[:2] == ["python", "benchmarks/bench_search.py"]


@pytest.mark.slow
def test_every_job_runs_at_toy_size_on_the_cpu(accelerator, tmp_path):
    lines = smoke(tmp_path)
    assert [line.split()[1].rstrip(":") for line in lines] == [job.name for job in accelerator.JOBS]
    assert all(line.startswith("done ") for line in lines)
