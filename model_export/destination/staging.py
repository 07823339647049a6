"""Where a directory is made before it takes its place: hidden beside it, and cleared by whoever
comes next if its owner is killed.

A workplace is a directory `.fastvlm-<16 hexadecimal digits>`:

    lock        locked (flock) as long as its owner lives; says whose it is
    bundle      what is being made; after an exchange, what was at the destination before
    replaced    what was at the destination, where the filesystem can't exchange
    record      from just before something is replaced: what was to be, and what was made
    *.discarded what is being removed

Nothing is removed that is not known, by the record, to be what was made or what was to be replaced,
unless there is no record, and then nothing but what was made can have been in there.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO

from fastvlm_mlx.errors import DestinationError
from model_export.destination import renames
from model_export.destination.content import Content, content_of
from model_export.destination.locks import alone, locked
from model_export.destination.removal import remove_tree

NAME = re.compile(r"\.fastvlm-[0-9a-f]{16}")
NAME_OF_ENTRY = re.compile(r"(?!\.{1,2}$)[^/\0]+", re.DOTALL)
LOCK, BUNDLE, REPLACED, RECORD = "lock", "bundle", "replaced", "record"
NEW_RECORD = "record.new"
DISCARDED = {BUNDLE: "bundle.discarded", REPLACED: "replaced.discarded"}
OURS = {LOCK, BUNDLE, REPLACED, RECORD, NEW_RECORD, *DISCARDED.values()}
MAGIC = "a workplace of fastvlm-mlx"
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Record:
    """What was to replace what, and where."""

    destination: str
    found: Content
    made: Content


@dataclass(frozen=True)
class Workplace:
    """One that is ours, locked.

    Attributes:
        parent: descriptor of the directory that it and the destination are in.
        fd: its own.
        lock: None if there is none left.
        file_mode, directory_mode: as the umask, and what the directory inherits, make them.
    """

    parent: int
    name: str
    fd: int
    lock: FileIO | None
    file_mode: int = 0o666
    directory_mode: int = 0o777

    def put(self, destination: str) -> None:
        """What was made takes its place, where there is nothing.

        Raises:
            FileExistsError: there is something.
        """
        with alone(self.parent):
            renames.put((self.fd, BUNDLE), (self.parent, destination))

    def replace(self, destination: str, found: Content) -> str | None:
        """What was made takes the place of `found`, and of nothing else.

        It is exchanged in one step, and what comes out is looked at: if it is not `found`, it goes
        back. Where the filesystem can't exchange there are two renames, and killed between them,
        the next run puts back what was there.

        Returns:
            What kept it from being done, None if it was.

        Raises:
            DestinationError: what came out can't go back, see `sort_out`.
        """
        with alone(self.parent):
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
            self.sort_out()
            if content_of(BUNDLE, self.fd) is None:
                return None
        return "it changed at the last moment"

    def sort_out(self) -> None:
        """After an exchange, whoever makes it or finds it made: what is to go is marked, and what
        was taken out wrongly goes back. Others are kept out (`alone`).

        Raises:
            DestinationError: something can neither go nor go back; it has a visible place now.
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
        """Sort out, and be gone.

        Raises:
            DestinationError: as `sort_out`.
            OSError: something can't be moved or removed; it stays for the next run.
        """
        try:
            with alone(self.parent):
                self.sort_out()
        except DestinationError:
            self._remove()
            raise
        self._remove()

    def _remove(self) -> None:
        """What was sorted out; the lock last, so that a kill leaves what is known."""
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
        try:
            file = os.open(RECORD, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            return None
        with open(file, encoding="ascii") as stream:
            data = json.load(stream)
        if not NAME_OF_ENTRY.fullmatch(data["destination"]):
            raise ValueError(data["destination"])
        found, made = Content.from_json(data["found"]), Content.from_json(data["made"])
        return Record(data["destination"], found, made)

    def _rescued(self, name: str, record: Record) -> DestinationError:
        place = f"fastvlm-kept-{secrets.token_hex(4)}"
        renames.put((self.fd, name), (self.parent, place))
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
def workplace(parent: int) -> Iterator[Workplace]:
    """A new workplace in the directory of that descriptor, gone afterwards.

    Raises:
        OSError: it can't be made, or can't be removed.
        DestinationError: it holds what was taken from the destination and can't go back.
    """
    name = f".fastvlm-{secrets.token_hex(8)}"
    lock: FileIO | None = None
    try:
        with alone(parent):
            os.mkdir(name, 0o700, dir_fd=parent)
            fd = os.open(name, DIRECTORY, dir_fd=parent)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            lock = FileIO(os.open(LOCK, flags, 0o666, dir_fd=fd), "r+")
            locked(lock.fileno())
            os.write(lock.fileno(), f"{MAGIC}\n{os.getpid()} {platform.node()}\n".encode())
        os.fsync(lock.fileno())
        os.mkdir(BUNDLE, dir_fd=fd)
        modes = os.fstat(lock.fileno()).st_mode, os.stat(BUNDLE, dir_fd=fd).st_mode
        os.close(fd)
        with opened(parent, name, lock, *map(stat.S_IMODE, modes)) as place:
            yield place
    # Whatever ends it, a Ctrl-C too, leaves nothing behind.
    except BaseException:
        # What went wrong first is told; what can't be removed now is removed by the next run.
        with suppress(OSError):
            _settle_at_last(parent, name, lock)
        raise
    else:
        _settle_at_last(parent, name, lock)


def _settle_at_last(parent: int, name: str, lock: FileIO | None) -> None:
    """The owner's end, in whatever state that is."""
    try:
        _settle(parent, name, lock)
    except (KeyboardInterrupt, SystemExit):
        # `interruptible` lets no second one through.
        _settle(parent, name, lock)
        raise
    finally:
        if lock is not None:
            lock.close()


def _settle(parent: int, name: str, lock: FileIO | None) -> None:
    with suppress(FileNotFoundError), opened(parent, name, lock) as place:
        place.end()


@contextmanager
def opened(parent: int, name: str, lock: FileIO | None, *modes: int) -> Iterator[Workplace]:
    fd = os.open(name, DIRECTORY, dir_fd=parent)
    try:
        yield Workplace(parent, name, fd, lock, *modes)
    finally:
        os.close(fd)
