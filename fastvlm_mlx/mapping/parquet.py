"""Rows as Parquet: converted from lines of JSON, since a Parquet file is never added to."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import UNSET

from fastvlm_mlx.errors import DestinationError
from fastvlm_mlx.extras import needs_extra
from fastvlm_mlx.mapping import rows, structured
from fastvlm_mlx.mapping.journal import check_regular, writing
from fastvlm_mlx.mapping.structured import Column

if TYPE_CHECKING:
    import pyarrow

# The key of a file's metadata that says that this made it.
MADE_BY = b"fastvlm map"
# Rows that are in memory at once.
_GROUP = 10_000
_TEXTS = ("image", "text", "finish_reason", "error", "image_bytes")
_COUNTS = ("prompt_tokens", "image_tokens", "generation_tokens")


def check(path: Path, rows_path: Path, *, overwrite: bool) -> None:
    """Raises OptionError: pyarrow is not installed. DestinationError: `path` is somebody else's, or
    the rows that it was made from are gone."""
    with needs_extra():
        import pyarrow  # noqa: F401
    _check_ours(path)
    if path.exists() and not (rows_path.exists() or overwrite):
        raise DestinationError(
            f"{path} exists without {rows_path.name}, the rows that it was made from: choose "
            "another --out, or begin anew with --overwrite"
        )


def convert(source: Path, path: Path, json_schema: str | None = None) -> None:
    """Make `path` of the rows in `source`, in one step.

    Args:
        json_schema: of the answers, whose properties are columns then.

    Raises:
        DestinationError: no room for it, or `path` is somebody else's by now.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = structured.columns(json_schema, (*_TEXTS, *_COUNTS))
    schema = _schema(columns)
    # A name that nothing else has: what is there already is somebody else's.
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")
    with writing(path):
        try:
            with (
                part.open("xb") as stream,
                pq.ParquetWriter(stream, schema, compression="zstd") as writer,
            ):
                for group in _groups(source, columns):
                    writer.write_table(pa.Table.from_pylist(group, schema))
                writer.close()
                stream.flush()
                os.fsync(stream.fileno())
            # What came there during the run stays, as what was there before it.
            _check_ours(path)
            os.replace(part, path)
        finally:
            with suppress(FileNotFoundError):
                part.unlink()


def _check_ours(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_regular(path)
    if not path.exists():
        return
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        metadata = {}
    if MADE_BY not in metadata:
        raise DestinationError(
            f"{path} exists, and `fastvlm map` did not make it: choose another --out, or remove it "
            "yourself"
        )


def _groups(source: Path, columns: list[Column]) -> Iterator[list[dict[str, object]]]:
    with source.open("rb") as stream:
        while group := [_cells(rows.read(line), columns) for line in islice(stream, _GROUP)]:
            yield group


def _cells(row: rows.Row, columns: list[Column]) -> dict[str, object]:
    cells = {name: getattr(row, name) for name in (*_TEXTS, *_COUNTS)}
    found = {name: None if value is UNSET else value for name, value in cells.items()}
    return found | structured.cells(columns, row.value)


def _schema(columns: list[Column]) -> pyarrow.Schema:
    import pyarrow as pa

    kinds = {**dict.fromkeys(_TEXTS, pa.string()), **dict.fromkeys(_COUNTS, pa.int32())}
    fields = [pa.field(name, kinds[name]) for name in rows.Row.__struct_fields__ if name in kinds]
    fields += [column.field() for column in columns]
    return pa.schema(fields, metadata={MADE_BY: b"1"})
