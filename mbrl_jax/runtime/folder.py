"""What a run folder takes: a new run, or one to go on with, and how often it is saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mbrl_jax.runtime import devices, logs
from mbrl_jax.runtime.plan import Plan
from mbrl_jax.types import InputError, PyTree

FREE_BYTES = 64 * 2**20  # of the state of all seeds, written at every evaluation by default


def default_spacing(state_bytes: int, periods: int) -> int:
    """How many evaluation periods lie between two checkpoints where the user names no number.

    A state of up to 64 MiB is written at every evaluation. A larger one is written so rarely that
    an evaluation costs 64 MiB of writing on average, but four times a run at least, so that a kill
    loses no more than a quarter of it. Writing, with its digests, took 1.5 s for 64 MiB and 15 s
    for 512 MiB on two busy CPU cores with a virtual disk.

    Args:
      state_bytes: size of the state of all seeds.
      periods: evaluation periods of the whole run.
    """
    return max(1, min(-(-state_bytes // FREE_BYTES), periods // 4))


class Saving(NamedTuple):
    """When a run is saved, which its result does not depend on; as in `train`."""

    checkpoint_every: int | None
    keep_checkpoints: int

    def check(self) -> None:
        """Raises InputError for numbers that are not positive."""
        for name, value in zip(self._fields, self, strict=True):
            unset = name == "checkpoint_every" and value is None
            if not unset and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} = {value!r}: expected a whole number, 1 or more")

    def spacing(self, plan: Plan, state: PyTree) -> int:
        """Evaluation periods between two checkpoints; `state` has the shapes of all seeds."""
        if self.checkpoint_every is None:
            return default_spacing(devices.state_bytes(state), plan.periods)
        return -(-self.checkpoint_every // (plan.num_envs * plan.steps_per_period))


def prepare(out: Path, run: dict[str, Any], plan: Plan, resume: bool) -> None:
    """Checks that `out` may be written, and writes `config.json` where the run is new."""
    try:
        if (out / "config.json").exists():
            if not resume:
                raise InputError(f"{out} holds a run; add --resume to go on, or take another --out")
            _compare(logs.read_config(out), run, plan, out)
            return
        # a file that a kill left half-written is nobody's
        if out.exists() and (
            not out.is_dir() or any(path.suffix != ".partial" for path in out.iterdir())
        ):
            raise InputError(f"{out} holds other things than a run; take another --out")
        out.mkdir(parents=True, exist_ok=True)
        logs.write_config(out, run)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; take another --out") from error


def _compare(old: dict[str, Any], new: dict[str, Any], plan: Plan, out: Path) -> None:
    """Raises InputError unless `new` is the run of `out`, be it with another total."""
    old, new = _flat(old), _flat(new)
    for name in sorted((old.keys() | new.keys()) - {"total_steps"}):
        a, b = old.get(name), new.get(name)
        if a == b:
            continue
        longer = old.get("total_steps") != new["total_steps"]
        if name == "eval_every" and longer and isinstance(a, int) and a > 0:
            raise InputError(other_periods(new, plan, a, out))
        raise InputError(
            f"--resume: {name} is {b!r}, but the run in {out} has {a!r}; give the same, or "
            "take another --out"
        )


def other_periods(run: dict[str, Any], plan: Plan, period: int, out: Path) -> str:
    """Why a new total does not go with the periods of a run, and which ones near it do."""
    total, start = run["total_steps"], plan.start * plan.num_envs
    below = start + max(1, (total - start) // period) * period
    return (
        f"--resume: total_steps = {total} has periods of {run['eval_every']} steps, but the "
        f"run in {out} has evaluated every {period}; expected a total with the same periods, such "
        f"as {below} or {below + period}, and no other eval_every"
    )


def _flat(run: dict[str, Any]) -> dict[str, Any]:
    def named(prefix: str, fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in fields.items():
            if isinstance(value, dict):
                yield from named(f"{prefix}{name}.", value)
            else:
                yield f"{prefix}{name}", value

    rest = {name: value for name, value in run.items() if name != "config"}
    return dict(named("agent.", run["config"])) | rest
