"""A row: what a model said about one image, as a line of JSON."""

from __future__ import annotations

import os
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from fastvlm_mlx.errors import ImageError, printable
from fastvlm_mlx.language.generate import GenerationResult
from fastvlm_mlx.mapping.structured import value_of


class Row(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answer about an image, or what is wrong with the image.

    Attributes:
        image: its path in the folder, with `/` between its parts. Bytes of a name that are not
            UTF-8 are shown as �.
        text, finish_reason, prompt_tokens, image_tokens, generation_tokens: as `GenerationResult`
            has them; None where the image can't be read.
        json: the answer's value where a schema was given, and only then; null where there is an
            error.
        error: a sentence; None where there is an answer.
        image_bytes: the path in hexadecimal, if it is not UTF-8, and only then.
    """

    image: str
    text: str | None = None
    json: Raw | UnsetType = UNSET
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    generation_tokens: int | None = None
    error: str | None = None
    image_bytes: str | UnsetType = UNSET

    @property
    def value(self) -> bytes | None:
        """The JSON of the answer's value, or None if there is none."""
        return None if self.json is UNSET else bytes(self.json)

    @property
    def name(self) -> str:
        """The path in the folder, as the system's functions take it."""
        # What is UTF-8 may be something else to a system that is set to another encoding.
        hexadecimal = self.image.encode().hex() if self.image_bytes is UNSET else self.image_bytes
        return named(hexadecimal)


_NULL = b"null"
_CUT = (
    "was ended by --max-tokens before its JSON was whole: begin anew with more "
    "--max-tokens, or make the schema smaller"
)
_NO_JSON = "is no JSON that can be held: limit the numbers and the depth that the schema allows"
# Whatever is the first in a line of ours.
BEGINNING = b'{"image":"'
_decoder = msgspec.json.Decoder(Row)


def named(hexadecimal: str) -> str:
    """A name of the file system from its bytes. Raises ValueError: they are no such."""
    return os.fsdecode(bytes.fromhex(hexadecimal))


def answered(name: str, result: GenerationResult, *, structured: bool = False) -> Row:
    """
    Args:
        structured: the answer is to be JSON.
    """
    more: dict[str, Any] = {}
    if structured:
        cut = result.finish_reason == "length"
        value = value_of(result.text, cut=cut)
        more = {"json": Raw(_NULL if value is None else value)}
        if value is None:
            more["error"] = f"the answer about {printable(name)} {_CUT if cut else _NO_JSON}"
    return _row(
        name,
        **more,
        text=result.text,
        finish_reason=result.finish_reason,
        prompt_tokens=result.prompt_tokens,
        image_tokens=result.image_tokens,
        generation_tokens=result.generation_tokens,
    )


def failed(name: str, error: ImageError, *, structured: bool = False) -> Row:
    more: dict[str, Any] = {"json": Raw(_NULL)} if structured else {}
    return _row(name, error=str(error), **more)


def _row(name: str, **fields: Any) -> Row:
    raw = os.fsencode(name)
    try:
        image = raw.decode()
    except UnicodeDecodeError:
        shown = raw.decode(errors="replace")
        return Row(image=shown, image_bytes=raw.hex(), **fields)
    return Row(image=image, **fields)


def line(row: Row) -> bytes:
    return msgspec.json.encode(row) + b"\n"


def read(data: bytes) -> Row:
    """Raises ValueError: it is no row, or not a whole one."""
    row = _decoder.decode(data)
    _ = row.name
    return row
