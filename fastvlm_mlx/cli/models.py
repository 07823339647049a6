"""`fastvlm models`: the verb."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastvlm_mlx.cli.common import Json, option, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastvlm_mlx.models.listing import Row

CACHE = "Cache"


def models(
    remove: Annotated[
        str | None,
        option(
            "Remove this model from the cache, or all models.",
            group=CACHE,
            value="NAME|all",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """A verb that runs a bundle takes a checkpoint, a hub id and each of these names as well. What
    is downloaded or exported for that is kept in a cache, which the variable FASTVLM_CACHE moves.
    A checkpoint on the hub is kept in the hub's own cache; `hf cache` shows that."""
    from fastvlm_mlx.models import cache, listing

    found = listing.rows() if remove is None else listing.remove(remove)
    total = sum(row.bytes or 0 for row in found)
    if as_json:
        shown = "models" if remove is None else "removed"
        print_json(
            {
                "directory": str(cache.directory()),
                "bytes": total,
                shown: [row.to_dict() for row in found],
            }
        )
    elif remove is None:
        _print_models(found, total)
    else:
        _print_removed(found, total)


def _print_models(found: Sequence[Row], total: int) -> None:
    from datetime import datetime

    from rich.table import Table
    from rich.text import Text

    from fastvlm_mlx.bundle.files import shown_bytes
    from fastvlm_mlx.cli import show
    from fastvlm_mlx.errors import printable
    from fastvlm_mlx.models import cache

    table = Table("name", "what", "size", "last used", "from", box=None, pad_edge=False)
    for row in found:
        used = "" if row.used is None else f"{datetime.fromtimestamp(row.used):%Y-%m-%d %H:%M}"
        cells = (
            row.names[0],
            row.what,
            "not cached" if row.bytes is None else shown_bytes(row.bytes),
            used,
            row.origin,
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    show.print_table(table, _width(table))
    print(f"{shown_bytes(total)} in {printable(cache.directory())}")


def _print_removed(found: Sequence[Row], total: int) -> None:
    from fastvlm_mlx.bundle.files import shown_bytes
    from fastvlm_mlx.errors import printable

    for row in found:
        print(f"removed {printable(row.names[0])}, {row.what}, {shown_bytes(row.bytes or 0)}")
    print(f"{shown_bytes(total)} are free again")


def _width(table: object) -> int:
    """Wider than the terminal rather than cut."""
    from rich.console import Console

    return max(Console().width, Console(width=1000).measure(table).maximum)  # type: ignore[arg-type]
