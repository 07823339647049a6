"""A file of rows that is only ever added to, so that a run can be killed at any byte.

Beside `captions.jsonl` lies `captions.jsonl.run`, which says what made it and is locked while a run
writes. What does not say so was made by somebody else, and is left as it is.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import DestinationError, printable
from fastvlm_mlx.locks import is_at
from fastvlm_mlx.machine import tell
from fastvlm_mlx.mapping import rows
from fastvlm_mlx.mapping.rows import Row

MADE_BY, VERSION = "fastvlm map", 1
# Many times what a prompt or an answer within a model's context has.
_LONGEST = 1 << 26
_SHOWN = 60
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Journal:
    """The file of rows, which is not touched before the first row comes.

    Attributes:
        done: the names of the images that have a row, each with whether that is an error.
    """

    def __init__(
        self, path: Path, lock: int, made_of: Mapping[str, Any], *, overwrite: bool
    ) -> None:
        """
        Args:
            lock: the descriptor of the file beside it, which is locked.
        """
        self.path = path
        self.done: dict[str, bool] = {}
        self._lock, self._made_of = lock, made_of
        self._file: int | None = None
        self._size, self._tail = 0, b""
        self._forgotten: set[str] = set()
        if self._has_rows():
            self._scan()
            if self._tail and not (_is_row(self._tail) or _begins_as_ours(self._tail)):
                raise _foreign(path, "its end")
        self._overwrite = overwrite
        if overwrite:
            self.done = {}

    def write(self, row: Row) -> None:
        """Add a row, whole or not at all.

        Raises:
            DestinationError: the disk is full, or somebody else writes to the file.
        """
        self.begin()
        self._check_ours()
        if self._forgotten:
            self._remove(self._forgotten)
            self._forgotten = set()
        self._append(rows.line(row))
        self.done[row.name] = row.error is not None

    def forget(self, names: Iterable[str]) -> None:
        """Have other rows in place of those of these images. They are removed, in one step, when
        the first new row comes."""
        self._forgotten = set(names)
        for name in self._forgotten:
            del self.done[name]

    def _remove(self, names: set[str]) -> None:
        part = self.path.with_name(f".{self.path.name[:40]}.{secrets.token_hex(8)}.part")
        with ExitStack() as undo, writing(self.path):
            to = os.open(part, _FLAGS | os.O_APPEND | os.O_EXCL, 0o600)
            undo.callback(os.close, to)
            undo.callback(part.unlink, missing_ok=True)
            os.fchmod(to, stat.S_IMODE(os.fstat(self.file).st_mode))
            size = 0
            with self.path.open("rb") as source, open(to, "ab", closefd=False) as target:
                for line in source:
                    if rows.read(line).name not in names:
                        size += target.write(line)
            os.fsync(to)
            self._check_ours()
            os.replace(part, self.path)
            undo.pop_all()
            os.close(self.file)
            self._file, self._size = to, size
            _sync_directory(self.path.parent)

    def sync(self) -> None:
        """Have the rows on the disk. Raises DestinationError: it refuses."""
        if self._file is not None:
            with writing(self.path):
                os.fsync(self._file)

    def begin(self) -> None:
        """Have a file that rows can be added to, if that was not done. Errors as `write`."""
        if self._file is not None:
            return
        with writing(self.path):
            rows_are_there = self._has_rows()
            if not rows_are_there:
                # Before there are any, so that none is ever without what says what made it.
                self._say()
            self._file = os.open(self.path, _FLAGS | os.O_APPEND, 0o666)
            _sync_directory(self.path.parent)
        tail, self._tail = self._tail, b""
        self._check_ours(len(tail))
        if self._overwrite and rows_are_there:
            with writing(self.path):
                # First the rows, so that none is ever beside what did not make it.
                os.ftruncate(self._file, 0)
                os.fsync(self._file)
                self._say()
            self._size = 0
        elif tail:
            self._end_line(tail)

    def close(self) -> None:
        """Raises DestinationError: the last rows can't be written."""
        if self._file is not None:
            try:
                self.sync()
            finally:
                os.close(self._file)

    def _end_line(self, tail: bytes) -> None:
        """See to what follows the last line's end."""
        if _is_row(tail):
            row = rows.read(tail)
            self._size += len(tail)
            self._append(b"\n")
            self.done[row.name] = row.error is not None
            return
        with writing(self.path):
            os.ftruncate(self.file, self._size)
        tell(
            f"{printable(self.path)} ended in the middle of a row, as a run that is killed may "
            "leave it: that row was cut off, and its image is asked about again"
        )

    def _append(self, data: bytes) -> None:
        rest = memoryview(data)
        whole = False
        try:
            with writing(self.path):
                while rest:
                    rest = rest[os.write(self.file, rest) :]
            whole = True
            self._size += len(data)
        finally:
            # An interruption too: the part that was written goes.
            if not whole:
                with suppress(OSError):
                    os.ftruncate(self.file, self._size)

    @property
    def file(self) -> int:
        """The descriptor. Raises ValueError: before `begin`."""
        if self._file is None:
            raise ValueError("the file of rows is not open yet")
        return self._file

    def _has_rows(self) -> bool:
        return self.path.exists() and self.path.stat().st_size > 0

    def _say(self) -> None:
        """Write what makes the rows into the file beside them."""
        data = memoryview(_text(self._made_of))
        os.ftruncate(self._lock, 0)
        done = 0
        while done < len(data):
            done += os.pwrite(self._lock, data[done:], done)
        os.fsync(self._lock)

    def _scan(self) -> None:
        with self.path.open("rb") as stream:
            for number, text in enumerate(iter(lambda: stream.readline(_LONGEST), b""), 1):
                if not text.endswith(b"\n"):
                    self._tail = text
                    break
                if not _is_row(text):
                    raise _foreign(self.path, f"line {number}")
                row = rows.read(text)
                self.done[row.name] = row.error is not None
                self._size += len(text)

    def _check_ours(self, more: int = 0) -> None:
        now = os.fstat(self.file)
        try:
            there = os.stat(self.path, follow_symlinks=False).st_ino == now.st_ino
        except OSError:
            there = False
        if there and now.st_size == self._size + more:
            return
        what = "was written to" if there else "was removed or replaced"
        raise DestinationError(
            f"{self.path} {what} by something else during this run, and is left as it is: give "
            "another --out, or start again when nothing else uses the file"
        )


@contextmanager
def opened(path: Path, made_of: Mapping[str, Any], *, overwrite: bool) -> Iterator[Journal]:
    """The file of rows, new or to be gone on with, which nobody else writes to meanwhile.

    Args:
        path: an absolute one.
        made_of: what the answers depend on, by the name of its option. A file that was made of
            something else is not gone on with.
        overwrite: begin anew a file that an earlier run made.

    Raises:
        DestinationError: it is somebody else's, was made of something else, is being written, or
            can't be written.
    """
    beside = path.with_name(f"{path.name}.run")
    check_regular(path)
    check_regular(beside)
    if path.exists() and path.stat().st_size and not beside.exists():
        raise _not_made_here(path, beside)
    with writing(path):
        lock = _locked(beside, path)
    try:
        with writing(path):
            _check_earlier(path, beside, lock, made_of, overwrite=overwrite)
            journal = Journal(path, lock, made_of, overwrite=overwrite)
        try:
            yield journal
        finally:
            journal.close()
    finally:
        if not os.fstat(lock).st_size and is_at(lock, beside):
            # Made only to be locked.
            with suppress(OSError):
                os.unlink(beside)
        os.close(lock)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write into a DestinationError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "make room" if full else "check the disk and the permissions"
        raise DestinationError(
            f"{path} can't be written ({error.strerror}), and all rows that it has are whole: "
            f"{hint}, and give the same command again, which goes on"
        ) from error


def check_regular(path: Path) -> None:
    """Raises DestinationError: what is at `path` is no regular file, or it can't be looked at."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DestinationError(
            f"{path} can't be written ({reason}): give --out the path of a file"
        ) from error
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symbolic link"}
    kind = kinds.get(stat.S_IFMT(mode), "a device, a pipe or a socket")
    raise DestinationError(f"{path} is {kind}: give --out the path of a file itself")


def _locked(beside: Path, path: Path) -> int:
    """The descriptor of the file that says what made the rows, locked."""
    while True:
        with ExitStack() as undo:
            lock = os.open(beside, _FLAGS, 0o666)
            undo.callback(os.close, lock)
            _lock(lock, path)
            # One that was removed since it was opened locks nothing.
            if is_at(lock, beside):
                undo.pop_all()
                return lock


def _lock(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DestinationError(
            f"another run is adding rows to {path}: wait for its end, or give each run an --out of "
            "its own"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        tell(
            f"the disk of {printable(path)} has no locks: see to it that no other run writes there"
        )


def _check_earlier(
    path: Path, beside: Path, lock: int, made_of: Mapping[str, Any], *, overwrite: bool
) -> None:
    said = os.pread(lock, _LONGEST, 0)
    earlier = _read(said)
    if earlier is None and not _text({}).startswith(said[:20]):
        raise DestinationError(
            f"{beside} is not what a run of `fastvlm map` keeps beside its rows: choose another "
            "--out, or move that file"
        )
    if path.exists() and path.stat().st_size:
        if earlier is None:
            raise _not_made_here(path, beside)
        if not overwrite:
            _check_same(path, earlier, made_of)


def _read(said: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(found, dict) and found.get("made_by") == MADE_BY
    return found if ours else None


def _text(made_of: Mapping[str, Any]) -> bytes:
    said = {"made_by": MADE_BY, "version": VERSION, **made_of}
    return (json.dumps(said, indent=2) + "\n").encode()


def _check_same(path: Path, earlier: Mapping[str, Any], made_of: Mapping[str, Any]) -> None:
    if earlier.get("version") != VERSION:
        raise DestinationError(
            f"{path} was begun by another release of fastvlm-mlx: go on with that one, choose "
            "another --out, or begin anew with --overwrite"
        )
    for key, value in json.loads(_text(made_of)).items():
        if earlier.get(key) != value:
            raise DestinationError(
                f"{path} was begun with {key.replace('_', ' ')} {_short(earlier.get(key))}, not "
                f"{_short(value)}: give that again to go on, choose another --out, or begin anew "
                "with --overwrite"
            )


def _short(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False), _SHOWN)


def _is_row(text: bytes) -> bool:
    try:
        rows.read(text)
    except ValueError:
        return False
    return True


def _begins_as_ours(tail: bytes) -> bool:
    # A machine that lost its power may leave zeros where data was to come.
    text = tail.rstrip(b"\0")
    return text.startswith(rows.BEGINNING) or rows.BEGINNING.startswith(text)


def _foreign(path: Path, where: str) -> DestinationError:
    return DestinationError(
        f"{path} holds what is no row of `fastvlm map` ({where}), and is left as it is: remove "
        "that, or choose another --out"
    )


def _not_made_here(path: Path, beside: Path) -> DestinationError:
    return DestinationError(
        f"{path} exists, and nothing beside it ({beside.name}) says that `fastvlm map` made it: "
        "choose another --out, or remove it yourself"
    )


def _sync_directory(directory: Path) -> None:
    opened_directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(opened_directory)
    finally:
        os.close(opened_directory)
