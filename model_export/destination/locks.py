"""Locks on directories (flock), which a killed process lets go of."""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# What is done while others wait is done in milliseconds, unless a strange program holds the lock.
PATIENCE_S = 10.0
# The filesystem has no locks, or none for a directory (NFS).
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


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


def locked(fd: int, *, wait: bool = True) -> bool:
    """Lock a file or a directory.

    Returns:
        False if others have the lock and it is not waited for. True where the filesystem has no
        locks: nobody has one there, and the run goes on without.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True
