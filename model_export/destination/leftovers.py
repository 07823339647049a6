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
from model_export.destination.staging import LOCK, MAGIC, NAME, OURS, StagingDirectory, opened


def clear(parent: int) -> None:
    """Finish or undo what killed runs left in a directory, and remove their staging directories.

    What is not certainly one of them, or belongs to somebody else or to a run that is alive, stays.

    Raises:
        DestinationError: one held what can't be put back, because something else is there now. It
            lies beside that now, and this is said once.
        OSError: `parent` can't be listed.
    """
    for name in sorted(name for name in os.listdir(parent) if NAME.fullmatch(name)):
        # What others own or protect stays; a broken record is not acted on.
        not_ours = suppress(OSError, ValueError, TypeError, KeyError, IndexError)
        with _claimed(parent, name) as place, not_ours:
            if place is not None:
                place.end()


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
    return replace(place, lock=lock) if _abandoned(lock.fileno(), names) else None


def _abandoned(lock: int, names: set[str]) -> bool:
    # Bounded: it may be anything that has this name.
    text = os.pread(lock, 1000, 0).decode("utf-8", "replace")
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
