"""Images: what Pillow writes, then damaged, enlarged by their headers, mixed, or no image."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, features

from tests.fuzz.case import Case
from tests.fuzz.mutate import damaged, fragment, text
from tests.fuzz.stock import Stock

# Format, the modes it takes, and its options, of which one set is drawn.
_PLAIN: tuple[dict[str, Any], ...] = ({},)
FORMATS: dict[str, tuple[tuple[str, ...], tuple[dict[str, Any], ...]]] = {
    "PNG": (("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "I"), ({}, {"optimize": True})),
    "JPEG": (("RGB", "L", "CMYK"), ({}, {"progressive": True}, {"quality": 5})),
    "WEBP": (("RGB", "RGBA"), ({}, {"lossless": True}, {"method": 0})),
    "TIFF": (
        ("RGB", "RGBA", "L", "1", "CMYK", "I;16", "F", "P", "LAB"),
        (
            *({"compression": name} for name in (None, "tiff_lzw", "packbits", "jpeg", "zstd")),
            *({"compression": name} for name in ("tiff_adobe_deflate", "lzma", "group4")),
            {"compression": "tiff_ccitt", "big_tiff": True},
        ),
    ),
    "GIF": (("P", "L", "RGB"), ({}, {"transparency": 0}, {"interlace": 0})),
    "BMP": (("RGB", "L", "P", "1", "RGBA"), _PLAIN),
    "ICO": (("RGBA", "RGB"), ({"sizes": [(16, 16), (32, 32)]}, {"bitmap_format": "bmp"})),
    "ICNS": (("RGBA",), _PLAIN),
    "PPM": (("RGB", "L", "1", "I"), _PLAIN),
    "TGA": (("RGB", "RGBA", "L", "P"), ({}, {"compression": "tga_rle"})),
    "PCX": (("RGB", "L", "P", "1"), _PLAIN),
    "SGI": (("RGB", "L", "RGBA"), ({}, {"bpc": 2})),
    "DDS": (("RGB", "RGBA", "L"), ({}, {"pixel_format": "DXT1"}, {"pixel_format": "DXT5"})),
    "JPEG2000": (("RGB", "L", "RGBA"), ({}, {"irreversible": True})),
    "AVIF": (("RGB", "RGBA"), ({"speed": 10},)),
    "SPIDER": (("F",), _PLAIN),
    "IM": (("RGB", "L", "P"), _PLAIN),
    "MSP": (("1",), _PLAIN),
    "XBM": (("1",), _PLAIN),
    "PDF": (("RGB",), _PLAIN),
    "EPS": (("RGB",), _PLAIN),
    "QOI": (("RGB", "RGBA"), _PLAIN),
    "MPO": (("RGB",), _PLAIN),
}
COMMON = (".png", ".jpeg", ".webp", ".gif", ".bmp", ".tiff")
_TEXTS = (
    b"",
    b"hello\n",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\nshowpage\n",
    b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>',
    b"%PDF-1.4\n",
    b"<html><body>not found</body></html>",
    b"P6\n99999 99999\n255\n",
    b"P6\n# " + b"x" * 5000 + b"\n3 3\n255\n" + bytes(27),
    b"P3\n2 2\n255\n" + b"9" * 100_000,
    b"P7\nWIDTH 9\nHEIGHT 9\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n",
    b"Pf\n3 3\nnan\n" + bytes(36),
    b"#define x_width 99999\n#define x_height 99999\nstatic char x_bits[] = {\n0x00};\n",
    b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic",
    b"GIF89a" + b"\xff\xff\xff\xff" + b"\x00" * 9,
    b"8BPS" + bytes(100),
    b"SIMPLE  =                    T" + b" " * 2850,
    b"II*\x00\x08\x00\x00\x00\x00\x00" + bytes(8),
    b"qoif" + b"\xff" * 20,
)


def warm(stock: Stock) -> None:
    import fastvlm_mlx.image.preprocess  # noqa: F401

    Image.init()


def prepare(case: Case) -> None:
    rng = case.rng
    case.source.mkdir()
    how = rng.choices(
        (_encoded, _damaged, _enlarged, _metadata, _polyglot, _text, _spliced, _frames),
        (4, 40, 14, 12, 8, 5, 12, 5),
    )[0]
    data, suffix, note = how(rng, case.stock)
    name = rng.choice((f"image{suffix}", "image", "image.png", "[red]mark7[red].jpg"))
    if rng.random() < 0.03:
        name = rng.choice(("a\nb.png", "\x1b[31m.png", "é" * 100, "right\u202eleft.png"))
    (case.source / name).write_bytes(data)
    case.facts = {"mutator": how.__name__.strip("_"), "note": note, "name": name}
    # What everybody has must be read; of the others that they end well is enough.
    case.facts["common"] = how is _encoded and suffix in COMMON


def run(case: Case) -> None:
    from fastvlm_mlx.image.preprocess import ImageProcessor, load_image

    path = case.source / case.facts["name"]
    rng = case.rng
    options: dict[str, Any] = {}
    if rng.random() < 0.3:
        options["max_pixels"] = rng.choice((1, 1000, 10_000_000))
    how = rng.choice(("path", "str", "bytes", "file"))

    def load() -> Any:
        if how == "file":
            with path.open("rb") as file:
                return load_image(file, **options)
        given: Any = {"path": path, "str": str(path), "bytes": path.read_bytes()}[how]
        return load_image(given, **options)

    must_answer = case.facts["common"] and not options
    image = case.step(f"load_image of {how}", load, must_answer=must_answer)
    if image is None:
        return
    if image.mode != "RGB" or min(image.size) < 1:
        case.bad("not RGB", f"{image.mode} {image.size}")
    if image.width * image.height > options.get("max_pixels", 178_956_970):
        case.bad("over max_pixels", f"{image.size}")
    size = rng.choice((64, 256))
    raw = {
        "image_mean": [0.0] * 3,
        "image_std": [1.0] * 3,
        "size": {"shortest_edge": size},
        "crop_size": {"width": size, "height": size},
    }
    aspect = rng.choice(("pad", "crop", None))
    pixels = case.step("preprocess", lambda: ImageProcessor.from_dict(raw, aspect)(image))
    if pixels is not None and (
        pixels.shape != (1, 3, size, size) or pixels.dtype != np.float32 or not _in_range(pixels)
    ):
        case.bad("wrong pixels", f"{pixels.shape} {pixels.dtype}")


def _in_range(pixels: np.ndarray) -> bool:
    return bool(np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1)


def _image(rng: random.Random) -> Image.Image:
    width, height = rng.choice(((1, 1), (7, 5), (33, 20), (64, 64), (3, 200)))
    noise = np.frombuffer(rng.randbytes(width * height * 3), np.uint8)
    return Image.fromarray(noise.reshape(height, width, 3).copy())


def _save(
    rng: random.Random, name: str | None = None, image: Image.Image | None = None, **more: Any
) -> tuple[bytes, str, str]:
    """An image in a format, mode and variant; PNG where this Pillow can't write it."""
    name = name or rng.choice(list(FORMATS))
    modes, variants = FORMATS[name]
    mode, options = rng.choice(modes), rng.choice(variants)
    image = image or _image(rng)
    if name == "AVIF" and not features.check("avif"):
        name, mode, options = "PNG", "RGB", {}
    if options.get("compression") in ("group4", "tiff_ccitt"):
        mode = "1"
    buffer = io.BytesIO()
    try:
        _as_mode(image, mode).save(buffer, name, **options, **more)
    # A combination that this build of Pillow does not have.
    except (OSError, ValueError, KeyError, SystemError, RuntimeError):
        buffer, name = io.BytesIO(), "PNG"
        image.save(buffer, "PNG")
    return buffer.getvalue(), "." + name.lower(), f"{name} {mode} {options}"


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "LAB":
        return Image.merge("LAB", image.split())
    return image.convert(mode)


def _encoded(rng: random.Random, stock: Stock) -> tuple[bytes, str, str]:
    return _save(rng)


def _any(rng: random.Random, stock: Stock) -> tuple[bytes, str, str]:
    if rng.random() < 0.3:
        file = rng.choice(sorted((stock / "images").iterdir()))
        return file.read_bytes(), file.suffix, file.name
    return _save(rng)


def _damaged(rng: random.Random, stock: Stock) -> tuple[bytes, str, str]:
    data, suffix, note = _any(rng, stock)
    for _ in range(rng.choice((1, 1, 2, 5))):
        data, what = damaged(rng, data)
        note += "; " + what
    return data, suffix, note


def _spliced(rng: random.Random, stock: Stock) -> tuple[bytes, str, str]:
    (a, suffix, one), (b, _, other) = _any(rng, stock), _any(rng, stock)
    at, to = rng.randrange(len(a) + 1), rng.randrange(len(b) + 1)
    return a[:at] + b[to:], suffix, f"{one} to {at}, then {other} from {to}"


def _polyglot(rng: random.Random, stock: Stock) -> tuple[bytes, str, str]:
    (a, suffix, one), (b, _, other) = _any(rng, stock), _any(rng, stock)
    joined = rng.choice(
        (a + b, b"\0" * 16 + a, a + b"PK\x03\x04" + b, b"<script>" + a, b"\r\n" + a)
    )
    return joined, suffix, f"{one} with {other}"


def _text(rng: random.Random, stock: Stock) -> tuple[bytes, str, str]:
    data = rng.choice((*_TEXTS, fragment(rng).encode(), text(rng).encode("utf-8", "replace")))
    return data, rng.choice((".txt", ".png", ".ppm")), "text"


def _frames(rng: random.Random, stock: Stock) -> tuple[bytes, str, str]:
    images = [_image(rng) for _ in range(rng.choice((2, 3, 30)))]
    name = rng.choice(("GIF", "TIFF", "WEBP", "PNG", "MPO"))
    buffer = io.BytesIO()
    first = images[0].resize((20, 20))
    rest = [image.resize((20, 20)) for image in images[1:]]
    first.save(buffer, name, save_all=True, append_images=rest)
    data, note = buffer.getvalue(), f"{name} of {len(images)} frames"
    if rng.random() < 0.7:
        data, what = damaged(rng, data)
        note += "; " + what
    return data, "." + name.lower(), note


def _metadata(rng: random.Random, stock: Stock) -> tuple[bytes, str, str]:
    """EXIF, colour profiles and text chunks that are broken, or enormous when unpacked."""
    how = rng.choice(("exif", "exif", "icc", "text", "bomb", "dpi"))
    name = rng.choice(("JPEG", "PNG", "WEBP", "TIFF"))
    if how == "exif":
        exif = Image.Exif()
        exif[0x0112] = rng.choice((0, 1, 3, 6, 8, 9, 65535))
        exif[0x010E] = text(rng).replace("\ud800", "")
        raw, what = exif.tobytes(), "whole"
        if rng.random() < 0.7:
            raw, what = damaged(rng, raw)
        if name == "TIFF":
            name = "JPEG"
        data, suffix, note = _save(rng, name, exif=raw)
        return data, suffix, f"{note}; exif {what}"
    if how == "icc":
        profile = rng.choice((b"", b"x" * 10, rng.randbytes(500), bytes(128) + b"\xff" * 100))
        return _save(rng, name, icc_profile=profile)
    if how == "dpi":
        return _save(rng, name, dpi=rng.choice(((0, 0), (1, 100_000), (300.5, 1))))
    data, suffix, note = _save(rng, "PNG")
    packed = zlib.compress(bytes(200_000_000 if how == "bomb" else 5000), 9)
    kind = rng.choice((b"zTXt", b"iCCP", b"iTXt"))
    middle = b"\0\x01\0\0\0" if kind == b"iTXt" else b"\0\0"
    return _with_chunk(data, kind, b"name" + middle + packed), suffix, f"{note}; {how} {kind!r}"


def _with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    # After the signature and the header.
    crc = struct.pack(">I", zlib.crc32(kind + body))
    return png[:33] + struct.pack(">I", len(body)) + kind + body + crc + png[33:]


def _png_size(data: bytearray, width: int, height: int) -> None:
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))


def _at(place: int, form: str) -> Callable[[bytearray, int, int], None]:
    def write(data: bytearray, width: int, height: int) -> None:
        largest = 256 ** (struct.calcsize(form) // 2) - 1
        struct.pack_into(form, data, place, min(width, largest), min(height, largest))

    return write


def _jpeg_size(data: bytearray, width: int, height: int) -> None:
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        at = data.find(marker)
        if at > 0:
            struct.pack_into(">HH", data, at + 5, min(height, 65535), min(width, 65535))


def _tiff_size(data: bytearray, width: int, height: int) -> None:
    for tag, value in ((256, width), (257, height)):
        at = data.find(struct.pack("<HH", tag, 4))
        at = at if at > 0 else data.find(struct.pack("<HH", tag, 3))
        if at > 0:
            struct.pack_into("<HII", data, at + 2, 4, 1, value)


_SIZES: dict[str, Callable[[bytearray, int, int], None]] = {
    "PNG": _png_size,
    "GIF": _at(6, "<HH"),
    "BMP": _at(18, "<II"),
    "TGA": _at(12, "<HH"),
    "PCX": _at(8, "<HH"),
    "SGI": _at(6, ">HH"),
    "DDS": _at(12, "<II"),
    "JPEG": _jpeg_size,
    "TIFF": _tiff_size,
    "WEBP": _at(26, "<HH"),
    "ICO": _at(6, "BB"),
    "QOI": _at(4, ">II"),
}


def _enlarged(rng: random.Random, stock: Stock) -> tuple[bytes, str, str]:
    """A header that promises far more pixels than there are."""
    name = rng.choice(list(_SIZES))
    data, suffix, note = _save(rng, name)
    buffer = bytearray(data)
    sizes = ((13_000, 13_000), (65_535, 65_535), (2**31 - 1, 1), (1, 100_000_000), (0, 5))
    width, height = rng.choice((*sizes, (5, 0), (2**32 - 1,) * 2, (40_000, 4000), (300, 300)))
    if suffix == "." + name.lower() and len(buffer) > 40:
        _SIZES[name](buffer, width, height)
    return bytes(buffer), suffix, f"{note}; header says {width} × {height}"
