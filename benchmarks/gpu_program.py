"""The program that XLA makes for an NVIDIA H100, compiled on a machine that has none.

JAX compiles for a device from its description alone; what comes out is the scheduled program of the
real compiler. On small networks a GPU's time is the number of kernels on the way times some
microseconds, so that this number can be driven down without a GPU. It needs the extra `cuda13`.

Kernels are not tuned without the device, so that a product may become another kernel there. A loop
whose length only data tell counts as one turn; each of its turns makes the host wait for a number,
as a conditional does, of which the longest branch counts.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# before JAX looks for its plugins, which ask the driver for its version
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

import jax
from jax.experimental import topologies

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# instructions that start nothing on the device
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "async-done", "copy-done", "opt-barrier", "add-dependency",
}  # fmt: skip
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .+? ([a-z][\w\-]*)\((.*)$")


class Count(NamedTuple):
    """What a program does on its way."""

    kernels: int  # kernels and copies that are started
    waits: int  # times that the host waits for a number before it goes on

    def times(self, turns: int) -> Count:
        return Count(self.kernels * turns, self.waits * turns)

    def plus(self, other: Count) -> Count:
        return Count(self.kernels + other.kernels, self.waits + other.waits)


class Program(NamedTuple):
    """A program for an H100 in numbers."""

    kernels: int
    waits: int
    temporary_bytes: int  # device memory beside arguments and results
    compile_seconds: float


def as_on_an_accelerator(make: Callable[..., Any], *args: Any) -> Any:
    """`make(*args)` where code that asks for JAX's backend is told "gpu"."""
    asked = jax.default_backend
    jax.default_backend = lambda: "gpu"
    try:
        return make(*args)
    finally:
        jax.default_backend = asked


def compiled_for_h100(function: Callable[..., Any], *args: Any) -> Any:
    """`function`, from `jax.jit`, compiled for one H100.

    Args:
      function: from `jax.jit`.
      args: arrays, or ShapeDtypeStructs that stand for them.

    Raises:
      SystemExit: without the extra `cuda13`.
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", target_config=H100, topology="1x1x1"
        )
    except NotImplementedError:
        raise SystemExit(
            "JAX for NVIDIA is not installed: pip install -e '.[cuda13]' (4.4 GB, no GPU needed)"
        ) from None
    where = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where, weak_type=x.weak_type)

    shapes = jax.tree.map(placed, jax.eval_shape(lambda tree: tree, args))
    return as_on_an_accelerator(lambda: function.lower(*shapes).compile())


def measure(function: Callable[..., Any], *args: Any) -> Program:
    """`function`, from `jax.jit`, compiled for one H100 and counted; arguments as there."""
    start = time.perf_counter()
    compiled = compiled_for_h100(function, *args)
    seconds = time.perf_counter() - start
    counted = count(compiled.as_text())
    return Program(*counted, compiled.memory_analysis().temp_size_in_bytes, seconds)


def count(text: str) -> Count:
    """Kernels and waits of a scheduled program of XLA, `compiled.as_text()`."""
    computations, entry = _computations(text)
    return _walk(computations, entry)


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """{computation: [(opcode, the rest of its line)]}, and the name of the one that is run."""
    found: dict[str, list[tuple[str, str]]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith("HloModule"):
            lines = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif match := _INSTRUCTION.match(line):
            lines.append((match[1], match[2]))
    return found, entry


def _walk(computations: dict[str, list[tuple[str, str]]], name: str) -> Count:
    total = Count(0, 0)
    for opcode, rest in computations.get(name, ()):
        if opcode in _FREE:
            continue
        if opcode == "while":
            body = _walk(computations, _called(rest, "body"))
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            if turns:
                total = total.plus(body.times(int(turns[1])))
            else:  # one turn, and its condition before and after it
                condition = _walk(computations, _called(rest, "condition"))
                total = total.plus(body).plus(condition.times(2)).plus(Count(0, 2))
        elif opcode == "conditional":
            named = re.search(r"branch_computations=\{([^}]*)\}", rest)
            names = (
                [name.strip().lstrip("%") for name in named[1].split(",")]
                if named
                else [_called(rest, f"{side}_computation") for side in ("true", "false")]
            )
            longest = max(_walk(computations, name) for name in names)
            total = total.plus(longest).plus(Count(0, 1))
        elif opcode in ("call", "async-start"):
            called = _called(rest, "to_apply") or _called(rest, "calls")
            total = total.plus(_walk(computations, called))
        else:
            total = total.plus(Count(1, 0))
    return total


def _called(rest: str, role: str) -> str:
    match = re.search(rf"{role}=%?([\w.\-]+)", rest)
    return match[1] if match else ""
