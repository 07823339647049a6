"""An encoder package through Core ML, on macOS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.machine import tell
from fastvlm_mlx.vision import AUTO
from fastvlm_mlx.vision.compiled import Compiled, compiled
from fastvlm_mlx.vision.interface import check_features, check_images, encoder_shape, to_bytes
from fastvlm_mlx.vision.package import (
    FUNCTION_NAME,
    IMAGE,
    INPUT_NAME,
    OUTPUT_NAME,
    describe,
    one_line,
    quiet_coremltools,
)
from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder
from fastvlm_mlx.vision.units import (
    NAMES,
    Measured,
    best,
    floor_db,
    measure,
    probe,
    read_record,
    write_record,
)


class CoreMLEncoder:
    """The encoder in an `.mlpackage` on the chosen compute units: float32 [1, 3, S, S] → [1, N, C].

    The package is compiled once for each version of macOS, into the user's cache, where the last
    few stay. "auto" is the compute units that run it best, which is measured once and kept beside
    the compiled model: those of another Mac, the bundle's maker's too, say nothing about this one.

    Args:
        image_size: S, where the package takes several; its default one's unless given.

    Attributes:
        compute_units: that it runs on.
        compiled: the model on disk, and what it took to make.

    Raises:
        EncoderError: the package is missing, damaged, not an encoder's, or refused by Core ML.
        OptionError: it does not take that size.
    """

    def __init__(self, package: Path, compute_units: str = AUTO, image_size: int | None = None):
        package = Path(package)
        self.info = describe(package, image_size)
        self.image_size, self.num_tokens, self.hidden_size = encoder_shape(self.info)
        try:
            self.compiled = compiled(package)
            self.compute_units = self._best(package) if compute_units == AUTO else compute_units
            self._model = self._open(package)
        # What Core ML refuses arrives as a RuntimeError with its NSError in the text.
        except RuntimeError as error:
            raise EncoderError(
                f"Core ML refuses {package} ({one_line(error)}): expected a system for "
                f"{self.info.deployment_target} or later, update it or try other compute units"
            ) from error
        self.backend = f"Core ML ({self.compute_units})"

    def _best(self, package: Path) -> str:
        """What was measured on this Mac before, or is now."""
        if not self.compiled.kept:
            # To measure in every process would take longer than to answer.
            return "all"
        kept = read_record(_record(self.compiled, self.info.function))
        if kept is not None:
            return kept
        tell("measuring which compute units run the encoder best: once for it on this Mac")
        chosen = choose_units(package, self.image_size).best
        floor = floor_db(self.info.precision)
        if not chosen.holds(floor):
            tell(
                f"no compute units come within {floor:g} dB of the encoder's own arithmetic, and "
                f"{chosen.units} comes nearest: run `fastvlm doctor` and report what it prints"
            )
        return chosen.units

    def _open(self, package: Path) -> Any:
        try:
            return _load(self.compiled.path, self.compute_units, self.info.function)
        except RuntimeError:
            if self.compiled.compile_s:
                raise
            # What lies in the cache may be damaged; a refusal costs one more compilation.
            self.compiled.remove()
            self.compiled = compiled(package)
            return _load(self.compiled.path, self.compute_units, self.info.function)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] in 0 to 1 → float32 [1, N, C].

        Raises:
            EncoderError: `images` has another shape, or the prediction fails.
        """
        check_images(images, self.image_size)
        # Core ML gets the memory itself, and refuses what can't be written to.
        pixels: Any = np.require(images, np.float32, ["C", "W"])
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


@dataclass(frozen=True)
class Choice:
    """Compute units as they were measured, the one to use, and what they were compared with."""

    best: Measured
    measured: list[Measured]
    reference: str


def measure_units(
    package: Path, images: Sequence[np.ndarray], references: Sequence[np.ndarray]
) -> list[Measured]:
    """Every compute unit of this Mac, on images [1, 3, S, S] and their features [1, N, C].

    One that can't run the encoder says why.
    """
    size = images[0].shape[-1]
    return measure(lambda units: CoreMLEncoder(package, units, size), images, references)


def choose_units(package: Path, image_size: int | None = None) -> Choice:
    """Measure this Mac's compute units against the package evaluated op by op, and keep the result
    beside the compiled model, where `CoreMLEncoder` finds it.

    Where there is no torch to evaluate it with, against Core ML on the CPU.

    Raises:
        EncoderError: no compute units run it.
    """
    info = describe(package, image_size)
    pixels = probe(encoder_shape(info)[0])
    if find_spec("torch") is None:
        reference = "Core ML on the CPU"
        features = CoreMLEncoder(package, "cpu", image_size)(pixels)
    else:
        reference = "the package evaluated op by op"
        features = MLProgramEncoder(package, image_size)(pixels)
    measured = measure_units(package, [pixels], [features])
    chosen = best(measured, floor_db(info.precision))
    made = compiled(package)
    if made.kept:
        write_record(_record(made, info.function), chosen.units, reference, measured)
    return Choice(chosen, measured, reference)


def _record(made: Compiled, function: str) -> Path:
    return made.directory / f"units-{function}.json"


def _load(path: Path, units: str, function: str) -> Any:
    with quiet_coremltools():
        import coremltools as ct

        return ct.models.CompiledMLModel(
            str(path),
            compute_units=ct.ComputeUnit[NAMES[units]],
            # Before macOS 15 a function can't be named, and there is one.
            function_name=None if function == FUNCTION_NAME else function,
        )
