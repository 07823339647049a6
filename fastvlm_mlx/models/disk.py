"""Files and directories of the cache: written whole, put onto the disk, measured, removed."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path


def size(path: Path) -> int:
    """The bytes of all files; links are not followed."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def write_whole(file: Path, text: str) -> None:
    """Write a file that is there whole or not at all. Raises OSError."""
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    try:
        with open(new, "w", encoding="utf-8", opener=_private) as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)


def sync_tree(path: Path) -> None:
    """Have the files below a directory on the disk, and their names."""
    for folder, _, names in os.walk(path):
        for name in (*names, ""):
            file = os.path.join(folder, name)
            if os.path.islink(file) or not os.access(file, os.R_OK):
                continue
            fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a directory; no link is followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
