"""A directory that appears whole or not at all: made beside its place, synced, renamed into it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastvlm_mlx.errors import DestinationError
from fastvlm_mlx.manifest import MANIFEST


def resolve(path: str | Path) -> Path:
    """An absolute destination, `..` and `~` taken out of it.

    Raises:
        DestinationError: a symbolic link, or a directory that no bundle may take the place of.
    """
    destination = Path(os.path.abspath(Path(path).expanduser()))
    if destination.is_symlink():
        raise DestinationError(
            f"{destination} is a symbolic link: give the directory that is meant itself"
        )
    here, home = Path.cwd(), Path.home()
    if destination in (here, home, *here.parents, *home.parents):
        raise DestinationError(
            f"{destination} can't become a bundle, you work or live in it: choose a directory of "
            "its own"
        )
    return destination


def check_replaceable(destination: Path, *, overwrite: bool) -> None:
    """Only a bundle, or nothing, is ever replaced.

    Raises:
        DestinationError: `destination` exists and `overwrite` is off, or it is something else.
    """
    if not destination.exists():
        return
    if not overwrite:
        raise DestinationError(
            f"{destination} exists: choose another destination, or replace it with --overwrite"
        )
    if not destination.is_dir():
        raise DestinationError(f"{destination} is a file: expected a bundle to overwrite")
    content = sorted(path.name for path in destination.iterdir())
    a_bundle = MANIFEST in content or (
        "config.json" in content and any(name.endswith(".mlpackage") for name in content)
    )
    if content and not a_bundle:
        raise DestinationError(
            f"{destination} holds what is no bundle ({content[0]}), which --overwrite would "
            "delete: choose another destination, or remove it yourself"
        )


@contextmanager
def appearing(destination: Path) -> Iterator[Path]:
    """A directory beside `destination` that takes its place on success, and is gone otherwise.

    What was at `destination` stays until the new directory is complete and on disk. What earlier
    runs left when they were killed is cleared first.

    Raises:
        DestinationError: it can't be written, or the disk is full.
    """
    made = [p for p in destination.parents if not p.exists()]
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _recover(destination)
        partial, lock = _locked_directory(destination)
    except OSError as error:
        _remove_empty(made)
        raise _destination_error(destination, error) from error
    try:
        yield partial
        _sync(partial)
        _replace(partial, destination)
        made = []
    except OSError as error:
        raise _destination_error(destination, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)
        _remove_empty(made)


def _locked_directory(destination: Path) -> tuple[Path, int]:
    """A new directory, and the lock that tells other runs that its owner is alive."""
    hidden = Path(tempfile.mkdtemp(prefix=".fastvlm-", dir=destination.parent))
    umask = os.umask(0)
    os.umask(umask)
    hidden.chmod(0o777 & ~umask)
    lock = os.open(hidden, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    # Under its name only once it is locked, so that no other run takes it for a dead one's.
    partial = hidden.with_name(f".{destination.name}.partial-{hidden.name.rpartition('-')[2]}")
    hidden.rename(partial)
    return partial, lock


def _recover(destination: Path) -> None:
    for path in destination.parent.iterdir():
        if path.name.startswith(f".{destination.name}.partial-") and _abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(f".{destination.name}.replaced-"):
            if destination.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(destination)


def _abandoned(partial: Path) -> bool:
    try:
        lock = os.open(partial, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def _replace(partial: Path, destination: Path) -> None:
    if not destination.exists():
        partial.rename(destination)
    else:
        old = partial.with_name(partial.name.replace(".partial-", ".replaced-"))
        destination.rename(old)
        try:
            partial.rename(destination)
        except OSError:
            old.rename(destination)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync_one(destination.parent)


def _sync(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_empty(directories: list[Path]) -> None:
    """Parents that were made for a destination that did not appear, innermost first."""
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


def _destination_error(destination: Path, error: OSError) -> DestinationError:
    where = Path(error.filename) if isinstance(error.filename, str) else destination
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DestinationError(
            f"the disk of {where.parent} is full, nothing was left at {destination}: make room, "
            "or choose another disk"
        )
    return DestinationError(
        f"{where} can't be read or written ({error.strerror or error}), nothing was left at "
        f"{destination}: check the path and its permissions"
    )
