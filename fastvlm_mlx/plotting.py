"""The files that charts are drawn into."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_mlx.errors import DestinationError, OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
LONGEST_NAME = 30


def check(file: Path) -> None:
    """Check the file to draw into, and what draws, before anything is measured.

    Raises:
        OptionError: the file's suffix is none that can be drawn.
        DestinationError: there is no directory for it.
        ModuleNotFoundError: matplotlib is missing, which the command line tells.
    """
    import matplotlib.figure  # noqa: F401, asked for and not used

    if file.suffix.lower() not in SUFFIXES:
        raise OptionError(f"--plot {file} has no known suffix: expected {', '.join(SUFFIXES)}")
    if not file.expanduser().parent.is_dir():
        raise DestinationError(f"{file.parent} is not a directory: make it, or draw elsewhere")


def save(figure: Figure, file: Path) -> None:
    figure.savefig(file.expanduser(), dpi=150)


def shortened(name: str) -> str:
    """A name that is too long for a chart, without its middle."""
    if len(name) <= LONGEST_NAME:
        return name
    half = LONGEST_NAME // 2
    return f"{name[:half]}…{name[1 - half :]}"
