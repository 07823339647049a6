"""While answers are decoded, what a GPU reads stays in memory (is wired), as in mlx-lm.

macOS takes memory back that has not been read for a moment, a token at a time and a model at a
time, and decoding then waits for it. mlx-lm's `wired_limit` puts the limit back that it found,
which of two answers at once would be the other's; and it warns on standard output, where answers
go. Here the first answer raises the limit, and the last one to end lowers it.
"""

from __future__ import annotations

from collections.abc import Generator
from threading import Lock
from typing import TypeVar

import mlx.core as mx

T = TypeVar("T")

_lock = Lock()
_holders = 0
# The limit before the first answer, in bytes; None on a machine that has none.
_former: int | None = None


def wired(steps: Generator[T]) -> Generator[T]:
    """What `steps` yields, the limit raised from the first step to the end of them."""
    global _holders, _former
    with _lock:
        _holders += 1
        if _holders == 1:
            recommended = mx.device_info().get("max_recommended_working_set_size")
            _former = None if recommended is None else mx.set_wired_limit(int(recommended))
    try:
        yield from steps
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0 and _former is not None:
                # The limit must not change under a step that is still computed.
                mx.synchronize()
                mx.set_wired_limit(_former)
