"""How much memory a program may take."""

from __future__ import annotations

import os

import jax


def available() -> int | None:
    """Bytes that there are in all, on every device of the backend; None where no one tells."""
    if jax.default_backend() == "cpu":
        if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
            return None
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else limit * jax.device_count()
