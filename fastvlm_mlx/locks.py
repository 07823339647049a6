"""Locks on files and directories (flock), which a killed process lets go of."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# The filesystem has no locks, or none for a directory (NFS).
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
_PAUSE_S = 0.1


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


@contextmanager
def lock_file(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold a lock, which is a file that is there as long as somebody has it.

    Args:
        waiting: called once if another process has it, which then is waited for; without it nobody
            is waited for.

    Yields:
        Whether it is held.

    Raises:
        OSError: the file can't be made.
    """
    told = False
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            # Not a wait in the system's call: a Ctrl-C has to come through in every thread.
            while not (held := locked(fd, wait=False)) and waiting is not None:
                if not told:
                    waiting()
                    told = True
                time.sleep(_PAUSE_S)
            if held and not is_at(fd, path):
                # Who had it removed it when it was done.
                continue
            try:
                yield held
            finally:
                if held:
                    path.unlink(missing_ok=True)
            return
        finally:
            os.close(fd)


def is_at(fd: int, path: Path) -> bool:
    """Whether a path still leads to the file that was opened."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False
