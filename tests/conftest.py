"""Strictness for every test: 8 CPU devices, no silent rank promotion, no key used twice."""

import os
import tempfile

import jax
import pytest

# one compilation cache for a worker and the processes that its tests start; JAX writes entries in
# place, so that workers which share one may read half an entry
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(
    os.environ.get("JAX_COMPILATION_CACHE_DIR", tempfile.gettempdir()),
    f"mbrl_jax_tests_{os.environ.get('PYTEST_XDIST_WORKER', 'main')}",
)
os.environ["JAX_PLATFORMS"] = "cpu"
# most of the time is compilation: with less optimisation the suite takes about half of it
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def lake():
    """Deterministic FrozenLake, 4x4."""
    from mbrl_jax import make_env

    return make_env("FrozenLake-misc", is_slippery=False)
