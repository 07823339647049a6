"""A bundle directory: which files it holds, what its manifest says, and whether both agree.

Read by the runtime and written by the exporter. Apple's own bundles (layout `app`) and mlx-vlm's
conversions (layout `mlx`) have no manifest; they are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.config import IMAGE_TOKEN, FastVLMConfig
from fastvlm_mlx.errors import BundleError
from fastvlm_mlx.quantization import Format

if TYPE_CHECKING:
    import mlx.core as mx
    from tokenizers import Tokenizer

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
PACKAGE = "fastvithd.mlpackage"
# Weights of an `mlx` bundle: the encoder's, and the projector's with the model's own names.
ENCODER_PREFIX = "vision_tower.vision_model."
MLX_PROJECTOR = {
    "mm_projector.0.": "multi_modal_projector.linear_0.",
    "mm_projector.2.": "multi_modal_projector.linear_2.",
}


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, its configuration read and nothing else."""

    path: Path
    raw_config: dict[str, Any]
    config: FastVLMConfig
    manifest: dict[str, Any] | None

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read `config.json` and, where there is one, `manifest.json`.

        Raises:
            BundleError: not a bundle directory, or one of the two can't be read.
            ConfigError: config.json describes something else.
        """
        path = Path(path).expanduser()
        if not path.exists():
            raise BundleError(f"{path} does not exist: expected a bundle made by `fastvlm export`")
        if not path.is_dir():
            raise BundleError(f"{path} is a file: expected the bundle's directory")
        if not (path / "config.json").is_file():
            raise BundleError(
                f"{path} holds no config.json: expected a bundle made by `fastvlm export`"
            )
        raw_config = read_json(path / "config.json")
        manifest = read_json(path / MANIFEST) if (path / MANIFEST).is_file() else None
        if manifest is not None:
            _check_manifest(path / MANIFEST, manifest)
        bundle = cls(path, raw_config, FastVLMConfig.from_dict(raw_config), manifest)
        if any(key.startswith("model.") for key in bundle.tensors(required=False)):
            raise BundleError(
                f"{path} is a checkpoint, not a bundle: run `fastvlm export {path} OUT` first"
            )
        return bundle

    def at(self, image_size: int) -> Bundle:
        """The same bundle, its configuration that of another input size in pixels.

        Raises:
            ConfigError: a size that the encoder can't have.
        """
        vision = replace(self.config.vision, image_size=image_size)
        return replace(self, config=replace(self.config, vision=vision))

    @cached_property
    def layout(self) -> str:
        """`app` or `mlx`: by the manifest, else by where the encoder is."""
        if self.manifest is not None:
            return str(self.manifest["layout"])
        names = self.tensors(required=False)
        return "mlx" if any(name.startswith(ENCODER_PREFIX) for name in names) else "app"

    @cached_property
    def files(self) -> list[str]:
        """Its files by relative name: the manifest and what it lists; without one, every file."""
        if self.manifest is not None:
            return sorted([*self.manifest["files"], MANIFEST])
        found = (file for file in self.path.rglob("*") if file.is_file())
        return sorted(file.relative_to(self.path).as_posix() for file in found)

    @cached_property
    def package(self) -> Path:
        """The Core ML encoder.

        Raises:
            BundleError: there is none, or more than one.
        """
        found = sorted(self.path.glob("*.mlpackage"))
        if len(found) != 1:
            listing = ", ".join(p.name for p in found) or "none"
            raise BundleError(
                f"{self.path} holds {len(found)} encoders ({listing}): expected one, {PACKAGE}; "
                "export the checkpoint again"
            )
        return found[0]

    @cached_property
    def weight_files(self) -> list[Path]:
        """Every `.safetensors` below the directory, as the loaders of the layout read them.

        Raises:
            BundleError: there is none.
        """
        found = sorted(self.path.rglob("*.safetensors"))
        if not found:
            raise BundleError(
                f"{self.path} holds no .safetensors file: export the checkpoint again"
            )
        return found

    def tensors(self, *, required: bool = True) -> dict[str, mx.array]:
        """The weights by name, unevaluated: headers are read, data when it is used.

        A new map each time, as an array that was evaluated stays in its map, and memory.

        Raises:
            BundleError: a file is damaged, or, where `required`, there is none.
        """
        import mlx.core as mx

        arrays: dict[str, mx.array] = {}
        for file in self.weight_files if required else sorted(self.path.rglob("*.safetensors")):
            try:
                arrays |= mx.load(str(file))  # type: ignore[arg-type]
            except RuntimeError as error:
                raise BundleError(
                    f"{file} is not a whole safetensors file ({error}): export the checkpoint again"
                ) from error
        return arrays

    def model_tensors(self) -> dict[str, mx.array]:
        """Projector and language model by the model's own names. Errors as `tensors`."""
        return {
            model_name(name): array
            for name, array in self.tensors().items()
            if not name.startswith(ENCODER_PREFIX)
        }

    def format_of(self, path: str) -> Format | None:
        """The quantized form of the module that the model calls `path`, if its weights have scales.

        None where config.json has no quantization, or says that this module is left out.
        """
        quantization = self.config.quantization
        return None if quantization is None else quantization.of(stored_name(path, self.layout))

    def encoder_arrays(self) -> dict[str, mx.array]:
        """The encoder of an `mlx` bundle, by its own names. Errors as `tensors`."""
        return {
            name.removeprefix(ENCODER_PREFIX): array
            for name, array in self.tensors().items()
            if name.startswith(ENCODER_PREFIX)
        }

    @cached_property
    def tokenizer_file(self) -> Path:
        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise BundleError(
                f"{self.path} holds no tokenizer.json: expected the tokenizer in the form that "
                "Swift reads, export the checkpoint again"
            )
        return file

    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer.json; an `app` bundle's is checked for the placeholder.

        Raises:
            BundleError: it can't be read, or its `<image>` is not what config.json says.
        """
        from tokenizers import Tokenizer

        file = self.tokenizer_file
        try:
            tokenizer = Tokenizer.from_file(str(file))
        # tokenizers raises no class of its own.
        except Exception as error:
            raise BundleError(
                f"{file} can't be read as a tokenizer ({error}): export the checkpoint again"
            ) from error
        # A tokenizer.json may ask for either; a prompt is neither cut nor filled up.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if self.layout == "mlx":
            return tokenizer
        found, expected = tokenizer.token_to_id(IMAGE_TOKEN), self.config.image_token_index
        if found != expected:
            raise BundleError(
                f"{file} gives {IMAGE_TOKEN} the id {found} where config.json says {expected}: "
                "export the checkpoint again"
            )
        return tokenizer

    @cached_property
    def preprocessor_config(self) -> dict[str, Any]:
        file = self.path / "preprocessor_config.json"
        if file.is_file():
            return read_json(file)
        # transformers 5, and with it mlx-vlm's conversions, put one inside the other.
        file = self.path / "processor_config.json"
        processor = read_json(file) if file.is_file() else {}
        inside = processor.get("image_processor")
        return {**processor, **inside} if isinstance(inside, dict) else {}

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that end an answer: generation_config.json's and config.json's together."""
        file = self.path / "generation_config.json"
        ids: set[int] = set()
        for source in (read_json(file) if file.is_file() else {}, self.raw_config):
            found = source.get("eos_token_id")
            listed = found if isinstance(found, list) else [] if found is None else [found]
            if not all(type(token_id) is int for token_id in listed):
                raise BundleError(f"eos_token_id of {self.path} is {found!r}: expected token ids")
            ids.update(listed)
        return frozenset(ids)

    def check_files(self) -> None:
        """Compare every file with the manifest's sizes and SHA-256; without a manifest, nothing.

        Raises:
            BundleError: naming the first file that is missing or has changed.
        """
        if self.manifest is None:
            return
        recorded: dict[str, dict[str, Any]] = self.manifest["files"]
        for name, entry in recorded.items():
            file = self.path / name
            if not file.is_file():
                raise BundleError(
                    f"{file} is missing, the manifest lists it with {entry['bytes']:,} bytes: "
                    "export the checkpoint again, or copy the file back"
                )
            if file.stat().st_size != entry["bytes"]:
                raise BundleError(
                    f"{file} has {file.stat().st_size:,} bytes where the manifest says "
                    f"{entry['bytes']:,}: it changed since export, export again"
                )
        # hashlib lets go of the interpreter lock, so threads hash in parallel.
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(lambda name: sha256(self.path / name), recorded)
            for (name, entry), found in zip(recorded.items(), hashes, strict=True):
                if found != entry["sha256"]:
                    raise BundleError(
                        f"{self.path / name} has SHA-256 {found[:12]}… where the manifest says "
                        f"{entry['sha256'][:12]}…: it changed since export, export again"
                    )


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_tree(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `directory` but the manifest, by relative name."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {
        file.relative_to(directory).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": sha256(file),
        }
        for file in files
    }


def read_json(file: Path) -> dict[str, Any]:
    """Raises BundleError if `file` is not a JSON object."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(
            f"{file} can't be read as JSON ({error}): export the checkpoint again"
        ) from error
    if not isinstance(data, dict):
        raise BundleError(f"{file} holds a {type(data).__name__}, expected a JSON object")
    return data


def model_name(stored: str) -> str:
    """The model's name of what a bundle of either layout stores as `stored`: a tensor's name, or
    the path of a module."""
    return _renamed(stored, MLX_PROJECTOR.items())


def stored_name(name: str, layout: str) -> str:
    """What a bundle of `layout` stores the model's `name` under: the inverse of `model_name`."""
    pairs = [(of_model, prefix) for prefix, of_model in MLX_PROJECTOR.items()]
    return _renamed(name, pairs) if layout == "mlx" else name


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    # A module's path has no dot at its end, which the prefixes have.
    path = f"{name}."
    for prefix, other in pairs:
        if path.startswith(prefix):
            return (other + path.removeprefix(prefix)).removesuffix(".")
    return name


def _check_manifest(file: Path, manifest: dict[str, Any]) -> None:
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"{file} has schema version {manifest.get('schema_version')}, expected "
            f"{SCHEMA_VERSION}: use the release of fastvlm-mlx that wrote it, or export again"
        )
    files, parts = manifest.get("files"), ("options", "source", "encoder", "llm")
    entries = list(files.values()) if isinstance(files, dict) else [None]
    whole = all(isinstance(manifest.get(part), dict) for part in parts)
    if not whole or not all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in entries
    ):
        raise BundleError(f"{file} is not a whole manifest: export the checkpoint again")
    for name in manifest["files"]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BundleError(
                f"{file} lists {name}, which is not inside the bundle: export the checkpoint again"
            )
