"""Medians and their spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, and the quartiles between which half of them lie."""

    median: float
    first_quartile: float
    third_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def text(self, digits: int = 3) -> str:
        """`1.234 (1.200–1.260)`."""
        low, high = self.first_quartile, self.third_quartile
        return f"{self.median:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Of measurements that were made in turns: each pair is of one round, of the same minute.

    One more of either is of a round that was not finished.
    """
    rounds = min(len(numerators), len(denominators))
    pairs = zip(numerators[:rounds], denominators[:rounds], strict=True)
    return Spread.of([a / b for a, b in pairs if b])
