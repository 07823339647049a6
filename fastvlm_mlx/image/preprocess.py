"""Any image → RGB → float32 [1, 3, S, S], with the geometry and values of the reference.

The reference is LLaVA's `expand2square` and then transformers' slow (PIL) CLIPImageProcessor:
bicubic on 8-bit pixels, rounded to 8 bits, × 1/255, normalized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct
from PIL import Image

from fastvlm_mlx.bundle.config import ImageSize
from fastvlm_mlx.bundle.schema import check
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.image.decode import DEFAULT_MAX_PIXELS, load_image
from fastvlm_mlx.image.resample import reached, resample, support
from fastvlm_mlx.image.rgb import to_rgb

__all__ = ["DEFAULT_MAX_PIXELS", "ImageProcessor", "load_image", "to_rgb"]

Share = Annotated[float, Meta(ge=0, le=1)]
Deviation = Annotated[float, Meta(gt=0, le=1e3)]
Triple = tuple[float, float, float]

_BICUBIC = Image.Resampling.BICUBIC
# Images longer than this many times their width are resized where they have pixels only.
_EXTREME = 8
_STRIP_PIXELS = 1 << 22


class _Preprocessor(Struct):
    """The keys of preprocessor_config.json that are read, and their types."""

    size: ImageSize | dict[str, ImageSize] | None = None
    crop_size: ImageSize | dict[str, ImageSize] | None = None
    do_normalize: bool = True
    image_mean: tuple[Share, Share, Share] = (0.0, 0.0, 0.0)
    image_std: tuple[Deviation, Deviation, Deviation] = (1.0, 1.0, 1.0)


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
                f"image_aspect_ratio is {self.aspect_ratio!r}, several tiles for one image: "
                "FastVLM takes one, expected pad or square"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], aspect_ratio: str | None) -> ImageProcessor:
        """Read a `preprocessor_config.json`.

        Raises:
            ConfigError: no size, or a step that is not the reference's.
        """
        given = {key: value for key, value in data.items() if value is not None}
        source = "preprocessor_config.json"
        stated = check(given, _Preprocessor, source, ConfigError, remedy="correct it")
        edges = (("size", stated.size), ("crop_size", stated.crop_size))
        sizes = {_edge(value, key) for key, value in edges if value}
        if len(sizes) != 1:
            found = ", ".join(map(str, sorted(sizes))) or "no size"
            raise ConfigError(
                f"preprocessor_config.json gives {found}: expected size.shortest_edge and "
                "crop_size to be the same number"
            )
        expected = {"resample": 3, "rescale_factor": 1 / 255, "do_resize": True, "do_rescale": True}
        for key, value in expected.items():
            if given.get(key, value) != value:
                raise ConfigError(
                    f"preprocessor_config.json says {key} {given[key]!r}: expected {value!r}"
                )
        if not stated.do_normalize:
            return cls(sizes.pop(), aspect_ratio)
        return cls(sizes.pop(), aspect_ratio, stated.image_mean, stated.image_std)

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

        Of a long and narrow image only what the crop keeps is resized: one pixel wide, it
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


def _edge(value: int | dict[str, int], key: str) -> int:
    """`size` and `crop_size` in the forms that occur: 1024, {shortest_edge}, {height, width}."""
    edges = set(value.values()) if isinstance(value, dict) else {value}
    if len(edges) == 1:
        return edges.pop()
    raise ConfigError(
        f"preprocessor_config.json says {key} {value!r}: expected one number of pixels"
    )
