"""Locks on files and directories (flock), which a killed process lets go of."""

from __future__ import annotations

import errno
import fcntl

# The filesystem has no locks, or none for a directory (NFS).
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


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
