"""What the files of a bundle become: its language model, encoder, image processor and token ids."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
from tokenizers import Tokenizer

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.config import IMAGE_TOKEN
from fastvlm_mlx.errors import BundleError, OptionError
from fastvlm_mlx.image.preprocess import ImageProcessor
from fastvlm_mlx.language.model import RunningModel, for_this_machine, load_model
from fastvlm_mlx.vision import (
    VisionEncoder,
    check_compute_units,
    check_encoder_compute,
    load_encoder,
)


def read_weights(bundle: Bundle) -> dict[str, mx.array]:
    """Projector and language model by name, in memory: what is put off belongs to the thread that
    did it, and would read what lies at the path later.

    Raises:
        BundleError: as `Bundle.tensors`, or they can't be read.
    """
    weights = bundle.model_tensors()
    try:
        mx.eval(weights)
    except RuntimeError as error:
        # A file that is shorter by now.
        bundle.check_unchanged()
        raise BundleError(
            f"the weights of {bundle.path} can't be read ({error}): export the checkpoint again"
        ) from error
    bundle.check_unchanged()
    return weights


def evaluated_model(bundle: Bundle, weights: dict[str, mx.array] | None = None) -> RunningModel:
    """The model as this machine runs it, of what `read_weights` returned."""
    return for_this_machine(load_model(bundle, weights or read_weights(bundle)))


def image_processor(bundle: Bundle, size: int, aspect_ratio: str | None) -> ImageProcessor:
    """Size is the encoder's: the one number that can't be wrong."""
    processor = ImageProcessor.from_dict(bundle.preprocessor_config, aspect_ratio)
    return replace(processor, size=size)


def placeholder_id(tokenizer: Tokenizer, bundle: Bundle) -> int:
    """The id that stands for the image: `<image>`'s, or one that no text has.

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
    bundle: Bundle,
    compute_units: str = "auto",
    image_size: int | None = None,
    encoder_compute: str = "auto",
    like: VisionEncoder | None = None,
) -> VisionEncoder:
    """The encoder of a bundle of either layout: its package's, or FastViTHD in MLX.

    Args:
        like: the bundle's encoder of another size, whose weights are used again.

    Raises:
        OptionError: compute units for an encoder that Core ML does not run, a type for one that
            torch does not evaluate, or a size that the encoder does not take.
        EncoderError: it is incomplete, or can't be evaluated here.
    """
    check_bundle_compute_units(bundle, compute_units)
    check_bundle_encoder_compute(bundle, encoder_compute)
    # Before, or what is there now would be told to be damaged; and after, or it could be mixed.
    bundle.check_unchanged(bundle.encoder_files)
    if bundle.layout == "app":
        encoder: VisionEncoder = load_encoder(
            bundle.package, compute_units, image_size, encoder_compute, like
        )
    else:
        from fastvlm_mlx.vision.fastvithd import FastViTHD

        vision = bundle.config.vision if image_size is None else bundle.at(image_size).config.vision
        if isinstance(like, FastViTHD):
            return like.at(vision)
        encoder = FastViTHD(bundle.encoder_arrays(), vision, bundle.config.quantization)
    bundle.check_unchanged(bundle.encoder_files)
    return encoder


def check_bundle_compute_units(bundle: Bundle, compute_units: str) -> None:
    if bundle.layout == "app":
        check_compute_units(compute_units)
    elif compute_units not in ("auto", "all"):
        raise OptionError(
            f"compute units {compute_units!r} were asked for, which Core ML has: {bundle.path} is "
            "of layout mlx and runs in MLX, leave the option out"
        )


def check_bundle_encoder_compute(bundle: Bundle, encoder_compute: str) -> None:
    check_encoder_compute(encoder_compute, "MLX" if bundle.layout == "mlx" else "")


def token_id(tokenizer: Tokenizer, token: str, bundle: Bundle) -> int:
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise BundleError(
            f"{bundle.tokenizer_file} has no token {token}: expected FastVLM's tokenizer, export "
            "the checkpoint again"
        )
    return found
