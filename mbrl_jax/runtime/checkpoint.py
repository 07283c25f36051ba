"""Checkpoints with orbax: whole or absent, the newest few kept, damage found by digests."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mbrl_jax.runtime import devices
from mbrl_jax.runtime.logs import write_whole
from mbrl_jax.types import InputError, PyTree

_DIGESTS = "sha256.json"  # of the files of a checkpoint, beside them


class Checkpoints:
    """The folder `checkpoints/` of a run; step numbers count finished periods.

    Args:
      folder: where the checkpoints lie.
      run: what config.json says of the run. Each checkpoint bears it, so that one of another run
        is told apart; `total_steps` does not count, since a run may be prolonged.
      keep: how many of the newest stay; each `save` removes older ones.
      write: False leaves the folder as it is, for a look at a run that may be training.
    """

    def __init__(self, folder: Path, run: dict[str, Any], keep: int = 3, write: bool = True):
        self.folder = folder.resolve()
        self._run = _identity(run)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            create=write,
            lightweight_initialize=True,  # damage is for `restore` to tell
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def newest(self) -> int | None:
        """The number of periods that the newest whole checkpoint holds, None without one."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree) -> None:
        """Writes `state` as checkpoint `step`: to a temporary folder that is renamed when whole.

        Raises InputError where the disk does not take it; earlier checkpoints stay as they are.
        """
        arrays = _arrays(state)
        about = {"run": self._run, "shapes": _shapes(arrays)}
        path = self.folder / str(step)
        try:
            devices.on_leader(self._make_sure_of_room, sum(x.nbytes for x in arrays.values()))
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
                ),
                force=True,
            )
            devices.on_leader(_write_digests, path)
        except InputError:  # of process 0
            raise
        except Exception as error:  # orbax and tensorstore raise what they like on a full disk
            raise InputError(
                f"cannot write checkpoint {path}: {_first_line(error)}; "
                "free some space, then go on with --resume"
            ) from error

    def restore(self, step: int, like: PyTree) -> PyTree:
        """Checkpoint `step` with the structure, shapes and shardings of `like`.

        Args:
          like: a state, or `jax.ShapeDtypeStruct`s with shardings.

        Raises InputError for a checkpoint that is damaged or of another run.
        """
        path = self.folder / str(step)
        mend = f"remove {path} to go on from the checkpoint before it, or start a new --out"
        wanted = _abstract(like)
        try:
            # before orbax looks, whose threads tell of damage at length
            _check_digests(path)
            args = ocp.args.Composite(about=ocp.args.JsonRestore())
            about = self._manager.restore(step, args=args)["about"]
            foreign = (_identity(about["run"]), about["shapes"]) != (self._run, _shapes(wanted))
            if not foreign:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
                arrays = self._manager.restore(step, args=args)["state"]
        except Exception as error:
            raise InputError(
                f"checkpoint {path} is damaged: {_first_line(error)}; {mend}"
            ) from error
        if foreign:
            raise InputError(f"checkpoint {path} is of another run; {mend}")
        return _rebuild(like, arrays)

    def close(self) -> None:
        self._manager.close()

    def _make_sure_of_room(self, size: int) -> None:
        # a full disk found here is one error; within orbax, many threads tell of it at length
        path = self.folder / "room.partial"
        try:
            with path.open("wb") as file:
                if size and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
        finally:
            path.unlink(missing_ok=True)


def _identity(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "total_steps"}


def _arrays(state: PyTree) -> dict[str, Any]:
    # orbax refuses empty arrays; typed keys are stored as their words
    return {
        name: jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for name, leaf in _named(state)
        if leaf.size
    }


def _abstract(like: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    def plain(leaf: Any) -> jax.ShapeDtypeStruct:
        words = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=leaf.sharding)

    return {name: plain(leaf) for name, leaf in _named(like) if leaf.size}


def _rebuild(like: PyTree, arrays: dict[str, jax.Array]) -> PyTree:
    def leaf(name: str, spec: Any) -> jax.Array:
        if not spec.size:
            return jax.device_put(np.zeros(spec.shape, spec.dtype), spec.sharding)
        if _is_key(spec):
            return jax.random.wrap_key_data(arrays[name], impl=spec.dtype._impl.name)
        return arrays[name]

    leaves = [leaf(name, spec) for name, spec in _named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _named(tree: PyTree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def _shapes(arrays: dict[str, Any]) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in arrays.items()}


def _write_digests(path: Path) -> None:
    write_whole(path / _DIGESTS, json.dumps(_digests(path), indent=2))


def _digests(path: Path) -> dict[str, str]:
    digests = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.name.startswith(_DIGESTS):
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            digests[str(file.relative_to(path))] = digest
    return digests


def _check_digests(path: Path) -> None:
    """Raises ValueError where a file is not what was written; a kill may have left no digests."""
    if not (path / _DIGESTS).exists():
        return
    written, found = json.loads((path / _DIGESTS).read_text()), _digests(path)
    changed = sorted(name for name in written | found if written.get(name) != found.get(name))
    if changed:
        raise ValueError(f"{changed[0]} has changed or is missing")


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
