"""What the gates look at: images, questions about them, and what the source makes of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.image.preprocess import ImageProcessor, load_image
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.samples import scenes

if TYPE_CHECKING:
    import torch

# A photograph, and as many scenes as together have the pixels of one image at 1024×1024.
GATE_PIXELS = 2**20
MAX_SCENES = 8
PHOTOGRAPH_QUESTIONS = (
    ("Describe the image.", "A pavilion with three tiers of orange roofs above a lake."),
    ("What colour is the roof?", "The roof is orange."),
    ("How many people are there?", "There are no people in the image."),
)


@dataclass(frozen=True)
class Sample:
    """An image the gates look at, and questions about it with their answers."""

    name: str
    image: Image.Image
    questions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Reference:
    """What the source makes of an image: pixels [1, 3, S, S] in, features [1, N, C] out."""

    sample: Sample
    pixels: np.ndarray
    features: np.ndarray


def gate_samples(vision: VisionConfig) -> list[Sample]:
    """Scenes, which have questions with answers, and last a photograph.

    A large encoder sees the photograph alone, and is asked about it; where scenes fit, the
    questions are about them.
    """
    size = vision.image_size
    photograph = [p for p in photographs() if p.name == "china.jpg"]
    count = min(MAX_SCENES, GATE_PIXELS // size**2 - len(photograph))
    if count < 1 and photograph:
        return [replace(photograph[0], questions=PHOTOGRAPH_QUESTIONS)]
    samples = []
    for seed in range(max(1, count)):
        scene = scenes.generate(seed, held_out=True)
        questions = tuple((q.prompt, q.answer) for q in scene.questions(seed))
        samples.append(Sample(f"scene {seed}", scene.draw(size), questions))
    return samples + photograph


def photographs() -> list[Sample]:
    """china.jpg and flower.jpg from scikit-learn's wheel, CC BY 2.0, 640×427; none without it."""
    spec = find_spec("sklearn")
    files = [
        Path(folder) / "datasets" / "images" / name
        for folder in ((spec.submodule_search_locations or ()) if spec else ())
        for name in ("china.jpg", "flower.jpg")
    ]
    return [Sample(file.name, load_image(file)) for file in files if file.is_file()]


def reference_features(
    state: dict[str, torch.Tensor],
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    image_size: int | None = None,
) -> list[Reference]:
    """The unfolded module of the source weights on every image, in float32.

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
    """`reference_features` one at a time: the pixels of many images are hundreds of megabytes."""
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
            images = torch.from_numpy(pixels).to(memory_format=torch.channels_last)
            features = module(images).contiguous().numpy()
        yield Reference(sample, pixels, features)


def references_of_sizes(
    state: dict[str, torch.Tensor], checkpoint: Checkpoint, other_sizes: Sequence[int] = ()
) -> dict[int, list[Reference]]:
    """`reference_features` of the gates' images at each size, the checkpoint's own first."""
    vision = checkpoint.config.vision
    return {
        size: reference_features(
            state, checkpoint, gate_samples(replace(vision, image_size=size)), size
        )
        for size in (vision.image_size, *other_sizes)
    }
