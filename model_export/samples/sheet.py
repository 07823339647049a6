"""A square sheet to draw text and shapes on, in units that do not depend on its pixels."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image, ImageDraw, ImageFont

INK = (28, 28, 34)
# Of a side; every position and size below is in these.
UNITS = 1_000


class Sheet:
    """A square to draw on, in units."""

    def __init__(self, size: int, paper: tuple[int, int, int]):
        self.image = Image.new("RGB", (size, size), paper)
        self._draw = ImageDraw.Draw(self.image)
        self._size = size

    def _pixels(self, units: float) -> int:
        return round(units * self._size / UNITS)

    def _at(self, point: tuple[int, int]) -> tuple[int, int]:
        return self._pixels(point[0]), self._pixels(point[1])

    def font(self, height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        return font(self._size, height)

    def text(
        self,
        at: tuple[int, int],
        words: str,
        height: int,
        colour: tuple[int, int, int] = INK,
        middle: bool = False,
    ) -> None:
        """`at`: the upper left corner; or the upper edge's middle."""
        x, y = self._at(at)
        if middle:
            x -= round(self.font(height).getlength(words) / 2)
        self._draw.text((x, y), words, colour, self.font(height))

    def width(self, words: str, height: int) -> int:
        """In units."""
        return round(self.font(height).getlength(words) * UNITS / self._size)

    def wrapped(self, words: str, height: int, width: int) -> Iterator[str]:
        """Lines that are not wider than `width`."""
        line = ""
        for word in words.split():
            longer = f"{line} {word}".strip()
            if line and self.font(height).getlength(longer) > self._pixels(width):
                yield line
                longer = word
            line = longer
        yield line

    def box(self, corners: tuple[int, int, int, int], colour: tuple[int, int, int]) -> None:
        x0, y0, x1, y1 = map(self._pixels, corners)
        # The lower right corner is the last pixel of it.
        self._draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), colour)

    def line(self, points: list[tuple[int, int]], colour: tuple[int, int, int], width: int) -> None:
        pixels = max(1, self._pixels(width))
        self._draw.line([self._at(point) for point in points], colour, pixels)

    def dot(self, at: tuple[int, int], radius: int, colour: tuple[int, int, int]) -> None:
        (x, y), r = self._at(at), self._pixels(radius)
        self._draw.ellipse((x - r, y - r, x + r, y + r), colour)


def font(size: int, height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Of a document of `size` pixels, for letters of `height` units."""
    return ImageFont.load_default(max(1, round(height * size / UNITS)))
