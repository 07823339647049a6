"""The chart of size and loss: every name can be read, and the axes say what they measure."""

from itertools import combinations

import pytest

from model_export.comparison import plot
from model_export.comparison.compare import Row, mark_best


def rows_of(count: int) -> list[Row]:
    """Models as a sweep makes them: near each other in size, every third with a long name."""
    made = [Row("checkpoint", "checkpoint", sizes(1200), 16.0, reference=True, questions=204)]
    for number in range(count):
        name = f"choices/bits-{number}" + "-by-a-method-with-a-long-name" * (number % 3 == 0)
        kl = 10 ** (-number / 2) * (1 + number % 4)
        row = Row(name, "bundle", sizes(250 + 40 * number), 4.0, kl_nats=kl, questions=204)
        row.changed = max(0, 9 - number)
        made.append(row)
    return mark_best(made)


def sizes(megabytes: int) -> dict[str, int]:
    return {"encoder": 0, "llm": megabytes * 10**6, "total": megabytes * 10**6}


def drawn(rows):
    """The axes, the boxes of the labels and the pixels of the points."""
    figure = plot.chart(rows)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [label.get_window_extent() for label in axes.texts]
    points = [(row.bytes["total"] / 1e6, row.kl_nats) for row in rows if not row.reference]
    return axes, boxes, axes.transData.transform(points)


@pytest.mark.parametrize("count", [3, 8, 14])
def test_labels_lie_inside_the_axes_and_off_each_other(count):
    axes, boxes, points = drawn(rows_of(count))
    frame = axes.get_window_extent()
    assert len(boxes) == count
    for box in boxes:
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
        assert not any(box.contains(*point) for point in points)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_the_axes_say_what_they_measure_and_in_what():
    axes, _, _ = drawn(rows_of(3))
    assert axes.get_title() == "Size and loss against checkpoint"
    assert axes.get_xlabel().endswith("(MB)")
    assert axes.get_ylabel().endswith("(nats)")
    names = [label.get_text() for label in axes.texts]
    assert names == ["bits-0-by-a-met…th-a-long-name (9)", "bits-1 (8)", "bits-2 (7)"]


def test_models_that_lose_nothing_are_drawn_too():
    equal = rows_of(2)
    for row in equal:
        row.kl_nats = 0.0
    _, boxes, _ = drawn(equal)
    assert len(boxes) == 2
    assert not boxes[0].overlaps(boxes[1])
