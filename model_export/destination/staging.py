"""A staging directory: where a bundle is made before it takes its place.

It lies hidden beside the destination. If its owner is killed, the next run clears it. Its name is
`.fastvlm-<16 hexadecimal digits>`, and in it are:

    lock        locked (flock) as long as its owner lives; says whose it is, and where it was made
    bundle      what is being made; after an exchange, what was at the destination before
    replaced    what was at the destination, where the filesystem can't exchange
    record      from just before something is replaced: what was to be, and what was made
    *.discarded what is being removed

Where there is a record, nothing is removed but what it names: what was made, and what was to be
replaced. Without a record nothing but what was made can be in there.

Such a directory may also come out of a repository or an archive, or be a copy. Only one that is
where it was made is acted on, which the numbers of its files (inodes) tell: whoever writes a
repository can't know what a file system will give. The number of the disk is left out, since many
disks have another after a restart.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from io import FileIO

from fastvlm_mlx.errors import DestinationError
from model_export.destination import renames
from model_export.destination.content import Content, content_of
from model_export.destination.locks import exclusive, locked
from model_export.destination.removal import remove_tree

NAME = re.compile(r"\.fastvlm-[0-9a-f]{16}")
NAME_OF_ENTRY = re.compile(r"(?!\.{1,2}$)[^/\0]+", re.DOTALL)
LOCK, BUNDLE, REPLACED, RECORD = "lock", "bundle", "replaced", "record"
NEW_RECORD = "record.new"
DISCARDED = {BUNDLE: "bundle.discarded", REPLACED: "replaced.discarded"}
OURS = {LOCK, BUNDLE, REPLACED, RECORD, NEW_RECORD, *DISCARDED.values()}
# What the lock of every version says, so that each clears what another left behind.
MAGIC = "a workplace of fastvlm-mlx"
# Of ten thousand files.
RECORD_BYTES = 16_000_000
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Record:
    """What was going to replace what, and where."""

    destination: str
    found: Content
    made: Content


@dataclass(frozen=True)
class StagingDirectory:
    """A staging directory that this process owns and has locked.

    Attributes:
        parent: descriptor of the directory that holds it and the destination.
        fd: its own descriptor.
        lock: its lock file; None if there is none left.
        abandoned: whether another process made it, which was killed.
        file_mode, directory_mode: what the umask, and what the directory inherits, make of them.
    """

    parent: int
    name: str
    fd: int
    lock: FileIO | None
    file_mode: int = 0o666
    directory_mode: int = 0o777
    abandoned: bool = field(default=False, kw_only=True)

    def put(self, destination: str) -> None:
        """Put what was made at the destination, where there is nothing.

        Raises:
            FileExistsError: something is there.
        """
        with exclusive(self.parent):
            renames.put((self.fd, BUNDLE), (self.parent, destination))

    def replace(self, destination: str, found: Content) -> str | None:
        """Put what was made in the place of `found`, and of nothing else.

        Both are exchanged in one step. If what comes out is not `found`, it goes back. Where the
        filesystem can't exchange there are two renames; after a kill between them, the next run
        puts back what was there.

        Returns:
            What kept it from being done; None if it was done.

        Raises:
            DestinationError: what came out can't go back, see `reconcile`.
        """
        with exclusive(self.parent):
            now = content_of(destination, self.parent)
            if now is not None and now != found:
                return found.difference(now)
            made = content_of(BUNDLE, self.fd)
            if made is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.name)
            self._write(Record(destination, found, made))
            try:
                renames.exchange((self.fd, BUNDLE), (self.parent, destination))
            except renames.ExchangeError:
                self._replace_in_two_steps(destination, found)
            except FileNotFoundError:
                # What was there is gone, so there is nothing to replace.
                renames.put((self.fd, BUNDLE), (self.parent, destination))
            self.reconcile()
            if content_of(BUNDLE, self.fd) is None:
                return None
        return "it changed at the last moment"

    def reconcile(self) -> None:
        """Mark what is to be removed after an exchange, and put back what was taken out wrongly.

        It is called by the process that made the exchange, and by one that finds it made, while
        others are kept out (`exclusive`).

        Raises:
            DestinationError: something can neither be removed nor put back; it has a visible place
                now.
        """
        record = self.record()
        if record is None:
            return
        for name in (REPLACED, BUNDLE):
            content = content_of(name, self.fd)
            if content is None or (name == BUNDLE and content == record.made):
                continue
            published = content_of(BUNDLE, self.fd) != record.made
            if content == record.found and published:
                os.rename(name, DISCARDED[name], src_dir_fd=self.fd, dst_dir_fd=self.fd)
            elif content.inode == record.made.inode or not self._put_back(name, record):
                raise self._rescued(name, record)

    def end(self) -> None:
        """Reconcile, and remove the staging directory.

        Raises:
            DestinationError: as `reconcile`.
            OSError: something can't be moved or removed, and stays for the next run.
        """
        try:
            with exclusive(self.parent):
                self.reconcile()
        except DestinationError:
            self._remove()
            raise
        self._remove()

    def _remove(self) -> None:
        """Remove what was marked, and the lock last, so that a kill leaves what is known."""
        record = self.record()
        if record is not None and content_of(BUNDLE, self.fd) == record.made:
            os.rename(BUNDLE, DISCARDED[BUNDLE], src_dir_fd=self.fd, dst_dir_fd=self.fd)
        names = set(os.listdir(self.fd))
        doomed = {*DISCARDED.values()} if record else {*DISCARDED.values(), BUNDLE}
        for name in sorted(doomed & names):
            remove_tree(name, self.fd)
        if not set(os.listdir(self.fd)) <= {LOCK, RECORD, NEW_RECORD}:
            return
        if self.lock is not None:
            # NFS keeps a file that is open, under another name.
            self.lock.close()
        for name in (NEW_RECORD, RECORD, LOCK):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.fd)
        with suppress(FileNotFoundError):
            os.rmdir(self.name, dir_fd=self.parent)

    def record(self) -> Record | None:
        """What is recorded; None if nothing is.

        Raises:
            OSError: it can't be read.
            ValueError, LookupError, TypeError: it is no record.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            file = os.open(RECORD, flags, dir_fd=self.fd)
        except FileNotFoundError:
            return None
        with open(file, "rb") as stream:
            text = stream.read(RECORD_BYTES + 1)
        if len(text) > RECORD_BYTES:
            raise ValueError("the record is too large")
        try:
            # Not `schema.parse`: a name that is no UTF-8 is half a surrogate pair in here.
            data = json.loads(text)
        except RecursionError as error:
            raise ValueError("the record is nested too deeply") from error
        if not NAME_OF_ENTRY.fullmatch(data["destination"]):
            raise ValueError(data["destination"])
        found, made = Content.from_json(data["found"]), Content.from_json(data["made"])
        return Record(data["destination"], found, made)

    def _rescued(self, name: str, record: Record) -> DestinationError:
        place = f"fastvlm-kept-{secrets.token_hex(4)}"
        renames.put((self.fd, name), (self.parent, place))
        if self._keeps_hidden(record):
            return DestinationError(
                f"{record.destination} is a hidden name, under which nothing is put back; what a "
                f"killed run took from there is in {place} beside it: rename it yourself, and "
                "start again"
            )
        return DestinationError(
            f"something else came to be at {record.destination} while it was being replaced, and "
            f"stays; what was there before is in {place} beside it: keep which you want, and start "
            "again"
        )

    def _replace_in_two_steps(self, destination: str, found: Content) -> None:
        try:
            os.rename(destination, REPLACED, src_dir_fd=self.parent, dst_dir_fd=self.fd)
        except FileNotFoundError:
            pass
        else:
            if content_of(REPLACED, self.fd) != found:
                return
        with suppress(FileExistsError):
            renames.put((self.fd, BUNDLE), (self.parent, destination))

    def _put_back(self, name: str, record: Record) -> bool:
        """Whether it was done: only where there is nothing, or what was made and nothing more."""
        if self._keeps_hidden(record):
            return False
        taken, place = (self.fd, name), (self.parent, record.destination)
        now = content_of(record.destination, self.parent)
        try:
            if now is None:
                renames.put(taken, place)
            elif now == record.made and name == BUNDLE:
                renames.exchange(taken, place)
                return content_of(BUNDLE, self.fd) == record.made
            else:
                return False
        except (FileExistsError, renames.ExchangeError):
            return False
        return True

    def _keeps_hidden(self, record: Record) -> bool:
        """Nothing that somebody left behind becomes hidden: programs act on what is in `.git`."""
        return self.abandoned and record.destination.startswith(".")

    def _write(self, record: Record) -> None:
        data = {
            "destination": record.destination,
            "found": record.found.to_json(),
            "made": record.made.to_json(),
        }
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(NEW_RECORD, flags, 0o600, dir_fd=self.fd)
        with open(file, "w", encoding="ascii") as stream:
            json.dump(data, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(NEW_RECORD, RECORD, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        os.fsync(self.fd)


@contextmanager
def staging_directory(parent: int) -> Iterator[StagingDirectory]:
    """Make a staging directory in the directory of that descriptor, and remove it afterwards.

    Raises:
        OSError: it can't be made, or can't be removed.
        DestinationError: it holds what was taken from the destination and can't be put back.
    """
    name = f".fastvlm-{secrets.token_hex(8)}"
    lock: FileIO | None = None
    whole = False
    try:
        with exclusive(parent):
            os.mkdir(name, 0o700, dir_fd=parent)
            fd = os.open(name, DIRECTORY, dir_fd=parent)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            lock = FileIO(os.open(LOCK, flags, 0o666, dir_fd=fd), "r+")
            locked(lock.fileno())
            os.write(lock.fileno(), lock_text(fd, lock.fileno(), os.getpid()).encode())
        os.fsync(lock.fileno())
        os.mkdir(BUNDLE, dir_fd=fd)
        modes = os.fstat(lock.fileno()).st_mode, os.stat(BUNDLE, dir_fd=fd).st_mode
        os.close(fd)
        with opened(parent, name, lock, *map(stat.S_IMODE, modes)) as place:
            yield place
        whole = True
    # Whatever ends it, a Ctrl-C too, leaves nothing behind.
    finally:
        # Of a failure what went wrong first is told; what can't be removed then is removed by the
        # next run.
        with nullcontext() if whole else suppress(OSError):
            _end_at_last(parent, name, lock)


def lock_text(directory: int, lock: int, owner: int) -> str:
    """What a lock says.

    Args:
        directory, lock: descriptors of the staging directory and of its lock.
        owner: the number of a process.
    """
    return f"{MAGIC}\n{owner} {platform.node()}\n{made_here(directory, lock)}\n"


def made_here(directory: int, lock: int) -> str:
    """The numbers of a staging directory and of its lock, which no copy of them has."""
    return f"{os.fstat(directory).st_ino} {os.fstat(lock).st_ino}"


def _end_at_last(parent: int, name: str, lock: FileIO | None) -> None:
    """End the staging directory for its owner, in whatever state it is."""
    try:
        _end(parent, name, lock)
    except (KeyboardInterrupt, SystemExit):
        # `interruptible` lets no second one through.
        _end(parent, name, lock)
        raise
    finally:
        if lock is not None:
            lock.close()


def _end(parent: int, name: str, lock: FileIO | None) -> None:
    with suppress(FileNotFoundError), opened(parent, name, lock) as place:
        place.end()


@contextmanager
def opened(parent: int, name: str, lock: FileIO | None, *modes: int) -> Iterator[StagingDirectory]:
    fd = os.open(name, DIRECTORY, dir_fd=parent)
    try:
        yield StagingDirectory(parent, name, fd, lock, *modes)
    finally:
        os.close(fd)
