"""A flag that keeps XLA from a fault, set when the package is imported."""

from __future__ import annotations

import importlib.metadata
import os

FAULTY = "0.10.2"
"""The jaxlib that has the fault."""
OPTION = "--xla_cpu_experimental_ynn_fusion_type"
FLAG = f"{OPTION}=-LIBRARY_FUSION_TYPE_REDUCE"


def avoid_wrong_sums() -> None:
    """Asks XLA on a CPU not to hand sums to YNNPACK where that gives wrong numbers.

    In jaxlib 0.10.2 a sum of products with an array that a batch shares, `vmap(lambda x: sum(w * x)
    + sum((w - 1) * x))`, is wrong from row 8 on (github.com/jax-ml/jax, issue 39103). With the flag
    SAC, DQN, PPO and MBPO took 0.83, 0.98, 1.05 and 0.87 of the time on two cores. XLA reads it
    when the backend starts, so the package has to be imported before anything runs in JAX. The same
    option in XLA_FLAGS wins.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    found = [one.version for one in importlib.metadata.distributions(name="jaxlib")]
    if found[:1] == [FAULTY] and OPTION not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}".strip()
