"""The sizes that a loaded bundle looks at images in, and the detail by which an image chooses one.

A size is what decides the cost of an image: the side of the encoder's input in pixels, the tokens
that come out, and whether tiles follow the image as a whole. A detail is the name by which OpenAI's
API, the command line and Python ask for a size:

    auto        the size that `load` was told, or the bundle's own
    low         the bundle's smallest size
    high        its largest one
    original    an overview of the size `auto`, and 2×2 tiles of that size

A bundle of one size has it as auto, low and high.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.errors import BundleError, OptionError, printable
from fastvlm_mlx.image.preprocess import ImageProcessor
from fastvlm_mlx.language.prompt.messages import AUTO, DETAILS, HIGH, LOW, ORIGINAL
from fastvlm_mlx.vision.interface import encoder_shape
from fastvlm_mlx.vision.package import PackageInfo, describe_spec, read_spec

# Along a side.
_TILES = 2


@dataclass(frozen=True)
class Size:
    """How an image is looked at.

    Attributes:
        pixels: S, along a side of the encoder's input.
        input_tokens: N, what one input becomes.
        tiled: whether the tiles of the image at twice the size follow the image as a whole.
    """

    pixels: int
    input_tokens: int
    tiled: bool = False

    @property
    def count(self) -> int:
        """The encoder's inputs for one image."""
        return 1 + _TILES**2 if self.tiled else 1

    @property
    def num_tokens(self) -> int:
        """The tokens that one image becomes."""
        return self.count * self.input_tokens

    def inputs(self, processor: ImageProcessor, image: Image.Image) -> np.ndarray:
        """The encoder's inputs for an image, float32 [1, 3, S, S], or [5, 3, S, S] with tiles.

        The order is that of LLaVA's AnyRes (`process_anyres_image` of llava/mm_utils.py): first the
        overview, then the tiles row by row. The overview is the very input of an image without
        tiles, which is what FastVLM was trained with, where LLaVA squeezes an image that is not
        square. The tiles are cut from the image in the same geometry at twice the size.
        """
        overview = replace(processor, size=self.pixels)(image)
        if not self.tiled:
            return overview
        side = self.pixels
        whole = replace(processor, size=_TILES * side)(image)
        cut = whole.reshape(1, 3, _TILES, side, _TILES, side).transpose(0, 2, 4, 1, 3, 5)
        return np.concatenate([overview, cut.reshape(-1, 3, side, side)])


@dataclass(frozen=True)
class Sizes:
    """The sizes of a loaded bundle."""

    auto: Size
    low: Size
    high: Size

    def of(self, detail: Any) -> Size:
        """Raises OptionError: no detail."""
        sizes = {
            AUTO: self.auto,
            LOW: self.low,
            HIGH: self.high,
            ORIGINAL: replace(self.auto, tiled=True),
        }
        return sizes[check_detail(detail)]

    def __iter__(self) -> Iterator[Size]:
        return map(self.of, DETAILS)


def check_detail(detail: Any) -> str:
    """Raises OptionError: it is none."""
    if not isinstance(detail, str) or detail not in DETAILS:
        found = repr(detail[:40]) if isinstance(detail, str) else f"of type {type(detail).__name__}"
        raise OptionError(
            f"the detail of an image is {printable(found, 60)}: expected one of "
            f"{', '.join(DETAILS)}"
        )
    return detail


def sizes_of(bundle: Bundle, image_size: int | None) -> Sizes:
    """The sizes of a bundle's encoder, as its package declares them, or config.json and the
    manifest.

    Args:
        image_size: S of `auto`, in pixels; the bundle's own unless given.

    Raises:
        EncoderError: the package is damaged, or no encoder's.
        BundleError: it is not the encoder that config.json describes.
        OptionError, ConfigError: it does not take `image_size`.
    """
    return (
        _of_package(bundle, image_size) if bundle.layout == "app" else _of_mlx(bundle, image_size)
    )


def _of_package(bundle: Bundle, image_size: int | None) -> Sizes:
    package = bundle.package
    spec = read_spec(package)
    info = describe_spec(spec, package, image_size)
    sides = [side for side in info.functions.values() if side]
    auto = _declared(bundle, info)
    known = {auto.pixels: auto}
    for side in (min(sides), max(sides)):
        if side not in known:
            known[side] = _declared(bundle, describe_spec(spec, package, side))
    return Sizes(auto, known[min(sides)], known[max(sides)])


def _declared(bundle: Bundle, info: PackageInfo) -> Size:
    side, num_tokens, channels = encoder_shape(info)
    if channels != bundle.config.vision.hidden_size:
        raise BundleError(
            f"{bundle.package} makes {channels} channels where config.json says "
            f"{bundle.config.vision.hidden_size}: they belong to different models, export again"
        )
    return Size(side, num_tokens)


def _of_mlx(bundle: Bundle, image_size: int | None) -> Sizes:
    """Such an encoder takes any multiple of 64: its sizes are those that it was exported for, and
    the one that was asked for."""
    own = bundle.config.vision.image_size
    exported = (bundle.manifest or {}).get("encoder", {}).get("image_sizes", [])
    auto = own if image_size is None else image_size
    low, high = min(own, auto, *exported), max(own, auto, *exported)
    visions = [bundle.at(side).config.vision for side in (auto, low, high)]
    return Sizes(*(Size(vision.image_size, vision.num_tokens) for vision in visions))
