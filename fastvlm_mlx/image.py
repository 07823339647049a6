"""Any picture → RGB → float32 [1, 3, S, S], with the geometry and values of the reference.

The reference is LLaVA's `expand2square` and then transformers' slow (PIL) CLIPImageProcessor:
bicubic on 8-bit pixels, rounded to 8 bits, × 1/255, normalized.
"""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from fastvlm_mlx.errors import ConfigError, ImageError
from fastvlm_mlx.files import is_url
from fastvlm_mlx.resample import reached, resample, support

# Where PIL by itself refuses: half a gibibyte of 24-bit pixels.
DEFAULT_MAX_PIXELS = 178_956_970

Triple = tuple[float, float, float]

# What PIL's decoders are known to raise on damaged files; they promise nothing narrower.
_DECODER_ERRORS = (
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
)

_ORIENTATION_TAG = 0x0112
# EXIF 2.3, 4.6.4 A: the stored picture's rows and columns, by the turn that makes it upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")

_BICUBIC = Image.Resampling.BICUBIC
# Pictures longer than this many times their width are resized where they have pixels only.
_EXTREME = 8
_STRIP_PIXELS = 1 << 22

_pillow_limit = threading.Lock()


def load_image(
    source: str | Path | bytes | BinaryIO, *, max_pixels: int = DEFAULT_MAX_PIXELS
) -> Image.Image:
    """Decode a picture (its first frame) into 8-bit RGB, upright, over white, deep greys scaled.

    Args:
        source: a path, an encoded picture, or a binary file at its start.
        max_pixels: width × height at most; read from the header, before anything is decoded.

    Raises:
        ImageError: nothing there, not a picture, a damaged one, or one with too many pixels.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), "the picture", max_pixels)
    if not isinstance(source, str | Path):
        name = getattr(source, "name", None)
        return _decode(source, name if isinstance(name, str) else "the picture", max_pixels)
    if not str(source):
        raise ImageError("the picture's path is empty: give the path of a picture")
    if is_url(source):
        raise ImageError(
            f"{source} is a URL: expected the path of a picture, download it first with `curl -LO "
            f"{quote(str(source))}` and give the file"
        )
    path = Path(source).expanduser()
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise ImageError(f"{path} does not exist: give the path of a picture") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path} is a directory: give the path of one picture in it") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{path} can't be opened ({_reason(error)}): check the path") from error
    with file:
        return _decode(file, str(path), max_pixels)


def _decode(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    try:
        with _no_pillow_limit():
            image = Image.open(file)
    except Image.UnidentifiedImageError as error:
        raise ImageError(_unidentified(file, name)) from error
    except _DECODER_ERRORS as error:
        raise ImageError(_damaged(name, error)) from error
    if image.format == "EPS":
        # PIL would hand the file to Ghostscript, which runs it as a program.
        raise ImageError(f"{name} is PostScript, not a bitmap: convert it to PNG or JPEG")
    _check_size(image, name, max_pixels)
    try:
        image.load()
        # Icons state their size a second time, inside.
        _check_size(image, name, max_pixels)
        return to_rgb(image)
    except MemoryError as error:
        raise ImageError(f"{name} needs more memory than there is: shrink it") from error
    except _DECODER_ERRORS as error:
        raise ImageError(_damaged(name, error)) from error


@contextmanager
def _no_pillow_limit() -> Iterator[None]:
    """Keep PIL from warning or raising on its own limit while a header is read: ours follows."""
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}×{height} pixels: expected at least one pixel")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is {width}×{height}, {width * height / 1e6:.4g} megapixels, over the limit "
            f"of {max_pixels / 1e6:.4g}: shrink it, or raise the limit (--max-pixels, load_image's "
            "max_pixels)"
        )


def _unidentified(file: BinaryIO, name: str) -> str:
    try:
        file.seek(0)
        start = file.read(12)
    except (OSError, ValueError):
        start = b"?"
    if not start:
        return f"{name} is empty, zero bytes: expected a picture"
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
        return f"{name} is an HEIF picture, which can't be read here: convert it to JPEG or PNG"
    return f"{name} is not a picture in a format that can be read: give a JPEG, PNG, WebP or TIFF"


def _damaged(name: str, error: BaseException) -> str:
    return f"{name} can't be decoded ({_reason(error)}): the file is damaged, get it again"


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


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
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation: Any = image.getexif().get(_ORIENTATION_TAG)
    except _DECODER_ERRORS:
        # Viewers show a picture whose EXIF block is damaged as it is stored.
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


@dataclass(frozen=True)
class ImageProcessor:
    """PIL image of any size and mode → float32 [1, 3, S, S].

    Attributes:
        size: S, pixels.
        aspect_ratio: the checkpoint's `image_aspect_ratio`. "pad" pads to a square with the
            colour of the mean, then resizes; any other value resizes the shortest edge and
            crops the centre ("crop" says so on purpose).
        image_mean, image_std: of each channel, on a scale of 0…1.
    """

    size: int
    aspect_ratio: str | None
    image_mean: Triple = (0.0, 0.0, 0.0)
    image_std: Triple = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"image size is {self.size}: expected at least 1")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(np.isfinite(values)):
                raise ConfigError(f"{name} is {values}: expected three numbers")
        if 0 in self.image_std:
            raise ConfigError(f"image_std is {self.image_std}: expected no zero")
        if "anyres" in (self.aspect_ratio or ""):
            raise ConfigError(
                f"image_aspect_ratio is {self.aspect_ratio!r}, several tiles for one picture: "
                "FastVLM takes one, expected pad or square"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], aspect_ratio: str | None) -> ImageProcessor:
        """Read a `preprocessor_config.json`.

        Raises:
            ConfigError: no size, or a step that is not the reference's.
        """
        sizes = {_edge(data[key], key) for key in ("size", "crop_size") if data.get(key)}
        if len(sizes) != 1:
            found = ", ".join(map(str, sorted(sizes))) or "no size"
            raise ConfigError(
                f"preprocessor_config.json gives {found}: expected size.shortest_edge and "
                "crop_size to be the same number"
            )
        expected = {"resample": 3, "rescale_factor": 1 / 255, "do_resize": True, "do_rescale": True}
        for key, value in expected.items():
            if data.get(key, value) != value:
                raise ConfigError(
                    f"preprocessor_config.json says {key} {data[key]!r}: expected {value!r}"
                )
        normalize = data.get("do_normalize", True)
        return cls(
            size=sizes.pop(),
            aspect_ratio=aspect_ratio,
            image_mean=tuple(data.get("image_mean", cls.image_mean)) if normalize else (0, 0, 0),
            image_std=tuple(data.get("image_std", cls.image_std)) if normalize else (1, 1, 1),
        )

    def __call__(self, image: Image.Image) -> np.ndarray:
        image = to_rgb(image)
        square = self._pad(image) if self.aspect_ratio == "pad" else self._crop(image)
        pixels = np.asarray(square)
        # Rescaled in double and normalized in single precision, as the reference does.
        levels = (np.arange(256) * (1 / 255)).astype(np.float32)
        batch = np.empty((1, 3, self.size, self.size), np.float32)
        for channel in range(3):
            mean = np.float32(self.image_mean[channel])
            std = np.float32(self.image_std[channel])
            batch[0, channel] = ((levels - mean) / std)[pixels[:, :, channel]]
        return batch

    def _pad(self, image: Image.Image) -> Image.Image:
        """`expand2square`, then resize, without ever holding the square.

        PIL resizes and rounds all rows, then all columns, so rows can be padded and resized a
        strip at a time.
        """
        width, height = image.size
        side, size = max(width, height), self.size
        background = tuple(int(255 * mean) for mean in self.image_mean)
        if side > _EXTREME * min(width, height):
            return self._pad_extreme(image, background)
        left, top = (side - width) // 2, (side - height) // 2
        columns = Image.new("RGB", (size, side), background)
        rows = max(1, _STRIP_PIXELS // side)
        for y in range(0, height, rows):
            strip = image.crop((0, y, width, min(y + rows, height)))
            if width < side:
                padded = Image.new("RGB", (side, strip.height), background)
                padded.paste(strip, (left, 0))
                strip = padded
            columns.paste(strip.resize((size, strip.height), _BICUBIC), (0, top + y))
        return columns.resize((size, size), _BICUBIC)

    def _pad_extreme(self, image: Image.Image, background: tuple[int, ...]) -> Image.Image:
        width, height = image.size
        side, size = max(width, height), self.size
        square = Image.new("RGB", (size, size), background)
        short = min(width, height)
        offset = (side - short) // 2
        first, last = reached(offset, offset + short, side, size)
        if width > height:
            image = image.resize((size, height), _BICUBIC)
            image = resample(image, 0, offset, side, size, first, last, background)
            square.paste(image, (0, first))
        else:
            image = resample(image, 1, offset, side, size, first, last, background)
            square.paste(image.resize((last - first, size), _BICUBIC), (first, 0))
        return square

    def _crop(self, image: Image.Image) -> Image.Image:
        """Resize the shortest edge, crop the centre.

        Of a long and narrow picture only what the crop keeps is resized: one pixel wide, it
        would first grow to S times its length. PIL's passes are then across and down, as below;
        for shrinking ones the order varies with PIL's version and is left to PIL.
        """
        width, height = image.size
        short, long, size = min(width, height), max(width, height), self.size
        resized = int(size * long / short)
        first = (resized - size) // 2
        last = first + size
        if short >= size or long <= _EXTREME * short:
            shape = (resized, size) if width > height else (size, resized)
            box = (first, 0, last, size) if width > height else (0, first, size, last)
            return image.resize(shape, _BICUBIC).crop(box)
        low, high = support(long, resized, np.array([first, last - 1]))
        start, stop = int(low[0]), int(high[1])
        if width > height:
            image = image.crop((start, 0, stop, height))
            image = resample(image, 1, start, width, resized, first, last, (0, 0, 0))
            return image.resize((size, size), _BICUBIC)
        image = image.crop((0, start, width, stop)).resize((size, stop - start), _BICUBIC)
        return resample(image, 0, start, height, resized, first, last, (0, 0, 0))


def _edge(value: Any, key: str) -> int:
    """`size` and `crop_size` in the forms that occur: 1024, {shortest_edge}, {height, width}."""
    edges = set(value.values()) if isinstance(value, dict) else {value}
    if len(edges) == 1 and isinstance(edge := edges.pop(), int):
        return edge
    raise ConfigError(
        f"preprocessor_config.json says {key} {value!r}: expected one number of pixels"
    )
