"""Pixels of any kind → what a viewer shows of them, as 8-bit RGB."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from fastvlm_mlx.errors import ImageError

# What PIL's decoders are known to raise on damaged files; they promise nothing narrower.
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    # Where the user has made errors of warnings.
    Warning,
)

_ORIENTATION_TAG = 0x0112
_STRIP_PIXELS = 1 << 22
# EXIF 2.3, 4.6.4 A: the stored image's rows and columns, by the turn that makes it upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def from_array(array: np.ndarray, name: str) -> Image.Image:
    """Grey [H, W] or [H, W, 1], RGB [H, W, 3] or RGBA [H, W, 4] → a PIL image that shares nothing.

    Integers are uint8; floats are of any width, from 0 to 1, and rounded to the nearest level.

    Raises:
        ImageError: an array of another shape or type, an empty one, or values beyond the range.
    """
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError(
            f"{name} is an array of shape {list(array.shape)}: expected [H, W], or [H, W, C] with "
            "1, 3 or 4 channels"
        )
    floating = array.dtype.kind == "f"
    if not floating and array.dtype != np.uint8:
        raise ImageError(
            f"{name} is an array of {array.dtype}: expected uint8, or floats from 0 to 1"
        )
    if 0 in array.shape:
        raise ImageError(f"{name} is an array of shape {list(array.shape)}: expected pixels")
    levels = np.array(array, np.uint8, order="C") if not floating else _levels(array, name)
    return Image.fromarray(levels[:, :, 0] if levels.shape[2:] == (1,) else levels)


def _levels(array: np.ndarray, name: str) -> np.ndarray:
    levels = np.empty(array.shape, np.uint8)
    for row, out in zip(array, levels, strict=True):
        # Not a number is in no range.
        if not (row.min() >= 0 and row.max() <= 1):
            raise ImageError(
                f"{name} holds values from {row.min():.4g} to {row.max():.4g}: expected floats "
                "from 0 to 1, or uint8"
            )
        out[:] = np.rint(row.astype(np.float64) * 255)
    return levels


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any PIL image into what a viewer shows, as 8-bit RGB; `image` stays as it is.

    EXIF orientation is applied, transparency is put over white, grey of more than 8 bits is
    scaled. An upright RGB image is returned itself. PIL's errors pass through.
    """
    image.load()
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bit_grey(image)
    if image.has_transparency_data:
        if image.mode == "La":
            # Premultiplied grey has no other conversion.
            image = image.convert("LA")
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image = _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """RGBA → RGB, some rows at a time: whole, it would take five images' memory."""
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    made = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        made.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return made


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation: Any = image.getexif().get(_ORIENTATION_TAG)
    except DECODER_ERRORS:
        # Viewers show an image whose EXIF block is damaged as it is stored.
        return image
    turn = _UPRIGHT.get(orientation)
    if turn is None:
        return image
    turned = image.transpose(turn)
    # What PIL copies along would turn it again.
    turned.info = {k: v for k, v in image.info.items() if k == "transparency"}
    return turned


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    """I;16, I and F → L.

    Integers are taken as 16-bit and floats as 0…1 or 0…255 where their range allows it; any
    other range is stretched from its lowest to its highest value.
    """
    values = np.asarray(image)
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    tops = (1.0, 255.0) if values.dtype.kind == "f" else (65535.0,)
    base, span = low, max(high - low, 1e-30)
    for top in reversed(tops):
        if low >= 0 and high <= top:
            base, span = 0.0, top
    grey = np.empty(values.shape, np.uint8)
    for row, out in zip(values, grey, strict=True):
        out[:] = np.rint((row.astype(np.float64) - base) * (255 / span))
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)
