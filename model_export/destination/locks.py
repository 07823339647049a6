"""Locks on directories (flock), which a killed process lets go of."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fastvlm_mlx.locks import NO_LOCKS as NO_LOCKS
from fastvlm_mlx.locks import locked as locked

# What is done while others wait is done in milliseconds, unless a strange program holds the lock.
PATIENCE_S = 10.0


@contextmanager
def exclusive(parent: int) -> Iterator[None]:
    """Keep other runs from publishing into this directory, or clearing it, meanwhile.

    This holds where the filesystem has locks, and nobody holds one for longer than `PATIENCE_S`.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not (held := locked(parent, wait=False)) and time.monotonic() < deadline:
        time.sleep(0.002)
    try:
        yield
    finally:
        if held:
            with suppress(OSError):
                fcntl.flock(parent, fcntl.LOCK_UN)
