"""What is known and what is in the cache, for `fastvlm models`, and what its `--remove` means."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import OptionError, printable
from fastvlm_mlx.models import cache
from fastvlm_mlx.models.names import PUBLISHED, published

ALL = "all"
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Row:
    """A model that is known or cached, or what is left of one.

    Attributes:
        names: all that it is called by, the one that is shown first.
        what: bundle, checkpoint, or `INTERRUPTED`.
        bytes, path, place, used: of what is in the cache; None of what is not.
    """

    names: tuple[str, ...]
    what: str
    origin: str
    bytes: int | None = None
    path: Path | None = None
    place: Path | None = None
    used: float | None = None
    commit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        used = None if self.used is None else datetime.fromtimestamp(int(self.used), UTC)
        return {
            "name": self.names[0],
            "kind": self.what,
            "origin": self.origin,
            "commit": self.commit,
            "cached": self.place is not None and self.what != INTERRUPTED,
            "bytes": self.bytes,
            "path": None if self.path is None else str(self.path),
            "last_used": None if used is None else used.isoformat().replace("+00:00", "Z"),
        }


def rows() -> list[Row]:
    """What is in the cache, the model used last first, then what is published and not there.

    Raises:
        DestinationError: the cache can't be read.
    """
    found = [_of_entry(entry) for entry in cache.entries()]
    for place in cache.unfinished():
        size = cache.size(place)
        origin = "a download or an export that is under way, or was interrupted"
        found.append(Row((place.name,), INTERRUPTED, origin, size, place, place))
    cached = {name for row in found for name in row.names}
    for one in PUBLISHED.values():
        if one.name not in cached:
            found.append(Row((one.name,), one.what, one.origin))
    return found


def remove(name: str) -> list[Row]:
    """Remove from the cache what is called so, or all of it.

    Returns:
        What was removed.

    Raises:
        OptionError: nothing in the cache has that name.
        DestinationError: it is being made, or can't be removed.
    """
    there = [row for row in rows() if row.place is not None]
    wanted = there if name == ALL else [row for row in there if _is_called(row, name)]
    if not wanted and name != ALL:
        names = ", ".join(printable(row.names[0]) for row in there)
        raise OptionError(
            f"--remove {name} is no model in the cache: expected "
            + (f"{names}, or {ALL}" if names else "one that is there, and it is empty")
        )
    for row in wanted:
        if row.place is not None:
            cache.remove(row.place)
    if name == ALL:
        cache.remove_books()
    return wanted


def _of_entry(entry: cache.Entry) -> Row:
    names = [entry.name]
    if entry.reference is not None:
        if entry.revision is None:
            names = [p.name for p in PUBLISHED.values() if p.hub == entry.reference] + names
        else:
            names = [f"{entry.reference}@{entry.revision}", *names]
        names.append(entry.reference)
    place = Path(entry.place)
    names.append(place.name)
    return Row(
        tuple(names),
        entry.what,
        entry.origin,
        entry.bytes,
        entry.path,
        place,
        entry.used,
        entry.commit,
    )


def _is_called(row: Row, name: str) -> bool:
    one = published(name)
    # `Path.resolve` raises where links lead in a circle.
    asked = {cache.as_kept(text) for text in (name, os.path.realpath(name))}
    asked |= {one.name} if one else set()
    return not asked.isdisjoint(row.names)
