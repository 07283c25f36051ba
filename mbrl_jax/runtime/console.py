"""What a command reads and prints: its options, its output, and streams that fail."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

import tyro
from rich.console import Console

from mbrl_jax.types import InputError


def guarded(command: Callable[[], int]) -> int:
    """The exit code of `command`, whatever becomes of standard output and error meanwhile.

    128 + SIGPIPE where nobody reads the output any longer (`| head -1`), 2 where a full disk does
    not take it. Either stream may be closed, or of an encoding that lacks some letters.
    """
    _open_streams()
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO) or error.filename is not None:
            raise
        tell(f"error: cannot write the output: {error.strerror}")
        return 2
    finally:
        _drop_unwritten()


def tell(text: Any) -> None:
    """Prints to standard error, where anybody reads that."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class Output(Console):
    """A rich console that tells its caller of a closed pipe, where rich ends the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def parse(kind: Any, args: list[str], prog: str) -> Any:
    """tyro's parser, its boxed complaint folded into one line."""
    # what tyro draws depends on the terminal; these have one width, one encoding and no colours
    nowhere, said = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
        for _ in range(2)
    )
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=args, prog=prog)
    except SystemExit as stop:
        failed = bool(stop.code)
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    if not failed:  # help: again, as the user's terminal wants it
        tyro.cli(kind, args=args, prog=prog)
    said.seek(0)
    raise InputError(_one_line(said.read(), prog)) from None


def _one_line(box: str, prog: str) -> str:
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    lines = lines or box.split("\n")
    rule = next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))
    near = re.findall(r"^(--[\w.-]+)", "\n".join(lines[rule:]), flags=re.MULTILINE)
    hint = f"; did you mean {' or '.join(near[:3])}?" if "Perhaps" in box and near else ""
    return f"{' '.join(' '.join(lines[:rule]).split())}{hint} (see {prog} --help)"


def _open_streams() -> None:
    """Makes standard output and error take whatever is printed."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller; else the next file gets its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # letters that its encoding lacks


def _drop_unwritten() -> None:
    """Sends what a stream could not write to nowhere, or Python would try again as it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
