"""References: what the source checkpoint's encoder computes from each sample.

Every comparison is against these features, which the unfolded module (`reference`) computes from
the source weights in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fastvlm_mlx.image.preprocess import ImageProcessor
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.samples import images
from model_export.samples.images import Sample

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Reference:
    """A sample, its pixels [1, 3, S, S], and the features [1, N, C] that the source computes."""

    sample: Sample
    pixels: np.ndarray
    features: np.ndarray


def reference_features(
    state: dict[str, torch.Tensor],
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    image_size: int | None = None,
) -> list[Reference]:
    """Run the unfolded module of the source weights on every image, in float32.

    Args:
        state: FastViTHD's state dict, from `Checkpoint.encoder_state`.
        image_size: in pixels, in place of the checkpoint's own.
    """
    return list(each_reference(state, checkpoint, samples, image_size))


def each_reference(
    state: dict[str, torch.Tensor],
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    image_size: int | None = None,
) -> Iterator[Reference]:
    """Yield what `reference_features` returns one at a time.

    The pixels of many images take hundreds of megabytes.
    """
    import torch

    from model_export.encoder.reference import FastViTHD

    config = checkpoint.config
    with torch.device("meta"):
        module = FastViTHD(config.vision)
    module.load_state_dict(state, strict=True, assign=True)
    module.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    process = ImageProcessor(image_size or config.vision.image_size, config.image_aspect_ratio)
    for sample in samples:
        pixels = process(sample.image)
        with torch.inference_mode():
            pixel_values = torch.from_numpy(pixels).to(memory_format=torch.channels_last)
            features = module(pixel_values).contiguous().numpy()
        yield Reference(sample, pixels, features)


def references_of_sizes(
    state: dict[str, torch.Tensor], checkpoint: Checkpoint, other_sizes: Sequence[int] = ()
) -> dict[int, list[Reference]]:
    """Run `reference_features` on the gates' samples at each size, the checkpoint's own first."""
    vision = checkpoint.config.vision
    return {
        size: reference_features(
            state, checkpoint, images.gate_samples(replace(vision, image_size=size)), size
        )
        for size in (vision.image_size, *other_sizes)
    }
