"""What is loaded of a bundle, and how it looks at images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import mlx.core as mx
import numpy as np
from PIL import Image
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
)
from fastvlm_mlx.language.generate import Timings
from fastvlm_mlx.language.kept import DEFAULT_LIMIT, Kept, content_hash
from fastvlm_mlx.language.model import RunningModel
from fastvlm_mlx.language.structured.constraint import Grammars
from fastvlm_mlx.language.worker import Worker
from fastvlm_mlx.vision import VisionEncoder


@dataclass(frozen=True, repr=False)
class Looking:
    """The parts of a bundle, and its half that turns images into features.

    Attributes:
        num_tokens: N, the tokens that an image becomes.
        max_pixels: width × height of the largest image that is taken.
        kept_bytes: the most that is kept in memory of earlier questions and images.
    """

    bundle: Bundle
    config: FastVLMConfig
    num_tokens: int
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

    def __post_init__(self) -> None:
        rows = self.config.text.vocab_size
        grammars = Grammars(self.tokenizer, rows, self.eos_token_ids)
        object.__setattr__(self, "_grammars", grammars)

    def __repr__(self) -> str:
        size = self.image_processor.size
        return f"FastVLM({str(self.bundle.path)!r}, {size} px, {self.num_tokens} image tokens)"

    @property
    def encoder(self) -> VisionEncoder:
        """The vision encoder, which is loaded at its first use.

        Raises:
            EncoderError: it is incomplete, or can't be evaluated here.
        """
        return self.worker.run(lambda: self._encoder)

    # Asked for on the worker alone: nothing else keeps two threads from making it twice.
    @cached_property
    def _encoder(self) -> VisionEncoder:
        with self._loading():
            size = self.image_processor.size
            return load_bundle_encoder(self.bundle, self.compute_units, size, self.encoder_compute)

    # Of this model alone: a copy with another model begins with nothing.
    @cached_property
    def _kept(self) -> Kept:
        return Kept(self.kept_bytes)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.model, self.num_tokens, self.image_processor.size)

    @property
    def load_s(self) -> float:
        """Seconds of loading so far: those of `load`, and of the encoder once it was needed."""
        return sum(self._loading_s)

    @contextmanager
    def _loading(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._loading_s.append(time.perf_counter() - started)

    def encode(self, image: ImageSource) -> ImageFeatures:
        """Encode an image once; the features may be asked about any number of times.

        Args:
            image: whatever `fastvlm_mlx.image.preprocess.load_image` reads.

        Raises:
            ImageError: not an image, or one that is too large.
            EncoderError: the encoder is incomplete, or can't be evaluated here.
        """
        self.worker.check()
        if not isinstance(image, Image.Image):
            image = load_image(image, max_pixels=self.max_pixels)
        return self.worker.run(self._look, *self._pixels(image))

    def _pixels(self, image: ImageSource) -> tuple[np.ndarray, bytes, float]:
        """What the encoder takes, a hash of it, and the seconds that this took. On any thread."""
        started = time.perf_counter()
        # Of a PIL image that nobody has decoded, that is the time to.
        pixels = self.image_processor(load_image(image, max_pixels=self.max_pixels))
        content = content_hash(pixels) if self.kept_bytes else b""
        return pixels, content, time.perf_counter() - started

    def _look(self, pixels: np.ndarray, content: bytes, preprocess_s: float) -> ImageFeatures:
        encoder = self._encoder
        kept = self._kept.get(content)
        if kept is None:
            started = time.perf_counter()
            features = encoder(pixels)
            timings = Timings(encode_s=time.perf_counter() - started)
            encoded = self._project(features)
            timings = replace(timings, project_s=encoded.timings.project_s)
            if self.kept_bytes:
                nbytes = encoded.features.nbytes + encoded.projected.nbytes
                self._kept.put(content, copied(encoded), nbytes)
        else:
            encoded, timings = copied(kept), Timings()
        timings = replace(timings, load_s=self.load_s, preprocess_s=preprocess_s)
        return replace(encoded, timings=timings)

    def project(self, features: np.ndarray) -> ImageFeatures:
        """Project features that an encoder made elsewhere, float32 [1, N, C].

        Raises:
            OptionError: an array of another type or shape, or values that are no numbers.
        """
        shape = (1, self.num_tokens, self.config.vision.hidden_size)
        return self.worker.run(self._project, check_encoded(features, shape))

    def _project(self, features: np.ndarray) -> ImageFeatures:
        model = self._fingerprint
        started = time.perf_counter()
        projected = self.model.project(mx.array(features))
        mx.eval(projected)
        timings = Timings(project_s=time.perf_counter() - started)
        return ImageFeatures(features, projected, timings, model)

    def _check(self, features: ImageFeatures) -> None:
        shape = (self.num_tokens, self.config.text.hidden_size)
        check_features(features, self.worker.run(lambda: self._fingerprint), shape)
