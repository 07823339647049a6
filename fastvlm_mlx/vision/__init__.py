"""The vision encoder of a bundle: float32 [1, 3, S, S] → float32 [1, N, C].

On macOS the package runs through Core ML; elsewhere the same package is evaluated op by op.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Protocol

import numpy as np

from fastvlm_mlx.errors import OptionError

# Those that this machine runs the encoder best on, by measurement.
AUTO = "auto"
COMPUTE_UNITS = (AUTO, "all", "cpu", "gpu", "ne")


class VisionEncoder(Protocol):
    """What the runtime needs of an encoder. S is `image_size`, N `num_tokens`, C `hidden_size`."""

    image_size: int
    num_tokens: int
    hidden_size: int
    backend: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] → float32 [1, N, C]."""
        ...


def load_encoder(
    package: Path, compute_units: str = AUTO, image_size: int | None = None
) -> VisionEncoder:
    """Load the encoder in an `.mlpackage`.

    Args:
        package: the `.mlpackage` directory.
        compute_units: what Core ML may use: "all"; "cpu" alone, "gpu" and CPU, "ne" (Neural
            Engine) and CPU; "auto" is the fastest of these that computes what the package says,
            measured once on each Mac. Only Core ML has compute units.
        image_size: in pixels, where the package takes several; its default one unless given.

    Raises:
        OptionError: unknown compute units, or some chosen where there is no Core ML; or a size
            that the package does not take.
        EncoderError: the package is missing, damaged, or refused by Core ML.
    """
    check_compute_units(compute_units)
    if sys.platform == "darwin":
        from fastvlm_mlx.vision.coreml import CoreMLEncoder

        return CoreMLEncoder(package, compute_units, image_size)
    from fastvlm_mlx.vision.mlprogram import MLProgramEncoder

    return MLProgramEncoder(package, image_size)


def check_compute_units(compute_units: str) -> None:
    """Raises OptionError: unknown compute units, or some chosen where there is no Core ML."""
    if compute_units not in COMPUTE_UNITS:
        raise OptionError(
            f"compute units {compute_units!r} are unknown: choose one of {', '.join(COMPUTE_UNITS)}"
        )
    if sys.platform != "darwin" and compute_units not in (AUTO, "all"):
        raise OptionError(
            f"compute units {compute_units!r} were asked for, which exist on macOS only: leave the "
            "option out here"
        )
