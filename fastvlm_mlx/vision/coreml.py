"""An encoder package through Core ML, on macOS."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.vision.mlprogram import check_features, check_images, encoder_shape, to_bytes
from fastvlm_mlx.vision.package import (
    FUNCTION_NAME,
    IMAGE,
    INPUT_NAME,
    OUTPUT_NAME,
    describe,
    one_line,
    quiet_coremltools,
)

# Names of coremltools.ComputeUnit.
_UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ne": "CPU_AND_NE"}
_CACHE = Path("~/Library/Caches/fastvlm-mlx")
_KEPT = 4  # compiled models, a quarter of a gigabyte each


class CoreMLEncoder:
    """The encoder in an `.mlpackage` on the chosen compute units: float32 [1, 3, S, S] → [1, N, C].

    The package is compiled once for each version of macOS, into the user's cache, where the last
    few stay: what the system prepares for the Neural Engine it keeps by the path of the compiled
    model, and prepares again for another path.

    Args:
        image_size: S, where the package takes several; its default one's unless given.

    Raises:
        EncoderError: the package is missing, damaged, not an encoder's, or refused by Core ML.
        OptionError: it does not take that size.
    """

    def __init__(self, package: Path, compute_units: str = "all", image_size: int | None = None):
        package = Path(package)
        self.info = describe(package, image_size)
        self.image_size, self.num_tokens, self.hidden_size = encoder_shape(self.info)
        self.backend = f"Core ML ({compute_units})"
        try:
            self._model = _load(_compiled(package), _UNITS[compute_units], self.info.function)
        # What Core ML refuses arrives as a RuntimeError with its NSError in the text.
        except RuntimeError as error:
            raise EncoderError(
                f"Core ML refuses {package} ({one_line(error)}): expected a system for "
                f"{self.info.deployment_target} or later, update it or try other compute units"
            ) from error
        except OSError as error:
            raise EncoderError(
                f"{package} can't be compiled into {_CACHE} ({error.strerror}): expected room and "
                "permission to write there, make some"
            ) from error

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] in 0 to 1 → float32 [1, N, C].

        Raises:
            EncoderError: `images` has another shape, or the prediction fails.
        """
        check_images(images, self.image_size)
        pixels: Any = np.ascontiguousarray(images, dtype=np.float32)
        if self.info.inputs[0].dtype == IMAGE:
            pixels = Image.fromarray(to_bytes(pixels)[0].transpose(1, 2, 0))
        try:
            made = self._model.predict({INPUT_NAME: pixels})[OUTPUT_NAME]
        except RuntimeError as error:
            raise EncoderError(
                f"Core ML can't run the encoder ({one_line(error)}): expected a prediction on "
                f"{self.backend}, try other compute units"
            ) from error
        features = np.asarray(made, dtype=np.float32)
        check_features(features, (1, self.num_tokens, self.hidden_size))
        return features


def cache_key(package: Path) -> str:
    """A name for the compiled package: its content and the version of macOS, in hexadecimal."""
    digest = hashlib.sha256(platform.mac_ver()[0].encode())
    for path in sorted(p for p in package.rglob("*") if p.is_file()):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _compiled(package: Path) -> Path:
    """The compiled model of `package` in the cache, made if it is not there."""
    directory = _CACHE.expanduser() / cache_key(package)
    compiled = directory / "fastvithd.mlmodelc"
    if compiled.is_dir():
        os.utime(directory)
        return compiled
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        target = Path(scratch) / "compiled" / compiled.name
        target.parent.mkdir()
        with quiet_coremltools():
            import coremltools as ct

            ct.utils.compile_model(str(package), str(target))
        try:
            os.rename(target.parent, directory)
        except OSError:
            # Another process was first; anything else shows as the compiled model's absence.
            if not compiled.is_dir():
                raise
    _prune(directory.parent)
    return compiled


def _prune(cache: Path) -> None:
    """Remove all but the models used last."""
    kept = sorted(cache.glob("*/*.mlmodelc"), key=lambda p: p.parent.stat().st_mtime, reverse=True)
    for compiled in kept[_KEPT:]:
        shutil.rmtree(compiled.parent, ignore_errors=True)


def _load(compiled: Path, units: str, function: str) -> Any:
    with quiet_coremltools():
        import coremltools as ct

        try:
            return ct.models.CompiledMLModel(
                str(compiled),
                compute_units=ct.ComputeUnit[units],
                # Before macOS 15 a function can't be named, and there is one.
                function_name=None if function == FUNCTION_NAME else function,
            )
        except RuntimeError:
            # A damaged cache must not be met again; a refusal costs one more compilation.
            shutil.rmtree(compiled.parent, ignore_errors=True)
            raise
