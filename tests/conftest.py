"""Strictness for every test: 8 CPU devices and no silent rank promotion; the suite's order."""

import gc
import importlib
import os
import signal
import sys
import tempfile
from pathlib import Path

import jax
import pytest
from jaxlib.version import __version_info__ as jaxlib_version

# one compilation cache for all workers and the processes that tests start; JAX writes entries in
# place, and takes a lock for it only where the cache has a bound
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(
    os.environ.get("JAX_COMPILATION_CACHE_DIR", tempfile.gettempdir()), "mbrl_jax_tests"
)
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**32)
os.environ["JAX_PLATFORMS"] = "cpu"
# most of the time is compilation: without optimisation, and without XLA's fusion emitters, which
# take longest, the suite needs a quarter of it; XLA ends the process at a flag that it does not
# know
FLAGS = "--xla_backend_optimization_level=0"
if jaxlib_version < (0, 11):
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", FLAGS)
import mbrl_jax  # noqa: E402, F401  # adds a flag of its own to those that are set

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_compilation_cache_max_size", 2**32)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# tracing makes many objects, few of them cyclic garbage, and looking for it takes time
gc.freeze()
gc.set_threshold(50_000, 10, 10)

# the files that take longest, the longest first, so that no worker is left with one at the end
LONGEST = (
    "learning", "deep_agents", "readme_bits", "book_figures", "x64", "dyna", "experiments",
    "search", "dreamer_agent", "sharding", "loop", "mbpo", "runs", "search_inputs",
    "search_transforms", "kill", "readme", "fit", "env", "dreamer_switches", "dreamer", "totals",
    "saving", "own_agents",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def lake():
    """Deterministic FrozenLake, 4x4."""
    from mbrl_jax import make_env

    return make_env("FrozenLake-misc", is_slippery=False)


@pytest.fixture
def optimised(monkeypatch):
    """Programs of runs are optimised, for runs that are longer than their compilation."""
    from probes import optimised_functions

    monkeypatch.setattr("mbrl_jax.runtime.reuse.compiled", optimised_functions)


@pytest.fixture
def no_curves(monkeypatch):
    """Run folders without `curve.png`, which takes longer than a short run."""
    monkeypatch.setattr("mbrl_jax.runtime.logs.draw_curve", lambda out, label: None)


@pytest.fixture
def accelerator(monkeypatch):
    """The module; its `common` is another than that of experiments/."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    other = sys.modules.pop("common", None)
    module = importlib.import_module("accelerator")
    monkeypatch.setattr(module, "GRACE", 0.5)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield module
    for number, handler in handlers.items():  # `main` sets its own
        signal.signal(number, handler)
    sys.modules.pop("common", None)
    if other is not None:
        sys.modules["common"] = other
