"""Runs of one kind share one compiled program: what a process keeps of a run for the next one.

`jax.jit` compiles a function once, but every run makes its functions anew. Here those of an earlier
run of the same kind take their place, so that a second `train`, with other seeds, other floats in
the config, a larger total or `resume`, traces and compiles nothing. The rest is up to `jax.jit`,
which compiles again for other shapes, devices and flags of JAX.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from mbrl_jax.agents import AgentDef
from mbrl_jax.envs import Env
from mbrl_jax.runtime import devices
from mbrl_jax.runtime.loop import Evaluate, Program
from mbrl_jax.runtime.plan import Plan
from mbrl_jax.types import Schedule

# an entry holds its environment and its compiled programs, some megabytes in host memory
_KEPT = 8


class _Same:
    """An object as a key that equals itself alone, whether it can be hashed or not."""

    def __init__(self, it: Any):
        self.it = it  # held, so that no other object gets its id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """All that the functions of a program depend on, and the program, which is no part of the key.

    What a function calls or closes over is taken to stay as it is, as under `jax.jit`.
    """

    make: _Same  # of the `AgentDef`
    env: _Same  # its parameters are numbers within the program
    evaluate: _Same
    static: Any  # the tree structure of the config, which holds its static fields
    schedule: Schedule
    plan: Plan  # without the number of periods, which only the host counts
    eval_episodes: int
    eval_max_steps: int | None
    debug_nans: bool  # which the program reads, and `jax.jit` does not compare
    program: Program = dataclasses.field(compare=False)


def shared(
    program: Program,
    definition: AgentDef,
    env: Env,
    config: Any,
    schedule: Schedule,
    eval_episodes: int,
    eval_max_steps: int | None,
    evaluate: Evaluate | None,
) -> Program:
    """`program` with the functions of the first one of its kind, as long as that one is kept.

    Args:
      program: from `make_program` with the other arguments, which are as there.
      schedule: of the agent.
    """
    kind = _Kind(
        _Same(definition.make), _Same(env), _Same(evaluate), jax.tree.structure(config), schedule,
        program.plan._replace(periods=0), eval_episodes, eval_max_steps,
        bool(jax.config.jax_debug_nans),  # type: ignore[attr-defined]
        program,
    )  # fmt: skip
    first = _first(kind)
    return program._replace(init=first.init, period=first.period)


@functools.lru_cache(_KEPT)
def _first(kind: _Kind) -> Program:
    return kind.program


@functools.lru_cache(_KEPT)
def alone(init: Callable) -> Any:
    """Jitted `init(key, config)` of a `Program`, whose `eval_shape` traces once."""
    return jax.jit(init)


@functools.lru_cache(_KEPT)
def compiled(init: Callable, period: Callable, mesh: Mesh, mode: str) -> tuple[Any, Any]:
    """Jitted `init(keys, config)` and `chunk(run, config, index)`, which donates `run`.

    Args:
      init, period: of a `Program`; the same ones give the same jitted functions.
      mesh, mode: of the seeds, as in `devices.over_seeds`.
    """
    start = devices.over_seeds(init, mesh, mode, shared=1)
    chunk = devices.over_seeds(period, mesh, mode, shared=2)
    return jax.jit(start), jax.jit(chunk, donate_argnums=0)
