"""Sizes that an image's file states once more further in, which PIL's header does not tell.

Icons hold whole images, and JPEG 2000 a codestream, each with a size of its own that is decoded
whatever the header around it says.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

_PNG = b"\x89PNG\r\n\x1a\n"
_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
# JPEG 2000's first two markers: start of the codestream, and its size.
_CODESTREAM = b"\xff\x4f\xff\x51"
# An icon is thousands of times smaller.
_MOST_BYTES = 1 << 28


def inner_sizes(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Width and height of each image within, of a file at its start; none in most formats."""
    start = file.read(12)
    if start[:4] == b"\0\0\1\0":
        yield from _ico(start + file.read(_MOST_BYTES))
    elif start[:4] == b"icns":
        yield from _icns(start + file.read(_MOST_BYTES))
    elif start == _JP2:
        yield from _image(start + file.read(_MOST_BYTES))


def _ico(data: bytes) -> Iterator[tuple[int, int]]:
    (count,) = struct.unpack_from("<H", data, 4)
    for i in range(min(count, (len(data) - 6) // 16)):
        (offset,) = struct.unpack_from("<I", data, 6 + 16 * i + 12)
        inner = data[offset : offset + 64]
        if inner.startswith(_PNG):
            yield from _image(inner)
        elif len(inner) >= 12:
            # A bitmap whose header counts the rows of its mask as well.
            old = inner[:4] == b"\x0c\0\0\0"
            width, height = struct.unpack_from("<HH" if old else "<ii", inner, 4)
            yield abs(width), abs(height) // 2


def _icns(data: bytes) -> Iterator[tuple[int, int]]:
    at = 8
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at + 4)
        yield from _image(data[at + 8 : at + length])
        at += max(length, 8)


def _image(data: bytes) -> Iterator[tuple[int, int]]:
    if data.startswith(_PNG) and len(data) >= 24:
        yield struct.unpack_from(">II", data, 16)
    elif (at := data.find(_CODESTREAM)) >= 0 and len(data) >= at + 24:
        right, bottom, left, top = struct.unpack_from(">IIII", data, at + 8)
        yield max(right - left, 0), max(bottom - top, 0)
