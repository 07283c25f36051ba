"""Peers in processes of their own: the pipe between a benchmark and its worker, and environments.

A request and its answer are one line of JSON each. `load` prepares a run and tells about it, `run`
makes it once and gives the seconds. Workers import this file too, so it needs nothing installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Loader = Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[[], float]]]


class PeerError(RuntimeError):
    """A worker ended, with the end of what it wrote to stderr."""


class Peer:
    """A worker that has loaded one run; idle until it is asked for `seconds`."""

    def __init__(
        self,
        python: str | Path,
        script: Path,
        environment: Mapping[str, str] | None = None,
        **request: Any,
    ):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in `close`
        # what leads our own interpreter to its packages must not lead another one there
        own = Path(python) == Path(sys.executable)
        variables = {k: v for k, v in os.environ.items() if own or k != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [str(python), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, env=variables | dict(environment or {}),
        )  # fmt: skip
        try:
            self.info = self._ask({"command": "load", **request})
        except BaseException:
            self.close()
            raise

    def seconds(self) -> float:
        """One run, timed by the worker itself."""
        return self._ask({"command": "run"})["seconds"]

    def close(self) -> None:
        if self._process.stdin and not self._process.stdin.closed:
            self._process.kill()
            self._process.communicate()
        self._errors.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            raise PeerError(f"{self._process.args[1]} ended:\n{self._errors.read()[-3000:]}")
        return json.loads(answer)


def serve(load: Loader) -> None:
    """The worker's side: answers requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr  # whatever else is printed is no answer
    run: Callable[[], float] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["command"] == "load":
            answer, run = load(request)
        else:
            assert run is not None
            answer = {"seconds": run()}
        print(json.dumps(answer), file=answers, flush=True)


def faster_threads(torch: Any, run: Callable[[], float]) -> dict[int, float]:
    """Takes one thread or all of them, whichever makes `run` faster; -> the seconds of each."""
    tried = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        run()
        tried[threads] = run()
    torch.set_num_threads(min(tried, key=lambda threads: tried[threads]))
    return tried


def interpreter(folder: Path) -> Path:
    """The Python of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def has(folder: Path, versions: dict[str, str]) -> bool:
    """Whether the virtual environment exists and holds these versions."""
    python = interpreter(folder)
    if not python.exists():
        return False
    code = (
        "import importlib.metadata as m, json, sys\n"
        "names = json.loads(sys.argv[1])\n"
        "print(json.dumps({name: m.version(name) for name in names}))"
    )
    command = [str(python), "-c", code, json.dumps(list(versions))]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode == 0 and json.loads(done.stdout) == versions


def provide(folder: Path, versions: dict[str, str], *more: str, loose: str = "") -> None:
    """Makes the virtual environment where it is missing, with these packages and `more`.

    `loose` is the one among them whose own requirements are left out, since they do not install.
    """
    if has(folder, versions):
        return
    wanted = [f"{name}=={version}" for name, version in versions.items()]
    print(f"making {folder.name} with {', '.join(wanted)} (once)", flush=True)
    if not interpreter(folder).exists():
        venv.create(folder, with_pip=True)
    pip = [str(interpreter(folder)), "-m", "pip", "install", "--quiet"]
    firm = [name for name in wanted if name.split("==")[0] != loose]
    subprocess.run([*pip, *firm, *more], check=True)
    if loose:
        subprocess.run([*pip, "--no-deps", f"{loose}=={versions[loose]}"], check=True)
