"""The images of a folder: which of its files are meant, in an order that every machine gives."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

from fastvlm_mlx.bundle.files import is_litter
from fastvlm_mlx.errors import ImageError, OptionError
from fastvlm_mlx.image.suffixes import SUFFIXES


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of the images, from 1; which part an image is in depends on its path in
    the folder alone.

    Raises:
        OptionError: there is no such part.
    """

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        for number in (self.index, self.count):
            if not isinstance(number, Integral) or isinstance(number, bool):
                raise OptionError(f"--shard has {number!r}: expected two whole numbers, as in 2/8")
        if not 1 <= self.index <= self.count:
            raise OptionError(
                f"--shard is {self}: expected the number of a part, from 1, and of all parts, as "
                "in 2/8"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Of "2/8", the second of eight. Raises OptionError: it is something else."""
        index, slash, count = text.partition("/")
        if not (slash and _is_number(index) and _is_number(count)):
            raise OptionError(
                f"--shard is {text!r}: expected the number of a part and of all parts, as in 2/8"
            )
        return cls(int(index), int(count))

    def holds(self, name: str) -> bool:
        if self.count == 1:
            return True
        digest = hashlib.sha256(os.fsencode(name)).digest()
        return int.from_bytes(digest[:8]) % self.count == self.index - 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass
class Found:
    """What a folder holds.

    Attributes:
        names: of the images, relative to the folder with `/` between its parts, in the order of
            their bytes.
        others: how many files are none by their name.
        links: how many links lead to directories, which are not entered.
        unreadable: of each directory that can't be read a sentence.
    """

    names: list[str] = field(default_factory=list)
    others: int = 0
    links: int = 0
    unreadable: list[str] = field(default_factory=list)


def find(folder: str, patterns: Iterable[str], shard: Shard, own: Iterable[str] = ()) -> Found:
    """Look through a folder and the folders in it. What is hidden is left alone.

    Args:
        folder: an absolute path.
        patterns: of names, such as `*.png`; none takes every name that images have.
        own: absolute paths of files that are not meant, whatever their names.

    Raises:
        ImageError: the folder itself can't be read.
    """
    wanted = tuple(pattern.lower() for pattern in patterns)
    left_out = frozenset(_stamps(own))
    found = Found()
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        try:
            with os.scandir(os.path.join(folder, inside)) as entries:
                for entry in entries:
                    _sort_in(entry, inside, found, waiting, wanted, left_out)
        except OSError as error:
            if not inside:
                raise _unreadable_folder(folder, error) from error
            path = os.path.join(folder, inside)
            found.unreadable.append(
                f"{path} can't be read ({error.strerror}): check its permissions"
            )
    found.names = sorted(filter(shard.holds, found.names), key=os.fsencode)
    found.unreadable.sort()
    return found


def _sort_in(
    entry: os.DirEntry[str],
    inside: str,
    found: Found,
    waiting: list[str],
    wanted: tuple[str, ...],
    left_out: frozenset[tuple[int, int]],
) -> None:
    name = f"{inside}{entry.name}"
    if entry.name.startswith(".") or is_litter(entry.name) or _is_own(entry, left_out):
        return
    if entry.is_dir(follow_symlinks=False):
        waiting.append(f"{name}/")
    elif _leads_to_directory(entry):
        found.links += 1
    elif _is_meant(entry.name.lower(), wanted):
        found.names.append(name)
    else:
        found.others += 1


def _stamps(paths: Iterable[str]) -> Iterator[tuple[int, int]]:
    """What tells files apart by whichever way they are reached, through a link for example."""
    for path in paths:
        with suppress(OSError):
            found = os.lstat(path)
            yield found.st_dev, found.st_ino


def _is_own(entry: os.DirEntry[str], left_out: frozenset[tuple[int, int]]) -> bool:
    if not any(inode == entry.inode() for _, inode in left_out):
        return False
    return (entry.stat(follow_symlinks=False).st_dev, entry.inode()) in left_out


def _is_meant(name: str, wanted: tuple[str, ...]) -> bool:
    if wanted:
        return any(fnmatchcase(name, pattern) for pattern in wanted)
    return os.path.splitext(name)[1] in SUFFIXES


def _leads_to_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    # A link to what may not be looked at: opening the image says so.
    except OSError:
        return False


def _unreadable_folder(folder: str, error: OSError) -> ImageError:
    if isinstance(error, NotADirectoryError):
        return ImageError(
            f"{folder} is a file: expected a folder of images; `fastvlm generate` asks about one"
        )
    return ImageError(f"{folder} can't be read ({error.strerror}): give a folder of images")


def check_patterns(patterns: Any) -> tuple[str, ...]:
    """Raises OptionError: one text in place of several, or an empty one."""
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    if not all(isinstance(pattern, str) and pattern for pattern in given):
        raise OptionError("--pattern holds what is no pattern: expected one such as '*.png'")
    if slashed := [pattern for pattern in given if "/" in pattern]:
        raise OptionError(
            f"--pattern is {slashed[0]!r}: expected a pattern of names alone, without folders, "
            "such as '*.png'"
        )
    return tuple(given)


def special(path: str) -> str | None:
    """What a path is, if opening it would wait for a writer or never end; None of any other."""
    try:
        mode = os.stat(path).st_mode
    # Reading it says what is wrong.
    except (OSError, ValueError):
        return None
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return "a device, a pipe or a socket"


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
