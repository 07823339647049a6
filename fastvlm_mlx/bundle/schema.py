"""JSON: somebody else's is parsed in one place, within limits, and held to a type; ours is written
so that everybody can read it.

`msgspec` parses and compares; a type is a frozen dataclass or a `msgspec.Struct` whose fields say
their ranges. Keys that a type does not have are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import chain
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from fastvlm_mlx.bundle.files import MB, read_bytes
from fastvlm_mlx.errors import FastVLMError

T = TypeVar("T")

# A model's configuration has kilobytes, the index of a 7B checkpoint a hundred.
JSON_BYTES = 16 * MB
# Deeper than anybody writes by hand, and shallow enough for every function that recurses.
MAX_DEPTH = 64

# Ranges that any model fits into with room to spare, and any machine's memory bounds.
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Layers = Annotated[int, Meta(ge=1, le=1_000)]
Width = Annotated[int, Meta(ge=1, le=2**20)]
Positive = Annotated[float, Meta(gt=0, le=1e30)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


def read_json(
    root: Path | None, file: Path, error: type[FastVLMError], *, remedy: str
) -> dict[str, Any]:
    """A file of `root` that holds a JSON object; None as for `files.inside`.

    Raises:
        error: it can't be read, is not JSON, is nested too deeply, or is no object.
    """
    return parse(read_bytes(root, file, error, JSON_BYTES), str(file), error, remedy=remedy)


def parse(data: bytes, source: str, error: type[FastVLMError], *, remedy: str) -> dict[str, Any]:
    """The JSON object in `data`, which came from `source`. Errors as `read_json`."""
    try:
        found = msgspec.json.decode(data)
    # Bytes that are no UTF-8 are a ValueError of their own; deep nesting is a RecursionError.
    except (ValueError, RecursionError) as cause:
        reason = "nested too deeply" if isinstance(cause, RecursionError) else cause
        raise error(f"{source} can't be read as JSON ({reason}): {remedy}") from cause
    if not isinstance(found, dict):
        raise error(f"{source} holds {_kind(found)}, expected a JSON object: {remedy}")
    _check_depth(found, source, error, remedy)
    return found


def to_json(data: Any, *, ascii_only: bool = True) -> str:
    """JSON as text. It has neither NaN nor infinity, for which null stands."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=ascii_only, allow_nan=False)


def check(value: Any, kind: type[T], source: str, error: type[FastVLMError], *, remedy: str) -> T:
    """`value`, parsed JSON, as a `kind`.

    Raises:
        error: naming the key of `source` that is missing, of another type, or out of its range;
            or whatever `kind` raises of this family.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as cause:
        # An error raised in __post_init__ is wrapped into one of msgspec's.
        if isinstance(cause.__cause__, FastVLMError):
            raise cause.__cause__ from None
        raise error(f"{source}: {_sentence(cause, value)}: {remedy}") from cause


def check_fields(
    instance: Any, error: type[FastVLMError], names: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Hold a frozen dataclass of options to the types of its fields; choices are left to it.

    Args:
        names: the command line's name of each field that is called otherwise there.

    Raises:
        error: naming the first option that has another type.
    """
    for name, kind in get_type_hints(type(instance)).items():
        value = getattr(instance, name)
        # The options look at these by themselves, and tell what there is to choose from.
        if get_origin(kind) is tuple or "Literal" in str(kind) or "Path" in str(kind):
            kind = Any if get_origin(kind) is tuple else str | None
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as cause:
            wanted = re.sub(r"Expected|`", "", str(cause).partition(", got")[0]).strip()
            option = names.get(name, name).replace("_", "-")
            raise error(f"--{option} is {value!r}: expected {wanted}") from cause
        if isinstance(value, float) and not isfinite(value):
            option = names.get(name, name).replace("_", "-")
            raise error(f"--{option} is {value}: expected a finite number")


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not isfinite(data) else data


def _sentence(cause: msgspec.ValidationError, value: Any) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.layers[0]`" in our order, the value told."""
    text, _, place = str(cause).partition(" - at ")
    wanted = re.sub(r", got .*", "", text.replace("`", "")).replace("Expected", "expected")
    if missing := re.fullmatch(r"Object missing required field `(.*)`", text):
        where = place.strip("`").removeprefix("$").lstrip(".") or "it"
        return f"{where} lacks {missing.group(1)}"
    name = place.strip("`").removeprefix("$").lstrip(".") or "it"
    found: Any = value
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]", name if name != "it" else ""):
        if index == "...":
            # Of an object's values msgspec does not say which.
            return f"{name} is something else, {wanted}"
        found = found[int(index)] if index else found[key]
    shown = repr(found)
    return f"{name} is {shown if len(shown) < 80 else shown[:77] + '…'}, {wanted}"


def _check_depth(
    found: dict[str, Any], source: str, error: type[FastVLMError], remedy: str
) -> None:
    level: list[Any] = [found]
    for _ in range(MAX_DEPTH):
        # A tokenizer has 150,000 merges: the shortest way through them.
        values = chain.from_iterable(o.values() if type(o) is dict else o for o in level)
        level = [value for value in values if type(value) is list or type(value) is dict]
        if not level:
            return
    raise error(f"{source} is nested more than {MAX_DEPTH} deep, expected a flat file: {remedy}")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
