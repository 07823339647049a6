"""The runtime's face: a bundle, loaded, that looks at pictures and answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.config import IMAGE_TOKEN, FastVLMConfig
from fastvlm_mlx.errors import BundleError, OptionError
from fastvlm_mlx.generate import (
    Generation,
    GenerationResult,
    SamplingOptions,
    Timings,
    check_room,
    generate,
)
from fastvlm_mlx.image import ImageProcessor, load_image
from fastvlm_mlx.model import Model, load_model
from fastvlm_mlx.prompt import encode_prompt
from fastvlm_mlx.vision import VisionEncoder, check_compute_units, load_encoder
from fastvlm_mlx.vision.mlprogram import encoder_shape
from fastvlm_mlx.vision.package import describe

Picture = Image.Image | str | Path | bytes


@dataclass(frozen=True)
class ImageFeatures:
    """A picture as the language model reads it, reusable for any number of prompts.

    Attributes:
        features: the encoder's output, float32 [1, N, C].
        projected: the projector's, [N, D] in the model's dtype.
        timings: what preprocessing, encoding and projecting took.
    """

    features: np.ndarray
    projected: mx.array
    timings: Timings


@dataclass(frozen=True)
class FastVLM:
    """A loaded bundle. Made by `fastvlm_mlx.load`.

    Attributes:
        num_tokens: N, tokens of a picture.
    """

    bundle: Bundle
    config: FastVLMConfig
    num_tokens: int
    model: Model
    tokenizer: Tokenizer
    image_processor: ImageProcessor
    eos_token_ids: frozenset[int]
    compute_units: str
    _loading_s: list[float] = field(default_factory=list, repr=False)

    @cached_property
    def encoder(self) -> VisionEncoder:
        """Made when it is first asked for, by the first picture if by nobody before.

        Raises:
            EncoderError: it is incomplete, or can't be evaluated here.
        """
        with self._loading():
            return load_bundle_encoder(self.bundle, self.compute_units, self.image_processor.size)

    @property
    def load_s(self) -> float:
        """Seconds of loading so far: `load`, and what it put off until it was needed."""
        return sum(self._loading_s)

    @contextmanager
    def _loading(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._loading_s.append(time.perf_counter() - started)

    def encode(self, image: Picture) -> ImageFeatures:
        """Look at a picture once; ask about the result as often as wanted.

        Raises:
            ImageError: not a picture, or one that is too large.
            EncoderError: the encoder is incomplete, or can't be evaluated here.
        """
        if not isinstance(image, Image.Image):
            image = load_image(image)
        encoder = self.encoder
        clock = [time.perf_counter()]
        pixels = self.image_processor(image)
        clock.append(time.perf_counter())
        features = encoder(pixels)
        clock.append(time.perf_counter())
        projected = self.model.project(mx.array(features))
        mx.eval(projected)
        clock.append(time.perf_counter())
        preprocess_s, encode_s, project_s = (b - a for a, b in pairwise(clock))
        timings = Timings(
            load_s=self.load_s, preprocess_s=preprocess_s, encode_s=encode_s, project_s=project_s
        )
        return ImageFeatures(features, projected, timings)

    def stream(
        self,
        image: Picture | ImageFeatures | None,
        prompt: str,
        options: SamplingOptions | None = None,
        **sampling: Any,
    ) -> Generation:
        """Answer piece by piece: iterate over the generation, then read its `result`.

        Args:
            image: a picture, the features of one, or None for a question about nothing seen.
            options: how to sample; or its fields as keywords (`max_tokens=64`).

        Raises:
            ImageError, PromptError, OptionError: before anything is computed, or on iteration.
        """
        options = replace(options or SamplingOptions(), **sampling)
        check_room(self.config.text, self._encode_prompt(prompt, image is not None))
        if image is None:
            return self._stream(None, prompt, options, Timings())
        if isinstance(image, ImageFeatures):
            return self._stream(image, prompt, options, Timings())
        features = self.encode(image)
        return self._stream(features, prompt, options, features.timings)

    def generate(
        self,
        image: Picture | ImageFeatures | None,
        prompt: str,
        options: SamplingOptions | None = None,
        **sampling: Any,
    ) -> GenerationResult:
        """Answer in one piece. Arguments and errors as `stream`."""
        return self.stream(image, prompt, options, **sampling).result

    def ask(
        self, image: Picture, prompts: list[str], options: SamplingOptions
    ) -> Iterator[Generation]:
        """One picture, several prompts: encoded once, its time charged to the first answer."""
        for prompt in prompts:
            check_room(self.config.text, self._encode_prompt(prompt, True))
        features = self.encode(image)
        spent = features.timings
        for prompt in prompts:
            yield self._stream(features, prompt, options, spent)
            spent = Timings()

    def _stream(
        self,
        features: ImageFeatures | None,
        prompt: str,
        options: SamplingOptions,
        spent: Timings,
    ) -> Generation:
        def pieces() -> Iterator[str | GenerationResult]:
            with self._loading():
                import_module("mlx_lm.generate")
            started = time.perf_counter()
            yield from generate(
                self.model,
                self.tokenizer,
                prompt=prompt,
                ids=self._encode_prompt(prompt, features is not None),
                projected=None if features is None else features.projected,
                options=options,
                eos_token_ids=self.eos_token_ids,
                spent=replace(spent, load_s=self.load_s),
                started=started,
            )

        return Generation(pieces())

    def _encode_prompt(self, prompt: str, with_image: bool) -> list[int]:
        return encode_prompt(
            self.tokenizer,
            prompt,
            image_token_id=self.config.image_token_index,
            num_image_tokens=self.num_tokens if with_image else 0,
        )


def load(
    path: str | Path,
    *,
    compute_units: str = "auto",
    image_size: int | None = None,
    crop: bool = False,
    check_hashes: bool = True,
) -> FastVLM:
    """Load a bundle: one of ours of either layout, Apple's (`app`) or mlx-vlm's (`mlx`).

    Nothing is computed: weights are read when they are first used, and the encoder is made at the
    first picture, or when `encoder` is first asked for. That a package is whole, declares an
    encoder and is the one that config.json describes is found here; what Core ML refuses, an
    operation that can't be evaluated, or a missing weight of an `mlx` bundle's encoder is found
    when it is made.

    Args:
        compute_units: where Core ML runs the encoder, on macOS: "auto" (what this Mac does best,
            measured once), "all", "cpu", "gpu" or "ne".
        image_size: the encoder's input in pixels, where it takes several: of a package one that it
            was exported with, in MLX any multiple of 64. Fewer pixels are fewer tokens.
        crop: the demo app's centre crop in place of the checkpoint's own geometry.
        check_hashes: compare every file with the manifest before use.

    Raises:
        BundleError, ConfigError: the bundle is incomplete, or changed since its export.
        EncoderError: its package is damaged, or no encoder's.
        OptionError: compute units that are unknown, or that nothing here has; or a size that the
            encoder does not take.
    """
    started = time.perf_counter()
    bundle = Bundle.open(path)
    _check_compute_units(bundle, compute_units)
    # First, what needs no reading of weights to be missing.
    _ = bundle.package if bundle.layout == "app" else bundle.weight_files
    if check_hashes:
        bundle.check_files()
    tokenizer = bundle.tokenizer()
    size, num_tokens = _encoder_sizes(bundle, image_size)
    if image_size is not None:
        bundle = bundle.at(image_size)
    config = replace(bundle.config, image_token_index=placeholder_id(tokenizer, bundle))
    bundle = replace(bundle, config=config)
    model = load_model(bundle)
    aspect_ratio = "crop" if crop else config.image_aspect_ratio
    return FastVLM(
        bundle=bundle,
        config=config,
        num_tokens=num_tokens,
        model=model,
        tokenizer=tokenizer,
        image_processor=image_processor(bundle, size, aspect_ratio),
        eos_token_ids=bundle.eos_token_ids | {_id(tokenizer, "<|im_end|>", bundle)},
        compute_units=compute_units,
        _loading_s=[time.perf_counter() - started],
    )


def image_processor(bundle: Bundle, size: int, aspect_ratio: str | None) -> ImageProcessor:
    """Size is the encoder's: the one number that can't be wrong."""
    processor = ImageProcessor.from_dict(bundle.preprocessor_config, aspect_ratio)
    return replace(processor, size=size)


def placeholder_id(tokenizer: Tokenizer, bundle: Bundle) -> int:
    """The id that stands for the picture: `<image>`'s, or one that no text has.

    Raises:
        BundleError: there is neither, in a bundle of layout `mlx` that is not ours.
    """
    rows = bundle.config.text.vocab_size
    found: int | None = tokenizer.token_to_id(IMAGE_TOKEN)
    if found is None:
        found = max(tokenizer.get_vocab().values()) + 1
    if found >= rows:
        raise BundleError(
            f"{bundle.tokenizer_file} leaves none of the embedding's {rows:,} rows for "
            f"{IMAGE_TOKEN}: export the checkpoint with `fastvlm export --layout mlx`"
        )
    return found


def load_bundle_encoder(
    bundle: Bundle, compute_units: str = "auto", image_size: int | None = None
) -> VisionEncoder:
    """The encoder of a bundle of either layout: its package's, or FastViTHD in MLX.

    Raises:
        OptionError: compute units for an encoder that Core ML does not run, or a size that the
            encoder does not take.
        EncoderError: it is incomplete, or can't be evaluated here.
    """
    _check_compute_units(bundle, compute_units)
    if bundle.layout == "app":
        return load_encoder(bundle.package, compute_units, image_size)
    from fastvlm_mlx.vision.fastvithd import FastViTHD

    vision = bundle.config.vision if image_size is None else bundle.at(image_size).config.vision
    return FastViTHD(bundle.encoder_arrays(), vision, bundle.config.quantization)


def _encoder_sizes(bundle: Bundle, image_size: int | None) -> tuple[int, int]:
    """S and N of the bundle's encoder, as its package declares them, or config.json.

    Raises:
        EncoderError: the package is damaged, or no encoder's.
        BundleError: it is not the encoder that config.json describes.
        OptionError, ConfigError: it does not take `image_size`.
    """
    vision = bundle.config.vision
    if bundle.layout == "mlx":
        if image_size is not None:
            vision = bundle.at(image_size).config.vision
        return vision.image_size, vision.num_tokens
    size, num_tokens, channels = encoder_shape(describe(bundle.package, image_size))
    if channels != vision.hidden_size:
        raise BundleError(
            f"{bundle.package} makes {channels} channels where config.json says "
            f"{vision.hidden_size}: they belong to different models, export again"
        )
    return size, num_tokens


def _check_compute_units(bundle: Bundle, compute_units: str) -> None:
    if bundle.layout == "app":
        check_compute_units(compute_units)
    elif compute_units not in ("auto", "all"):
        raise OptionError(
            f"compute units {compute_units!r} were asked for, which Core ML has: {bundle.path} is "
            "of layout mlx and runs in MLX, leave the option out"
        )


def _id(tokenizer: Tokenizer, token: str, bundle: Bundle) -> int:
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise BundleError(
            f"{bundle.tokenizer_file} has no token {token}: expected FastVLM's tokenizer, export "
            "the checkpoint again"
        )
    return found
