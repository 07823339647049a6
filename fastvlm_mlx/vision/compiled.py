"""Compiled Core ML models: one for each package, version of macOS and chip, in the user's cache.

What the system prepares for the Neural Engine it keeps by the path of the compiled model, and
prepares again for another path. Where nothing can be kept, a temporary directory does, for as long
as the process lives.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastvlm_mlx.bundle.files import inside, listing, sha256
from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.machine import chip, tell
from fastvlm_mlx.vision.package import quiet_coremltools

CACHE = Path("~/Library/Caches/fastvlm-mlx")
_NAME = "fastvithd.mlmodelc"
_KEPT = 4  # compiled models, a quarter of a gigabyte each


@dataclass(frozen=True)
class Compiled:
    """A compiled model on disk.

    Attributes:
        kept: the next process finds it, and what else is put into its directory.
        compile_s: seconds that it took now; 0 for one that was there.
    """

    path: Path
    kept: bool
    compile_s: float

    @property
    def directory(self) -> Path:
        """What belongs to the model and goes with it."""
        return self.path.parent

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def cache_key(package: Path) -> str:
    """A name in hexadecimal for the package's content, the version of macOS and the chip.

    Raises:
        EncoderError: a directory can't be read.
        OSError: a file can't.
    """
    digest = hashlib.sha256(f"{platform.mac_ver()[0]}\0{chip()}\0".encode())
    for name in listing(package, EncoderError):
        digest.update(name.encode() + b"\0" + sha256(package / name).encode())
    return digest.hexdigest()


def compiled(package: Path) -> Compiled:
    """The compiled model of `package`, made if it is not there.

    Raises:
        EncoderError: there is no room for it, neither in the cache nor for temporary files.
        RuntimeError: Core ML refuses the package.
    """
    try:
        key = cache_key(package)
    except OSError as error:
        raise EncoderError(
            f"{error.filename} can't be read ({error.strerror}): check its permissions"
        ) from error
    try:
        return _in(CACHE.expanduser(), key, package, kept=True)
    except OSError as error:
        _tell_once(
            f"{CACHE} can't be written to ({error.strerror}), so the encoder is prepared anew in "
            "every process: make room and give permission there"
        )
    try:
        return _in(_scratch(), key, package, kept=False)
    except OSError as error:
        raise EncoderError(
            f"{package} can't be compiled ({error.strerror}): expected room and permission to "
            f"write to {CACHE} or {tempfile.gettempdir()}, make some"
        ) from error


def _in(cache_directory: Path, key: str, package: Path, *, kept: bool) -> Compiled:
    directory = cache_directory / key
    path = directory / _NAME
    if path.is_dir():
        # It was used last; a cache that can only be read is as good.
        if os.access(directory, os.W_OK):
            os.utime(directory)
        return Compiled(path, kept, 0.0)
    cache_directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_directory) as scratch:
        tell("preparing the encoder for Core ML: once for it on this Mac, up to a minute")
        started = time.perf_counter()
        target = Path(scratch) / "compiled" / _NAME
        target.parent.mkdir()
        with quiet_coremltools():
            import coremltools as ct

            ct.utils.compile_model(str(_plain(package, Path(scratch))), str(target))
        try:
            os.rename(target.parent, directory)
        except OSError:
            # Another process was first; anything else shows as the compiled model's absence.
            if not path.is_dir():
                raise
        seconds = time.perf_counter() - started
    _prune(cache_directory)
    return Compiled(path, kept, seconds)


def _plain(package: Path, scratch: Path) -> Path:
    """The package, or a copy of one with links in it, as in the hub's cache, or with files that a
    system left there: the compiler follows and knows neither."""
    names = set(listing(package, EncoderError))
    found = {p.relative_to(package).as_posix(): p for p in package.rglob("*") if not p.is_dir()}
    if names == set(found) and not any(p.is_symlink() for p in (package, *package.rglob("*"))):
        return package
    copy = scratch / "copy.mlpackage"
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inside(package, package / name, EncoderError), copy / name)
    return copy


@cache
def _scratch() -> Path:
    """A directory of this process, removed at its end. Raises OSError."""
    directory = tempfile.mkdtemp(prefix="fastvlm-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


@cache
def _tell_once(text: str) -> None:
    tell(text)


def _prune(cache_directory: Path) -> None:
    """Remove all but the models used last."""
    found = sorted(cache_directory.glob(f"*/{_NAME}"), key=lambda p: p.parent.stat().st_mtime)
    for path in found[:-_KEPT]:
        shutil.rmtree(path.parent, ignore_errors=True)
