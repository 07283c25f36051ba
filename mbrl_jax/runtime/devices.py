"""Where seeds run: vmapped or one after another on each device, and spread over all devices."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mbrl_jax import memory
from mbrl_jax.types import InputError, PyTree

T = TypeVar("T")
SEED_MODES = ("auto", "vmap", "map")
_EXTRA = "--xla_backend_extra_options"
_LOOPS = f"{_EXTRA}=xla_cpu_small_while_loop_byte_threshold=1000000000"
_COMMAND_BUFFER = "--xla_gpu_enable_command_buffer"
GRAPHS = f"{_COMMAND_BUFFER}=+WHILE,+CONDITIONAL"
"""XLA's own choice of what an NVIDIA GPU runs as a CUDA graph, and loops and conditionals."""


def seed_mesh(num_seeds: int) -> Mesh:
    """A mesh with the one axis `seed` over the devices of all processes.

    One process uses as many of its devices as divide the seeds; several need seeds that divide
    by all their devices, otherwise InputError.
    """
    devices = jax.devices()
    if num_seeds % len(devices):
        if jax.process_count() > 1:
            raise InputError(
                f"seeds = {num_seeds}: expected a multiple of the {len(devices)} devices of the "
                f"{jax.process_count()} processes"
            )
        devices = devices[: math.gcd(num_seeds, len(devices))]
    return jax.make_mesh((len(devices),), ("seed",), axis_types=(AxisType.Auto,), devices=devices)


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that a key does not take in whole."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"seed = {seed!r}: expected a whole number from 0 to {2**32 - 1}")


def loops_as_kernels() -> None:
    """Asks XLA to compile each loop on the CPU as one kernel, for agents that learn a table.

    XLA's CPU runtime starts a kernel for every few operations, and for a tabular agent the starts
    take most of the time: one seed of Q-learning makes 45 times as many steps in one kernel. XLA
    does the same by itself with loops over less than a kilobyte; the environment variable XLA_FLAGS
    raises that limit. Loops with something that a kernel cannot hold (sorts, library calls) stay as
    they are. Results keep every bit, but for sums that XLA may add up in another order (the
    expectations of `models.tabular.Counts`). A kernel uses one core and computes large matrix
    products slowly, so that networks would lose by it.

    Call it before anything runs in JAX, whose backend reads the variable once. It does nothing
    where the backend has started, or where XLA_FLAGS has other extra options.
    """
    _ask(_EXTRA, _LOOPS)


def loops_as_graphs() -> None:
    """Asks XLA to run all loops on an NVIDIA GPU as CUDA graphs: no host between two turns.

    XLA's own choice leaves out loops whose length only data tell, and starts their kernels from the
    host, turn by turn: on an H200 MBPO takes 5 times as long that way. Agents without such loops
    are as fast or a few per cent slower with the flag. Elsewhere it changes nothing.

    Call it before anything runs in JAX, whose backend reads the environment variable XLA_FLAGS
    once. It does nothing where the backend has started, or where XLA_FLAGS has that flag already.
    """
    _ask(_COMMAND_BUFFER, GRAPHS)


def _ask(name: str, flags: str) -> None:
    """Adds `flags` to XLA_FLAGS unless `name` is in it or the backend has started."""
    devices = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    try:
        # JAX takes another number only while its backend has not started
        jax.config.update("jax_num_cpu_devices", devices + 1)
    except RuntimeError:
        return
    jax.config.update("jax_num_cpu_devices", devices)
    before = os.environ.get("XLA_FLAGS", "")
    if name not in before:
        os.environ["XLA_FLAGS"] = f"{before} {flags}".strip()


def put_seeds(keys: jax.Array, mesh: Mesh) -> jax.Array:
    """Keys [num_seeds] with each device's share on it."""
    sharding = NamedSharding(mesh, PartitionSpec("seed"))
    words = np.asarray(jax.random.key_data(keys))
    placed = jax.make_array_from_callback(words.shape, sharding, lambda index: words[index])
    return jax.random.wrap_key_data(placed)


def over_seeds(fn: Callable[..., PyTree], mesh: Mesh, mode: str, shared: int) -> Callable:
    """`fn` over a leading axis of seeds, spread over the mesh without communication.

    Args:
      fn: of one seed; its last `shared` arguments are the same for all seeds and stay unbatched.
      mesh: from `seed_mesh`.
      mode: "vmap" runs a device's seeds in one batch, "map" one after another.
    """

    def local(*args: Any) -> PyTree:
        split = len(args) - shared
        own, common = args[:split], args[split:]
        if mode == "vmap":
            return jax.vmap(lambda *own: fn(*own, *common))(*own)
        return jax.lax.map(lambda own: fn(*own, *common), own)

    def sharded(*args: Any) -> PyTree:
        split = len(args) - shared
        specs = (PartitionSpec("seed"),) * split + (PartitionSpec(),) * shared
        # per-shard programs: a vmapped while_loop would otherwise ask all devices when to stop
        out = jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("seed"), check_vma=False
        )(*args)
        return jax.tree.map(_strong, out)

    return sharded


def _strong(x: jax.Array) -> jax.Array:
    # a type that is weak after one chunk and not before it would trace the next one anew
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return x if is_key else jax.lax.convert_element_type(x, x.dtype)


@custom_vmap
def with_seed_axis(tree: PyTree) -> PyTree:
    """`tree`, of which under `vmap` every leaf has the batch's axis, also one that is equal in all.

    A state that comes back from a compiled chunk has that axis everywhere. Counters that start at a
    constant would not have it in a program that makes the state itself, and XLA rounds some
    functions of one number and of many in different ways (powers, on a CPU).
    """
    return tree


@with_seed_axis.def_vmap
def _with_seed_axis(axis_size: int, batched: list[PyTree], tree: PyTree) -> tuple[PyTree, PyTree]:
    def leaf(is_batched: bool, x: jax.Array) -> jax.Array:
        return x if is_batched else jnp.broadcast_to(x[None], (axis_size, *x.shape))

    # once more, for a vmap around this one
    whole = with_seed_axis(jax.tree.map(leaf, batched[0], tree))
    return whole, jax.tree.map(lambda _: True, batched[0])


def seed_mode(mode: str, agent_state: PyTree) -> str:
    """Resolves "auto": vmap, except on a CPU for agents with networks or loops as kernels.

    Those have a field named `params` in `agent_state` (shapes), at any depth. On 2 cores with 8
    seeds map is 1.9 times as fast for DQN (64 x 64), 1.06 and 2.3 for SAC (64 x 64, 256 x 256), 0.9
    for PPO (64 x 64, 16 environments). The tabular agents gain by vmap, unless `loops_as_kernels`
    was called: then map is 0.5 (no planning), 1.5 (5 planning steps) and 1.4 (50) times as fast
    with 256 seeds, and compiles in less time.
    """
    if mode not in SEED_MODES:
        raise InputError(f"seed_mode = {mode!r}: expected one of {', '.join(SEED_MODES)}")
    if mode != "auto":
        return mode
    has_networks = any(
        jax.tree_util.GetAttrKey("params") in path
        for path, _ in jax.tree_util.tree_leaves_with_path(agent_state)
    )
    alone = has_networks or _LOOPS in os.environ.get("XLA_FLAGS", "")
    return "map" if alone and jax.default_backend() == "cpu" else "vmap"


def state_bytes(state: PyTree) -> int:
    """The size of all arrays of a state, or of shapes that stand for them."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(state))


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def check_memory(state: PyTree, seeds: int) -> None:
    """Raises InputError where `seeds` states of one seed (shapes) cannot fit into memory."""
    needed, free = seeds * state_bytes(state), memory.available()
    if free is None or needed <= free:
        return
    size, name = max(
        (_bytes(leaf), jax.tree_util.keystr(path))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    )
    raise InputError(
        f"the state of {seeds} seeds takes {needed / 2**30:.1f} GiB ({name} {size / 2**30:.2f} GiB "
        f"a seed), expected at most {free / 2**30:.1f} GiB, the memory there is; lower what fills "
        "it (such as buffer_size or num_envs), or take fewer seeds"
    )


def to_host(tree: PyTree) -> PyTree:
    """The whole arrays as numpy, on every process."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process, so that all stop at the same chunk."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(jnp.asarray(flag))))


def on_leader(work: Callable[..., T], *args: Any) -> T | None:
    """Runs `work(*args)` on process 0; where that fails, all processes end instead of waiting."""
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = work(*args)
        except (InputError, OSError) as failure:
            error = failure
    if any_process(error is not None):
        raise error or InputError("process 0 has failed; its message says why")
    return result
