"""Numbers of the published DreamerV3: tests/golden/dreamer/README.md."""

from functools import cache
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "golden" / "dreamer"


@cache
def golden(name):
    """Names to arrays of one file."""
    return dict(np.load(FOLDER / f"{name}.npz"))


def part(arrays, prefix):
    """The arrays below a prefix, without it."""
    return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}


def tree(arrays):
    """{"a.b": x} as {"a": {"b": x}}."""
    out = {}
    for name, value in arrays.items():
        *path, last = name.split(".")
        node = out
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return out
