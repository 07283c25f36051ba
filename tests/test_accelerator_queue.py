"""How the queue runs jobs: no job takes others along, and rows are kept however one ends."""

import os
import signal
import threading
import time

import pytest
from jobs import FAILS, GOOD, HANGS, MACHINE, dies, make_job, read


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
