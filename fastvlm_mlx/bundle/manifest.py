"""`manifest.json`: what a bundle's files are, what they were made from, and what was measured.

Written by the exporter last of all. Anybody may have edited one since, so it is held to its types
here before anything in it is used.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from fastvlm_mlx.bundle.files import listing, sha256
from fastvlm_mlx.bundle.schema import check
from fastvlm_mlx.errors import BundleError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
EXPORT_AGAIN = "export the checkpoint again"

Bytes = Annotated[int, Meta(ge=0, le=2**50)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class FileEntry(Struct):
    bytes: Bytes
    sha256: Sha256


class GateEntry(Struct):
    """`value` is a text where it is NaN or infinite, which JSON does not have."""

    name: str
    value: float | str
    unit: str
    limit: float
    at_least: bool
    passed: bool


class BaseEntry(Struct, kw_only=True):
    """A checkpoint that a fine-tune is a difference to."""

    name: str
    kind: str = ""
    files: dict[str, FileEntry] = field(default_factory=dict)
    base: BaseEntry | None = None


class SourceEntry(BaseEntry, kw_only=True):
    license: str


class FormatEntry(Struct):
    bits: int
    group_size: int
    mode: str = "affine"


class CalibrationEntry(Struct):
    method: str
    images: int


class LanguageEntry(Struct):
    formats: dict[str, FormatEntry | None]
    dtype: str
    parameters: Annotated[int, Meta(ge=1)]
    bytes: Bytes
    bits_per_weight: Annotated[float, Meta(gt=0)]
    left_unquantized: dict[str, str]
    calibration: CalibrationEntry | None = None


class EncoderEntry(Struct):
    precision: str
    image_size: Annotated[int, Meta(ge=1)]
    tokens_per_image: Annotated[int, Meta(ge=1)]
    channels: Annotated[int, Meta(ge=1)]
    bytes: Bytes
    image_sizes: list[Annotated[int, Meta(ge=1)]] = field(default_factory=list)


class ConvertedEntry(Struct):
    directory: str
    layout: str
    files: dict[str, FileEntry]


class Manifest(Struct):
    """The keys that are read again, and their types."""

    layout: Literal["app", "mlx"]
    source: SourceEntry
    options: dict[str, Any]
    encoder: EncoderEntry
    llm: LanguageEntry
    gates: list[GateEntry]
    gates_passed: bool
    versions: dict[str, str]
    files: Annotated[dict[str, FileEntry], Meta(min_length=1)]
    converted_from: ConvertedEntry | None = None


def check_manifest(file: Path, data: dict[str, Any]) -> None:
    """Hold the content of a manifest to its types.

    Raises:
        BundleError: it is of another version, not whole, or lists what is not inside the bundle.
    """
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{file} has schema version {version!r}, expected {SCHEMA_VERSION}: use the release of "
            "fastvlm-mlx that wrote it, or export again"
        )
    check(data, Manifest, f"{file} is not a whole manifest", BundleError, remedy=EXPORT_AGAIN)
    for name in data["files"]:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.as_posix() != name or "\0" in name:
            raise BundleError(
                f"{file} lists {name!r}, which is no file inside the bundle: {EXPORT_AGAIN}"
            )
    if MANIFEST in data["files"] or "config.json" not in data["files"]:
        raise BundleError(
            f"{file} does not list the bundle's files, config.json and others but not itself: "
            f"{EXPORT_AGAIN}"
        )


def gate_cells(gate: dict[str, Any]) -> tuple[str, str, str, str]:
    """A gate of a manifest as a row for people: name, figure, limit, whether it passed."""
    value = f"{float(gate['value']):.4g} {gate['unit']}"
    limit = f"{'≥' if gate['at_least'] else '≤'} {gate['limit']:g} {gate['unit']}"
    judged = "passed" if gate["passed"] else "FAILED"
    return gate["name"], value, limit, "not judged" if gate.get("left_out") else judged


def hash_tree(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `directory` but the manifest, by relative name.

    Raises:
        BundleError: a directory can't be read.
    """
    names = [name for name in listing(directory, BundleError) if name != MANIFEST]
    files = {name: directory / name for name in names}
    return {
        name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for name, file in files.items()
    }
