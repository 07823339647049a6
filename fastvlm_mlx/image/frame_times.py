"""Which frames of a video are looked at, and how their times are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from numbers import Integral, Real
from typing import Any

import numpy as np

from fastvlm_mlx.errors import OptionError

# Frames in between that make it worth to seek.
_WORTH_SEEKING = 16
# Decimals of a second that a time is written with at most.
_DECIMALS = 3


@dataclass(frozen=True)
class Index:
    """The frames of a clip as its packets have them, in the order in which they are shown.

    Attributes:
        positions: when each frame is shown, in units of `unit`; ascending.
        keyframes: the positions of those that can be decoded by themselves; ascending.
        last_duration: how long the last frame is shown, in units.
        unit: seconds.
        timed: whether a decoded frame says its position. Otherwise they are counted.
    """

    positions: np.ndarray
    keyframes: np.ndarray
    last_duration: int
    unit: Fraction
    timed: bool

    @property
    def length(self) -> int:
        """From the first frame's beginning to the last one's end, in units."""
        return int(self.positions[-1]) - int(self.positions[0]) + self.last_duration

    def seconds(self, position: int) -> float:
        return float((position - int(self.positions[0])) * self.unit)

    def numbered(self, number: int) -> int:
        """The position of a frame that is known by its number only."""
        return int(self.positions[min(number, len(self.positions) - 1)])

    def worth_seeking(self, at: int | None, wanted: int) -> int | None:
        """The last keyframe up to the wanted frame, if it is far behind the one at `at`."""
        place = int(np.searchsorted(self.keyframes, wanted, side="right")) - 1
        if place < 0:
            return None
        key = int(self.keyframes[place])
        begin = 0 if at is None else int(np.searchsorted(self.positions, at))
        between = int(np.searchsorted(self.positions, key)) - begin
        return key if between > _WORTH_SEEKING else None


@dataclass(frozen=True)
class Choice:
    """How frames are chosen: so many at even distances, or one in so many seconds.

    Of `count` frames each is the one that is shown in the middle of one of `count` equal parts.
    Otherwise they are those that are shown at 0, `every_s`, 2 · `every_s` … seconds. A frame that
    would be chosen twice is chosen once.
    """

    count: int | None
    every_s: Fraction | None

    @classmethod
    def checked(cls, count: Any, fps: Any, every_s: Any) -> Choice:
        """Raises OptionError: not exactly one of them is given, or it is no positive number."""
        given = {"frames": count, "fps": fps, "every": every_s}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            found = f"{' and '.join(f'--{name}' for name in names)} are given together"
            raise OptionError(
                f"{found if names else 'none of --frames, --fps and --every is given'}: expected "
                "one of --frames, --fps and --every"
            )
        if count is not None:
            if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
                raise OptionError(
                    f"--frames is {ascii(count)[:40]}: expected a whole number, 1 or more"
                )
            return cls(int(count), None)
        number = fps if every_s is None else every_s
        real = isinstance(number, Real) and not isinstance(number, bool)
        # What is not a number is in no range.
        if not real or not 1e-6 <= float(number) <= 1e6:
            raise OptionError(
                f"--{names[0]} is {ascii(number)[:40]}: expected a number from 0.000001 to "
                "1,000,000"
            )
        # 0.1 is meant as it is written, and not as the nearest binary fraction.
        exact = Fraction(repr(float(number)))
        return cls(None, exact if every_s is not None else 1 / exact)

    def of(self, index: Index) -> list[int]:
        """The positions of the frames that are chosen, ascending."""
        if self.every_s is None:
            step = Fraction(index.length, self.count or 1)
            offset = step / 2
        else:
            step, offset = self.every_s / index.unit, Fraction(0)
        positions = index.positions
        first, chosen, target = int(positions[0]), [], offset
        while target < index.length:
            place = int(np.searchsorted(positions, first + floor(target), side="right")) - 1
            chosen.append(int(positions[place]))
            if place + 1 == len(positions):
                break
            # The first of the targets at which another frame is shown.
            following = Fraction(int(positions[place + 1]) - first)
            target = offset + step * max(ceil((following - offset) / step), 1)
        return chosen


def clocks(times_s: Sequence[float]) -> list[str]:
    """Times as a player shows them, "0:03"; with as many decimals as keep them apart."""
    for decimals in range(_DECIMALS + 1):
        written = [_clock(time, decimals) for time in times_s]
        if len(set(written)) == len(set(times_s)):
            break
    return written


def _clock(time_s: float, decimals: int) -> str:
    # A little more, for a time such as 0.3, of which a binary fraction falls short.
    ticks = floor(time_s * 10**decimals + 1e-6)
    seconds, fraction = divmod(ticks, 10**decimals)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    return f"{clock}.{fraction:0{decimals}}" if decimals else clock
