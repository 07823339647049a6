"""Files of a checkpoint or a bundle: regular ones, inside its directory, of bounded size.

Both come from elsewhere. A link in them may lead to a user's private files or to a device that
never ends, so nothing is opened before it is known to be a regular file inside the directory. The
one exception is the Hugging Face hub's cache, where a snapshot consists of links into the `blobs`
beside it.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.errors import FastVLMError

KB, MB = 1_000, 1_000_000
# Qwen2's tokenizer.json has 11 MB; no other file that is parsed as text comes near.
SMALL_FILE_BYTES = 64 * MB
# Many times what a bundle of shards and a package holds; a directory with more is something else.
MAX_FILES = 10_000

# What desktop systems leave beside files, on a USB stick for example; and where git and
# huggingface_hub (`hf download --local-dir`) keep books of their own.
_LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX"})
_BOOKS = frozenset({".git", ".cache"})
_APPLE_DOUBLE = "._"
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/+\S", re.IGNORECASE)


@dataclass(frozen=True)
class Stamp:
    """What tells whether a file is still the one that was looked at, without reading it."""

    device: int
    inode: int
    bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, file: Path | int) -> Stamp:
        """Of a path, or of an open file's descriptor. Raises OSError."""
        found = os.stat(file)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def is_url(reference: object) -> bool:
    """Whether it begins as a URL does, and nothing here has that name. Of a URL that was made a
    path one slash is left."""
    return _URL.match(str(reference)) is not None and not os.path.exists(str(reference))


def left_behind(name: str) -> bool:
    """Whether a system or a tool leaves files or folders of this name by itself: no part of a
    model."""
    return name in _BOOKS or is_litter(name)


def is_litter(name: str) -> bool:
    """Whether a desktop system leaves files or folders of this name, which nobody misses."""
    return name in _LITTER or name.startswith(_APPLE_DOUBLE)


def is_empty(directory: Path) -> bool:
    """Whether there is nothing in a directory that anybody put there. Raises OSError."""
    return all(is_litter(path.name) for path in directory.iterdir())


def inside(root: Path | None, file: Path, error: type[FastVLMError]) -> Path:
    """`file` with its links resolved, a regular file in `root` or in the hub's cache of it.

    Args:
        root: None of a file that the user named, whose links may lead anywhere.

    Raises:
        error: it is missing, is no regular file, or a link leads out of `root`.
    """
    try:
        real = file.resolve(strict=True)
        mode = real.stat().st_mode
    # A loop of links is a RuntimeError before Python 3.13; NUL in a name is a ValueError.
    except (OSError, RuntimeError, ValueError) as cause:
        reason = getattr(cause, "strerror", None) or "its links or its name lead nowhere"
        raise error(f"{file} can't be opened ({reason}): expected a file there") from cause
    if root is not None and not any(real.is_relative_to(home) for home in _homes(root)):
        raise error(
            f"{file} is a link that leads out of {root}, to {real}, and is not followed: put the "
            "file itself there"
        )
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
        raise error(f"{file} is {kind}: expected a regular file")
    return real


def is_file(path: Path) -> bool:
    """Whether there is a file; there is none of a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_bytes(
    root: Path | None, file: Path, error: type[FastVLMError], limit: int = SMALL_FILE_BYTES
) -> bytes:
    """All of a small file of `root`; None as for `inside`.

    Raises:
        error: as `inside`; or it can't be read, or has more than `limit` bytes.
    """
    real = inside(root, file, error)
    try:
        # Were it exchanged for a pipe since, opening would not wait for a writer.
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as stream:
            data = stream.read(limit + 1)
    except OSError as cause:
        raise error(f"{file} can't be read ({cause.strerror}): check its permissions") from cause
    if len(data) > limit:
        raise error(f"{file} has more than {limit:,} bytes: expected a small file, not this one")
    return data


def listing(root: Path, error: type[FastVLMError]) -> list[str]:
    """The relative names of all files below `root`, sorted, but for those that were left behind.

    Links to directories are not entered, and stand in the list as files do.

    Raises:
        error: there are too many, or a directory can't be read.
    """
    names: list[str] = []

    def refuse(cause: OSError) -> None:
        raise error(f"{cause.filename} can't be read ({cause.strerror}): check its permissions")

    for directory, folders, files in os.walk(root, onerror=refuse):
        base = Path(directory).relative_to(root)
        folders[:] = [folder for folder in folders if not left_behind(folder)]
        links = [folder for folder in folders if (root / base / folder).is_symlink()]
        names += [(base / name).as_posix() for name in (*files, *links) if not left_behind(name)]
        if len(names) > MAX_FILES:
            raise error(
                f"{root} holds more than {MAX_FILES:,} files: expected the directory of one model"
            )
    return sorted(names)


def sha256(file: Path) -> str:
    """Hexadecimal. Raises OSError."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shown_bytes(count: int) -> str:
    """A size for people: 2.6 MB, 856.3 kB."""
    return f"{count / MB:,.1f} MB" if count >= MB else f"{count / KB:,.1f} kB"


def _homes(root: Path) -> tuple[Path, ...]:
    real = root.resolve()
    # huggingface_hub's cache: models--owner--name/{blobs,refs,snapshots/COMMIT}.
    for snapshots in real.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            return real, snapshots.parent / "blobs"
    return (real,)
