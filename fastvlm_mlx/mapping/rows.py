"""A row: what a model said about one image, as a line of JSON."""

from __future__ import annotations

import os

import msgspec
from msgspec import UNSET, Struct, UnsetType

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.language.generate import GenerationResult


class Row(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answer about an image, or what is wrong with the image.

    Attributes:
        image: its path in the folder, with `/` between its parts. Bytes of a name that are not
            UTF-8 are shown as �.
        text, finish_reason, prompt_tokens, image_tokens, generation_tokens: as `GenerationResult`
            has them; None where there is an error.
        error: a sentence; None where there is an answer.
        image_bytes: the path in hexadecimal, if it is not UTF-8, and only then.
    """

    image: str
    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    generation_tokens: int | None = None
    error: str | None = None
    image_bytes: str | UnsetType = UNSET

    @property
    def name(self) -> str:
        """The path in the folder, as the system's functions take it."""
        # What is UTF-8 may be something else to a system that is set to another encoding.
        hexadecimal = self.image.encode().hex() if self.image_bytes is UNSET else self.image_bytes
        return named(hexadecimal)


# Whatever is the first in a line of ours.
BEGINNING = b'{"image":"'
_decoder = msgspec.json.Decoder(Row)


def named(hexadecimal: str) -> str:
    """A name of the file system from its bytes. Raises ValueError: they are no such."""
    return os.fsdecode(bytes.fromhex(hexadecimal))


def answered(name: str, result: GenerationResult) -> Row:
    return _row(
        name,
        text=result.text,
        finish_reason=result.finish_reason,
        prompt_tokens=result.prompt_tokens,
        image_tokens=result.image_tokens,
        generation_tokens=result.generation_tokens,
    )


def failed(name: str, error: ImageError) -> Row:
    return _row(name, error=str(error))


def _row(name: str, **fields: str | int | None) -> Row:
    raw = os.fsencode(name)
    try:
        image = raw.decode()
    except UnicodeDecodeError:
        shown = raw.decode(errors="replace")
        return Row(image=shown, image_bytes=raw.hex(), **fields)  # type: ignore[arg-type]
    return Row(image=image, **fields)  # type: ignore[arg-type]


def line(row: Row) -> bytes:
    return msgspec.json.encode(row) + b"\n"


def read(data: bytes) -> Row:
    """Raises ValueError: it is no row, or not a whole one."""
    row = _decoder.decode(data)
    _ = row.name
    return row
