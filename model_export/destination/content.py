"""The content of a place: enough of it to tell later whether it is still the same."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

# The Finder writes it into whatever is looked at; it is nobody's work.
IGNORED = frozenset({".DS_Store"})


@dataclass(frozen=True)
class Entry:
    """One file, directory or link.

    Attributes:
        name: relative to the place, "." for what is at the place itself.
        kind: `stat.S_IFMT` of its mode.
        size, mtime_ns: bytes and nanoseconds; both 0 of a directory, whose entries speak for it.
    """

    name: str
    kind: int
    inode: int
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Content:
    """A place's entries in the order of their names, links not followed.

    Two are equal if nothing was added, removed, replaced or written to in between; what is written
    without a change of size and of the time of change is not seen.
    """

    entries: tuple[Entry, ...]

    @property
    def inode(self) -> int:
        return self.entries[0].inode

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.entries[0].kind)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all that is no directory, relative to the place."""
        return tuple(e.name for e in self.entries[1:] if not stat.S_ISDIR(e.kind))

    @property
    def top(self) -> tuple[str, ...]:
        """The names in the directory itself."""
        return tuple(e.name for e in self.entries[1:] if "/" not in e.name)

    def difference(self, later: Content) -> str:
        """Name one thing that is not as it was, as a clause for a sentence."""
        before = {entry.name: entry for entry in self.entries}
        after = {entry.name: entry for entry in later.entries}
        if before["."] != after["."]:
            return "it is another one"
        for name in sorted(before.keys() | after.keys()):
            if name not in before:
                return f"{name} is new"
            if name not in after:
                return f"{name} is gone"
            if before[name] != after[name]:
                return f"{name} was written to"
        return "nothing differs"

    def to_json(self) -> list[list[Any]]:
        return [[e.name, e.kind, e.inode, e.size, e.mtime_ns] for e in self.entries]

    @classmethod
    def from_json(cls, entries: Sequence[Sequence[Any]]) -> Content:
        return cls(tuple(Entry(*entry) for entry in entries))


def content_of(name: str, directory: int) -> Content | None:
    """Read what is at `name` in the directory of that descriptor; None if nothing is there.

    Raises:
        OSError: it can't be read.
    """
    try:
        entry = _entry(".", name, directory)
        if not stat.S_ISDIR(entry.kind):
            return Content((entry,))
        # It may be exchanged while it is read: all is read through one descriptor.
        root = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
    except FileNotFoundError:
        return None
    try:
        below = sorted(_entries_below(root), key=lambda entry: entry.name)
        return Content((_of_status(".", os.fstat(root)), *below))
    finally:
        os.close(root)


def _entries_below(root: int) -> list[Entry]:
    found = []
    for at, folders, files, fd in os.fwalk(".", dir_fd=root, onerror=_unless_gone):
        prefix = "" if at == "." else at.removeprefix("./") + "/"
        for name in {*folders, *files} - IGNORED:
            with suppress(FileNotFoundError):
                found.append(_entry(prefix + name, name, fd))
    return found


def _entry(shown: str, name: str, directory: int) -> Entry:
    return _of_status(shown, os.stat(name, dir_fd=directory, follow_symlinks=False))


def _of_status(shown: str, status: os.stat_result) -> Entry:
    kind = stat.S_IFMT(status.st_mode)
    if stat.S_ISDIR(status.st_mode):
        return Entry(shown, kind, status.st_ino, 0, 0)
    return Entry(shown, kind, status.st_ino, status.st_size, status.st_mtime_ns)


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
