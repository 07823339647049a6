"""Size against loss, drawn: each model a point, the best at their size joined by a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_mlx.errors import DestinationError, OptionError

if TYPE_CHECKING:
    from model_export.comparison.compare import Row

SUFFIXES = (".png", ".svg", ".pdf")
# A logarithmic axis has no zero; what is nearer than float32 tells is drawn there.
LEAST_KL = 1e-9


def check(file: Path) -> None:
    """Before anything is measured.

    Raises:
        OptionError: the file's suffix is none that can be drawn.
        DestinationError: there is no directory for it.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise OptionError(f"--plot {file} has no known suffix: expected {', '.join(SUFFIXES)}")
    if not file.expanduser().parent.is_dir():
        raise DestinationError(f"{file.parent} is not a directory: make it, or draw elsewhere")


def draw(rows: Sequence[Row], file: Path) -> None:
    """Write the image."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if not row.reference]
    sizes = {row.name: row.bytes["total"] / 1e6 for row in shown}
    losses = {row.name: max(row.kl_nats, LEAST_KL) for row in shown}
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    best = sorted((row.name for row in shown if row.best), key=sizes.__getitem__)
    axes.plot([sizes[n] for n in best], [losses[n] for n in best], color="0.7", zorder=1)
    axes.scatter(
        [sizes[row.name] for row in shown],
        [losses[row.name] for row in shown],
        c=["tab:blue" if row.best else "0.5" for row in shown],
        zorder=2,
    )
    for row in shown:
        label = f"{Path(row.name).name} ({row.changed} of {row.questions} changed)"
        axes.annotate(
            label,
            (sizes[row.name], losses[row.name]),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set(
        yscale="log",
        xlabel="encoder and language model, MB",
        ylabel="KL divergence from the reference, nats",
    )
    axes.margins(x=0.15)
    figure.savefig(file.expanduser(), dpi=150)
