"""The queue of what is not measured on an accelerator yet, or is older than the code it measures.

    python benchmarks/accelerator.py --list
    python benchmarks/accelerator.py --minutes 9
    python benchmarks/accelerator.py --minutes 9 --only search_800 mbpo_cheetah
    python benchmarks/accelerator.py --minutes 4 --beside 10
    python benchmarks/accelerator.py --smoke

The jobs are in accelerator_jobs.py. --minutes runs the most valuable ones that fit, one after
another, each in a process of its own with a limit, at which it is killed with all its children; a
job that fails or hangs stops nothing else. Most of a job's time is compilation: with --beside so
many jobs compile side by side and measure in turn; runs that learn are left out then, since they
hold the device. --smoke runs every job at toy size on the CPU.

Records lie in benchmarks/results/accelerator/: NAME.json of a job that ended well, and
NAME.unfinished.json of one that was cut or failed, which is written while the job runs, so that a
cut of the queue itself leaves the rows so far. Each holds what the script wrote, and the job:
command, date, device, versions, how it ended, and a hash of the files that it measures. A job is
due again when that hash is no longer theirs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from accelerator_jobs import JOBS, ROOT, Job, choose, code_hash, in_order, lacking
from common import ALONE, HERE, markdown

from mbrl_jax.runtime.logs import write_whole

RESULTS = HERE / "results" / "accelerator"
RUNS = Path("runs", "accelerator")
"""Run folders, which git ignores; relative to the root, where the jobs run."""
GRACE = 10.0
"""Seconds between the request to stop and the kill."""
SMOKE_SECONDS = 600.0
ON_CPU = {"JAX_PLATFORMS": "cpu"}
"""The environment of a smoke run."""
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""The environment of jobs that share the device's memory."""
STOP_EARLY = 90.0
"""Seconds before its limit at which a run that saves itself is asked to stop."""
DESCRIBE = """
import json, jax
from mbrl_jax.runtime.logs import describe_machine
made = describe_machine()
print(json.dumps({"backend": jax.default_backend(),
                  **{name: made[name] for name in ("device", "versions", "python", "cpus")}}))
"""


class State(NamedTuple):
    """What is known of a job: one of the states of `in_order`, and that in words."""

    name: str
    text: str


def machine(smoke: bool = False) -> dict[str, Any]:
    """Backend, device and versions, as another process sees them: this one takes no device."""
    variables = {**os.environ, **(ON_CPU if smoke else {})}
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE], capture_output=True, text=True, cwd=ROOT, env=variables
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"error: this machine cannot be described: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def read(path: Path) -> dict[str, Any] | None:
    """A record, None where there is none."""
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise SystemExit(f"error: {path} is damaged ({error}); mend or remove it") from None


def written(folder: str) -> dict[str, Any]:
    """What a script has written so far into the folder of its record."""
    found = sorted(Path(folder).glob("*.json"))
    return json.loads(found[0].read_text()) if found else {}


def num_rows(record: Mapping[str, Any]) -> int:
    """The rows of all tables of a record."""
    return sum(len(table) for table in record.values() if isinstance(table, list))


def state(job: Job, results: Path = RESULTS) -> State:
    """What the records say of a job."""
    now = code_hash(job.code)
    measured = read(results / f"{job.name}.json")
    tried = read(results / f"{job.name}.unfinished.json")
    if measured is not None and measured["job"]["code"]["hash"] == now:
        return State("measured", f"measured {_when(measured)}")
    if tried is not None and tried["job"]["code"]["hash"] == now:
        rows = num_rows(tried["record"])
        how = "failed" if tried["job"]["state"] == "failed" else "cut"
        return State(how, f"{how} {_when(tried)}, {rows} row{'s' * (rows != 1)}")
    earlier = read(results.parent / job.earlier) if job.earlier else None
    for old in (measured, tried, earlier):
        if old is not None:
            return State("stale", f"older than its code ({_when(old)})")
    return State("missing", "missing")


def _when(result: Mapping[str, Any]) -> str:
    made = result["job"] | result["job"]["machine"] if "job" in result else result["made"]
    return f"{made['date']} on {made['device']}"


def table(jobs: Sequence[Job], results: Path = RESULTS) -> str:
    """All jobs with their rank, expected minutes and state."""
    rows = []
    for rank, job in enumerate(jobs, 1):
        text = state(job, results).text
        if missing := lacking(job.extra):
            text += f"; needs the extra {job.extra} ({', '.join(missing)} not installed)"
        rows.append([rank, job.name, f"{job.minutes:g}", text, job.measures])
    return markdown(["value", "job", "minutes", "state", "what it measures"], rows)


def command(job: Job, seconds: float, runs: Path, smoke: bool) -> list[str]:
    """The script and its options, for a limit in seconds; without the folder of its record."""
    stop = max(seconds - STOP_EARLY, seconds / 2)
    filled = {
        "processes": max(1, min(14, (os.cpu_count() or 1) - 2)), "seconds": int(stop),
        "run": runs / f"{job.name}_{code_hash(job.code)[:8]}",
    }  # fmt: skip
    words = (job.toy if smoke else job.options).split()
    return [job.script, *(word.format(**filled) for word in words)]


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its children, which have the group to themselves."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(
    job: Job,
    seconds: float,
    results: Path,
    described: Mapping[str, Any],
    smoke: bool = False,
    lock: Path | None = None,
    halt: threading.Event | None = None,
) -> dict[str, Any]:
    """Runs a job and writes its record as it goes.

    Args:
      job: to run.
      seconds: after which it is killed.
      results: folder of the record.
      described: from `machine`.
      smoke: at toy size.
      lock: the file by which jobs beside this one measure in turn.
      halt: the job is cut once it is set.

    Returns:
      The `job` part of the record; `state` is "done", "cut" or "failed".
    """
    results.mkdir(parents=True, exist_ok=True)
    words = command(job, seconds, results / "runs" if smoke else RUNS, smoke)
    own = dict(ON_CPU if smoke else job.environment)
    own |= SHARED if lock else {}
    if flags := os.environ.get("XLA_FLAGS"):  # the user's win
        own["XLA_FLAGS"] = f"{own.get('XLA_FLAGS', '')} {flags}".strip()
    whole, unfinished = (results / f"{job.name}{end}.json" for end in ("", ".unfinished"))
    about: dict[str, Any] = {
        "name": job.name, "measures": job.measures, "state": "running",
        "command": " ".join([*(f"{k}='{v}'" for k, v in own.items()), "python", *words]),
        "date": time.strftime("%Y-%m-%d"), "machine": dict(described),
        "limit_seconds": round(seconds, 1),
        "code": {"paths": list(job.code), "hash": code_hash(job.code)},
    }  # fmt: skip
    before = read(unfinished)
    kept = 0  # rows of an attempt with the same code, which fewer do not replace
    if before is not None and before["job"]["code"] == about["code"]:
        kept = num_rows(before["record"])
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "output.txt")

        def publish(state: str, code: int | None = None) -> None:
            found = written(folder)
            if state == "done" and not num_rows(found):
                state = "failed"
            took = round(time.monotonic() - started, 1)
            about.update(state=state, exit=code, seconds=took, rows=num_rows(found))
            if state in ("cut", "failed"):
                about["output_tail"] = log.read_text(errors="replace")[-2_000:]
            text = json.dumps({"job": about, "record": found}, indent=1) + "\n"
            if state == "done":
                write_whole(whole, text)
                unfinished.unlink(missing_ok=True)
            elif about["rows"] >= kept:
                write_whole(unfinished, text)

        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *words, "--out", folder], cwd=ROOT, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **own, **({ALONE: str(lock)} if lock else {})},
            )  # fmt: skip
            seen = -1
            try:
                while (left := seconds - (time.monotonic() - started)) > 0:
                    if halt is not None and halt.is_set():
                        break
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(min(left, 1.0))
                        break
                    if (rows := num_rows(written(folder))) != seen:
                        seen = rows
                        publish("running")
                ended = process.poll()
            except BaseException:
                end(process)
                publish("cut")
                raise
            end(process)
            if ended == 0:
                publish("done", 0)
            elif ended in (None, -signal.SIGTERM, 128 + signal.SIGTERM):
                publish("cut", ended)  # at the limit, or by itself before it
            else:
                publish("failed", ended)
    return about


def ending(about: Mapping[str, Any], results: Path) -> str:
    """One line about a job that has ended."""
    rows = f"{about['rows']} row{'s' * (about['rows'] != 1)}"
    text = f"{about['state']} {about['name']}: {rows} in {about['seconds']:.0f} s"
    if about["state"] == "failed":
        tail = about["output_tail"].strip().splitlines() or ["no output"]
        return f"{text}, exit {about['exit']}: {tail[-1]}"
    kind = "" if about["state"] == "done" else ".unfinished"
    return f"{text}, {results / (about['name'] + kind + '.json')}"


def queue(
    waiting: Sequence[Job], minutes: float, results: Path, described: Mapping[str, Any],
    beside: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """Runs jobs in order as long as one fits into the minutes; -> the `job` parts of the records.

    Args:
      waiting: in order.
      minutes: for all of them.
      results: folder of the records.
      described: from `machine`.
      beside: jobs at once.
    """
    until, waiting = time.monotonic() + 60 * minutes, list(waiting)
    choosing, halt, ended = threading.Lock(), threading.Event(), []

    def left() -> float:
        return max(until - time.monotonic(), 0.0) / 60

    def work(lock: Path | None) -> None:
        while not halt.is_set():
            with choosing:
                found = choose(waiting, left())
                if found is None:
                    return
                job, most = found
                waiting.remove(job)
                print(f"start {job.name}, at most {most:.1f} of {left():.1f} minutes: "
                      f"{job.measures}", flush=True)  # fmt: skip
            # what ends a process takes a while, too
            about = run(job, max(60 * most - GRACE, 1.0), results, described, False, lock, halt)
            print(ending(about, results), flush=True)
            ended.append(about)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(beside) as pool:
        lock = Path(folder, "lock") if beside > 1 else None
        workers = [pool.submit(work, lock) for _ in range(beside)]
        try:
            for worker in workers:
                worker.result()
        finally:
            halt.set()
    print(f"{len(waiting)} jobs wait, none of which fits into {left():.1f} minutes"
          if waiting else "no job waits", flush=True)  # fmt: skip
    return ended


def smoke(jobs: Sequence[Job], results: Path) -> list[dict[str, Any]]:
    """Runs jobs at toy size on the CPU, one after another; what is the same toy runs once."""
    described = machine(smoke=True)
    ended: dict[tuple[str, str], dict[str, Any]] = {}
    for job in jobs:
        toy = (job.script, job.toy)
        if toy in ended:
            print(f"{ended[toy]['state']} {job.name}: the same toy as {ended[toy]['name']}")
            continue
        ended[toy] = run(job, SMOKE_SECONDS, results, described, smoke=True)
        print(ending(ended[toy], results), flush=True)
    return list(ended.values())


def stop(signum: int, frame: Any) -> None:
    """Handles a signal to the queue, which must not leave its job running."""
    raise SystemExit(128 + signum)


def main(argv: Sequence[str] | None = None) -> int:
    """-> 0; 1 where a job failed or a toy did not end well; 2 for bad options, no accelerator."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="all jobs and their state")
    what.add_argument("--minutes", type=float, help="runs what fits into so many")
    what.add_argument("--smoke", action="store_true", help="every job at toy size on the CPU")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these jobs, measured or not")
    parser.add_argument("--beside", type=int, default=1, help="jobs at once, of those that measure")
    parser.add_argument("--out", type=Path, help="folder of the records")
    args = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    names = {job.name: job for job in JOBS}
    if unknown := [name for name in args.only or () if name not in names]:
        parser.error(f"--only {' '.join(unknown)}: no such job; --list shows them")
    if args.minutes is not None and not 0 < args.minutes < float("inf"):
        parser.error(f"--minutes {args.minutes:g}: expected a number above 0")
    if args.beside < 1:
        parser.error(f"--beside {args.beside}: expected 1 or more")
    if args.smoke:
        out = (args.out or Path(tempfile.mkdtemp(prefix="accelerator_"))).resolve()
        if out.is_relative_to(RESULTS.parent):
            parser.error(f"--out {out}: holds committed results; a smoke run takes another folder")
        ended = smoke([job for job in JOBS if not args.only or job.name in args.only], out)
        return int(any(about["state"] != "done" for about in ended))
    out = args.out or RESULTS
    states = {job.name: state(job, out).name for job in JOBS}
    described = machine()
    if args.list:
        due = sum(name != "measured" for name in states.values())
        here = described["device"]
        if described["backend"] == "cpu":
            here = "no accelerator here"
        print(f"{here}; {due} of {len(JOBS)} jobs are due\n\n{table(JOBS, out)}")
        return 0
    if described["backend"] == "cpu":
        print("error: --minutes: JAX finds no accelerator here; --smoke runs on the CPU, --list "
              "shows what is due", file=sys.stderr)  # fmt: skip
        return 2
    waiting = in_order(JOBS, states)
    if args.only:
        waiting = [job for job in JOBS if job.name in args.only]
    for job in list(waiting):
        if missing := lacking(job.extra):
            waiting.remove(job)
            print(f"skip {job.name}: needs the extra {job.extra}, {', '.join(missing)} not "
                  "installed", flush=True)  # fmt: skip
        elif args.beside > 1 and job.script.startswith("experiments/"):
            waiting.remove(job)
            print(f"skip {job.name}: learns, which needs the device for itself", flush=True)
    ended = queue(waiting, args.minutes, out, described, args.beside)
    failed = [about["name"] for about in ended if about["state"] == "failed"]
    print(f"{len(ended)} ran, {len(failed)} failed{': ' * bool(failed)}{', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
