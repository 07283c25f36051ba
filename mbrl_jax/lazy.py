"""Names and modules that load when they are first used (PEP 562)."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def attach(
    package: str, submodules: tuple[str, ...], names: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package; assign both at its top level.

    Args:
      package: its `__name__`.
      submodules: what `package.NAME` imports.
      names: other public names, each with the full name of the module that holds it.
    """
    names = names or {}

    def get(name: str) -> Any:
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        if name in names:
            return getattr(importlib.import_module(names[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def listed() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *submodules, *names})

    return get, listed


class _Deferred(types.ModuleType):
    """Stands for the module of its name, which its first attribute imports."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what import machinery and `inspect` ask of every module
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} yet")
        return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def deferred(*names: str) -> Iterator[None]:
    """What is imported in this context imports the modules `names` when it first uses them.

    It sees a stand-in for each of them; imports after the context get the module itself. A module
    that is there already stays.

    Args:
      names: full names of modules that are used by their attributes, `import NAME as it`.
    """
    stand_ins = {name: _Deferred(name) for name in names if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]
