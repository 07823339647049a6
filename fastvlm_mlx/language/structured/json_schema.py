"""The schema of a structured answer: what is taken for one, and that it can be followed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.files import read_bytes
from fastvlm_mlx.bundle.schema import parse
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.extras import needs_extra
from fastvlm_mlx.language.structured import schema_trial

MAX_SCHEMA_BYTES = 256_000
# Of a trial on a machine that is busy with other things; its processor time is limited by itself.
_TRIAL_SECONDS = 60
_REMEDY = "give the JSON of a schema, a dict, or a pydantic model"
_NAME = "--json-schema"
# All but those that have an escape of a letter in JSON.
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_LARGEST = 2**53


def schema_text(schema: Any) -> str:
    """A schema as JSON: of a dict, of JSON text, or of a class that has `model_json_schema`, as
    pydantic's models do. The order of its keys stays.

    Raises:
        OptionError: it is no schema, not one that can be followed, or takes too much to follow; or
            the `json` extra is not installed.
    """
    with needs_extra():
        import llguidance
    text = _json_of(schema)
    size = len(text.encode(errors="replace"))
    if size > MAX_SCHEMA_BYTES:
        raise OptionError(
            f"{_NAME} has {size:,} bytes: expected at most {MAX_SCHEMA_BYTES:,}, make the schema "
            "smaller"
        )
    found = parse(text.encode(errors="surrogatepass"), _NAME, OptionError, remedy=_REMEDY)
    # llguidance's own settings, by which a schema could do away with its rules.
    found.pop("x-guidance", None)
    _check_counts(found)
    parts = list(_parts(found))
    for part in parts:
        _check_values([part.get("const"), part.get("enum")])
    if not any(map(_is_joined, parts)):
        for part in filter(_is_open, parts):
            part["additionalProperties"] = False
    text = json.dumps(found)
    _try(text, str(Path(llguidance.__file__).parents[1]))
    return text


def read_schema(file: Path) -> str:
    """A file that holds a schema, unread as one. Raises OptionError: it can't be read."""
    data = read_bytes(None, file, OptionError, MAX_SCHEMA_BYTES)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise OptionError(f"{file} can't be read as text ({error}): {_REMEDY}") from error


def _json_of(schema: Any) -> str:
    made_from = getattr(schema, "model_json_schema", None)
    if isinstance(schema, type) and callable(made_from):
        try:
            schema = made_from()
        # Its own errors, of whatever package it is of.
        except Exception as error:
            raise OptionError(
                f"{schema.__name__} has no JSON schema ({error}): give a model that has one"
            ) from error
    if isinstance(schema, str):
        return schema
    if not isinstance(schema, dict):
        raise OptionError(f"{_NAME} is of type {type(schema).__name__}: {_REMEDY}")
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise OptionError(f"{_NAME} can't be written as JSON ({reason}): {_REMEDY}") from error


def _check_counts(schema: dict[str, Any]) -> None:
    """Refuse to count keys: those that a schema does not name may come twice, and count once."""
    level: list[Any] = [schema]
    while level:
        for each in level:
            count = each.get("minProperties") if isinstance(each, dict) else None
            if isinstance(count, int | float) and count > 1:
                raise refused(f"minProperties is {count}, and at most 1 can be ensured")
        values = [v for e in level for v in (e.values() if isinstance(e, dict) else e)]
        level = [value for value in values if isinstance(value, dict | list)]


def _check_values(given: Any) -> None:
    """Refuse values that llguidance changes: it leaves control characters out of a text where no
    escape of a letter writes them, and rounds a number to one of 64 bits."""
    if isinstance(given, dict | list):
        for value in given.values() if isinstance(given, dict) else given:
            _check_values(value)
    elif isinstance(given, str):
        if lost := _CONTROL.search(given):
            raise refused(f"a value holds the control character U+{ord(lost.group()):04X}")
    elif isinstance(given, int) and abs(given) > _LARGEST:
        raise refused(f"a value is {given}, beyond the {_LARGEST:,} up to which numbers are exact")


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all that is in it, but for what stands for values."""
    if isinstance(schema, dict):
        yield schema
        for key, value in schema.items():
            if key not in ("const", "default", "enum", "examples"):
                yield from _parts(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _parts(value)


def _is_joined(schema: dict[str, Any]) -> bool:
    """Whether a value has to meet this and another schema, whose properties it may have as well."""
    others = {"$ref", "anyOf", "oneOf"} & schema.keys()
    return "allOf" in schema or (bool(others) and (len(others) > 1 or "properties" in schema))


def _is_open(schema: dict[str, Any]) -> bool:
    """Whether it names properties and says nothing of others. A model writes others without an end,
    and an answer without them meets the schema just as well."""
    named, required = schema.get("properties"), schema.get("required", [])
    return (
        isinstance(named, dict)
        and not schema.keys() & {"additionalProperties", "patternProperties"}
        and isinstance(required, list)
        and all(isinstance(name, str) and name in named for name in required)
    )


def refused(said: str) -> OptionError:
    """The error of a schema that llguidance refuses, by what it says."""
    first, *_, last = said.splitlines() * 2
    # Of a pattern that it can't read the last line says why. What follows otherwise is a trace, or
    # the name of an option that we don't have.
    reason = first.partition(". Enable ")[0]
    if first.endswith(":"):
        reason = f"{first} {last.removeprefix('error: ')}"
    if reason.startswith("NoExtension"):
        reason = "no JSON meets it"
    elif len(reason) > 300:
        reason = reason[:300] + "…"
    return OptionError(f"{_NAME} can't be followed ({reason}): change that part of the schema")


@lru_cache(maxsize=64)
def _try(text: str, packages: str) -> None:
    """Raises OptionError: the trial has failed. Those that have not are not repeated."""
    command = [sys.executable, "-I", "-S", schema_trial.__file__, packages]
    try:
        tried = subprocess.run(
            command, input=text.encode(), capture_output=True, timeout=_TRIAL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        tried = None
    if tried is None or tried.returncode != 0:
        raise OptionError(
            f"{_NAME} takes more than {schema_trial.SECONDS} s, or too much memory, to prepare: "
            "make the schema simpler, with fewer patterns, definitions and alternatives"
        )
    if tried.stdout:
        raise refused(tried.stdout.decode(errors="replace"))
