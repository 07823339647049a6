"""Renames that never overwrite, and renames that exchange two places, each in one system call.

POSIX has neither: Linux has `renameat2`, macOS `renameatx_np`. A filesystem may refuse both (NFS,
some of FUSE), and then `put` still loses nothing and `exchange` says that it can't.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from collections.abc import Callable
from functools import cache

# From linux/fs.h, and from sys/stdio.h of macOS.
FUNCTION, NOREPLACE, EXCHANGE = (
    ("renameatx_np", 0x4, 0x2) if sys.platform == "darwin" else ("renameat2", 0x1, 0x2)
)
# A kernel, a C library or a filesystem without the call or the flag.
REFUSALS = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

# A name, and the descriptor of the directory that it is in.
Place = tuple[int, str]


class ExchangeError(OSError):
    """The filesystem can't exchange two places."""


def put(source: Place, target: Place) -> None:
    """Rename something to where nothing is, in one step.

    Where the system has no such call, the step is a plain rename of a directory, which POSIX lets
    take the place of nothing but an empty directory: what has content is never replaced, and of
    two who put something at one place exactly one succeeds. An empty directory is looked for
    before, and is lost only if it is made between the look and the rename. What is no directory is
    linked, which replaces nothing, and then its old name removed.

    Raises:
        FileExistsError: something is at `target`, were it a broken link.
        OSError: anything else.
    """
    try:
        _flagged(source, target, NOREPLACE)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        _put_plainly(source, target)


def exchange(one: Place, other: Place) -> None:
    """Exchange what is at two places; at no moment is either of them empty.

    Raises:
        ExchangeError: the system or the filesystem has no such call.
        OSError: anything else; FileNotFoundError, where one of the two is absent.
    """
    try:
        _flagged(one, other, EXCHANGE)
    except OSError as error:
        if error.errno in REFUSALS:
            raise ExchangeError(error.errno, error.strerror) from error
        raise


def _put_plainly(source: Place, target: Place) -> None:
    in_the_way = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target[1])
    if not stat.S_ISDIR(os.stat(source[1], dir_fd=source[0], follow_symlinks=False).st_mode):
        between = {"src_dir_fd": source[0], "dst_dir_fd": target[0]}
        os.link(source[1], target[1], **between, follow_symlinks=False)
        os.unlink(source[1], dir_fd=source[0])
        return
    try:
        os.stat(target[1], dir_fd=target[0], follow_symlinks=False)
    except FileNotFoundError:
        pass
    else:
        raise in_the_way
    try:
        os.rename(source[1], target[1], src_dir_fd=source[0], dst_dir_fd=target[0])
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise in_the_way from error
        raise


def _flagged(source: Place, target: Place, flag: int) -> None:
    call = _system_call()
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    (from_fd, from_name), (to_fd, to_name) = source, target
    if call(from_fd, os.fsencode(from_name), to_fd, os.fsencode(to_name), flag) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), to_name)


@cache
def _system_call() -> Callable[[int, bytes, int, bytes, int], int] | None:
    """The C library's function, or None where it has none (Linux before glibc 2.28)."""
    call = getattr(ctypes.CDLL(None, use_errno=True), FUNCTION, None)
    if call is not None:
        text, number = ctypes.c_char_p, ctypes.c_int
        call.argtypes = (number, text, number, text, ctypes.c_uint)
        call.restype = number
    return call
