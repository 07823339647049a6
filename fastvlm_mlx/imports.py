"""Single modules of large packages, imported without what the packages' own `__init__` imports.

The runtime needs two packages only in part. mlx-lm 0.32 imports its tokenizers, its downloads and
its generation with any of its modules, and so transformers and huggingface_hub; coremltools 9.0
imports its converters, and with them torch, scipy and scikit-learn where they are installed. A
model's definition and a package's specification need none of that.

Without this module `fastvlm generate` takes 7.7 s of processor time in place of 3.2 for the demo's
`app` bundle on Linux, of which torch, which evaluates the encoder there, takes 2. In an environment
without the `export` extra it takes 2.3 s in place of 0.9 for an `mlx` bundle, and `fastvlm inspect`
2.6 in place of 0.7 for an `app` bundle. (Whole processes, medians of alternating runs on two busy
cores.) `tests/language/test_load.py` fails when a package no longer needs this.

The package's `__init__` is postponed until something else of the package is asked for, by whoever
it is. Then it runs as it would have, so both packages are whole for everybody else in the process.
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
    """A package whose `__init__` has not run. Every import asks for `__path__`, which runs it."""

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
        module = sys.modules.get(package)
        if not isinstance(module, _Postponed):
            return import_module(name)
        module._open = True
        try:
            return import_module(name)
        finally:
            module._open = False
