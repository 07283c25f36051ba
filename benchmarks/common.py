"""What the benchmarks share: options, sides measured in turn, records and tables.

Workers of peers import this file too, so it needs nothing installed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FLAGS = {
    "quick": "tiny sizes, to see that it runs; makes no virtual environment",
    "no-peers": "our side alone",
    "no-install": "makes no virtual environment; peers that are not there are left out",
}


def options(doc: str, *flags: str, repeats: int = 5) -> argparse.ArgumentParser:
    """The options of every benchmark, and those of `FLAGS` that are named.

    Args:
      doc: the script's docstring, whose first line is its description.
      flags: names in `FLAGS`.
      repeats: the default of --repeats.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=repeats, help="measurements of each side")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the record")
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true", help=FLAGS[flag])
    return parser


def start_jax(devices: int | None = None) -> None:
    """Sets JAX's CPU devices, before its backend starts, and lets nothing come from a cache."""
    import jax

    if devices is not None:
        jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_enable_compilation_cache", False)


def seed_modes(seeds: int, quick: bool = False) -> tuple[str, ...]:
    """Our ways to run so many seeds, for a try of each; an accelerator takes them in one batch."""
    import jax

    if jax.default_backend() != "cpu":
        return ("vmap",)
    return ("map",) if seeds == 1 or quick else ("map", "vmap")


ALONE = "MBRL_JAX_BENCHMARK_LOCK"
"""The environment variable with the path of the lock of `alone`."""
_held = 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Holds the machine while something is measured, where other benchmarks run beside this one.

    They compile side by side and measure in turn, if all find the same file's path in the
    environment variable ALONE; without it nothing is waited for. It may be entered again inside.
    """
    global _held
    path = os.environ.get(ALONE)
    with open(path, "a") if path and not _held else contextlib.nullcontext() as file:
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        _held += 1
        try:
            yield
        finally:
            _held -= 1


def timed(fn: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds until what `fn` gives, a tree of JAX arrays, is there; and that."""
    import jax

    start = time.perf_counter()
    out = jax.block_until_ready(fn(*args))
    return time.perf_counter() - start, out


def launched(run: Callable[[], Any]) -> tuple[int, int]:
    """Kernels that one run starts on the accelerator, copies among them; numbers the host reads."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        names = [
            event.name for plane in planes if plane.name.startswith("/device:")
            for line in plane.lines if line.name.startswith("Stream") for event in line.events
        ]  # fmt: skip
    read = sum("D2H" in name for name in names)
    return len(names) - read, read


def compiled_period(job: Any) -> tuple[float, Callable[[], float]]:
    """Seconds of compiling the first period of a `runtime.train.Job`, and what runs it again.

    Each call goes on with the run that the one before left, and returns its seconds; the first
    call, which may allocate, is made here.
    """
    import jax.numpy as jnp

    from mbrl_jax.runtime.train import traced

    init, chunk = job.functions()
    config, index = traced(job.config), jnp.int32(0)
    compile_s, ready = timed(lambda: chunk.lower(job.like(), config, index).compile())
    holder = [init(job.keys(), config)]  # the run, which every call gives away

    def run() -> float:
        took, (holder[0], _) = timed(ready, holder[0], config, index)
        return took

    run()
    return compile_s, run


def alternate(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """The seconds of all sides, [repeats] each, one of each in turn.

    Args:
      sides: name -> a function that runs it once and returns its seconds.
      repeats: measurements of each side.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    with alone():
        for _ in range(repeats):
            for name, run in sides.items():
                times[name].append(run())
    return times


def ratios(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times as much the other side is as ours, pair by pair: median, least, greatest."""
    pairs = [b / a for a, b in zip(own, other, strict=True)]
    spread = {"ratio_min": min(pairs), "ratio_max": max(pairs)}
    return {"ratio": statistics.median(pairs), **spread}


def against(
    run: Callable[[], float],
    peer: Callable[[], float] | None,
    repeats: int,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Our seconds and a peer's, in turn, with their ratios; ours alone without a peer.

    Args:
      run: runs ours once and returns its seconds.
      peer: likewise; None where there is no peer.
      repeats: measurements of each side.
      scale: how many times a run of the peer is to be counted.

    Returns:
      A row with `seconds`, and with a peer `peer_seconds` and the fields of `ratios`.
    """
    if peer is None:
        return dict(alternate({"seconds": run}, repeats))
    times = alternate({"seconds": run, "peer_seconds": peer}, repeats)
    times["peer_seconds"] = [scale * seconds for seconds in times["peer_seconds"]]
    return {**times, **ratios(times["seconds"], times["peer_seconds"])}


def ratio_text(row: Mapping[str, Any], form: str = ".2f") -> str:
    """A row's median ratio with the least and the greatest; a dash where there is none."""
    if "ratio" not in row:
        return "-"
    middle, least, most = (format(row[f"ratio{end}"], form) for end in ("", "_min", "_max"))
    return f"{middle} ({least} to {most})"


class Record:
    """What a benchmark found and what made it; written as JSON whenever a row is added."""

    def __init__(self, args: argparse.Namespace, name: str, **fields: Any):
        """Describes the machine, JAX's devices among it, and how busy others keep it."""
        from mbrl_jax.runtime.logs import describe_machine

        made = {**describe_machine(), "load_average": round(os.getloadavg()[0], 2)}
        self.path = args.out / f"{name}.json"
        self.data: dict[str, Any] = {"made": made, "repeats": args.repeats, **fields, "rows": []}
        args.out.mkdir(parents=True, exist_ok=True)

    def add(self, row: Mapping[str, Any], table: str = "rows") -> None:
        """Adds a row to a table and writes the record."""
        self.data.setdefault(table, []).append(row)
        self.write()

    def write(self) -> None:
        """Writes the whole record in the place of the one before, which a cut leaves as it is."""
        from mbrl_jax.runtime.logs import write_whole

        write_whole(self.path, json.dumps(self.data, indent=1) + "\n")


def line(cells: Iterable[Any]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def markdown(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])
