"""Draws size against loss: each model is a point, and a line joins the best of their size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastvlm_mlx.plotting import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from model_export.comparison.compare import Row

# A logarithmic axis has no zero; what is nearer than float32 tells is drawn there.
LEAST_KL = 1e-9
# Between a point's centre and its label, in points of the page: the first place that is free is
# taken. A label that is farther away than the last of the near ones gets a line to its point.
_NEAR = (7, 12)
_FAR = (20, 30, 42, 56, 72, 90, 110, 132)
_DIRECTIONS = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))
# What keeps free of each other: a point's radius, and the space around a label.
_RADIUS = 4.5
_GAP = 2.0

_Point = tuple[float, float]


def chart(rows: Sequence[Row]) -> Figure:
    """Draw every model but the reference as a point with its name."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if not row.reference]
    points = [(row.bytes["total"] / 1e6, max(row.kl_nats, LEAST_KL)) for row in shown]
    figure = Figure(figsize=(8, 5) if len(rows) <= 10 else (9, 6.5), layout="constrained")
    axes = figure.add_subplot()
    best = sorted(point for row, point in zip(shown, points, strict=True) if row.best)
    rest = [point for row, point in zip(shown, points, strict=True) if not row.best]
    for chosen, style, colour, legend in (
        (best, "o-", "tab:blue", "no other is both smaller and nearer"),
        (rest, "o", "0.55", "another is both smaller and nearer"),
    ):
        if chosen:
            axes.plot(*zip(*chosen, strict=True), style, color=colour, label=legend, linewidth=1)
    reference = next((Path(row.name).name for row in rows if row.reference), "the reference")
    questions = max((row.questions for row in shown), default=0)
    axes.set_title(f"Size and loss against {shortened(reference)}", parse_math=False)
    axes.set(
        yscale="log",
        xlabel="encoder and language model (MB)",
        ylabel="mean KL divergence of the next token (nats)",
    )
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
    axes.margins(0.12)
    if any(row.changed for row in shown):
        axes.plot([], [], " ", label=f"(n): answers that changed, of {questions}")
    # Outside of the axes, where it hides no point.
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    _label(figure, axes, [_text(row) for row in shown], points, best)
    return figure


def _text(row: Row) -> str:
    changed = f" ({row.changed})" if row.changed else ""
    return shortened(Path(row.name).name) + changed


def _label(
    figure: Figure,
    axes: Axes,
    texts: Sequence[str],
    points: Sequence[_Point],
    line: Sequence[_Point],
) -> None:
    """Put each text beside its point: inside of the axes, off the points and off each other."""
    # How large the axes are is decided by the layout, which runs when the figure is drawn.
    figure.draw_without_rendering()
    axes.autoscale(False)
    scale = figure.dpi / 72
    frame = np.array(axes.get_window_extent().extents)
    places = axes.transData.transform(points)
    taken = [_boxes(places, 0, 0, _RADIUS * scale), _dots(axes.transData.transform(line), scale)]
    for text, point, place in zip(texts, points, places, strict=True):
        label = axes.annotate(
            text,
            point,
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            parse_math=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
        # A label that changed the layout would move the points that its place was chosen by.
        label.set_in_layout(False)
        extent = label.get_window_extent()
        offsets = _offsets(extent.width / scale, extent.height / scale)
        centres = place + offsets[:, :2] * scale
        own = _boxes(centres, extent.width, extent.height, _GAP * scale)
        others = np.concatenate(taken)
        costs = _overlap(own[:, None], others).sum(1)
        costs += 4 * (_area(own) - _overlap(own, frame)) + offsets[:, 2] * scale
        far = offsets[:, 2] > _NEAR[-1]
        for i in np.flatnonzero(far):
            costs[i] += _overlap(_leader(place, centres[i], scale)[:, None], others).sum()
        best = int(costs.argmin())
        label.set_position(tuple(offsets[best, :2]))
        taken.append(own[best : best + 1])
        if far[best]:
            ends = axes.transData.inverted().transform([place, centres[best]])
            axes.plot(*ends.T, color="0.6", linewidth=0.6, zorder=1)
            taken.append(_leader(place, centres[best], scale))


def _offsets(width: float, height: float) -> np.ndarray:
    """Where the centre of a label may lie from its point, and how far away its edge then is."""
    return np.array(
        [
            (right * (distance + width / 2), up * (distance + height / 2), distance)
            for distance in (*_NEAR, *_FAR)
            for right, up in _DIRECTIONS
        ]
    )


def _boxes(centres: np.ndarray, width: float, height: float, gap: float) -> np.ndarray:
    """[n, 2] centres → [n, 4]: left, bottom, right, top."""
    half = np.array([width / 2 + gap, height / 2 + gap])
    return np.concatenate([centres - half, centres + half], axis=-1)


def _dots(line: np.ndarray, scale: float) -> np.ndarray:
    """A line of several segments as boxes, close enough together for no label to fit between."""
    parts = [np.linspace(a, b, 40) for a, b in pairwise(line)]
    return _boxes(np.concatenate(parts) if parts else np.empty((0, 2)), 0, 0, scale)


def _leader(place: np.ndarray, centre: np.ndarray, scale: float) -> np.ndarray:
    """The line from a point to its label, but for where it begins, which the point takes."""
    return _dots(np.array([place, centre]), scale)[4:]


def _area(boxes: np.ndarray) -> np.ndarray:
    sides = np.maximum(0, boxes[..., 2:] - boxes[..., :2])
    return np.asarray(sides[..., 0] * sides[..., 1])


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    return _area(np.concatenate([low, high], axis=-1))
