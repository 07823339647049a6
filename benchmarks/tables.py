"""Tables of the documentation that are made from the JSON in `benchmarks/results`.

A table stands on its page between two comments, which a reader does not see. The first one names
the benchmark that it is from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = ROOT / "docs" / "measured.md"
_END = "<!-- end -->"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its lines ended."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def read(name: str) -> dict[str, Any]:
    """`benchmarks/results/NAME.json`."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def keep(name: str, result: dict[str, Any]) -> Path:
    """Write `benchmarks/results/NAME.json`."""
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def shown(page: Path, name: str) -> str:
    """What the page shows of a result."""
    return _parts(page, name)[1].removesuffix("\n")


def put(page: Path, name: str, text: str) -> None:
    """Put what is made from a result onto its page, in the place of what is there."""
    before, _, after = _parts(page, name)
    page.write_text(f"{before}{text}\n{after}", encoding="utf-8")


def machine_line(machine: dict[str, Any]) -> str:
    """A sentence for above a table."""
    return (
        f"Measured on {machine['system'].partition(' ')[0]} {machine['architecture']}, "
        f"{machine['cores']} cores of an {machine['processor']}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB."
    )


def _parts(page: Path, name: str) -> tuple[str, str, str]:
    """What stands before the place of a result, in it, and after it.

    Raises:
        ValueError: the page has no such place.
    """
    start = f"<!-- benchmarks.{name} -->\n\n"
    before, found, rest = page.read_text(encoding="utf-8").partition(start)
    inside, ended, after = rest.partition(_END)
    if not found or not ended:
        raise ValueError(f"{page} has no place for {name}: expected {start.strip()} … {_END}")
    return before + found, inside, _END + after
