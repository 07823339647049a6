"""Removing a directory tree: no link is followed, and nothing that is mounted is touched."""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

# How the list of mounts writes a space, a tab, a line's end and a backslash.
_OCTAL = re.compile(r"\\([0-7]{3})")


def remove_tree(name: str, directory: int) -> None:
    """Remove a file or a whole directory, write-protected or not; links are not followed."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=directory)
        return
    try:
        _remove_directory(name, directory)
    except PermissionError:
        for *_, fd in os.fwalk(name, dir_fd=directory):
            os.fchmod(fd, 0o700)
        _remove_directory(name, directory)


def _remove_directory(name: str, directory: int) -> None:
    check_not_mounted(name, directory)
    # shutil's closes descriptors twice if a Ctrl-C comes at the wrong moment.
    for _, folders, files, fd in os.fwalk(name, topdown=False, dir_fd=directory, onerror=_raise):
        for file in files:
            os.unlink(file, dir_fd=fd)
        for folder in folders:
            try:
                os.rmdir(folder, dir_fd=fd)
            except NotADirectoryError:
                # A link to one.
                os.unlink(folder, dir_fd=fd)
    os.rmdir(name, dir_fd=directory)


def check_not_mounted(name: str, directory: int) -> None:
    """Check, before a directory is replaced or removed, that nothing is mounted in it.

    Args:
        directory: a descriptor of the directory that holds `name`.

    Raises:
        OSError: EBUSY, naming where something is mounted.
    """
    for path, _, _, fd in os.fwalk(name, dir_fd=directory, onerror=_raise):
        if os.fstat(fd).st_dev != os.fstat(directory).st_dev:
            raise OSError(errno.EBUSY, "another disk is mounted there", path)
    # The same disk can be seen at a second place, which only the system's list of mounts tells.
    with suppress(FileNotFoundError):
        top = os.path.realpath(f"/proc/self/fd/{directory}")
        for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
            place = _OCTAL.sub(lambda match: chr(int(match.group(1), 8)), line.split()[4])
            if Path(place).is_relative_to(Path(top, name)):
                raise OSError(errno.EBUSY, "something is mounted there", place)


def _raise(error: OSError) -> None:
    raise error
