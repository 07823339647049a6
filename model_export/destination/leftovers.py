"""Staging directories that killed runs left behind are finished or undone, and removed."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from io import FileIO

from model_export.destination.locks import NO_LOCKS, exclusive
from model_export.destination.staging import (
    LOCK,
    MAGIC,
    NAME,
    OURS,
    StagingDirectory,
    made_here,
    opened,
)

# Of a lock: a line, a process and a machine's name, two numbers.
_LOCK_BYTES = 1000


def clear(parent: int) -> list[str]:
    """Finish or undo what killed runs left in a directory, and remove their staging directories.

    What is not certainly one of them, or belongs to somebody else or to a run that is alive, stays.

    Returns:
        The names of those that look like a killed run's, and of which that can't be proven.

    Raises:
        DestinationError: one held what can't be put back, because something else is there now. It
            lies beside that now, and this is said once.
        OSError: `parent` can't be listed.
    """
    unproven = []
    for name in sorted(name for name in os.listdir(parent) if NAME.fullmatch(name)):
        # What others own or protect stays.
        with _claimed(parent, name) as place, suppress(OSError):
            if place is None:
                continue
            if not _is_made_here(place):
                unproven.append(name)
                continue
            try:
                place.end()
            except (ValueError, LookupError, TypeError):
                # A broken record is not acted on.
                unproven.append(name)
    return unproven


@contextmanager
def _claimed(parent: int, name: str) -> Iterator[StagingDirectory | None]:
    """The staging directory of that name, locked, if its owner is dead and it is one indeed."""
    with ExitStack() as stack:
        claimed = None
        # A file, a link, somebody else's, or gone since it was listed.
        with suppress(OSError):
            place = stack.enter_context(opened(parent, name, None))
            # Under this lock nobody is between making a staging directory and locking it.
            with exclusive(parent):
                claimed = _if_abandoned(place, stack)
        yield claimed


def _if_abandoned(place: StagingDirectory, stack: ExitStack) -> StagingDirectory | None:
    names = set(os.listdir(place.fd))
    if os.fstat(place.fd).st_uid != os.geteuid() or not names <= OURS:
        return None
    if not names:
        return place
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    lock = stack.enter_context(FileIO(os.open(LOCK, flags, dir_fd=place.fd), "r+"))
    if not _abandoned(lock.fileno(), names):
        return None
    return replace(place, lock=lock, abandoned=True)


def _is_made_here(place: StagingDirectory) -> bool:
    """Whether it was made where it is. One that holds nothing yet does not say, and is removed."""
    if place.lock is None:
        return True
    text = _text(place.lock.fileno())
    return not text or text.splitlines()[2:] == [made_here(place.fd, place.lock.fileno())]


def _text(lock: int) -> str:
    # Bounded: it may be anything that has this name.
    return os.pread(lock, _LOCK_BYTES, 0).decode("utf-8", "replace")


def _abandoned(lock: int, names: set[str]) -> bool:
    text = _text(lock)
    if text.partition("\n")[0] != MAGIC and (text or names != {LOCK}):
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            return False
        return _owner_is_dead(text)
    # Whoever had it may have removed it since it was opened.
    return os.fstat(lock).st_nlink > 0


def _owner_is_dead(text: str) -> bool:
    """Without locks: by the number of its process, which only its own machine can tell of."""
    try:
        number, host = text.splitlines()[1].split(" ", 1)
        if host != platform.node():
            return False
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (IndexError, ValueError, OSError):
        return False
    return False
