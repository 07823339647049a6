"""Documents: what is answered is what the image shows, measured on its pixels."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from model_export.samples import documents
from model_export.samples.documents import SMALL, TEXT, TITLE, Bars, Line, Page, Table, generate
from model_export.samples.sheet import INK, UNITS, Sheet, font

SIZE = 512
SEEDS = range(1_000, 1_008)


def of(kind):
    return [found for found in map(generate, SEEDS) if isinstance(found, kind)]


def places(image, words, height, paper, ink=INK):
    """Where `words` are drawn: the centres of the boxes around them that are equal pixel by pixel,
    as (x, y)."""
    letters = font(SIZE, height)
    left, top, right, bottom = letters.getbbox(words)
    wanted = Image.new("RGB", (right - left, bottom - top), paper)
    ImageDraw.Draw(wanted).text((-left, -top), words, ink, letters)
    whole, part = (np.asarray(image).astype(np.int32) for image in (image, wanted))
    whole, part = (a[..., 0] * 65_536 + a[..., 1] * 256 + a[..., 2] for a in (whole, part))
    rows, columns = (a.ravel() for a in np.mgrid[: SIZE - len(part), : SIZE - part.shape[1]])
    # Ink first, which is rare.
    order = np.argsort(part.ravel() == part[0, 0], kind="stable")
    for y, x in zip(*np.unravel_index(order, part.shape), strict=True):
        same = whole[rows + y, columns + x] == part[y, x]
        rows, columns = rows[same], columns[same]
    height, width = part.shape
    return [(x + width // 2, y + height // 2) for x, y in zip(columns, rows, strict=True)]


def place(*arguments):
    (found,) = places(*arguments)
    return found


def painted(image, colour):
    return (np.asarray(image) == colour).all(2)


def test_the_same_seed_is_the_same_image_in_any_process():
    code = (
        "import hashlib; from model_export.samples import documents as d;"
        "print(hashlib.sha256("
        "b''.join(d.generate(s).draw(96).tobytes() + repr(d.generate(s).questions()).encode() "
        "for s in range(8))).hexdigest())"
    )
    found = hashlib.sha256()
    for seed in range(8):
        found.update(generate(seed).draw(96).tobytes())
        found.update(repr(generate(seed).questions()).encode())
    for salt in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == found.hexdigest()


def test_the_kinds_come_in_turn_and_no_two_are_alike():
    made = [generate(seed) for seed in range(64)]
    assert [type(document) for document in made] == [Page, Table, Bars, Line] * 16
    assert len({hashlib.sha256(d.draw(64).tobytes()).digest() for d in made}) == 64


@pytest.mark.parametrize("size", [64, 300, 1024, 1536])
def test_any_size_has_it_all_within_its_margins(size):
    for seed in range(20 if size == 300 else 4):
        document = generate(seed)
        image = document.draw(size)
        assert image.size == (size, size)
        inner = np.asarray(image).copy()
        edge = size // 40
        inner[edge:-edge, edge:-edge] = document.paper
        assert painted(inner, document.paper).all()


def test_a_page_says_what_is_answered():
    """Each answer is a whole line, or stands in a paragraph whose lines are all drawn, in order."""
    for page in of(Page):
        image, answers = page.draw(SIZE), dict(page.questions())
        ys = [place(image, answers["What is the heading of this page?"], TITLE, page.paper)[1]]
        drawn = Sheet(SIZE, page.paper)
        for paragraph in page.paragraphs:
            lines = list(drawn.wrapped(paragraph, TEXT, UNITS - 2 * documents.MARGIN))
            assert " ".join(lines) == paragraph
            ys += [place(image, line, TEXT, page.paper)[1] for line in lines]
        ys.append(place(image, answers["Who signed the notice?"][:-1], TEXT, page.paper)[1])
        assert ys == sorted(ys)
        day = answers[f"On which day is the {page.place} closed?"].removeprefix("On ")[:-1]
        assert f"closed on {day} while" in page.paragraphs[0]
        price = answers["How much does a ticket cost?"]
        assert page.paragraphs[-1].endswith(f"a ticket costs {price}")
        summary = answers["What does the page say?"]
        assert summary.replace("is closed", "will be closed") in page.paragraphs[0]


def test_a_table_s_answers_are_in_its_rows():
    for table in of(Table):
        image, answers = table.draw(SIZE), dict(table.questions())
        place(image, answers.pop("What is the title of the table?"), TITLE, table.paper)
        found = {}
        for name, price, stock in table.rows:
            x, y = place(image, name, TEXT, table.paper)
            cells = [
                [at for at in places(image, str(n), TEXT, table.paper) if abs(at[1] - y) < 12]
                for n in (price, stock)
            ]
            assert all(cells)
            assert x < min(at[0] for at in cells[0]) < max(at[0] for at in cells[1])
            found[name] = (price, stock)
        assert len(answers) == 4
        dearest = max(found, key=lambda name: found[name][0])
        fewest = min(found, key=lambda name: found[name][1])
        assert answers["Which item has the highest price?"] == f"The {dearest}."
        assert answers["Of which item is the stock lowest?"] == f"Of the {fewest}."
        (asked,) = (q for q in answers if q.startswith("What is the price of the"))
        assert answers[asked] == f"{found[asked.split()[-1][:-1]][0]}."
        assert f"of {len(found)} items" in answers["Describe the image."]


def test_the_tallest_bar_is_the_answer():
    for chart in of(Bars):
        image, answers = chart.draw(SIZE), dict(chart.questions())
        place(image, answers["What is the title of the chart?"], TITLE, chart.paper)
        columns = painted(image, chart.accent).sum(0)
        edges = np.flatnonzero(np.diff(columns > 0, prepend=False, append=False))
        heights = {}
        for start, stop in edges.reshape(-1, 2):
            (name,) = (
                name
                for name, _ in chart.values
                if start < place(image, name, SMALL, chart.paper)[0] < stop
            )
            heights[name] = columns[start]
        assert len(heights) == len(chart.values)
        tallest, shortest = (pick(heights, key=heights.get) for pick in (max, min))
        assert answers["Which city has the tallest bar?"] == f"{tallest}."
        assert answers["Which city has the shortest bar?"] == f"{shortest}."
        assert f"{len(heights)} cities, {tallest} the highest" in answers["Describe the image."]
        # Bars stand on zero: heights are to each other as values are.
        values = dict(chart.values)
        scale = values[tallest] / heights[tallest]
        assert all(abs(heights[name] * scale - values[name]) < 0.5 for name in values)
        (asked,) = (q for q in answers if q.startswith("What is the value of"))
        name = asked.split()[-1][:-1]
        written = places(image, answers[asked][:-1], SMALL, chart.paper)
        assert abs(place(image, name, SMALL, chart.paper)[0] - written[0][0]) <= 1


def test_the_highest_point_is_the_answer():
    for chart in of(Line):
        image, answers = chart.draw(SIZE), dict(chart.questions())
        ys, xs = np.nonzero(painted(image, chart.accent))
        labels = {n: place(image, n, SMALL, chart.paper)[0] for n, _ in chart.values}

        def month(x, labels=labels):
            short = min(labels, key=lambda name: abs(labels[name] - x))
            return next(m for m in documents.MONTHS if m.startswith(short))

        highest, lowest = (month(xs[ys == edge].mean()) for edge in (ys.min(), ys.max()))
        assert answers["In which month is the line highest?"] == f"In {highest}."
        assert answers["In which month is the line lowest?"] == f"In {lowest}."
        ends = [ys[xs == edge].mean() for edge in (xs.min(), xs.max())]
        course = "higher" if ends[1] < ends[0] else "lower"
        assert f"ends {course} in" in answers["Describe the image."]
        (asked,) = (q for q in answers if q.startswith("What is the value of"))
        written = places(image, answers[asked][:-1], SMALL, chart.paper)
        assert month(written[0][0]) == asked.split()[-1][:-1]
