"""Pixels against the slow CLIPImageProcessor's, and every kind of image that may come."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastvlm_mlx.errors import ConfigError, ImageError
from fastvlm_mlx.image import resample
from fastvlm_mlx.image.preprocess import DEFAULT_MAX_PIXELS, ImageProcessor, load_image, to_rgb

GOLDEN = Path(__file__).parents[1] / "golden"
IMAGES = GOLDEN / "images"
PIXELS = np.load(GOLDEN / "pixels.npz")
TOLERANCE = 1 / 25_500
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png(width: int, height: int, mode: int = 2) -> bytes:
    """The start of a PNG: signature and header, then an empty block of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


# --- the reference's geometry and values


@pytest.mark.parametrize("key", [key for key in PIXELS.files if not key.endswith(".clip")])
def test_pixels_equal_the_reference(key: str) -> None:
    name, aspect_ratio = key.rsplit(".", 1)
    expected = PIXELS[key] / 255
    processor = ImageProcessor(size=expected.shape[-1], aspect_ratio=aspect_ratio)
    pixels = processor(load_image(IMAGES / name))
    assert pixels.shape == (1, *expected.shape)
    assert pixels.dtype == np.float32
    assert np.abs(pixels[0] - expected).max() <= TOLERANCE


@pytest.mark.parametrize("geometry", ["pad", "crop"])
def test_mean_and_std_as_the_reference_applies_them(geometry: str) -> None:
    expected = PIXELS[f"wide.jpg.{geometry}.clip"]
    processor = ImageProcessor(32, geometry, CLIP_MEAN, CLIP_STD)
    pixels = processor(load_image(IMAGES / "wide.jpg"))
    assert np.abs(pixels[0] - expected).max() <= TOLERANCE


@pytest.mark.parametrize("aspect_ratio", [None, "square", "crop"])
def test_all_but_pad_crops(aspect_ratio: str | None) -> None:
    image = make_image(61, 37)
    cropped = ImageProcessor(16, "crop")(image)
    assert np.array_equal(ImageProcessor(16, aspect_ratio)(image), cropped)
    assert not np.array_equal(ImageProcessor(16, "pad")(image), cropped)


def straightforward(image: Image.Image, size: int, pad: bool, mean: float) -> np.ndarray:
    """expand2square and the slow processor with everything held at once, uint8 [S, S, 3]."""
    width, height = image.size
    if pad:
        side = max(width, height)
        square = Image.new("RGB", (side, side), (int(255 * mean),) * 3)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    short, long = sorted(image.size)
    resized = int(size * long / short)
    shape = (size, resized) if width <= height else (resized, size)
    pixels = np.asarray(image.resize(shape, Image.Resampling.BICUBIC))
    top, left = ((edge - size) // 2 for edge in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


edges = st.one_of(st.integers(1, 12), st.integers(1, 400))


@given(
    width=edges,
    height=edges,
    size=st.sampled_from([1, 2, 7, 32, 63]),
    pad=st.booleans(),
    mean=st.sampled_from([0.0, 0.48145466, 1.0]),
    seed=st.integers(0, 9),
)
@example(width=1, height=400, size=63, pad=True, mean=1.0, seed=0)
@example(width=400, height=1, size=63, pad=True, mean=0.5, seed=0)
@example(width=3, height=400, size=63, pad=False, mean=0.0, seed=0)
@example(width=400, height=3, size=63, pad=False, mean=0.0, seed=0)
@example(width=40, height=400, size=32, pad=False, mean=0.0, seed=0)
@settings(max_examples=150, deadline=None)
def test_any_shape_is_resized_bit_for_bit(
    width: int, height: int, size: int, pad: bool, mean: float, seed: int
) -> None:
    image = make_image(width, height, seed)
    processor = ImageProcessor(size, "pad" if pad else None, (mean,) * 3, (1.0,) * 3)
    levels = (processor(image)[0].transpose(1, 2, 0) + np.float32(mean)) * 255
    expected = straightforward(image, size, pad, mean)
    assert np.abs(levels - expected).max() <= 0.01


def test_work_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    processors = [ImageProcessor(32, "pad"), ImageProcessor(32, "crop")]
    shapes = [(70, 90), (90, 70), (5, 300), (300, 5)]
    whole = [p(make_image(*shape)) for p in processors for shape in shapes]
    monkeypatch.setattr("fastvlm_mlx.image.preprocess._STRIP_PIXELS", 200)
    monkeypatch.setattr(resample, "_BLOCK_PIXELS", 200)
    blocks = [p(make_image(*shape)) for p in processors for shape in shapes]
    assert all(np.array_equal(a, b) for a, b in zip(whole, blocks, strict=True))


@pytest.mark.parametrize("shape", [(1, 200_000), (200_000, 1)])
@pytest.mark.parametrize("aspect_ratio", ["pad", None])
def test_a_thread_of_pixels_costs_no_square(
    shape: tuple[int, int], aspect_ratio: str | None
) -> None:
    # The padded square would be 120 GB, the resized strip 10 GB.
    pixels = ImageProcessor(128, aspect_ratio)(Image.new("RGB", shape, (255, 255, 255)))
    # Padded, the thread is a thousandth of the width of a pixel.
    assert np.unique(pixels) == (0 if aspect_ratio == "pad" else 1)


# --- preprocessor_config.json

CONFIG = {
    "crop_size": {"height": 48, "width": 48},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 48},
}


def test_preprocessor_config() -> None:
    assert ImageProcessor.from_dict(CONFIG, "pad") == ImageProcessor(48, "pad")
    clip = {**CONFIG, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
    assert ImageProcessor.from_dict(clip, None) == ImageProcessor(48, None, CLIP_MEAN, CLIP_STD)
    plain = {**clip, "do_normalize": False}
    assert ImageProcessor.from_dict(plain, None) == ImageProcessor(48, None)
    assert ImageProcessor.from_dict({"size": {"height": 48, "width": 48}}, "pad").size == 48
    assert ImageProcessor.from_dict({"crop_size": 48}, "pad").size == 48


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size": {"shortest_edge": 64}}, "48, 64"),
        ({"size": None, "crop_size": None}, "no size"),
        ({"crop_size": {"height": 48, "width": 64}}, "crop_size"),
        ({"size": "large"}, "large"),
        ({"resample": 2}, "resample 2"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"do_rescale": False}, "do_rescale"),
        ({"do_resize": False}, "do_resize"),
        ({"image_mean": [0.0]}, "image_mean"),
        ({"image_std": [1.0, 0.0, 1.0]}, "image_std"),
    ],
)
def test_a_preprocessor_that_is_not_the_reference(change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ImageProcessor.from_dict({**CONFIG, **change}, "pad")


def test_refused_geometry() -> None:
    with pytest.raises(ConfigError, match="anyres"):
        ImageProcessor(48, "anyres_max_9")
    with pytest.raises(ConfigError, match="image size is 0"):
        ImageProcessor(0, "pad")


# --- what a viewer shows


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_applied_once(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(make_image(7, 5), format, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    upright = load_image(data)
    assert np.array_equal(np.asarray(upright), expected)
    assert np.array_equal(np.asarray(to_rgb(upright)), expected)


def test_a_caller_s_image_is_left_alone() -> None:
    data = (IMAGES / "rotated.jpg").read_bytes()
    image = Image.open(io.BytesIO(data))
    pixels = ImageProcessor(32, "pad")(image)
    assert image.size == (141, 90)
    assert np.array_equal(pixels, ImageProcessor(32, "pad")(load_image(data)))


def test_damaged_exif_is_no_obstacle() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes()
    data = encoded(make_image(7, 5), "JPEG", exif=block[:14] + b"\xff" * (len(block) - 14))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_image(data).size == (7, 5)


RAMP = np.array([[0, 1, 256, 257], [32767, 32768, 65534, 65535]])


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled(format: str) -> None:
    image = load_image(encoded(Image.fromarray(RAMP.astype(np.uint16)), format))
    expected = np.rint(RAMP / 65535 * 255).astype(np.uint8)
    assert np.array_equal(np.asarray(image), np.stack([expected] * 3, 2))


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        (RAMP.astype(np.int32), 0, 65535),
        ((RAMP * 1000 - 7).astype(np.int32), -7, 65534993),
        ((RAMP / 65535).astype(np.float32), 0, 1),
        ((RAMP / 257).astype(np.float32), 0, 255),
        ((RAMP - 40000.0).astype(np.float32), -40000, 25535),
        (np.full((2, 4), 3e4, np.float32), 3e4, 4e4),
        (np.array([[0.5, np.nan, np.inf, -np.inf]] * 2, np.float32), 0, 1),
    ],
)
def test_deep_grey_is_scaled(values: np.ndarray, low: float, high: float) -> None:
    image = load_image(encoded(Image.fromarray(values), "TIFF"))
    finite = np.nan_to_num(values.astype(np.float64), nan=0, posinf=0, neginf=0)
    expected = (finite - low) / (high - low) * 255
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[:, :, 0] - expected).max() <= 0.51


def with_alpha(mode: str) -> Image.Image:
    image = make_image(16, 16).convert(mode.rstrip("Aa"))
    image.putalpha(Image.linear_gradient("L").resize((16, 16)))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_put_over_white(mode: str) -> None:
    image = with_alpha(mode)
    rgba = np.asarray(image.convert("RGBA"), np.float64)
    alpha = rgba[:, :, 3:] / 255
    expected = rgba[:, :, :3] * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(load_image(encoded(image))) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA"])
def test_transparency_in_modes_without_a_file(mode: str) -> None:
    image = with_alpha({"RGBa": "RGBA", "La": "LA", "PA": "RGBA"}[mode])
    if mode == "PA":
        image = image.quantize(16).convert("RGBA")
    shown = np.asarray(to_rgb(image.convert(mode)), np.int32)
    # Premultiplied colours are rounded once more.
    assert np.abs(shown - np.asarray(to_rgb(image), np.int32)).max() <= 2


@pytest.mark.parametrize("mode", ["P", "L", "1", "RGB", "I;16"])
def test_a_transparent_colour_is_white(mode: str) -> None:
    if mode == "I;16":
        image, colour = Image.fromarray(np.array([[9, 300]], np.uint16)), 9
    else:
        image = Image.new("RGB", (2, 1))
        image.putpixel((1, 0), (255, 240, 200))
        image = image.convert(mode)
        colour = image.getpixel((0, 0))
    shown = load_image(encoded(image, transparency=colour))
    assert shown.getpixel((0, 0)) == (255, 255, 255)
    assert shown.getpixel((1, 0)) == to_rgb(image).getpixel((1, 0))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_several(format: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert load_image(data).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = make_image(9, 7).convert("L" if mode in "IF" else "RGB").convert(mode)
    shown = to_rgb(image)
    assert (shown.mode, shown.size) == ("RGB", (9, 7))
    assert ImageProcessor(8, "pad")(image).shape == (1, 3, 8, 8)


# --- where images come from


def test_sources(tmp_path: Path) -> None:
    path = tmp_path / "image with no suffix"
    path.write_bytes(encoded(make_image(5, 4)))
    with path.open("rb") as file:
        sources = [str(path), path, path.read_bytes(), io.BytesIO(path.read_bytes()), file]
        images = [np.asarray(load_image(source)) for source in sources]
    assert all(np.array_equal(image, np.asarray(make_image(5, 4))) for image in images)


def test_a_pipe() -> None:
    read, write = os.pipe()
    data = encoded(make_image(5, 4))
    with os.fdopen(write, "wb") as file:
        file.write(data)
    with os.fdopen(read, "rb") as file:
        assert load_image(file).size == (5, 4)


def test_threads_share_nothing() -> None:
    data = encoded(make_image(40, 30))
    limit = Image.MAX_IMAGE_PIXELS
    sizes: list[tuple[int, int]] = []
    threads = [
        threading.Thread(target=lambda: sizes.append(load_image(data).size)) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [(40, 30)] * 16
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_file_is_read_from_where_it_stands(tmp_path: Path) -> None:
    data = encoded(make_image(5, 4))
    file = io.BytesIO(b"before" + data)
    file.seek(6)
    assert load_image(file).size == (5, 4)
    assert file.read() == b""


arrays = st.one_of(
    st.sampled_from([(3, 4), (3, 4, 1), (3, 4, 3), (3, 4, 4), (4,), (), (3, 4, 2), (0, 4, 3)]),
    st.lists(st.integers(0, 5), max_size=5).map(tuple),
).flatmap(
    lambda shape: st.sampled_from(
        [np.uint8, np.float16, np.float64, ">f4", np.int64, bool, "O"]
    ).map(lambda dtype: np.random.default_rng(0).random(shape).astype(dtype))
)


@given(arrays, st.sampled_from([1, 1.5, -1, np.nan, np.inf]))
@settings(max_examples=150, deadline=None)
def test_any_array_is_its_pixels_or_refused(array: np.ndarray, factor: float) -> None:
    if array.dtype.kind == "f":
        array = array * array.dtype.type(factor)
    channels = array.shape[2] if array.ndim == 3 else 1
    right = array.ndim in (2, 3) and channels in (1, 3, 4) and array.size > 0
    right &= array.dtype == np.uint8 or array.dtype.kind == "f"
    if not right or not ((array >= 0).all() and (array.astype(float) <= 255).all()):
        assert "expected" in message(array)
    elif array.dtype.kind == "f" and array.max() > 1:
        assert "expected floats from 0 to 1" in message(array)
    else:
        levels = array if array.dtype == np.uint8 else np.rint(array.astype(float) * 255)
        levels = levels.astype(np.uint8).reshape(*array.shape[:2], channels)
        expected = Image.fromarray(levels[:, :, 0] if channels == 1 else levels)
        assert np.array_equal(np.asarray(load_image(array)), np.asarray(to_rgb(expected)))


def test_an_array_is_not_kept() -> None:
    array = np.zeros((4, 5, 3), np.uint8)
    image = load_image(array)
    array[:] = 255
    assert image.getextrema() == ((0, 0),) * 3


# --- what is no image


def message(source: object, **options: int) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError) as caught:
            load_image(source, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_paths(tmp_path: Path) -> None:
    assert f"{tmp_path / 'no.jpg'} does not exist" in message(tmp_path / "no.jpg")
    assert "is a directory" in message(str(tmp_path))
    url = "https://example.org/cat.jpg"
    assert f"{url} is a URL" in message(url)
    assert f"`curl -LO {url}`" in message(url)
    assert "null byte" in message("a\0b")
    for data, said in ((b"", "is empty"), (b"hello, world", "is not an image")):
        (tmp_path / "file.jpg").write_bytes(data)
        assert f"{tmp_path / 'file.jpg'} {said}" in message(tmp_path / "file.jpg")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "PostScript"),
        (b"%PDF-1.7\n", "is not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image"),
        (encoded(make_image(64, 64), "JPEG")[:900], "damaged"),
        (encoded(make_image(64, 64))[:900], "damaged"),
        (png(8, 8), "damaged"),
        (png(0, 8), "is not an image"),
    ],
)
def test_what_is_no_image(data: bytes, said: str) -> None:
    assert said in message(data)


@pytest.mark.parametrize("source", sorted(IMAGES.iterdir()), ids=lambda path: path.name)
def test_no_truncation_escapes(source: Path) -> None:
    data = source.read_bytes()
    for length in np.linspace(0, len(data) - 1, 40, dtype=int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = load_image(data[:length])
            except ImageError:
                continue
            # Formats without an end mark may be complete before the end of the file.
            assert image.mode == "RGB"


@given(
    source=st.sampled_from(sorted(IMAGES.iterdir())),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
)
@settings(max_examples=150, deadline=None)
def test_no_damage_escapes(source: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(source.read_bytes())
    for position, value in changes:
        data[position % len(data)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert load_image(bytes(data), max_pixels=1_000_000).mode == "RGB"
        except ImageError:
            return


def test_too_many_pixels_by_the_header_alone() -> None:
    said = message(png(20_000, 10_000))
    assert "20000×10000" in said
    assert "200 megapixels" in said
    assert "--max-pixels" in said
    # Past the limit's check there are no pixels to decode.
    assert "damaged" in message(png(20_000, 10_000), max_pixels=200_000_000)
    # Between PIL's warning and ours.
    assert DEFAULT_MAX_PIXELS > 120_000_000
    assert "damaged" in message(png(12_000, 10_000))
    assert "over the limit" in message(encoded(make_image(11, 10)), max_pixels=109)
    assert load_image(encoded(make_image(11, 10)), max_pixels=110).size == (11, 10)


FORMATS = ("TIFF", "ICO", "ICNS", "GIF", "WEBP", "JPEG2000", "PNG", "BMP", "DDS", "AVIF", "MPO")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("way", ["bytes", "path", "opened", "decoded"])
def test_the_limit_holds_in_every_format_and_way(tmp_path: Path, format: str, way: str) -> None:
    image = make_image(128, 128)
    frames = {"save_all": True, "append_images": [make_image(128, 128, 1)]}
    several = format in ("TIFF", "GIF", "WEBP", "AVIF", "MPO")
    sizes = {"sizes": [(128, 128)]} if format == "ICO" else {}
    data = encoded(image, format, **(frames if several else sizes))
    (tmp_path / "it").write_bytes(data)
    if way in ("opened", "decoded"):
        source: object = Image.open(io.BytesIO(data))
        if way == "decoded":
            source.load()  # type: ignore[attr-defined]
    else:
        source = data if way == "bytes" else tmp_path / "it"
    assert "over the limit" in message(source, max_pixels=128 * 128 - 1)
    # An icon on macOS holds one of twice the size.
    assert load_image(source, max_pixels=2048 * 2048).mode == "RGB"  # type: ignore[arg-type]


def bomb(side: int) -> bytes:
    """A PNG of `side` × `side` white pixels, a thousandth of that in bytes."""
    return encoded(Image.new("1", (side, side), 1))


def test_a_large_image_inside_a_small_icon() -> None:
    """By what the inner image's header says, before PIL decodes it while it opens the icon."""
    inner = bomb(6000)
    ico = struct.pack("<HHH", 0, 1, 1) + struct.pack(
        "<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22
    )
    icns = (
        b"icns" + struct.pack(">I", 16 + len(inner)) + b"ic07" + struct.pack(">I", 8 + len(inner))
    )
    for data in (ico + inner, icns + inner):
        assert "6000×6000" in message(data, max_pixels=1_000_000)
    assert "6000×6000" in message(Image.open(io.BytesIO(icns + inner)), max_pixels=1_000_000)


def test_a_large_codestream_inside_a_small_jpeg_2000() -> None:
    data = encoded(make_image(40, 30), "JPEG2000")
    at = data.index(b"ihdr") + 4
    data = data[:at] + struct.pack(">II", 3, 4) + data[at + 8 :]
    assert "40×30" in message(data, max_pixels=1000)


def test_a_large_tile_of_a_small_tiff() -> None:
    entries = [(256, 8), (257, 8), (258, 8), (259, 8), (262, 1), (277, 1)]
    entries += [(322, 30_000), (323, 30_000), (324, 8), (325, 9)]
    ifd = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries
    )
    data = b"II*\0" + struct.pack("<I", 8) + ifd + struct.pack("<I", 0)
    assert "a tile of the image is 30000×30000" in message(data)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "of type NoneType: expected a path"),
        (["a.png"], "of type list"),
        (5, "of type int"),
        (Image.new("RGB", (0, 0)), "0×0 pixels: expected at least one pixel"),
        (Image.new("RGB", (0, 5)), "0×5"),
        (np.zeros((0, 5), np.uint8), "5×0"),
        (io.StringIO("x"), "is open as text"),
        ("~nobody-of-that-name/a.png", "can't be read"),
        ("a\n\x1b[31mb.png", "a\\n\\x1b[31mb.png does not exist"),
        ("x" * 5000, "can't be opened"),
        (memoryview(b"abc")[::2], "is not an image"),
    ],
)
def test_what_is_not_even_bytes(source: object, said: str) -> None:
    assert said in message(source)
    assert len(message(source)) < 700


def test_closed_and_damaged_pil_images(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(encoded(make_image(64, 64), "JPEG")[:900])
    assert "damaged" in message(Image.open(tmp_path / "cut.jpg"))
    closed = make_image(4, 4)
    closed.close()
    assert "was closed" in message(closed)
    file = (tmp_path / "cut.jpg").open("rb")
    file.close()
    assert "closed file" in message(file)
    with (tmp_path / "write").open("wb") as write:
        assert "can't be read" in message(write)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    assert "PostScript" in message(Image.open(io.BytesIO(eps)))


def test_a_file_without_an_end() -> None:
    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            return len(buffer)

    assert "more than 67,108,896 bytes" in message(Endless(), max_pixels=1)


def test_libtiff_writes_nothing_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    """Nor does any other: of each format that PIL writes, damaged in many ways, in two threads."""
    rng = np.random.default_rng(0)
    image = make_image(32, 32)
    sources = [encoded(image, "TIFF", compression=c) for c in ("tiff_lzw", "jpeg", "zstd")]
    sources += [encoded(make_image(32, 32).convert("1"), "TIFF", compression="group4")]
    sources += [encoded(make_image(32, 32), name) for name in ("JPEG", "PNG", "WEBP", "JPEG2000")]

    def damage(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for data in sources * 25:
            changed = bytearray(data)
            for at in rng.integers(0, len(data), 4):
                changed[at] = rng.integers(256)
            try:
                load_image(bytes(changed))
            except ImageError:
                continue

    threads = [threading.Thread(target=damage, args=(seed,)) for seed in rng.integers(99, size=2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err == ""
