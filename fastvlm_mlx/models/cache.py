"""The user's cache of models: one directory for each, which is whole or is not taken for one.

The cache is the user's own. In it are, by the name and the hash of what decides the model:

    NAME-HASH/entry.json     written last: what it is; without it nothing here is a model
    NAME-HASH/model/NAME     the bundle or the checkpoint
    NAME-HASH/partial        a download that was interrupted, and is resumed
    NAME-HASH.lock           locked while somebody makes it
    hashes                   SHA-256 of checkpoints' files, see `identity` of the exporter
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.files import is_litter, shown_bytes
from fastvlm_mlx.bundle.schema import check, read_json, to_json
from fastvlm_mlx.errors import BundleError, DestinationError, FastVLMError, printable
from fastvlm_mlx.locks import lock_file
from fastvlm_mlx.machine import tell
from fastvlm_mlx.models.disk import remove_tree, sync_tree
from fastvlm_mlx.models.disk import size as size
from fastvlm_mlx.models.disk import write_whole as write_whole

VARIABLE = "FASTVLM_CACHE"
ENTRY, MODEL, PARTIAL, LOCK, HASHES = "entry.json", "model", "partial", ".lock", "hashes"
_DIRECTORY = re.compile(r"[A-Za-z0-9._-]{1,80}-[0-9a-f]{16}")
_INNER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}")
_HASHES = re.compile(r"[0-9a-f]{32}\.json(\.\d+\.new)?")
# What stands in a model's directory, and the entry while it is written.
_OWN = re.compile(rf"{re.escape(ENTRY)}(\.\d+\.new)?|{MODEL}|{PARTIAL}")


@dataclass(frozen=True)
class Key:
    """What decides a model.

    Attributes:
        name: how its user calls it: a published name, a hub id, or a path.
        identity: the hash of this, which goes through JSON, tells one model from another.
        called: the name of its directory; made of `name` unless given.
    """

    name: str
    identity: Mapping[str, Any]
    called: str = ""

    @property
    def slug(self) -> str:
        name = self.called or self.name.partition("@")[0].rstrip("/").rpartition("/")[2]
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:80].rstrip(".-") or "model"

    @property
    def directory(self) -> str:
        text = json.dumps(self.identity, sort_keys=True)
        return f"{self.slug}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Entry:
    """A model in the cache, as `entry.json` describes it.

    Attributes:
        name: as `Key.name`.
        what: bundle or checkpoint.
        origin: where it comes from and how it was made, in words.
        directory: its own, relative to the entry's.
        bytes, seconds: what it takes on the disk, and how long it took to make.
        reference, revision, commit: the hub id and the revision that were asked for, and the
            commit that this was.
        made_with: tells what made it where that is more than a download; see `latest`.
        used: when it was used last, in seconds since 1970.
    """

    name: str
    what: str
    origin: str
    directory: str
    bytes: int
    seconds: float
    reference: str | None = None
    revision: str | None = None
    commit: str | None = None
    made_with: str = ""
    place: str = field(default="", kw_only=True)
    used: float = field(default=0.0, kw_only=True)

    @property
    def path(self) -> Path:
        """The directory of the bundle or the checkpoint."""
        return Path(self.place, MODEL, self.directory)


def directory() -> Path:
    """Where models are kept: in `FASTVLM_CACHE`, or where the system keeps caches.

    Raises:
        DestinationError: this user has no home, and the variable is not set.
    """
    given, default = os.environ.get(VARIABLE), "~/.cache"
    if given:
        base = Path(given)
    elif sys.platform == "darwin":
        base = Path("~/Library/Caches/fastvlm-mlx")
    else:
        xdg = os.environ.get("XDG_CACHE_HOME", "")
        # What is relative is to be ignored, says the specification of these directories.
        base = Path(xdg if os.path.isabs(xdg) else default) / "fastvlm-mlx"
    try:
        return Path(os.path.abspath(base.expanduser())) / "models"
    except RuntimeError as error:
        raise DestinationError(
            f"the home of this user can't be found ({error}): set {VARIABLE} to a directory for "
            "the cache of models"
        ) from error


def private() -> Path:
    """The cache's directory, made if it is not there.

    Raises:
        DestinationError: it can't be made, or others may write to it.
    """
    root = directory()
    with writing():
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = root.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise DestinationError(
            f"{root} is no directory: expected the cache of models, move it away, or set "
            f"{VARIABLE} to another place"
        )
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise DestinationError(
            f"{root} is another user's, or others may write to it: expected a directory of your "
            f"own, run `chmod go-w` on it, or set {VARIABLE} to another place"
        )
    return root


@contextmanager
def writing() -> Iterator[None]:
    """Turns what the system says of a file in the cache into a sentence."""
    try:
        yield
    except BrokenPipeError:
        # The reader of our output has gone.
        raise
    except OSError as error:
        raise disk_error(error) from error


def disk_error(error: OSError) -> DestinationError:
    """What to say where the cache can't be written."""
    root = directory()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DestinationError(
            f"the disk of the cache {root} is full: make room with `fastvlm models --remove NAME`, "
            f"or set {VARIABLE} to a directory on another disk"
        )
    where = error.filename if isinstance(error.filename, str) else root
    return DestinationError(
        f"{where} in the cache of models can't be read or written ({error.strerror or error}): "
        f"check its permissions, or set {VARIABLE} to another directory"
    )


def find(key: Key) -> Entry | None:
    """The whole model of that key, marked as used now; None if there is none."""
    entry = _read(directory() / key.directory)
    return None if entry is None else _used_now(entry)


def latest(reference: str, revision: str | None, made_with: str = "") -> Entry | None:
    """The model that was last used under a hub id, for when the hub can't be asked which commit it
    has now."""
    asked = (reference, revision, made_with)
    found = [e for e in entries() if (e.reference, e.revision, e.made_with) == asked]
    return _used_now(max(found, key=lambda entry: entry.used)) if found else None


def entries() -> list[Entry]:
    """All whole models, the one used last first."""
    found = [_read(place) for place in _places()]
    return sorted((e for e in found if e is not None), key=lambda e: -e.used)


def unfinished() -> list[Path]:
    """The directories of models that are being made, or were interrupted."""
    return [place for place in _places() if _read(place) is None]


def obtain(key: Key, entry: Entry, make: Callable[[Path, Path], None], *, waiting: str) -> Entry:
    """The model of that key, made if it is not there. Of several processes one makes it.

    Args:
        entry: what it will be; its bytes, its seconds and where it is are found here.
        make: called with the directory to make, which is not there, and with one for what may be
            left half done, to be resumed.
        waiting: what to say when another process makes it.

    Raises:
        DestinationError: the disk is full, or the cache can't be written.
        FastVLMError: whatever `make` raises. Nothing is left then but what can be resumed.
    """
    if found := find(key):
        return found
    root = private()
    with writing(), lock_file(root / f"{key.directory}{LOCK}", partial(tell, waiting)):
        if found := find(key):
            return found
        place = root / key.directory
        model, unfinished = place / MODEL / key.slug, place / PARTIAL
        started = time.perf_counter()
        with ExitStack() as undo:
            # A Ctrl-C, too, leaves nothing but what is resumed.
            undo.callback(_clear_if_possible, place)
            _clear(place)
            place.mkdir(mode=0o700, exist_ok=True)
            model.parent.mkdir(mode=0o700)
            make(model, unfinished)
            entry = replace(
                entry,
                directory=key.slug,
                bytes=size(model),
                seconds=round(time.perf_counter() - started, 1),
            )
            remove_tree(unfinished)
            # Before the entry, so that a machine that loses its power keeps no half model with one.
            sync_tree(model)
            _write(place, entry)
            undo.pop_all()
    made = find(key)
    if made is None:
        raise DestinationError(f"{place} was removed while it was made: run the same command again")
    return made


def remove(place: Path) -> int:
    """Remove a model or what is left of one, and nothing that the cache did not make.

    Returns:
        The bytes that it took.

    Raises:
        DestinationError: another process makes it just now, or it can't be removed.
    """
    with writing():
        taken = size(place)
        with lock_file(place.with_name(place.name + LOCK)) as held:
            if not held:
                raise DestinationError(
                    f"{printable(place.name)} is being made by another process: end that one, or "
                    "wait for it"
                )
            with suppress(FileNotFoundError):
                # First, so that nothing is taken for whole if this is interrupted.
                os.unlink(place / ENTRY)
            remove_tree(place)
    return taken


def remove_books() -> None:
    """Remove what is in the cache beside models, which is made again when it is needed."""
    root = directory()
    with writing():
        _remove_hashes(root / HASHES)
        for file in root.glob(f"*{LOCK}"):
            # Ours is empty.
            if _DIRECTORY.fullmatch(file.name.removesuffix(LOCK)) and not file.lstat().st_size:
                with lock_file(file):
                    # Letting go of it removes it.
                    pass


def _remove_hashes(place: Path) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        for file in [] if place.is_symlink() else list(place.iterdir()):
            if _HASHES.fullmatch(file.name):
                file.unlink(missing_ok=True)
    # What is left, somebody else has put there.
    with suppress(OSError):
        place.rmdir()


def announce(entry: Entry) -> None:
    """Say what was made, with its size and seconds."""
    tell(
        f"{printable(entry.name)}: {shown_bytes(entry.bytes)} in {entry.seconds:.0f} s, kept in "
        f"{printable(entry.path)} and used from now on; `fastvlm models` lists it"
    )


def as_kept(text: str) -> str:
    """A name as an entry has it: JSON can't hold the bytes of a path that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def _used_now(entry: Entry) -> Entry:
    # A cache that can only be read is as good.
    with suppress(OSError):
        os.utime(Path(entry.place, ENTRY))
    return entry


def _places() -> list[Path]:
    root = directory()
    try:
        found = sorted(root.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise disk_error(error) from error
    return [p for p in found if _DIRECTORY.fullmatch(p.name) and _is_place(p)]


def _is_place(path: Path) -> bool:
    """Whether it is a directory of which everything in it has a name that the cache gives. Somebody
    else's may end in hexadecimal digits too."""
    try:
        names = [] if path.is_symlink() else os.listdir(path)
    # It is a file, can't be looked into, or was removed meanwhile.
    except OSError:
        return False
    own = all(_OWN.fullmatch(name) or is_litter(name) for name in names)
    return own and not path.is_symlink() and _is_model(path / MODEL, path.name.rpartition("-")[0])


def _is_model(path: Path, slug: str) -> bool:
    """Whether in a directory there is nothing but what is called as a model is; what failed its
    check and what is being made have names that begin or end differently."""
    try:
        names = [] if path.is_symlink() else os.listdir(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return all(
        slug in name or name.startswith((".", "fastvlm-kept-")) or is_litter(name) for name in names
    )


def _read(place: Path) -> Entry | None:
    try:
        facts = read_json(place, place / ENTRY, BundleError, remedy="")
        entry = check(facts, Entry, str(place / ENTRY), BundleError, remedy="")
        used = (place / ENTRY).stat().st_mtime
    except (FastVLMError, OSError):
        # It is not whole.
        return None
    entry = replace(entry, place=str(place), used=used)
    named = _INNER.fullmatch(entry.directory) is not None
    return entry if named and entry.path.is_dir() else None


def _write(place: Path, entry: Entry) -> None:
    facts = {
        k: as_kept(v) if isinstance(v, str) else v
        for k, v in asdict(entry).items()
        if k not in ("place", "used")
    }
    write_whole(place / ENTRY, to_json(facts) + "\n")


def _clear(place: Path) -> None:
    """Remove what is at a place that holds no whole model, but for what can be resumed."""
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        place.unlink()
    if not place.is_dir():
        return
    for path in place.iterdir():
        if path.name != PARTIAL or path.is_symlink():
            remove_tree(path)
    with suppress(OSError):
        os.rmdir(place / PARTIAL)
    with suppress(OSError):
        place.rmdir()


def _clear_if_possible(place: Path) -> None:
    with suppress(OSError):
        _clear(place)
