"""Calibration data: images and questions that quantization is measured and calibrated on.

They are the user's own (a directory of images, or JSON lines of image, prompt and answer), or else
generated: scenes for a small encoder; a photograph, scenes and documents for a large one. None of
them is among the gates' samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.bundle.files import MB, inside, left_behind, read_bytes
from fastvlm_mlx.errors import ImageError, OptionError
from fastvlm_mlx.image.preprocess import load_image
from model_export.samples import documents, scenes
from model_export.samples.images import GATE_PIXELS, Sample, photographs

T = TypeVar("T")

MAX_LINES_BYTES = 100 * MB

# Asked about an image that comes without questions. The beginning of an answer is given: what is
# looked at is the next token's distribution after each of its tokens, not whether it is right.
OPENINGS = (
    ("Describe the image.", "The image shows a"),
    ("What is the main subject of this picture?", "The main subject of this picture is a"),
    ("What colours stand out?", "The colours that stand out are"),
    ("Is there any text in the image? If so, what does it say?", "The text in the image"),
)
FLOWER_QUESTIONS = (
    ("Describe the image.", "A pink and yellow dahlia in full bloom in front of dark leaves."),
    ("What kind of flower is this?", "This is a dahlia."),
    ("What colour is the background?", "The background is dark green."),
)
# Seeds from here on: the gates' scenes are the first.
FIRST_SEED = 1_000
SCENES = 48
# For a large encoder; a quarter of them is enough for a paired test.
SAMPLES = 24
# One of so many is a scene, the others are the kinds of documents in turn; where every fourth is
# kept back, so is every kind.
SCENE_EVERY = 5
# About each of these scenes; the search reckons with about as many for each image.
SCENE_QUESTIONS = 5
# Of a larger collection, as many are read, evenly over it.
MAX_IMAGES = 32
# What the encoder looks at: so many images at 1024×1024, or the same pixels in smaller ones.
IMAGES = 16
HELD_OUT_IMAGES = 8
# One image in so many is kept back, and more of a few.
HELD_OUT_EVERY = 4
# Longer than any message needs; the rest is counted.
LISTED = 5

EXPECTED = "expected a directory of images, or a JSONL file of image, prompt and answer"


@dataclass(frozen=True)
class Calibration:
    """Images with questions and answers.

    Attributes:
        skipped: what could not be read, one sentence each.
        digest: SHA-256 of all that is in it.
    """

    samples: tuple[Sample, ...]
    skipped: tuple[str, ...]

    @property
    def digest(self) -> str:
        return digest(self.samples)

    def spread(self, count: int) -> tuple[Sample, ...]:
        """Take at most `count` of the images, evenly over all of them."""
        return tuple(_spread(self.samples, count))

    def notes(self) -> list[str]:
        """Say what was skipped, in one line; return nothing if nothing was."""
        if not self.skipped:
            return []
        more = f" and {len(self.skipped) - LISTED} more" if len(self.skipped) > LISTED else ""
        listed = "; ".join(self.skipped[:LISTED])
        return [f"calibration: {len(self.skipped)} skipped ({listed}{more})"]


def digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of pixels, questions and answers."""
    hashed = hashlib.sha256()
    for sample in samples:
        hashed.update(repr((sample.image.size, sample.questions)).encode())
        hashed.update(sample.image.tobytes())
    return hashed.hexdigest()


def record(samples: Sequence[Sample]) -> dict[str, Any]:
    """Describe samples for the manifest: their count, names and hash."""
    names = [sample.name for sample in samples]
    return {"count": len(names), "names": names, "sha256": digest(samples)}


def split(
    calibration: Calibration, image_size: int, least: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Split samples into a calibration set and a held-out set.

    An image that is there twice is used once.

    Args:
        least: the held-out set has so many images, or half of all if these are fewer.
    """

    def some(samples: Sequence[Sample], at_1024: int, least: int = 1) -> tuple[Sample, ...]:
        count = max(least, at_1024 * GATE_PIXELS // image_size**2)
        return Calibration(tuple(samples), ()).spread(count)

    samples = list({digest([replace(p, questions=())]): p for p in calibration.samples}.values())
    count = len(samples)
    held_out_count = max(count // HELD_OUT_EVERY, min(least, count // 2))
    places = {(i + 1) * count // held_out_count - 1 for i in range(held_out_count)}
    calibration_set = [sample for i, sample in enumerate(samples) if i not in places]
    held_out_set = [samples[i] for i in sorted(places)]
    return some(calibration_set, IMAGES), some(held_out_set, HELD_OUT_IMAGES, least)


def check_path(option: str, path: str | Path) -> Path:
    """Look at what an option names, without reading it.

    Raises:
        OptionError: there is nothing at `path`, or a single image.
    """
    try:
        file = Path(path).expanduser()
        exists = file.exists()
    # A NUL in it, a home that nobody has, or a name that is too long.
    except (OSError, ValueError, RuntimeError):
        exists = False
    if not exists:
        raise OptionError(f"{option} {path} does not exist: {EXPECTED}")
    Image.init()
    if file.suffix.lower() in Image.EXTENSION and file.is_file():
        raise OptionError(f"{option} {path} is an image: {EXPECTED}")
    return file


def load_calibration(
    path: str | Path | None, vision: VisionConfig, option: str = "--calibration"
) -> Calibration:
    """Read the user's calibration data, or make what there is without any.

    Args:
        path: a directory of images, below it too, or a JSONL file whose lines have `image`
            (relative to the file), `prompt` and `answer`.
        option: what errors call the path.

    Raises:
        OptionError: there is nothing at `path`, or nothing in it that can be used.
    """
    if path is None:
        return Calibration(tuple(_own(vision)), ())
    path = check_path(option, path)
    if path.is_dir():
        samples, skipped = _directory(path, 2 * vision.image_size)
    else:
        samples, skipped = _lines(path, 2 * vision.image_size, option)
    calibration = Calibration(tuple(samples), tuple(skipped))
    if not samples:
        raise OptionError(
            f"{option} {path} holds no image that can be used"
            + "".join(f" ({note})" for note in calibration.notes())
            + ": expected images, or JSON lines of image, prompt and answer"
        )
    return calibration


def _own(vision: VisionConfig) -> list[Sample]:
    size = vision.image_size
    if size**2 <= GATE_PIXELS // 2:
        return [_scene(seed, size) for seed in range(FIRST_SEED, FIRST_SEED + SCENES)]
    photos = [p for p in photographs() if p.name == "flower.jpg"]
    samples = [replace(photo, questions=FLOWER_QUESTIONS) for photo in photos]
    return samples + [_generated(number, size) for number in range(SAMPLES - len(samples))]


def _generated(number: int, size: int) -> Sample:
    turn, kind = divmod(number, SCENE_EVERY)
    if not kind:
        scene = _scene(FIRST_SEED + turn, size)
        return replace(scene, questions=scene.questions[:SCENE_QUESTIONS])
    seed = FIRST_SEED + turn * (SCENE_EVERY - 1) + kind - 1
    document = documents.generate(seed)
    return Sample(f"document {seed}", document.draw(size), document.questions())


def _scene(seed: int, size: int) -> Sample:
    scene = scenes.generate(seed, held_out=False)
    questions = tuple((q.prompt, q.answer) for q in scene.questions(seed))
    return Sample(f"scene {seed}", scene.draw(size), questions)


def _directory(directory: Path, size: int) -> tuple[list[Sample], list[str]]:
    Image.init()
    files = [f for f in directory.rglob("*") if f.suffix.lower() in Image.EXTENSION and f.is_file()]
    names = (file.relative_to(directory) for file in sorted(files))
    asked = {n.as_posix(): OPENINGS for n in names if not any(map(left_behind, n.parts))}
    return _read(directory, asked, size)


def _lines(file: Path, size: int, option: str) -> tuple[list[Sample], list[str]]:
    """Lines about the same image make one image with several questions."""
    questions: dict[str, list[tuple[str, str]]] = {}
    skipped = []
    for number, line in enumerate(_text(file, option).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            skipped.append(f"line {number} is not JSON")
            continue
        fields = ("image", "prompt", "answer")
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(key), str) and entry[key].strip() for key in fields
        ):
            skipped.append(f"line {number} has not image, prompt and answer as text")
            continue
        questions.setdefault(entry["image"], []).append((entry["prompt"], entry["answer"]))
    asked = {name: tuple(pairs) for name, pairs in questions.items()}
    samples, unreadable = _read(file.parent, asked, size)
    return samples, skipped + unreadable


def _read(
    directory: Path, asked: Mapping[str, tuple[tuple[str, str], ...]], size: int
) -> tuple[list[Sample], list[str]]:
    """Images by name, none larger than `size` pixels a side: the encoder reads no more."""
    samples, skipped = [], []
    for name in _spread(list(asked), MAX_IMAGES):
        try:
            image = load_image(inside(None, directory / name, ImageError))
        except ImageError as error:
            skipped.append(str(error))
            continue
        image.thumbnail((size, size))
        samples.append(Sample(name, image, asked[name]))
    return samples, skipped


def _spread(items: Sequence[T], count: int) -> list[T]:
    taken = min(count, len(items))
    return [items[i * len(items) // taken] for i in range(taken)]


def _text(file: Path, option: str) -> str:
    try:
        return read_bytes(None, file, OptionError, MAX_LINES_BYTES).decode()
    except (OptionError, UnicodeDecodeError) as error:
        raise OptionError(f"{option} {file} can't be read as text ({error}): {EXPECTED}") from error
