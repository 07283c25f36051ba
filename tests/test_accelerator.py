"""The queue of device jobs: what is due, what fits, and what the command line says."""

import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import BENCHMARKS, FAILS, GOOD, MACHINE, ROOT, make_job, read


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
