"""The directory of a bundle: which files it consists of, and whether its manifest says the same.

What is read is what is listed: a file that a loader would read and the manifest does not list is
an error, small files are compared with their hashes before they are parsed, and the large ones by
`check_files`. What the directory consisted of when it was opened is remembered, so that whatever is
put in the place of a file later is told, and never mixed in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from fastvlm_mlx.bundle.files import Stamp, inside, is_url, listing, read_bytes, sha256
from fastvlm_mlx.bundle.kind import ADAPTER_CONFIG, CONFIG, is_like_a_hub_id, what_is_below
from fastvlm_mlx.bundle.manifest import EXPORT_AGAIN, MANIFEST, check_manifest
from fastvlm_mlx.bundle.schema import JSON_BYTES, parse
from fastvlm_mlx.errors import BundleError

# What the loaders of either layout read by itself if it lies in the directory.
LOADED_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".npz", ".gguf", ".bin", ".model"})
LOADED_NAMES = frozenset({"merges.txt", "vocab.txt"})


@dataclass(frozen=True)
class Directory:
    """A bundle's files, none of them read but the manifest.

    Attributes:
        manifest: its content, held to its types; None where there is none.
        stamps: by relative name, the files that it consisted of when it was opened.
    """

    path: Path
    manifest: dict[str, Any] | None
    stamps: Mapping[str, Stamp]

    @classmethod
    def look(cls, path: str | Path) -> Directory:
        """Look at what is at `path`, and read the manifest.

        Raises:
            BundleError: no bundle's directory; the manifest can't be read; a file is missing, not
                listed, a link that leads elsewhere, or no regular file.
        """
        path = _directory(path)
        stamps = _stamps(path)
        if MANIFEST not in stamps:
            return cls(path, None, stamps)
        data = read_bytes(path, path / MANIFEST, BundleError, JSON_BYTES)
        manifest = parse(data, str(path / MANIFEST), BundleError, remedy=EXPORT_AGAIN)
        check_manifest(path / MANIFEST, manifest)
        _check_listed(path, stamps, manifest["files"])
        return cls(path, manifest, stamps)

    @cached_property
    def files(self) -> list[str]:
        """Its files by relative name: the manifest and what it lists; without one, every file."""
        if self.manifest is not None:
            return sorted([*self.manifest["files"], MANIFEST])
        return sorted(self.stamps)

    def read(self, name: str) -> bytes:
        """All of a small file, compared with its hash in the manifest, if there is one.

        Raises:
            BundleError: it can't be read, is not listed, or has changed.
        """
        data = read_bytes(self.path, self.path / name, BundleError)
        if self.manifest is not None:
            entry = self.manifest["files"].get(name)
            if entry is None:
                raise _unlisted(self.path, name)
            _check_size(self.path / name, len(data), entry["bytes"])
            _check_hash(self.path / name, hashlib.sha256(data).hexdigest(), entry["sha256"])
        return data

    def read_json(self, name: str) -> dict[str, Any]:
        """A file that holds a JSON object. Raises BundleError: as `read`, or it holds none."""
        return parse(self.read(name), str(self.path / name), BundleError, remedy=EXPORT_AGAIN)

    def check_unchanged(self, names: Iterable[str] | None = None) -> None:
        """Compare the files with what was there when the bundle was opened, without reading them.

        Args:
            names: relative ones; all unless given.

        Raises:
            BundleError: naming the first that is another file now.
        """
        for name in self.stamps if names is None else names:
            try:
                now = Stamp.of(self.path / name)
            except OSError:
                now = None
            if now != self.stamps[name]:
                raise BundleError(
                    f"{self.path / name} {'changed' if now else 'is gone'} since the bundle was "
                    "opened, and what is there now may belong to another: load the bundle again"
                )

    def check_files(self) -> None:
        """Compare every file with the manifest's sizes and SHA-256; without a manifest, nothing.

        Raises:
            BundleError: naming the first file that has changed.
        """
        if self.manifest is None:
            return
        recorded: dict[str, dict[str, Any]] = self.manifest["files"]
        for name, entry in recorded.items():
            _check_size(self.path / name, self.stamps[name].bytes, entry["bytes"])
        # hashlib lets go of the interpreter lock, so threads hash in parallel.
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(self._hash, recorded)
            for (name, entry), found in zip(recorded.items(), hashes, strict=True):
                _check_hash(self.path / name, found, entry["sha256"])
        self.check_unchanged(recorded)

    def _hash(self, name: str) -> str:
        try:
            return sha256(self.path / name)
        except OSError as error:
            raise BundleError(
                f"{self.path / name} can't be read ({error.strerror}): check its permissions"
            ) from error


def _directory(path: str | Path) -> Path:
    """Raises BundleError: there is none at `path`, or it holds no config.json."""
    if not isinstance(path, str | Path):
        raise BundleError(
            f"a bundle was looked for at {path!r}, a {type(path).__name__}: expected a path"
        )
    if is_url(path):
        raise BundleError(f"{path} is a URL: expected a bundle's directory, download it first")
    try:
        path = Path(path).expanduser()
        exists, directory = path.exists(), path.is_dir()
    # A NUL in it, a home that nobody has, or a name that is too long.
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "it is no path"
        raise BundleError(f"{path} can't be opened as a path ({reason})") from error
    if not exists and is_like_a_hub_id(path):
        raise BundleError(
            f"{path} does not exist here, and is no hub id to this verb: `fastvlm export {path} "
            f"OUT` makes a bundle of a checkpoint on the hub, `hf download {path} --local-dir OUT` "
            "fetches a bundle"
        )
    if not exists:
        raise BundleError(f"{path} does not exist: expected a bundle made by `fastvlm export`")
    if not directory:
        raise BundleError(f"{path} is a file: expected the directory of a bundle")
    if (path / CONFIG).is_file():
        return path
    if (path / ADAPTER_CONFIG).is_file():
        raise checkpoint_found(path)
    below = what_is_below(path)
    raise BundleError(
        f"{path} holds no config.json but {below}: give the one that is meant"
        if below
        else f"{path} holds no config.json: expected a bundle made by `fastvlm export`"
    )


def checkpoint_found(path: Path) -> BundleError:
    """What is said of a checkpoint where a bundle belongs."""
    return BundleError(
        f"{path} is a checkpoint, not a bundle: run `fastvlm export {path} OUT` first"
    )


def _stamps(path: Path) -> dict[str, Stamp]:
    """Every file that is there; each regular, and inside. Raises BundleError."""
    stamps = {}
    for name in listing(path, BundleError):
        inside(path, path / name, BundleError)
        try:
            stamps[name] = Stamp.of(path / name)
        except OSError as error:
            raise BundleError(
                f"{path / name} can't be read ({error.strerror}): is the bundle being replaced?"
            ) from error
    return stamps


def _check_listed(path: Path, present: Iterable[str], listed: Mapping[str, Any]) -> None:
    """Raises BundleError: a listed file is missing, or one that loaders read is not listed."""
    for name, entry in listed.items():
        if name not in present:
            raise BundleError(
                f"{path / name} is missing, the manifest lists it with {entry['bytes']:,} bytes: "
                f"{EXPORT_AGAIN}, or copy the file back"
            )
    for name in present:
        if name != MANIFEST and name not in listed and _is_loaded(PurePosixPath(name)):
            raise _unlisted(path, name)


def _is_loaded(name: PurePosixPath) -> bool:
    package = any(part.endswith((".mlpackage", ".mlmodelc")) for part in name.parts[:-1])
    return package or name.suffix.lower() in LOADED_SUFFIXES or name.name in LOADED_NAMES


def _unlisted(path: Path, name: str) -> BundleError:
    return BundleError(
        f"{path / name} is not listed in {MANIFEST}, and programs would load it with the bundle: "
        f"remove it, or {EXPORT_AGAIN}"
    )


def _check_size(file: Path, found: int, recorded: int) -> None:
    if found != recorded:
        raise BundleError(
            f"{file} has {found:,} bytes where the manifest says {recorded:,}: it changed since "
            "export, export again"
        )


def _check_hash(file: Path, found: str, recorded: str) -> None:
    if found != recorded:
        raise BundleError(
            f"{file} has SHA-256 {found[:12]}… where the manifest says {recorded[:12]}…: it "
            "changed since export, export again"
        )
