"""The vision encoder of a bundle: float32 [1, 3, S, S] → float32 [1, N, C].

On macOS the package runs through Core ML; elsewhere the same package is evaluated op by op.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np

from fastvlm_mlx.errors import OptionError

# Those that this machine runs the encoder best on, by measurement.
AUTO = "auto"
COMPUTE_UNITS = (AUTO, "all", "cpu", "gpu", "ne")
# What torch may compute an encoder in, where there is no Core ML; `AUTO` is the exact one.
FLOAT32, BFLOAT16 = "float32", "bfloat16"
ENCODER_COMPUTES = (AUTO, FLOAT32, BFLOAT16)


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
    package: Path,
    compute_units: str = AUTO,
    image_size: int | None = None,
    encoder_compute: str = AUTO,
    like: VisionEncoder | None = None,
) -> VisionEncoder:
    """Load the encoder in an `.mlpackage`.

    Args:
        package: the `.mlpackage` directory.
        compute_units: what Core ML may use: "all"; "cpu" alone, "gpu" and CPU, "ne" (Neural
            Engine) and CPU; "auto" is the fastest of these that computes what the package says,
            measured once on each Mac. Only Core ML has compute units.
        image_size: in pixels, where the package takes several; its default one unless given.
        encoder_compute: what torch computes in, where it evaluates the package: "float32", or
            "bfloat16" where the CPU multiplies that natively. "auto" is float32.
        like: the encoder of another size, whose weights are used again; Core ML does so by itself.

    Raises:
        OptionError: what `check_compute_units` and `check_encoder_compute` refuse; or a size that
            the package does not take.
        EncoderError: the package is missing, damaged, or refused by Core ML.
    """
    check_compute_units(compute_units)
    check_encoder_compute(encoder_compute)
    if sys.platform == "darwin":
        from fastvlm_mlx.vision.coreml import CoreMLEncoder

        return CoreMLEncoder(package, compute_units, image_size)
    from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder

    compute = FLOAT32 if encoder_compute == AUTO else encoder_compute
    same = like if isinstance(like, MLProgramEncoder) else None
    return MLProgramEncoder(package, image_size, compute, same)


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


def check_encoder_compute(encoder_compute: str, elsewhere: str = "") -> None:
    """Refuse a type that the encoder can't be computed in here.

    Args:
        elsewhere: what computes it, if it is not for torch to do on any machine.

    Raises:
        OptionError: an unknown type; one that was chosen where torch does not compute the encoder;
            or bfloat16 where the CPU does not multiply it natively.
    """
    if encoder_compute not in ENCODER_COMPUTES:
        raise OptionError(
            f"encoder compute {encoder_compute!r} is unknown: choose one of "
            f"{', '.join(ENCODER_COMPUTES)}"
        )
    if sys.platform == "darwin":
        elsewhere = elsewhere or "Core ML"
    if encoder_compute != AUTO and elsewhere:
        raise OptionError(
            f"encoder compute {encoder_compute!r} was asked for, which is for an encoder that "
            f"torch evaluates: {elsewhere} computes this one, leave the option out"
        )
    if encoder_compute == BFLOAT16 and find_spec("torch") is not None:
        from fastvlm_mlx.vision.program.fusion import multiplies_bfloat16

        if not multiplies_bfloat16():
            raise OptionError(
                "encoder compute 'bfloat16' was asked for, which this processor does not multiply "
                "natively: float32 is faster here and more exact, leave the option out"
            )
