"""Makes a `FastVLM` of a bundle."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.components import (
    check_bundle_compute_units,
    check_bundle_encoder_compute,
    evaluated_model,
    image_processor,
    placeholder_id,
    read_weights,
    token_id,
)
from fastvlm_mlx.fastvlm import FastVLM
from fastvlm_mlx.image.decode import DEFAULT_MAX_PIXELS, check_max_pixels
from fastvlm_mlx.language.kept import DEFAULT_LIMIT, check_limit
from fastvlm_mlx.language.worker import Worker
from fastvlm_mlx.models.names import is_elsewhere
from fastvlm_mlx.sizes import sizes_of


def load(
    path: str | Path,
    *,
    compute_units: str = "auto",
    image_size: int | None = None,
    crop: bool = False,
    check_hashes: bool = True,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    kept_bytes: int = DEFAULT_LIMIT,
    encoder_compute: str = "auto",
) -> FastVLM:
    """Load a bundle: one of ours of either layout, Apple's (`app`) or mlx-vlm's (`mlx`).

    Where there is no directory of that name, `path` may be the hub id of a bundle or the name of a
    published one, which is downloaded once into the user's cache. What makes a bundle of a
    checkpoint is `model_export.resolve`.

    The projector's and the language model's weights are read here; the encoder is made at the first
    image, or when `encoder` is first asked for. That a package is whole, declares an
    encoder and is the one that config.json describes is found here; what Core ML refuses, an
    operation that can't be evaluated, or a missing weight of an `mlx` bundle's encoder is found
    when it is made.

    Args:
        compute_units: where Core ML runs the encoder, on macOS: "auto" (what this Mac does best,
            measured once), "all", "cpu", "gpu" or "ne".
        image_size: the encoder's input in pixels, where it takes several: of a package one that it
            was exported with, in MLX any multiple of 64. Fewer pixels are fewer tokens. An image
            that is asked about in another detail than "auto" has a size of its own.
        crop: the demo app's centre crop in place of the checkpoint's own geometry.
        check_hashes: compare every file with the manifest before use.
        max_pixels: width × height of the largest image that is looked at.
        kept_bytes: the most that is kept in memory of earlier questions and images, so that what
            they have in common with the next is not computed again; 0 keeps nothing. Answers are
            the same with any number.
        encoder_compute: what torch computes an `app` bundle's encoder in, on Linux: "float32", or
            "bfloat16" where the CPU multiplies that natively: half of the time, and features with
            35 to 45 dB. "auto" is float32.

    Raises:
        BundleError, ConfigError: the bundle is incomplete, or changed since its export.
        CheckpointError: it is a checkpoint on the hub, or can't be downloaded.
        EncoderError: its package is damaged, or no encoder's.
        OptionError: compute units or a type to compute in that are unknown, or that nothing here
            has; a size that the encoder does not take; or a limit that is no number of pixels or
            bytes.
    """
    started = time.perf_counter()
    max_pixels = check_max_pixels(max_pixels)
    kept_bytes = check_limit(kept_bytes)
    bundle = Bundle.open(_here(path))
    check_bundle_compute_units(bundle, compute_units)
    check_bundle_encoder_compute(bundle, encoder_compute)
    # First, what needs no reading of weights to be missing.
    _ = bundle.encoder_files
    if check_hashes:
        bundle.check_files()
    # Meanwhile: the tokenizer's library holds the interpreter lock while it reads, MLX does not.
    worker = Worker()
    weights = worker.submit(read_weights, bundle)
    tokenizer = bundle.tokenizer()
    sizes = sizes_of(bundle, image_size)
    if image_size is not None:
        bundle = bundle.at(image_size)
    config = replace(bundle.config, image_token_index=placeholder_id(tokenizer, bundle))
    bundle = replace(bundle, config=config)
    model = worker.run(evaluated_model, bundle, weights.result())
    aspect_ratio = "crop" if crop else config.image_aspect_ratio
    return FastVLM(
        bundle=bundle,
        config=config,
        sizes=sizes,
        model=model,
        tokenizer=tokenizer,
        image_processor=image_processor(bundle, sizes.auto.pixels, aspect_ratio),
        eos_token_ids=bundle.eos_token_ids | {token_id(tokenizer, "<|im_end|>", bundle)},
        compute_units=compute_units,
        worker=worker,
        max_pixels=max_pixels,
        kept_bytes=kept_bytes,
        encoder_compute=encoder_compute,
        _loading_s=[time.perf_counter() - started],
    )


def _here(path: str | Path) -> str | Path:
    """A bundle that is here, or on the hub under that id. What is neither is told where a bundle
    is opened."""
    if is_elsewhere(path):
        # What downloads is not imported for what is here.
        from fastvlm_mlx.models.resolve import resolve

        return resolve(path)
    return path
