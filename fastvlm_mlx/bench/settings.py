"""What is measured: bundles, image sizes, prompt lengths, compute units, and how often."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import OptionError

# Nobody waits for more, and a number that is a typing error is told at once.
MOST = 1_000_000


@dataclass(frozen=True)
class Setting:
    """One way to ask: a row of the table for each bundle.

    Attributes:
        image_size: the encoder's input in pixels, None for the bundle's own.
        prompt_tokens: of the question, without the image and what the chat template adds.
    """

    image_size: int | None
    prompt_tokens: int
    compute_units: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often.

    Attributes:
        bundles: one, or two that take turns.
        image: a file, or None for a generated image.
        max_tokens: decoded after each first question, end tokens or not.
        runs, warmup: for each bundle and setting; the latter don't count.
        encoder_compute: as `fastvlm_mlx.load` takes it.
    """

    bundles: tuple[Path, ...]
    image: Path | None = None
    image_sizes: tuple[int | None, ...] = (None,)
    prompt_tokens: tuple[int, ...] = (32,)
    compute_units: tuple[str, ...] = ("auto",)
    max_tokens: int = 64
    runs: int = 5
    warmup: int = 1
    encoder_compute: str = "auto"

    def __post_init__(self) -> None:
        """Raises OptionError: a number is none that can be measured with."""
        for name, value, least in (
            ("--max-tokens", self.max_tokens, 2),
            ("--runs", self.runs, 1),
            ("--warmup", self.warmup, 0),
        ):
            if not least <= value <= MOST:
                raise OptionError(f"{name} is {value}: expected a number from {least} to {MOST:,}")

    @property
    def settings(self) -> Iterator[Setting]:
        for size, units, tokens in product(
            self.image_sizes, self.compute_units, self.prompt_tokens
        ):
            yield Setting(size, tokens, units)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """`512,1024` → (512, 1024).

    Raises:
        OptionError: anything else than whole numbers from 1 on, each once.
    """
    words = [word.strip() for word in text.split(",")]
    found = [int(w) for w in words if w.isascii() and w.isdecimal() and len(w) < 10]
    if len(found) != len(words) or len({*found}) != len(found) or not min(found, default=0):
        raise OptionError(
            f"{option} is {text!r}: expected whole numbers from 1 on with commas between them, "
            "each of them once, such as 512,1024"
        )
    return tuple(found)


def names(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """`cpu,gpu` → ("cpu", "gpu").

    Raises:
        OptionError: a name that is not known, or one that is given twice.
    """
    found = tuple(word.strip() for word in text.split(","))
    if not {*found} <= {*known} or len({*found}) != len(found):
        raise OptionError(
            f"{option} is {text!r}: expected some of {', '.join(known)} with commas between them, "
            "each of them once"
        )
    return found
