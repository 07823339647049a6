"""Single modules of large packages, without what the packages' own `__init__` imports.

mlx-lm's imports transformers and with it, where it is installed, torch; coremltools' imports its
converters: seconds and 200 MB each, of which a model's definition and a package's specification
need nothing. Here the `__init__` waits until something else of the package is asked for, by
whoever it is, and then runs as it would have.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from threading import RLock
from types import ModuleType
from typing import Any

_LOCK = RLock()


class _Postponed(ModuleType):
    """A package that has not run yet. Every import from it asks for `__path__`, and so runs it."""

    _open = False  # whether `__path__` may be seen without that

    def __getattr__(self, name: str) -> Any:
        with _LOCK:
            spec = self.__spec__
            if isinstance(self, _Postponed) and spec is not None and spec.loader is not None:
                if name == "__path__" and self._open:
                    return spec.submodule_search_locations
                if not self._open:
                    self._open = True
                    with _forgotten_if_it_fails(self.__name__):
                        spec.loader.exec_module(self)
                    self.__path__ = list(spec.submodule_search_locations or ())
                    self.__class__ = ModuleType  # type: ignore[assignment]
                    del self._open
        return ModuleType.__getattribute__(self, name)


@contextmanager
def _forgotten_if_it_fails(name: str) -> Iterator[None]:
    """What the import system does with a module whose import fails: the next one starts afresh."""
    with ExitStack() as undo:
        undo.callback(sys.modules.pop, name, None)
        yield
        undo.pop_all()


def part(name: str) -> Any:
    """Import the module `name`, as "mlx_lm.models.qwen2", and nothing else of its package.

    Raises:
        ModuleNotFoundError: there is no such package, or no such module.
    """
    package = name.partition(".")[0]
    with _LOCK:
        if package not in sys.modules and (spec := find_spec(package)) is not None:
            postponed = module_from_spec(spec)
            postponed.__class__ = _Postponed
            del postponed.__path__
            sys.modules[package] = postponed
        found = sys.modules.get(package)
        if not isinstance(found, _Postponed):
            return import_module(name)
        found._open = True
        try:
            return import_module(name)
        finally:
            found._open = False
