"""An encoder package through Core ML, on macOS."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.vision.mlprogram import check_images, encoder_shape
from fastvlm_mlx.vision.package import INPUT_NAME, OUTPUT_NAME, describe, quiet_coremltools

# Names of coremltools.ComputeUnit.
_UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ne": "CPU_AND_NE"}


class CoreMLEncoder:
    """The encoder in an `.mlpackage` on the chosen compute units: float32 [1, 3, S, S] → [1, N, C].

    Core ML compiles the package for the machine here, which takes seconds the first time for the
    Neural Engine; the system keeps the result of that.

    Raises:
        EncoderError: the package is missing, damaged, not an encoder's, or refused by Core ML.
    """

    def __init__(self, package: Path, compute_units: str = "all"):
        package = Path(package)
        self.info = describe(package)
        self.image_size, self.num_tokens, self.hidden_size = encoder_shape(self.info)
        self.backend = f"Core ML ({compute_units})"
        with quiet_coremltools():
            import coremltools as ct

            try:
                self._model = ct.models.MLModel(
                    str(package), compute_units=ct.ComputeUnit[_UNITS[compute_units]]
                )
            # What Core ML refuses arrives as a RuntimeError with its NSError in the text.
            except RuntimeError as error:
                raise EncoderError(
                    f"Core ML refuses {package} ({_one_line(error)}): expected macOS for "
                    f"{self.info.deployment_target} or later, update the system or try other "
                    "compute units"
                ) from error

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] in 0 to 1 → float32 [1, N, C].

        Raises:
            EncoderError: `images` has another shape, or the prediction fails.
        """
        check_images(images, self.image_size)
        pixels = np.ascontiguousarray(images, dtype=np.float32)
        try:
            made = self._model.predict({INPUT_NAME: pixels})[OUTPUT_NAME]
        except RuntimeError as error:
            raise EncoderError(
                f"Core ML can't run the encoder ({_one_line(error)}): expected a prediction on "
                f"{self.backend}, try other compute units"
            ) from error
        features = np.asarray(made, dtype=np.float32)
        expected = (1, self.num_tokens, self.hidden_size)
        if features.shape != expected:
            raise EncoderError(
                f"Core ML made features of shape {list(features.shape)}: expected "
                f"{list(expected)}, export the encoder again"
            )
        return features


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
