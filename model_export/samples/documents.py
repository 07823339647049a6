"""Documents: a page of text, a table, a bar chart or a line chart, and questions about each.

What one says is decided by a seed, and every answer can be read off the image. Text is drawn in
the font that Pillow brings, one size for the same pixels everywhere, so that nothing is shipped and
the same seed gives the same image.

    >>> document = generate(2)
    >>> image = document.draw(1024)
    >>> document.questions()[0]
    ('What is the title of the chart?', 'Litres of milk')
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from model_export.samples.sheet import INK, UNITS, Sheet

# What is asked of a document, and the answers; what describes it last.
Questions = tuple[tuple[str, str], ...]
Named = tuple[tuple[str, int], ...]

PAPERS = ((255, 255, 255), (250, 246, 236), (240, 244, 248))
PALE = (196, 198, 204)
ACCENTS = ((196, 58, 48), (40, 98, 176), (40, 130, 84), (128, 74, 160), (206, 122, 24))

# In units of a sheet's side.
MARGIN = 80
TITLE, TEXT, SMALL = 56, 38, 30

PLACES = ("library", "museum", "post office", "swimming pool", "town hall", "railway station")
WORKS = (
    "the roof is repaired",
    "new lamps are installed",
    "the floor is renewed",
    "the doors are painted",
)
MORE = (
    "The entrance on the north side stays open for deliveries.",
    "Parking in the yard is not possible on that day.",
    "Lost property is kept at the desk for four weeks.",
    "Dogs are welcome in the garden if they are on a lead.",
    "The lift is out of order until further notice.",
    "Please bring a form of identification with you.",
)
NAMES = ("Anna Keller", "Tom Baker", "Maria Rossi", "Paul Dubois", "Ida Holm", "James Wood")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
GOODS = ("kettle", "lamp", "chair", "mirror", "clock", "basket", "ladder", "carpet", "bucket")
CITIES = ("Oslo", "Rome", "Lyon", "Bern", "Cork", "Graz", "Porto", "Turin", "Leeds")
MEASURES = (
    "Days of rain",
    "Litres of milk",
    "Visitors in thousands",
    "Trees planted",
    "Books sold",
)


class Document(Protocol):
    def draw(self, size: int) -> Image.Image:
        """RGB image of `size`×`size` pixels, the same at every call."""

    def questions(self) -> Questions: ...


@dataclass(frozen=True)
class Page:
    """A notice: a heading, paragraphs and who signed it."""

    place: str
    date: str
    hour: str
    price: int
    work: str
    signed: str
    more: tuple[str, ...]
    paper: tuple[int, int, int]

    @property
    def heading(self) -> str:
        return f"The {self.place} is closed"

    @property
    def paragraphs(self) -> tuple[str, ...]:
        return (
            f"The {self.place} will be closed on {self.date} while {self.work}. It opens again on "
            f"the next day at {self.hour}.",
            " ".join(self.more),
            f"From then on a ticket costs {self.price} euros.",
        )

    def draw(self, size: int) -> Image.Image:
        sheet = Sheet(size, self.paper)
        sheet.text((MARGIN, MARGIN), self.heading, TITLE)
        y = MARGIN + 2 * TITLE
        for paragraph in self.paragraphs:
            for line in sheet.wrapped(paragraph, TEXT, UNITS - 2 * MARGIN):
                sheet.text((MARGIN, y), line, TEXT)
                y += TEXT * 3 // 2
            y += TEXT
        sheet.text((MARGIN, y), self.signed, TEXT)
        return sheet.image

    def questions(self) -> Questions:
        return (
            ("What is the heading of this page?", self.heading),
            (f"On which day is the {self.place} closed?", f"On {self.date}."),
            ("Who signed the notice?", f"{self.signed}."),
            ("How much does a ticket cost?", f"{self.price} euros."),
            (
                "What does the page say?",
                f"The {self.place} is closed on {self.date} while {self.work}.",
            ),
        )


@dataclass(frozen=True)
class Table:
    """Goods with their prices and how many there are; no figure of a column occurs twice."""

    title: str
    rows: tuple[tuple[str, int, int], ...]
    accent: tuple[int, int, int]
    paper: tuple[int, int, int]

    COLUMNS = ("Item", "Price", "Stock")
    # Where a column begins.
    STARTS = (MARGIN + 20, 480, 720)
    TOP, STEP = 220, 84

    def draw(self, size: int) -> Image.Image:
        sheet = Sheet(size, self.paper)
        sheet.text((MARGIN, MARGIN), self.title, TITLE)
        sheet.box((MARGIN, self.TOP, UNITS - MARGIN, self.TOP + self.STEP), self.accent)
        for x, name in zip(self.STARTS, self.COLUMNS, strict=True):
            sheet.text((x, self.TOP + 22), name, TEXT, self.paper)
        for number, row in enumerate(self.rows, 1):
            y = self.TOP + number * self.STEP
            for x, cell in zip(self.STARTS, row, strict=True):
                sheet.text((x, y + 22), str(cell), TEXT)
            sheet.line([(MARGIN, y + self.STEP), (UNITS - MARGIN, y + self.STEP)], PALE, 3)
        return sheet.image

    def questions(self) -> Questions:
        dearest = max(self.rows, key=lambda row: row[1])
        fewest = min(self.rows, key=lambda row: row[2])
        name, price, _ = self.rows[len(self.rows) // 2]
        return (
            ("What is the title of the table?", self.title),
            (f"What is the price of the {name}?", f"{price}."),
            ("Which item has the highest price?", f"The {dearest[0]}."),
            ("Of which item is the stock lowest?", f"Of the {fewest[0]}."),
            (
                "Describe the image.",
                f"A table of {len(self.rows)} items with their price and stock.",
            ),
        )


@dataclass(frozen=True)
class _Chart:
    """Values by name, none of them twice, each written beside its bar or point."""

    title: str
    values: Named
    accent: tuple[int, int, int]
    paper: tuple[int, int, int]

    # The line that values stand on, and units for one of them.
    FLOOR, RISE = 860, 6

    def middle(self, index: int) -> int:
        """In units from the left."""
        width = UNITS - 2 * MARGIN
        return MARGIN + (2 * index + 1) * width // (2 * len(self.values))

    def height(self, value: int) -> int:
        """In units from the top."""
        return self.FLOOR - self.RISE * value

    @property
    def highest(self) -> str:
        return max(self.values, key=lambda pair: pair[1])[0]

    @property
    def lowest(self) -> str:
        return min(self.values, key=lambda pair: pair[1])[0]

    def _frame(self, size: int) -> Sheet:
        sheet = Sheet(size, self.paper)
        sheet.text((MARGIN, MARGIN), self.title, TITLE)
        sheet.line([(MARGIN, self.FLOOR), (UNITS - MARGIN, self.FLOOR)], INK, 4)
        for index, (name, _) in enumerate(self.values):
            x = self.middle(index)
            sheet.text((x, self.FLOOR + 20), name, SMALL, middle=True)
        return sheet

    def _label(self, sheet: Sheet, index: int, above: bool = True) -> None:
        """The value beside its point, over a line that may run through it."""
        x, value = self.middle(index), self.values[index][1]
        y = self.height(value) - 54 if above else self.height(value) + 18
        half = sheet.width(str(value), SMALL) // 2 + 6
        sheet.box((x - half, y, x + half, y + SMALL + 4), self.paper)
        sheet.text((x, y), str(value), SMALL, middle=True)


@dataclass(frozen=True)
class Bars(_Chart):
    """A bar for each city."""

    def draw(self, size: int) -> Image.Image:
        sheet = self._frame(size)
        half = (UNITS - 2 * MARGIN) // (3 * len(self.values))
        for index, (_, value) in enumerate(self.values):
            x = self.middle(index)
            sheet.box((x - half, self.height(value), x + half, self.FLOOR), self.accent)
            self._label(sheet, index)
        return sheet.image

    def questions(self) -> Questions:
        name, value = self.values[len(self.values) // 2]
        return (
            ("What is the title of the chart?", self.title),
            ("Which city has the tallest bar?", f"{self.highest}."),
            ("Which city has the shortest bar?", f"{self.lowest}."),
            (f"What is the value of {name}?", f"{value}."),
            (
                "Describe the image.",
                f"A bar chart of {len(self.values)} cities, {self.highest} the highest.",
            ),
        )


@dataclass(frozen=True)
class Line(_Chart):
    """A point for each month, joined to its neighbours."""

    def draw(self, size: int) -> Image.Image:
        sheet = self._frame(size)
        points = [(self.middle(i), self.height(value)) for i, (_, value) in enumerate(self.values)]
        sheet.line(points, self.accent, 6)
        for index, point in enumerate(points):
            around = points[max(0, index - 1) : index + 2]
            # In a valley the line comes from above on both sides.
            self._label(sheet, index, above=max(y for _, y in around) > point[1])
            sheet.dot(point, 12, self.accent)
        return sheet.image

    def questions(self) -> Questions:
        name, value = self.values[len(self.values) // 2]
        (first, start), (last, end) = self.values[0], self.values[-1]
        course = "higher" if end > start else "lower"
        return (
            ("What is the title of the chart?", self.title),
            ("In which month is the line highest?", f"In {_month(self.highest)}."),
            ("In which month is the line lowest?", f"In {_month(self.lowest)}."),
            (f"What is the value of {_month(name)}?", f"{value}."),
            (
                "Describe the image.",
                f"A line chart that ends {course} in {_month(last)} than it began in "
                f"{_month(first)}.",
            ),
        )


def generate(seed: int) -> Document:
    """The document of this seed, the kinds in turn: page, table, bars, line."""
    return _KINDS[seed % len(_KINDS)](random.Random(seed))


def _page(rng: random.Random) -> Document:
    return Page(
        place=rng.choice(PLACES),
        date=f"{rng.choice(DAYS)}, {rng.randint(1, 28)} {rng.choice(MONTHS)}",
        hour=f"{rng.randint(7, 11)}:{rng.choice(('15', '30', '45'))}",
        price=rng.randint(3, 29),
        work=rng.choice(WORKS),
        signed=rng.choice(NAMES),
        more=tuple(rng.sample(MORE, 3)),
        paper=rng.choice(PAPERS),
    )


def _table(rng: random.Random) -> Document:
    count = rng.randint(4, 7)
    columns = (rng.sample(GOODS, count), *(rng.sample(range(10, 100), count) for _ in range(2)))
    return Table(
        title=f"Stock in {rng.choice(MONTHS)}",
        rows=tuple(zip(*columns, strict=True)),
        accent=rng.choice(ACCENTS),
        paper=rng.choice(PAPERS),
    )


def _values(rng: random.Random, names: list[str]) -> Named:
    # Far enough from each other for the eye.
    heights = rng.sample(range(10, 100, 4), len(names))
    return tuple(
        (name, value + rng.randrange(3)) for name, value in zip(names, heights, strict=True)
    )


def _bars(rng: random.Random) -> Document:
    values = _values(rng, rng.sample(CITIES, rng.randint(4, 6)))
    return Bars(rng.choice(MEASURES), values, rng.choice(ACCENTS), rng.choice(PAPERS))


def _line(rng: random.Random) -> Document:
    count = rng.randint(5, 8)
    first = rng.randint(0, len(MONTHS) - count)
    names = [month[:3] for month in MONTHS[first : first + count]]
    values = _values(rng, names)
    return Line(rng.choice(MEASURES), values, rng.choice(ACCENTS), rng.choice(PAPERS))


_KINDS: tuple[Callable[[random.Random], Document], ...] = (_page, _table, _bars, _line)


def _month(short: str) -> str:
    """A month's whole name."""
    return next(month for month in MONTHS if month.startswith(short))
