"""A directory appears whole or not at all: it is made beside its place, synced and put there.

What is at the destination when the work begins is remembered, and only that is ever replaced.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastvlm_mlx.errors import DestinationError, printable
from fastvlm_mlx.machine import tell
from model_export.destination import leftovers
from model_export.destination.content import Content, content_of
from model_export.destination.removal import check_not_mounted
from model_export.destination.replaceable import foreign
from model_export.destination.staging import (
    BUNDLE,
    DIRECTORY,
    NAME,
    StagingDirectory,
    staging_directory,
)


@dataclass(frozen=True)
class Destination:
    """A place for a directory.

    Attributes:
        found: what is there, to be replaced; None if it must be new.
    """

    path: Path
    found: Content | None = None


def resolve(path: str | Path) -> Path:
    """Turn a path into an absolute destination without `..` and `~`.

    Raises:
        DestinationError: this is no path, or a symbolic link, or a directory that no bundle may
            replace.
    """
    try:
        destination = Path(os.path.abspath(Path(path).expanduser()))
        here, home = Path.cwd(), Path.home()
        os.fsencode(destination)
        if "\0" in str(destination):
            raise ValueError("it holds a NUL")
    # An unknown user, NUL and what no file's name can hold, a directory that was removed.
    except (RuntimeError, ValueError, OSError) as error:
        raise DestinationError(
            f"{os.fspath(path)!r} can't be a destination ({error}): give the path of a directory"
        ) from error
    if os.path.islink(destination):
        raise DestinationError(
            f"{destination} is a symbolic link: give the directory that is meant itself"
        )
    if destination in (here, home, *here.parents, *home.parents):
        raise DestinationError(
            f"{destination} can't become a bundle, you work or live in it: choose a directory of "
            "its own"
        )
    return destination


def check_replaceable(destination: Path, *, overwrite: bool) -> Destination:
    """Check that nothing but a bundle will be replaced, and remember what is there.

    What killed runs left beside the destination is cleared first, as `look_at` does.

    Raises:
        DestinationError: `destination` exists and `overwrite` is off, or it is something else, or
            it can't be read.
    """
    clear_leftovers(destination.parent)
    if not overwrite and os.path.lexists(destination):
        raise DestinationError(
            f"{destination} exists: choose another destination, or replace it with --overwrite"
        )
    seen = look_at(destination)
    if seen.found is None:
        return seen
    if not seen.found.is_directory:
        raise DestinationError(f"{destination} is a file: expected a bundle to overwrite")
    other = foreign(destination, seen.found)
    if other is not None:
        raise DestinationError(
            f"{destination} holds what is no bundle ({other}), which --overwrite would "
            "delete: choose another destination, or remove it yourself"
        )
    return seen


def check_overlap(destination: Path, sources: Iterable[Path]) -> None:
    """Raises DestinationError: it is a directory of what the bundle is made from, or around one."""
    target = destination.resolve()
    for directory in sources:
        source = directory.resolve()
        if target == source or source in target.parents or target in source.parents:
            raise DestinationError(
                f"{destination} overlaps its source {directory}, which is never written to: "
                "choose a directory of its own"
            )


def _check_not_mounted(destination: Path) -> None:
    try:
        with _directory(destination.parent) as parent:
            check_not_mounted(destination.name, parent)
    except OSError as error:
        raise DestinationError(
            f"{destination} can't be replaced, {error.strerror} ({error.filename}): choose another "
            "destination, or unmount it"
        ) from error


def look_at(destination: Path) -> Destination:
    """Remember what is at a destination now; only that is going to be replaced.

    What killed runs left beside it is finished or undone first, and removed.

    Raises:
        DestinationError: the destination can't be read, or can't be moved.
    """
    try:
        with _directory(destination.parent) as parent:
            _clear(destination.parent, parent)
            found = content_of(destination.name, parent)
    except FileNotFoundError:
        return Destination(destination)
    except OSError as error:
        raise _destination_error(destination, error) from error
    if found is None:
        return Destination(destination)
    if os.path.ismount(destination):
        raise DestinationError(
            f"{destination} is where a disk is mounted, which can't be replaced: choose a "
            "directory on it"
        )
    if found.is_directory:
        _check_not_mounted(destination)
    if found.is_directory and not os.access(destination, os.W_OK):
        raise DestinationError(
            f"{destination} is write-protected: choose another destination, or allow writing to it"
        )
    return Destination(destination, found)


@contextmanager
def appearing(destination: Destination) -> Iterator[Path]:
    """Give a directory to write to, which takes its place on success and is gone otherwise.

    What was at the destination stays until the new directory is complete and on disk. Then the new
    one takes its place in one step, so that a reader sees either of them whole. If something else
    appeared there meanwhile, or what was there changed, that stays and the new one is dropped.

    All files get one mode and all directories another, as the umask gives them.

    Raises:
        DestinationError: it can't be written, the disk is full, or somebody was faster.
    """
    path = destination.path
    made: list[tuple[Path, int]] = []
    placed = False
    try:
        _make_parents(path.parent, made)
        with _directory(path.parent) as parent, staging_directory(parent) as place:
            yield path.parent.resolve() / place.name / BUNDLE
            _finish(place)
            _check_same(path.parent, parent)
            _publish(place, destination)
            placed = True
            # Before what was replaced is removed.
            _sync(parent)
        for directory, _ in made:
            _sync_path(directory.parent)
    except OSError as error:
        raise _destination_error(path, error, placed=placed) from error
    finally:
        if not placed:
            _remove_empty(made)


def clear_leftovers(directory: Path) -> None:
    """Remove what killed runs left in a directory, if it is one."""
    with suppress(OSError), _directory(directory) as opened:
        _clear(directory, opened)


def _clear(directory: Path, opened: int) -> None:
    for name in leftovers.clear(opened):
        _tell_once(
            f"{printable(directory / name)} says that an interrupted run left it, but it was "
            "copied here, unpacked or checked out, and is left alone: remove it unless you need it"
        )


@cache
def _tell_once(text: str) -> None:
    tell(text)


def _publish(place: StagingDirectory, destination: Destination) -> None:
    path = destination.path
    if destination.found is None:
        try:
            place.put(path.name)
        except FileExistsError as error:
            raise DestinationError(
                f"{path} came to exist while this was under way, and stays as it is; what was made "
                "for it is dropped: choose another destination and start again"
            ) from error
        return
    try:
        changed = place.replace(path.name, destination.found)
    except FileExistsError:
        changed = "it was removed, and is another one"
    if changed is not None:
        raise DestinationError(
            f"{path} changed while this was under way ({changed}), and stays as it is; what was "
            "made for it is dropped: look at it, then start again"
        )


def _finish(place: StagingDirectory) -> None:
    """Modes, and everything on disk, the inner before what holds it; links are left alone."""
    for _, _, files, directory in os.fwalk(BUNDLE, dir_fd=place.fd, topdown=False, onerror=_raise):
        for name in files:
            if stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
                try:
                    _set_mode(file, place.file_mode)
                    os.fsync(file)
                finally:
                    os.close(file)
        _set_mode(directory, place.directory_mode)
        _sync(directory)
    _sync(place.fd)


def _set_mode(fd: int, mode: int) -> None:
    # Not for nothing: filesystems without modes refuse it.
    if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        os.fchmod(fd, mode)


def _sync(directory: int) -> None:
    try:
        os.fsync(directory)
    except OSError as error:
        # Some network filesystems sync files only.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise


def _sync_path(directory: Path) -> None:
    with _directory(directory) as fd:
        _sync(fd)


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    """A descriptor of an existing directory, links in its path followed."""
    fd = os.open(path, DIRECTORY & ~os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)


def _check_same(path: Path, opened: int) -> None:
    """Raises DestinationError: the path leads elsewhere than when it was opened."""
    with suppress(FileNotFoundError):
        if os.path.samestat(os.stat(path), os.fstat(opened)):
            return
    raise DestinationError(
        f"{path} was moved, removed or replaced while this was under way, and what was made for it "
        "is dropped: start again"
    )


def _make_parents(directory: Path, made: list[tuple[Path, int]]) -> None:
    """Add to `made` what was not there, innermost first, each with its inode."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        with suppress(FileExistsError):
            path.mkdir()
            made.insert(0, (path, path.stat().st_ino))


def _remove_empty(directories: list[tuple[Path, int]]) -> None:
    """Parents that were made for a destination that did not appear, innermost first."""
    for directory, inode in directories:
        with suppress(OSError):
            if directory.lstat().st_ino == inode:
                directory.rmdir()


def _raise(error: OSError) -> None:
    raise error


def _destination_error(
    destination: Path, error: OSError, *, placed: bool = False
) -> DestinationError:
    where = Path(error.filename) if isinstance(error.filename, str) else destination
    # Nobody knows the hidden directory, nor what is named from within it.
    if not where.is_absolute() or any(NAME.fullmatch(part) for part in where.parts):
        where = destination
    if placed:
        return DestinationError(
            f"{destination} is complete and in its place, but not all could be cleared or synced "
            f"({where}: {error.strerror or error}): remove what is hidden beside it"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DestinationError(
            f"the disk of {where.parent} is full, nothing was left at {destination}: make room, "
            "or choose another disk"
        )
    if error.errno in (errno.EXDEV, errno.EBUSY) and where == destination:
        # Of a container's image, for one.
        return DestinationError(
            f"{destination} can't be moved ({error.strerror}) and is as it was: remove it, "
            "or choose another destination"
        )
    return DestinationError(
        f"{where} can't be read or written ({error.strerror or error}), nothing was left at "
        f"{destination}: check the path and its permissions"
    )
