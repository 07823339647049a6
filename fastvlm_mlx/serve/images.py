"""The images of a request: data URLs, and addresses that the server was told to fetch from."""

from __future__ import annotations

import asyncio
import binascii
import re
from typing import Any

from fastvlm_mlx.language.prompt.messages import AUTO, image_part
from fastvlm_mlx.serve.errors import ApiError
from fastvlm_mlx.serve.fetch import Fetcher
from fastvlm_mlx.serve.formats.requests import ImageRef, Wanted

# Of each type how its files begin, as (place, bytes).
_BEGINNINGS: dict[str, tuple[tuple[int, bytes], ...]] = {
    "image/png": ((0, b"\x89PNG\r\n\x1a\n"),),
    "image/jpeg": ((0, b"\xff\xd8\xff"),),
    "image/gif": ((0, b"GIF8"),),
    "image/webp": ((0, b"RIFF"), (8, b"WEBP")),
    "image/bmp": ((0, b"BM"),),
    "image/tiff": ((0, b"II*\0"),),
    "image/x-tiff-big-endian": ((0, b"MM\0*"),),
    "image/avif": ((4, b"ftypavif"),),
}
_SAME = {"image/jpg": "image/jpeg", "image/x-tiff-big-endian": "image/tiff"}
_TYPES = "PNG, JPEG, GIF, WebP, BMP, TIFF or AVIF"
_DATA_URL = re.compile(r"data:([^;,]{1,100})((?:;[^;,]{0,100}){0,8}),", re.IGNORECASE)


async def fetched(wanted: Wanted, fetcher: Fetcher) -> list[dict[str, Any]]:
    """The conversation as `FastVLM.chat` takes it, its images as the bytes of their files.

    Raises:
        ApiError: an image that is none, or whose address is not to be fetched.
    """
    messages = []
    for turn in wanted.turns:
        content: list[dict[str, Any]] = []
        for part in turn.parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            else:
                content.append(image_part(await _image(part, fetcher), part.detail or AUTO))
        messages.append({"role": turn.role, "content": content})
    return messages


async def _image(ref: ImageRef, fetcher: Fetcher) -> bytes:
    if ref.url[:5].lower() == "data:":
        # Of many megabytes, which others are not to wait for.
        return await asyncio.to_thread(data_url, ref.url)
    data = await fetcher.get(ref.url)
    if kind_of(data) is None:
        raise _invalid(f"the file at the image's address is none of {_TYPES}: give an image's")
    return data


def data_url(url: str) -> bytes:
    """The bytes in a data URL. Raises ApiError: it holds no image, or another one than it says."""
    beginning = _DATA_URL.match(url)
    if beginning is None or not beginning[2].lower().endswith(";base64"):
        raise _invalid(
            "the image's data URL does not begin as one: expected data:image/png;base64, and the "
            "file in base64"
        )
    declared = beginning[1].lower()
    declared = _SAME.get(declared, declared)
    try:
        data = binascii.a2b_base64(url[beginning.end() :], strict_mode=True)
    except ValueError as error:
        raise _invalid(
            f"the image's data URL holds no base64 ({error}): encode the whole file"
        ) from error
    found = kind_of(data)
    if found is None:
        raise _invalid(f"the image's data URL holds no {_TYPES}: encode an image's file")
    if found != declared:
        raise _invalid(
            f"the image's data URL says {declared} and holds {found}: expected the type of what "
            "is in it"
        )
    return data


def kind_of(data: bytes) -> str | None:
    """The media type of an image's file, by how it begins."""
    for kind, beginnings in _BEGINNINGS.items():
        if all(data[place : place + len(found)] == found for place, found in beginnings):
            return _SAME.get(kind, kind)
    return None


def _invalid(message: str) -> ApiError:
    return ApiError(message, param="messages", code="invalid_image")
