"""What earlier questions computed, kept for later ones: KV caches of prompts, features of images.

A prompt is computed in pieces, and where a piece ends depends on nothing but the prompt up to
there: after an image, before a turn, and after so many places. All pieces but the last are kept,
each under a hash of the prompt up to its end, in which the image's content stands for its
placeholders. A prompt that begins in the same way takes those pieces and computes the rest. As a
prompt has the same pieces whether or not any of them is kept, its answer comes of the very same
products either way, and is the same to the bit.

mlx-lm's `LRUPromptCache` goes on where two prompts part, wherever that is. Products of other sizes
are rounded in other ways, so answers would depend on what was asked before; and it keeps an image
once for every question about it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import mlx.core as mx
import numpy as np

from fastvlm_mlx.errors import OptionError

# Bytes. At 0.5B an image is 7 MB of keys and values in float32 and 4 MB of features; at 7B, 32
# and 7.
DEFAULT_LIMIT = 256_000_000
# Places of a prompt that are computed at once: more would need more memory than they save time.
PREFILL_PLACES = 2048
# A turn begins no new piece before the piece has so many places: a piece reads all weights once.
_TURN_PLACES = 64


class Kept:
    """Values by key, those that were used last, in so many bytes. For one thread.

    Attributes:
        nbytes: of what is kept.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT):
        self.limit = limit
        self.nbytes = 0
        self._entries: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Any:
        """The value, or None."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: bytes, value: Any, nbytes: int) -> None:
        if nbytes > self.limit:
            return
        _, replaced = self._entries.pop(key, (None, 0))
        self._entries[key] = value, nbytes
        self.nbytes += nbytes - replaced
        while self.nbytes > self.limit:
            _, (_, dropped) = self._entries.popitem(last=False)
            self.nbytes -= dropped


def check_limit(limit: Any) -> int:
    """Raises OptionError: no number of bytes."""
    if not isinstance(limit, Integral) or isinstance(limit, bool) or limit < 0:
        raise OptionError(
            f"the bytes to keep for later questions are {limit!r}: expected a whole number, 0 or "
            "more"
        )
    return int(limit)


@dataclass(frozen=True)
class Prompt:
    """A prompt to compute.

    Attributes:
        ids: [L].
        embeddings: the same with the image in it, [L, D].
        ends: where its pieces end; the last is L.
        keys: of each piece but the last.
    """

    ids: mx.array
    embeddings: mx.array
    ends: tuple[int, ...]
    keys: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Span:
    """Where the placeholders of an image stand, and a hash of what stands for them."""

    start: int
    end: int
    content: bytes


def content_hash(array: mx.array | np.ndarray) -> bytes:
    """Of an array's type, shape and values; of an array of MLX that was evaluated."""
    # Of those that are safe, the one that processors have instructions for.
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    if isinstance(array, mx.array):
        array = np.asarray(array.view(mx.uint8))
    digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def cut(ids: Sequence[int], images: Sequence[Span], turn_start: int | None) -> tuple[int, ...]:
    """Where the pieces of a prompt end; each depends only on the ids before it and on the next."""
    after_images = {image.end for image in images}
    ends, start = [], 0
    for place in range(1, len(ids)):
        is_turn = ids[place] == turn_start and place - start >= _TURN_PLACES
        if place in after_images or is_turn or place - start == PREFILL_PLACES:
            ends.append(place)
            start = place
    return (*ends, len(ids))


def keys(ids: Sequence[int], images: Sequence[Span], ends: Sequence[int]) -> tuple[bytes, ...]:
    """Of each piece but the last: a hash of all before its end and of where pieces end in it."""
    found, before, start = [], b"", 0
    for end in ends[:-1]:
        digest = hashlib.sha256(before)
        digest.update(np.array(ids[start:end], np.int64).data)
        for image in images:
            if image.start < end and start < image.end:
                digest.update(f"{image.start} {image.end} ".encode() + image.content)
        before = digest.digest()
        found.append(before)
        start = end
    return tuple(found)


def take(kept: Kept, prompt: Prompt, caches: list[Any]) -> int:
    """Fill empty caches with the pieces that are kept, and return how many pieces those are."""
    count = 0
    for key in prompt.keys:
        layers = kept.get(key)
        if layers is None:
            break
        # A copy, and room for more that grows as it did when the piece was computed.
        for cache, (held_keys, held_values) in zip(caches, layers, strict=True):
            cache.update_and_fetch(held_keys, held_values)
        count += 1
    return count


def keep(kept: Kept, key: bytes, caches: list[Any], start: int, end: int) -> None:
    """Keep a copy of the places from `start` to `end`."""
    layers = [
        tuple(_copied(array[..., start:end, :]) for array in (cache.keys, cache.values))
        for cache in caches
    ]
    mx.eval([array for layer in layers for array in layer if isinstance(array, mx.array)])
    kept.put(key, layers, sum(array.nbytes for layer in layers for array in layer))


def _copied(array: Any) -> Any:
    return mx.contiguous(array) if isinstance(array, mx.array) else array.clone()
