"""An image from wherever it may come, decoded within a limit of pixels."""

from __future__ import annotations

import ctypes
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from fastvlm_mlx.bundle.files import is_url
from fastvlm_mlx.errors import ImageError, OptionError, escaped, printable
from fastvlm_mlx.image.inner_sizes import inner_sizes
from fastvlm_mlx.image.rgb import DECODER_ERRORS, from_array, to_rgb

# Where PIL by itself refuses: half a gibibyte of 24-bit pixels.
DEFAULT_MAX_PIXELS = 178_956_970

ImageSource = (
    Image.Image | np.ndarray | str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
)

_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
# No format of images takes more for a pixel than four channels of doubles; and what surrounds it.
_BYTES_PER_PIXEL, _BYTES_AROUND = 32, 1 << 26
# Tiles of this many pixels are usual, whatever the image's own size.
_TILE_PIXELS = 1 << 22
_TILE_WIDTH, _TILE_LENGTH = 322, 323

# PIL keeps an address for each row, which in an image one pixel wide is all that it keeps.
_MAX_SIDE = 1_000_000

# Characters of a file's name, or of a library's reason, in a message.
_MAX_NAME = 300

_lock = threading.Lock()


def load_image(source: ImageSource, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode an image (its first frame) into 8-bit RGB, upright, over white, deep greys scaled.

    Args:
        source: a path; an encoded image in bytes, a bytearray or a memoryview; a file open for
            reading bytes, which is read from where it stands to its end; pixels in a PIL image (its
            current frame) or a numpy array: grey [H, W] or [H, W, 1], RGB [H, W, 3] or RGBA
            [H, W, 4], of uint8 or of floats from 0 to 1.
        max_pixels: width × height at most; known before anything large is decoded.

    Raises:
        ImageError: nothing there, not an image, a damaged one, or one with too many pixels.
        OptionError: a limit that is no number of pixels.
    """
    max_pixels = check_max_pixels(max_pixels)
    if isinstance(source, Image.Image):
        return _pixels(source, "the image", max_pixels)
    if isinstance(source, np.ndarray):
        if source.ndim >= 2:
            _check_size((source.shape[1], source.shape[0]), "the image", max_pixels)
        return to_rgb(from_array(source, "the image"))
    if isinstance(source, bytes | bytearray | memoryview):
        return _encoded(source, max_pixels)
    if isinstance(source, str | os.PathLike):
        return _at(source, max_pixels)
    if callable(getattr(source, "read", None)):
        return _file(source, max_pixels)
    raise ImageError(
        f"the image is of type {type(source).__name__}: expected a path, bytes, a file open for "
        "reading bytes, a PIL image or a numpy array"
    )


def check_max_pixels(max_pixels: Any) -> int:
    """Raises OptionError: no whole number of 1 or more."""
    whole = isinstance(max_pixels, Integral) and not isinstance(max_pixels, bool)
    if not whole or max_pixels < 1:
        shown = max_pixels if whole else f"{ascii(max_pixels)[:40]}"
        raise OptionError(f"--max-pixels is {shown}: expected a whole number, 1 or more")
    return int(max_pixels)


def _encoded(source: bytes | bytearray | memoryview, max_pixels: int) -> Image.Image:
    try:
        return _decode(io.BytesIO(bytes(source)), "the image", max_pixels)
    except (ValueError, BufferError) as error:
        raise ImageError(f"the image can't be read ({_reason(error)}): give its bytes") from error


def _at(source: str | os.PathLike[str], max_pixels: int) -> Image.Image:
    try:
        text = os.fsdecode(source)
        path = Path(text).expanduser()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ImageError(
            f"the image's path can't be read ({_reason(error)}): give the path of an image"
        ) from error
    if not text:
        raise ImageError("the image's path is empty: give the path of an image")
    name = printable(escaped(path), _MAX_NAME)
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        if is_url(text):
            raise ImageError(
                f"{text} is a URL: expected the path of an image, download it first with `curl "
                f"-LO {quote(text)}` and give the file"
            ) from error
        raise ImageError(f"{name} does not exist: give the path of an image") from error
    except IsADirectoryError as error:
        raise ImageError(f"{name} is a directory: give the path of one image in it") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{name} can't be opened ({_reason(error)}): check the path") from error
    with file:
        return _decode(file if file.seekable() else _rest(file, name, max_pixels), name, max_pixels)


def _file(source: BinaryIO, max_pixels: int) -> Image.Image:
    name = getattr(source, "name", None)
    name = printable(escaped(name), _MAX_NAME) if isinstance(name, str) else "the image"
    return _decode(_rest(source, name, max_pixels), name, max_pixels)


def _rest(file: BinaryIO, name: str, max_pixels: int) -> BinaryIO:
    """What is still to be read of a file, which may be a pipe that never ends."""
    limit = _BYTES_PER_PIXEL * max_pixels + _BYTES_AROUND
    data = io.BytesIO()
    try:
        while part := file.read(1 << 20):
            if isinstance(part, str):
                raise ImageError(f"{name} is open as text: open it for reading bytes, as 'rb'")
            data.write(part)
            if data.tell() > limit:
                raise ImageError(f"{name} has more than {limit:,} bytes: expected one image")
    except (OSError, ValueError, TypeError) as error:
        raise ImageError(
            f"{name} can't be read ({_reason(error)}): give a file that is open for reading bytes"
        ) from error
    if part is None:
        raise ImageError(f"{name} has nothing to read yet: open it to wait for its bytes")
    data.seek(0)
    return data


def _decode(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    try:
        # PIL decodes some icons as soon as it opens them.
        _check_inner(file, name, max_pixels)
        with _no_pillow_limit():
            image = Image.open(file)
    except Image.UnidentifiedImageError as error:
        raise ImageError(_unidentified(file, name)) from error
    except DECODER_ERRORS as error:
        raise ImageError(_damaged(name, error)) from error
    return _pixels(image, name, max_pixels)


def _pixels(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """A PIL image, decoded by now or not."""
    try:
        if image.format == "EPS":
            # PIL would hand the file to Ghostscript, which runs it as a program.
            raise ImageError(f"{name} is PostScript, not a bitmap: convert it to PNG or JPEG")
        _check_size(image.size, name, max_pixels)
        if (fp := getattr(image, "fp", None)) is not None:
            _check_inner(fp, name, max_pixels)
        _check_tiles(image, name, max_pixels)
        _check_progressive(image, name, max_pixels)
        with _libtiff:
            image.load()
        _check_size(image.size, name, max_pixels)
        return to_rgb(image)
    except MemoryError as error:
        raise ImageError(f"{name} needs more memory than there is: shrink it") from error
    except DECODER_ERRORS as error:
        raise ImageError(_damaged(name, error)) from error


def _check_inner(file: BinaryIO, name: str, max_pixels: int) -> None:
    at = file.tell()
    file.seek(0)
    for size in inner_sizes(file):
        if 0 not in size:
            _check_size(size, name, max_pixels)
    file.seek(at)


def _check_tiles(image: Image.Image, name: str, max_pixels: int) -> None:
    """A TIFF's tiles are decoded whole, however little of them is in the image."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    width, length = tags.get(_TILE_WIDTH), tags.get(_TILE_LENGTH)
    if isinstance(width, int) and isinstance(length, int):
        _check_size((width, length), f"a tile of {name}", max(max_pixels, _TILE_PIXELS))


def _check_progressive(image: Image.Image, name: str, max_pixels: int) -> None:
    """Of a progressive JPEG every coefficient is kept, two bytes for each of a pixel's numbers.

    `max_pixels` stands for three numbers, and an image of four reaches it with fewer pixels.
    """
    if image.info.get("progressive"):
        numbers = max(3, len(image.getbands()))
        _check_size(image.size, f"{name}, a progressive JPEG,", 3 * max_pixels // numbers)


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}×{height} pixels: expected at least one pixel")
    if max(width, height) > _MAX_SIDE:
        raise ImageError(
            f"{name} is {width}×{height} pixels: expected at most {_MAX_SIDE:,} on a side, cut it"
        )
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is {width}×{height}, {width * height / 1e6:.4g} megapixels, over the limit "
            f"of {max_pixels / 1e6:.4g}: shrink it, or raise the limit (--max-pixels, or "
            "max_pixels of load and load_image)"
        )


@contextmanager
def _no_pillow_limit() -> Iterator[None]:
    """Keep PIL from warning or raising on its own limit while a header is read: ours follows."""
    with _lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


class _LibTiff:
    """Silences libtiff while anything of ours decodes: it writes about damage to stderr itself.

    Its handler is the process's, so the last to leave puts the former one back.
    """

    def __init__(self) -> None:
        self._inside = 0
        self._former: int | None = None
        self._set: Callable[[int | None], int | None] | None = None

    def __enter__(self) -> None:
        with _lock:
            if self._inside == 0 and (set_handler := self._find()) is not None:
                self._former = set_handler(None)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with _lock:
            self._inside -= 1
            if self._inside == 0 and (set_handler := self._find()) is not None:
                set_handler(self._former)

    def _find(self) -> Callable[[int | None], int | None] | None:
        """libtiff's function, found through PIL's own module, which is linked against it."""
        if self._set is None:
            try:
                function = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler
            except (OSError, AttributeError):
                # Built without libtiff, or in a way that hides it.
                return None
            function.restype = ctypes.c_void_p
            function.argtypes = [ctypes.c_void_p]
            self._set = function
        return self._set


_libtiff = _LibTiff()


def _unidentified(file: BinaryIO, name: str) -> str:
    try:
        file.seek(0)
        start = file.read(12)
    except (OSError, ValueError):
        start = b"?"
    if not start:
        return f"{name} is empty, zero bytes: expected an image"
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
        return f"{name} is an HEIF image, which can't be read here: convert it to JPEG or PNG"
    return f"{name} is not an image in a format that can be read: give a JPEG, PNG, WebP or TIFF"


def _damaged(name: str, error: BaseException) -> str:
    if "closed image" in str(error):
        return f"{name} is a PIL image that was closed: give it before it is"
    return f"{name} can't be decoded ({_reason(error)}): the file is damaged, get it again"


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(text, _MAX_NAME)
