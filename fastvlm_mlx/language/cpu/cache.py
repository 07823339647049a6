"""KV caches of the language model in torch, behind the interface of mlx-lm's.

A batch is a list of caches, one for each sequence: attention goes through a sequence at a time, so
nothing is padded, and to join or leave a batch copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class KVCache:
    """Keys and values of a layer, float32 [heads, places, head width], with room for more."""

    STEP = 256

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.offset = 0

    @property
    def sequences(self) -> list[KVCache]:
        return [self]

    def update_and_fetch(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [heads, L, width]; all that there are, [heads, offset, width]."""
        end = self.offset + keys.shape[1]
        if self.keys is None or self.values is None or end > self.keys.shape[1]:
            self.keys, self.values = (
                self._grown(old, new, end)
                for old, new in ((self.keys, keys), (self.values, values))
            )
        self.keys[:, self.offset : end] = keys
        self.values[:, self.offset : end] = values
        self.offset = end
        return self.keys[:, :end], self.values[:, :end]

    def _grown(self, old: Tensor | None, new: Tensor, end: int) -> Tensor:
        places = -(-end // self.STEP) * self.STEP
        grown = new.new_empty(new.shape[0], places, new.shape[2])
        if old is not None:
            grown[:, : self.offset] = old[:, : self.offset]
        return grown

    @property
    def state(self) -> tuple[()]:
        """What MLX has still to evaluate: nothing."""
        return ()

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.keys is None

    def is_trimmable(self) -> bool:
        return True

    def trim(self, count: int) -> int:
        """Forget the last `count` places; how many there were to forget."""
        count = min(count, self.offset)
        self.offset -= count
        return count

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.keys, self.values) if t is not None)

    @staticmethod
    def merge(caches: Sequence[KVCache]) -> BatchKVCache:
        """A batch of these sequences, which goes on with the caches themselves."""
        return BatchKVCache(caches)


class BatchKVCache:
    """The caches of a layer for the sequences of a batch."""

    def __init__(self, sequences: Sequence[KVCache]):
        self.sequences = list(sequences)
        self._padding: Sequence[int] = [0] * len(self.sequences)

    @classmethod
    def of(cls, count: int) -> BatchKVCache:
        return cls([KVCache() for _ in range(count)])

    @property
    def offset(self) -> list[int]:
        return [sequence.offset for sequence in self.sequences]

    @property
    def state(self) -> tuple[()]:
        return ()

    def size(self) -> int:
        return max(self.offset, default=0)

    def empty(self) -> bool:
        return all(sequence.empty() for sequence in self.sequences)

    def is_trimmable(self) -> bool:
        return True

    def trim(self, count: int) -> int:
        """Forget the last `count` places of each; how many the longest had to forget."""
        return max((sequence.trim(count) for sequence in self.sequences), default=0)

    @property
    def nbytes(self) -> int:
        return sum(sequence.nbytes for sequence in self.sequences)

    def filter(self, indices: Sequence[int]) -> None:
        """Keep these sequences alone, in this order."""
        self.sequences = [self.sequences[index] for index in indices]

    def extend(self, other: BatchKVCache) -> None:
        self.sequences += other.sequences

    def extract(self, index: int) -> KVCache:
        """A copy of one sequence's cache, which the batch does not write to."""
        held, copied = self.sequences[index], KVCache()
        if held.keys is not None and held.values is not None:
            copied.update_and_fetch(held.keys[:, : held.offset], held.values[:, : held.offset])
        return copied

    def prepare(
        self, *, lengths: Sequence[int] | None = None, right_padding: Sequence[int] = ()
    ) -> None:
        """The next places of each sequence end in as many that `finalize` is to forget.

        Whatever is computed for them, no place before them sees it.
        """
        self._padding = right_padding or [0] * len(self.sequences)

    def finalize(self) -> None:
        for sequence, padding in zip(self.sequences, self._padding, strict=True):
            sequence.trim(padding)
        self._padding = [0] * len(self.sequences)
