"""What is made once for a run of the tests, by the first of its processes that needs it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Shared:
    """Directories that every process of the run reads and none writes to after they are made."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        base = factory.getbasetemp()
        # A worker's directory lies in the one of the whole run.
        root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        self._root = root / "shared"
        self._root.mkdir(exist_ok=True)

    def get(self, name: str, last: str, make: Callable[[Path], object]) -> Path:
        """The directory `last` below `name`, after `make` has been given its path once.

        A process that comes while another is making it waits. If `make` raises, the next one that
        asks tries again.
        """
        folder = self._root / name
        with self._locked(name):
            if not (folder / last).exists():
                shutil.rmtree(folder, ignore_errors=True)
                scratch = self._root / f"{name}.part"
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir()
                make(scratch / last)
                scratch.rename(folder)
        return folder / last

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self._root / f"{name}.lock").open("w") as file:
            # Given back by the system if the process ends.
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
