"""What an encoder package takes and makes: the shapes that it declares, and arrays held to them."""

from __future__ import annotations

import numpy as np

from fastvlm_mlx.bundle.config import MAX_IMAGE_SIZE
from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.vision.package import IMAGE, INPUT_NAME, OUTPUT_NAME, PackageInfo

_MAX_CHANNELS = 2**16


def encoder_shape(info: PackageInfo) -> tuple[int, int, int]:
    """S, N and C of an encoder package.

    Raises:
        EncoderError: the inputs and outputs are not an encoder's.
    """
    declared = [f"{f.name} {f.dtype} {list(f.shape)}" for f in (*info.inputs, *info.outputs)]
    problem = EncoderError(
        f"the package declares {', '.join(declared) or 'nothing'}: expected {INPUT_NAME} float32 "
        f"or {IMAGE} [1, 3, S, S] and {OUTPUT_NAME} float32 [1, N, C], export the encoder again"
    )
    if len(info.inputs) != 1 or len(info.outputs) != 1:
        raise problem
    image, features = info.inputs[0], info.outputs[0]
    if (image.name, features.name) != (INPUT_NAME, OUTPUT_NAME):
        raise problem
    if image.dtype not in ("float32", IMAGE) or features.dtype != "float32":
        raise problem
    match image.shape, features.shape:
        case (1, 3, height, width), (1, tokens, channels) if (
            height == width
            and 1 <= height <= MAX_IMAGE_SIZE
            and 1 <= tokens <= MAX_IMAGE_SIZE
            and 1 <= channels <= _MAX_CHANNELS
        ):
            return height, tokens, channels
    raise problem


def to_bytes(images: np.ndarray) -> np.ndarray:
    """float32 in 0 to 1 → uint8: the nearest of 256 levels, which `image.ImageProcessor` makes."""
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


def check_images(images: np.ndarray, size: int) -> None:
    """Refuse pixels of another shape than the encoder's own.

    Raises:
        EncoderError: `images` is not [1, 3, size, size].
    """
    if images.shape != (1, 3, size, size):
        raise EncoderError(
            f"pixels of shape {list(images.shape)} can't be encoded: expected [1, 3, {size}, "
            f"{size}], preprocess the image for this encoder"
        )


def check_features(features: np.ndarray, shape: tuple[int, int, int]) -> None:
    """Refuse features of another shape than the package declares.

    Raises:
        EncoderError: `features` is not of `shape`, [1, N, C].
    """
    if features.shape != shape:
        raise EncoderError(
            f"the encoder made features of shape {list(features.shape)}: expected {list(shape)}, "
            "export it again"
        )
