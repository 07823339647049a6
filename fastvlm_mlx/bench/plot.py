"""Draws where the time to the first token goes: a bar for each bundle and setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastvlm_mlx.bench.measure import STAGES, Row
from fastvlm_mlx.plotting import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# From blue to yellow, told apart in grey too.
COLOURS = ("#30407a", "#2f7f8f", "#6fb46c", "#f0d24b")


def chart(rows: Sequence[Row]) -> Figure:
    """A bar for each row, the first on top: its stages' medians, and the spread of their sum."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.9 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    left = [0.0] * len(rows)
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        widths = [row.spread(stage).median for row in rows]
        name = stage.removesuffix("_s")
        axes.barh(places, widths, 0.62, left=left, color=colour, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    whole = [row.spread("ttft_s") for row in rows]
    below = [max(0.0, s.median - s.first_quartile) for s in whole]
    above = [max(0.0, s.third_quartile - s.median) for s in whole]
    medians = [s.median for s in whole]
    axes.errorbar(
        medians, places, xerr=(below, above), fmt="none", ecolor="0.2", elinewidth=1, capsize=3
    )
    several = len(rows) > len({row.setting for row in rows})
    for place, (row, spread) in enumerate(zip(rows, whole, strict=True)):
        speed = row.spread("tokens_per_s").median
        axes.annotate(
            f"{spread.median:.3g} s, then {speed:.3g} tokens/s",
            (max(spread.third_quartile, left[place]), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(places, [_name(row, several) for row in rows], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max([*left, *medians]))
    axes.set_title("Time to the first token, by stage")
    axes.set_xlabel("seconds (medians; the whisker joins the quartiles of the whole)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(STAGES), frameon=False, fontsize=9)
    return figure


def _name(row: Row, several: bool) -> str:
    last = row.runs[-1]
    units = row.setting.compute_units
    where = "" if units == "auto" else f", {units}"
    shown = f"{last['image_size']} px, {last['text_tokens']} text tokens{where}"
    return f"{shortened(row.bundle.name)}\n{shown}" if several else shown
