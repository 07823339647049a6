"""Answers that are JSON by a schema: a value in each row, and properties as typed columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import pyarrow

# What a schema's type becomes. Anything else is its JSON text, which loses nothing.
_TYPES = {"string": "string", "integer": "int64", "number": "float64", "boolean": "bool_"}
_PYTHONS = {str: "string", int: "integer", float: "number", bool: "boolean"}
_REFERENCE = "#/$defs/"
# References that lead to references.
_MOST_STEPS = 20


def value_of(text: str, *, cut: bool) -> bytes | None:
    """The JSON of an answer on one line, or None if it is not whole.

    Args:
        cut: whether the answer was ended before its end. Of a number, what is left is one too.
    """
    data = text.encode()
    try:
        found = msgspec.json.decode(data)
        if cut and isinstance(found, int | float) and not isinstance(found, bool):
            return None
        return msgspec.json.format(data, indent=-1)
    # Numbers that nothing holds, and lists in lists without end, are no answers either.
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class Column:
    """A property of the answers.

    Attributes:
        name: of the column.
        key: of the property.
        kind: one of a schema's types, or "json".
    """

    name: str
    key: str
    kind: str

    def field(self) -> pyarrow.Field:
        import pyarrow as pa

        return pa.field(self.name, getattr(pa, _TYPES.get(self.kind, "string"))())

    def cell(self, data: bytes) -> Any:
        """A property's value, which is JSON, in the column's type; None if it does not fit."""
        if self.kind == "json":
            return None if data == b"null" else data.decode()
        value = msgspec.json.decode(data)
        if self.kind == "number" and type(value) in (int, float):
            try:
                number = float(value)
            except OverflowError:
                return None
            return number if isfinite(number) else None
        if _PYTHONS.get(type(value)) != self.kind:
            return None
        return value if self.kind != "integer" or -(2**63) <= value < 2**63 else None


def columns(schema: str | None, taken: Iterable[str]) -> list[Column]:
    """A column for each top-level property of the answers, or none if they are no objects.

    Args:
        schema: JSON text.
        taken: names of other columns. A property of such a name gets `json.` before it.
    """
    root = {} if schema is None else json.loads(schema)
    resolved = _resolved(root, root)
    properties = resolved.get("properties")
    if resolved.get("type", "object") != "object" or not isinstance(properties, dict):
        return []
    names, made = set(taken) | properties.keys(), []
    for key, inner in properties.items():
        # Half of a surrogate pair can't be written; the answer's text has it.
        if not key.isascii() and key != key.encode(errors="replace").decode():
            continue
        name = key
        if key in taken:
            while name in names:
                name = f"json.{name}"
            names.add(name)
        made.append(Column(name, key, _kind(inner, root)))
    return made


def cells(made: Iterable[Column], value: bytes | None) -> dict[str, Any]:
    """A row's cells in those columns."""
    found: dict[str, msgspec.Raw] = {}
    if value is not None and value.startswith(b"{"):
        found = msgspec.json.decode(value, type=dict[str, msgspec.Raw])
    return {
        column.name: column.cell(bytes(found[column.key])) if column.key in found else None
        for column in made
    }


def _kind(schema: Any, root: Any) -> str:
    """What all values of a schema are, null aside."""
    kinds = set(_kinds(schema, root, _MOST_STEPS)) - {"null"}
    if kinds == {"integer", "number"}:
        return "number"
    (kind,) = kinds if len(kinds) == 1 else ("json",)
    return kind if kind in _TYPES else "json"


def _kinds(schema: Any, root: Any, steps: int) -> Iterator[str]:
    schema = _resolved(schema, root)
    given = schema.get("type")
    choices = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(given, str | list):
        yield from [given] if isinstance(given, str) else given
    elif "const" in schema or "enum" in schema:
        for value in [schema["const"]] if "const" in schema else schema["enum"]:
            yield "null" if value is None else _PYTHONS.get(type(value), "json")
    elif isinstance(choices, list) and steps:
        for choice in choices:
            yield from _kinds(choice, root, steps - 1)
    else:
        yield "json"


def _resolved(schema: Any, root: Any) -> dict[str, Any]:
    """A schema in place of a reference to it; an empty one if there is none."""
    for _ in range(_MOST_STEPS):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str):
            break
        name = reference.removeprefix(_REFERENCE)
        definitions = root.get("$defs")
        known = definitions if reference.startswith(_REFERENCE) else None
        schema = known.get(name) if isinstance(known, dict) else None
    return schema if isinstance(schema, dict) and "$ref" not in schema else {}
