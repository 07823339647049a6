"""The samples that the gates compare models on: images, and questions about them with answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.image.preprocess import load_image
from model_export.samples import scenes

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
    """An image, and questions about it with their answers."""

    name: str
    image: Image.Image
    questions: tuple[tuple[str, str], ...] = ()


def gate_samples(vision: VisionConfig) -> list[Sample]:
    """Make the gates' samples: scenes, which have questions with answers, and last a photograph.

    A large encoder gets only the photograph, with questions. Where scenes fit, the questions are
    about them.
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
    """Load china.jpg and flower.jpg from scikit-learn's wheel, CC BY 2.0, 640×427, or nothing."""
    spec = find_spec("sklearn")
    files = [
        Path(folder) / "datasets" / "images" / name
        for folder in ((spec.submodule_search_locations or ()) if spec else ())
        for name in ("china.jpg", "flower.jpg")
    ]
    return [Sample(file.name, load_image(file)) for file in files if file.is_file()]
