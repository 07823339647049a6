"""Draw the scenes that the demo checkpoint understands, and ask and judge questions about them.

A scene has coloured shapes and perhaps a number on a grid of 4×4 cells. At 256×256 a cell is 64
pixels, just what one token of FastViTHD covers. Each quadrant holds one thing at most: a shape,
which fills a cell, or a two-digit number, which fills the two cells of a row. In a scene no shape
and no colour occurs twice, and there is one number at most, so that each question has one answer.

    >>> scene = generate(7)
    >>> image = scene.draw(256)
    >>> question = scene.questions(seed=7)[0]
    >>> is_right(question, question.answer)
    True
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw

GRID = 4
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (222, 40, 44),
    "green": (38, 158, 66),
    "blue": (42, 84, 220),
    "yellow": (244, 206, 32),
    "purple": (138, 58, 176),
    "orange": (246, 130, 24),
}
BACKGROUNDS = ((255, 255, 255), (228, 228, 228), (250, 240, 216), (214, 230, 246))
INK = (24, 24, 28)
PLACES = ("top left", "top right", "bottom left", "bottom right")
# The widths that a shape may have, halved, in cells.
RADII = (0.38, 0.42, 0.46)
KINDS = ("describe", "count", "colour", "where", "read")

PHRASINGS = {
    "describe": (
        "Describe the image.",
        "Describe the picture.",
        "What is in the image?",
        "What do you see?",
    ),
    "count": (
        "How many shapes are there?",
        "How many shapes are in the image?",
        "How many shapes do you see?",
        "Count the shapes.",
    ),
    "colour": (
        "What colour is the {}?",
        "What color is the {}?",
        "Which colour is the {}?",
        "Which color is the {}?",
    ),
    "where": (
        "Where is the {}?",
        "Where is the {} in the image?",
        "Where do you see the {}?",
    ),
    "read": (
        "What number is written?",
        "What is the number?",
        "Which number do you see?",
        "Read the number.",
    ),
}

_COUNTS = ("Zero", "One", "Two", "Three", "Four")
# One scene in this many is held out; its content decides which.
_HELD_OUT_EVERY = 16
# Scenes are drawn larger by this factor and reduced, so that edges are smooth.
_OVERSAMPLING = 8
# Segments of a digit: x0, y0, x1, y1 in a box of 1×2.
_SEGMENTS = {
    "a": (0, 0, 1, 0),
    "b": (1, 0, 1, 1),
    "c": (1, 1, 1, 2),
    "d": (0, 2, 1, 2),
    "e": (0, 1, 0, 2),
    "f": (0, 0, 0, 1),
    "g": (0, 1, 1, 1),
}
_DIGITS = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")


@dataclass(frozen=True)
class Shape:
    """A shape in one cell. `radius` is half its width, in cells."""

    shape: str
    colour: str
    row: int
    column: int
    radius: float = RADII[1]


@dataclass(frozen=True)
class Number:
    """Two digits (10 to 99) in the cells (row, column) and (row, column + 1)."""

    value: int
    row: int
    column: int


@dataclass(frozen=True)
class Question:
    """A question about one scene: its kind (one of KINDS), its words, and the right answer."""

    kind: str
    prompt: str
    answer: str


def quadrant(thing: Shape | Number) -> int:
    """Return the index into PLACES of the quadrant that a thing lies in."""
    return 2 * (2 * thing.row // GRID) + 2 * thing.column // GRID


def place(thing: Shape | Number) -> str:
    return PLACES[quadrant(thing)]


@dataclass(frozen=True)
class Scene:
    """Shapes in reading order of their quadrants, a number or none, and a background (RGB)."""

    shapes: tuple[Shape, ...]
    number: Number | None
    background: tuple[int, int, int] = BACKGROUNDS[0]

    def draw(self, size: int = 256) -> Image.Image:
        """Draw an RGB image of `size`×`size` pixels, anti-aliased, the same bytes at every call.

        Raises:
            ValueError: `size` is not a positive multiple of GRID.
        """
        if size <= 0 or size % GRID:
            raise ValueError(f"size is {size}: expected a positive multiple of {GRID}")
        side = size // GRID
        image = Image.new("RGB", (size, size), self.background)
        for item in self.shapes:
            tile = _shape_tile(item.shape, item.colour, item.radius, self.background, side)
            image.paste(tile, (item.column * side, item.row * side))
        if self.number is not None:
            for offset, digit in enumerate(divmod(self.number.value, 10)):
                tile = _digit_tile(digit, self.background, side)
                image.paste(tile, ((self.number.column + offset) * side, self.number.row * side))
        return image

    def describe(self) -> str:
        items = [
            f"{_article(s.colour)} {s.colour} {s.shape} at the {place(s)}" for s in self.shapes
        ]
        listed = ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else items[0]
        text = listed[0].upper() + listed[1:] + "."
        if self.number is not None:
            text += f" The number {self.number.value} is at the {place(self.number)}."
        return text

    def questions(self, seed: int = 0) -> list[Question]:
        """Ask every question that this scene has an answer to; `seed` chooses the wording."""
        rng = random.Random(seed)

        def ask(kind: str, answer: str, about: str = "") -> Question:
            return Question(kind, rng.choice(PHRASINGS[kind]).format(about), answer)

        questions = [
            ask("describe", self.describe()),
            ask("count", f"{_COUNTS[len(self.shapes)]}."),
        ]
        for item in self.shapes:
            questions.append(ask("colour", f"{item.colour.capitalize()}.", item.shape))
            questions.append(ask("where", f"At the {place(item)}.", item.shape))
        if self.number is not None:
            questions.append(ask("where", f"At the {place(self.number)}.", "number"))
            questions.append(ask("read", f"{self.number.value}."))
        return questions

    @property
    def held_out(self) -> bool:
        """Whether this scene is kept from training, which its content decides and not its seed."""
        layout = [(s.shape, s.colour, s.row, s.column) for s in self.shapes]
        number = self.number and (self.number.value, self.number.row, self.number.column)
        digest = hashlib.sha256(repr((layout, number)).encode()).digest()
        return digest[0] % _HELD_OUT_EVERY == 0


def generate(seed: int, *, held_out: bool | None = None) -> Scene:
    """Make the scene of a seed, the same on every machine: one to four things, a shape among them.

    Args:
        held_out: True takes the scene from those that are kept from training, False from the
            others, and None from all.
    """
    rng = random.Random(seed)
    while True:
        scene = _random_scene(rng)
        if held_out is None or scene.held_out == held_out:
            return scene


def held_out(count: int, kinds: Iterable[str] = KINDS) -> list[tuple[Scene, Question]]:
    """Choose `count` questions about scenes that training never shows, with the kinds in turn. They
    are always the same."""
    kinds = tuple(kinds)
    pairs: list[tuple[Scene, Question]] = []
    seed = 0
    while len(pairs) < count:
        scene = generate(seed, held_out=True)
        kind = kinds[len(pairs) % len(kinds)]
        fitting = [q for q in scene.questions(seed) if q.kind == kind]
        if fitting:
            pairs.append((scene, random.Random(seed).choice(fitting)))
        seed += 1
    return pairs


def is_right(question: Question, text: str) -> bool:
    """Whether `text` has the words of the right answer in their order; case and punctuation do not
    count."""
    return _words(text) == _words(question.answer)


@dataclass(frozen=True)
class Score:
    """How many of the questions that were asked were answered right."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked


def score(pairs: Iterable[tuple[Scene, Question]], answers: Iterable[str]) -> dict[str, Score]:
    """Count the right answers of each kind of question, and of all under "all".

    Args:
        answers: in the order of the questions.

    Raises:
        ValueError: more pairs than answers, or fewer.
    """
    counts: dict[str, list[int]] = {}
    for (_, question), answer in zip(pairs, answers, strict=True):
        right = is_right(question, answer)
        for key in (question.kind, "all"):
            entry = counts.setdefault(key, [0, 0])
            entry[0] += right
            entry[1] += 1
    return {key: Score(*entry) for key, entry in counts.items()}


def evaluate(
    answer: Callable[[Image.Image, str], str],
    pairs: Iterable[tuple[Scene, Question]],
    *,
    size: int = 256,
) -> dict[str, Score]:
    """Draw each scene at `size` pixels, let `answer(image, prompt)` answer, and count what is
    right."""
    pairs = list(pairs)
    return score(pairs, [answer(scene.draw(size), question.prompt) for scene, question in pairs])


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _random_scene(rng: random.Random) -> Scene:
    things = rng.randint(1, 4)
    quadrants = rng.sample(range(4), things)
    number = None
    if things > 1 and rng.random() < 0.65:
        index = quadrants.pop()
        row = GRID // 2 * (index // 2) + rng.randrange(GRID // 2)
        number = Number(rng.randint(10, 99), row, GRID // 2 * (index % 2))
    shapes = rng.sample(SHAPES, len(quadrants))
    colours = rng.sample(tuple(COLOURS), len(quadrants))
    items = [
        Shape(
            shape,
            colour,
            GRID // 2 * (index // 2) + rng.randrange(GRID // 2),
            GRID // 2 * (index % 2) + rng.randrange(GRID // 2),
            rng.choice(RADII),
        )
        for index, shape, colour in zip(sorted(quadrants), shapes, colours, strict=True)
    ]
    return Scene(tuple(items), number, rng.choice(BACKGROUNDS))


def _outline(shape: str, radius: float) -> list[tuple[float, float]]:
    """List the corners of a shape around (0, 0), in cells; y points down."""
    if shape == "square":
        r = 0.88 * radius
        return [(-r, -r), (r, -r), (r, r), (-r, r)]
    if shape == "triangle":
        return [(0, -radius), (radius, 0.85 * radius), (-radius, 0.85 * radius)]
    if shape == "star":
        points = []
        for i in range(10):
            r = radius * (1.06 if i % 2 == 0 else 0.45)
            points.append((r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)))
        return points
    a, b = radius, radius / 3
    return [
        *((-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b)),
        *((b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)),
    ]


@lru_cache(maxsize=4096)
def _shape_tile(
    shape: str, colour: str, radius: float, background: tuple[int, int, int], side: int
) -> Image.Image:
    big = side * _OVERSAMPLING
    tile = Image.new("RGB", (big, big), background)
    draw = ImageDraw.Draw(tile)
    if shape == "circle":
        low, high = (0.5 - radius) * big, (0.5 + radius) * big
        draw.ellipse((low, low, high, high), COLOURS[colour])
    else:
        corners = [((0.5 + x) * big, (0.5 + y) * big) for x, y in _outline(shape, radius)]
        draw.polygon(corners, COLOURS[colour])
    return tile.reduce(_OVERSAMPLING)


@lru_cache(maxsize=1024)
def _digit_tile(digit: int, background: tuple[int, int, int], side: int) -> Image.Image:
    big = side * _OVERSAMPLING
    tile = Image.new("RGB", (big, big), background)
    draw = ImageDraw.Draw(tile)
    unit, pen = 0.36 * big, 0.06 * big
    left, top = 0.5 * (big - unit), 0.5 * big - unit
    for name in _DIGITS[digit]:
        x0, y0, x1, y1 = _SEGMENTS[name]
        draw.rectangle(
            (
                left + x0 * unit - pen,
                top + y0 * unit - pen,
                left + x1 * unit + pen,
                top + y1 * unit + pen,
            ),
            INK,
        )
    return tile.reduce(_OVERSAMPLING)
