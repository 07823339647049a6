"""What is loaded of a bundle, and how it looks at images: each at the size of its detail."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import mlx.core as mx
import numpy as np
import PIL.Image
from tokenizers import Tokenizer

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.config import FastVLMConfig
from fastvlm_mlx.components import load_bundle_encoder
from fastvlm_mlx.image.decode import DEFAULT_MAX_PIXELS, ImageSource, load_image
from fastvlm_mlx.image.preprocess import ImageProcessor
from fastvlm_mlx.language.features import (
    ImageFeatures,
    check_encoded,
    check_features,
    copied,
    fingerprint,
    joined,
)
from fastvlm_mlx.language.generate import Timings
from fastvlm_mlx.language.kept import DEFAULT_LIMIT, Kept, content_hash
from fastvlm_mlx.language.model import RunningModel
from fastvlm_mlx.language.prompt.messages import AUTO, Image
from fastvlm_mlx.language.structured.constraint import Grammars
from fastvlm_mlx.language.worker import Worker
from fastvlm_mlx.sizes import Size, Sizes
from fastvlm_mlx.vision import VisionEncoder


@dataclass(frozen=True)
class Pixels:
    """An image that is ready for the encoder.

    Attributes:
        inputs: float32 [1, 3, S, S], or [5, 3, S, S] with tiles.
        contents: a hash of each input.
        preprocess_s: seconds that this took.
    """

    inputs: np.ndarray
    contents: tuple[bytes, ...]
    size: Size
    preprocess_s: float


@dataclass(frozen=True, repr=False)
class Looking:
    """The parts of a bundle, and its half that turns images into features.

    Attributes:
        sizes: those that an image may be looked at in.
        image_processor: of the size of the detail "auto".
        max_pixels: width × height of the largest image that is taken.
        kept_bytes: the most that is kept in memory of earlier questions and images.
    """

    bundle: Bundle
    config: FastVLMConfig
    sizes: Sizes
    model: RunningModel
    tokenizer: Tokenizer
    image_processor: ImageProcessor
    eos_token_ids: frozenset[int]
    compute_units: str
    worker: Worker = field(default_factory=Worker, repr=False)
    max_pixels: int = DEFAULT_MAX_PIXELS
    kept_bytes: int = DEFAULT_LIMIT
    encoder_compute: str = "auto"
    _loading_s: list[float] = field(default_factory=list, repr=False)
    _grammars: Grammars = field(init=False, repr=False, compare=False)
    # By the pixels of their inputs' sides.
    _encoders: dict[int, VisionEncoder] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        rows = self.config.text.vocab_size
        grammars = Grammars(self.tokenizer, rows, self.eos_token_ids)
        object.__setattr__(self, "_grammars", grammars)

    def __repr__(self) -> str:
        size = self.image_processor.size
        return f"FastVLM({str(self.bundle.path)!r}, {size} px, {self.num_tokens} image tokens)"

    @property
    def num_tokens(self) -> int:
        """The tokens that an image of the detail "auto" becomes."""
        return self.sizes.auto.num_tokens

    @property
    def encoder(self) -> VisionEncoder:
        """The vision encoder for images of the detail "auto"; as `encoder_for`."""
        return self.encoder_for(AUTO)

    def encoder_for(self, detail: str) -> VisionEncoder:
        """The vision encoder for images of a detail, which is loaded at its first use.

        Raises:
            OptionError: no detail.
            EncoderError: it is incomplete, or can't be evaluated here.
        """
        return self.worker.run(self._encoder, self.sizes.of(detail).pixels)

    # Asked for on the worker alone: nothing else keeps two threads from making it twice.
    def _encoder(self, pixels: int) -> VisionEncoder:
        if pixels not in self._encoders:
            like = next(iter(self._encoders.values()), None)
            with self._loading():
                self._encoders[pixels] = load_bundle_encoder(
                    self.bundle, self.compute_units, pixels, self.encoder_compute, like
                )
        return self._encoders[pixels]

    # Of this model alone: a copy with another model begins with nothing.
    @cached_property
    def _kept(self) -> Kept:
        return Kept(self.kept_bytes)

    @cached_property
    def _fingerprints(self) -> dict[Size, str]:
        """Of the features that suit this model, by their size."""
        own = fingerprint(self.model)
        return {size: f"{own} {size.count}×{size.pixels}" for size in self.sizes}

    @property
    def load_s(self) -> float:
        """Seconds of loading so far: those of `load`, and of the encoder once it was needed."""
        return sum(self._loading_s)

    @contextmanager
    def _loading(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._loading_s.append(time.perf_counter() - started)

    def encode(self, image: ImageSource, detail: str = AUTO) -> ImageFeatures:
        """Encode an image once; the features may be asked about any number of times.

        Args:
            image: whatever `fastvlm_mlx.image.preprocess.load_image` reads.
            detail: "auto", the size that was loaded; "low" or "high", the bundle's smallest or
                largest; or "original", an overview and 2×2 tiles, five times the tokens.

        Raises:
            ImageError: not an image, or one that is too large.
            OptionError: no detail.
            EncoderError: the encoder is incomplete, or can't be evaluated here.
        """
        self.worker.check()
        size = self.sizes.of(detail)
        if not isinstance(image, PIL.Image.Image):
            image = load_image(image, max_pixels=self.max_pixels)
        return self.worker.run(self._look, self._pixels(image, size))

    def _pixels(self, image: ImageSource, size: Size) -> Pixels:
        """What the encoder takes. On any thread."""
        started = time.perf_counter()
        # Of a PIL image that nobody has decoded, that is the time to.
        decoded = load_image(image, max_pixels=self.max_pixels)
        inputs = size.inputs(self.image_processor, decoded)
        contents = tuple(content_hash(each) if self.kept_bytes else b"" for each in inputs)
        return Pixels(inputs, contents, size, time.perf_counter() - started)

    def _look(self, pixels: Pixels) -> ImageFeatures:
        size = pixels.size
        encoder = self._encoder(size.pixels)
        each = [
            self._look_at(encoder, pixels.inputs[i : i + 1], content, replace(size, tiled=False))
            for i, content in enumerate(pixels.contents)
        ]
        features = joined(each) if size.tiled else each[0]
        timings = replace(features.timings, load_s=self.load_s, preprocess_s=pixels.preprocess_s)
        return replace(features, timings=timings, model=self._fingerprints[size])

    def _look_at(
        self, encoder: VisionEncoder, pixels: np.ndarray, content: bytes, size: Size
    ) -> ImageFeatures:
        """The features of one input, which are kept by its content, its size included."""
        kept = self._kept.get(content)
        if kept is not None:
            return replace(copied(kept), timings=Timings())
        started = time.perf_counter()
        features = encoder(pixels)
        encode_s = time.perf_counter() - started
        encoded = self._project(features, size)
        encoded = replace(encoded, timings=replace(encoded.timings, encode_s=encode_s))
        if self.kept_bytes:
            nbytes = encoded.features.nbytes + encoded.projected.nbytes
            self._kept.put(content, copied(encoded), nbytes)
        return encoded

    def project(self, features: np.ndarray, detail: str = AUTO) -> ImageFeatures:
        """Project features that an encoder made elsewhere, float32 [1, N, C].

        Args:
            detail: of the image; of "original" features are [5, N, C], as `Size.inputs` orders
                them.

        Raises:
            OptionError: an array of another type or shape, values that are no numbers, or no
                detail.
        """
        size = self.sizes.of(detail)
        shape = (size.count, size.input_tokens, self.config.vision.hidden_size)
        return self.worker.run(self._project, check_encoded(features, shape), size)

    def _project(self, features: np.ndarray, size: Size) -> ImageFeatures:
        model = self._fingerprints[size]
        started = time.perf_counter()
        # One by one, as an image without tiles is.
        each = [self.model.project(mx.array(one[None])) for one in features]
        projected = mx.concatenate(each) if size.tiled else each[0]
        mx.eval(projected)
        timings = Timings(project_s=time.perf_counter() - started)
        return ImageFeatures(features, projected, timings, model)

    def _check(self, features: ImageFeatures) -> None:
        width = self.config.text.hidden_size
        fingerprints = self.worker.run(lambda: self._fingerprints)
        check_features(
            features, {name: (size.num_tokens, width) for size, name in fingerprints.items()}
        )

    def _num_tokens(self, image: Image) -> int:
        """Of an image in a message. Raises OptionError: no detail."""
        size = self.sizes.of(image.detail)
        features = image.image
        return features.num_tokens if isinstance(features, ImageFeatures) else size.num_tokens
