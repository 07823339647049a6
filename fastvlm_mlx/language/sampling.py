"""Sampling: the options, their limits, and a random key for each generation.

Temperature, nucleus and the rest are mlx-lm's, in its order. Around them is what keeps an extreme
value from overflowing: it gives what its limit gives. Chance comes from a key that belongs to one
generation; MLX's own state, which is the user's, is neither read nor changed.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from math import isfinite
from numbers import Integral, Real
from typing import Any

import mlx.core as mx
import numpy as np

from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.imports import part
from fastvlm_mlx.language.logprobs import MAX_TOP
from fastvlm_mlx.language.structured.json_schema import schema_text

sampling = part("mlx_lm.sample_utils")

# Log-probabilities of float32 are rounded by as much; a smaller temperature would tell apart
# tokens that only rounding does.
_GREEDY_BELOW = 1e-6
# Beyond these, products with logits leave float32; they order tokens as anything further out does.
_LEAST, _MOST = 1e-30, 1e30
# Tokens that a repetition penalty looks back on, as in mlx-lm.
_CONTEXT = 20
MAX_STOP_CHARACTERS = 100_000


@dataclass(frozen=True)
class _Range:
    """Whole numbers or any, from `low` on, or beyond it where it is `open`, up to `high`."""

    kind: type
    low: float
    high: float | None = None
    open: bool = False
    optional: bool = False

    def __str__(self) -> str:
        kind = "a whole number, " if self.kind is int else ""
        low = f"more than {self.low}" if self.open else f"{self.low} or more"
        return kind + (low if self.high is None else f"from {self.low} to {self.high}")

    def read(self, name: str, value: Any) -> float | int | None:
        """Raises OptionError: not such a number, or out of range."""
        if value is None and self.optional:
            return None
        number: float | int | None = None
        numeric = Integral if self.kind is int else Real
        # True counts as a number in Python, but nobody means one by it.
        if isinstance(value, numeric) and not isinstance(value, bool):
            try:
                number = self.kind(value)
            except (OverflowError, ValueError):
                number = None
        if (
            number is None
            or not (self.kind is int or isfinite(number))
            or number < self.low
            or (self.open and number == self.low)
            or (self.high is not None and number > self.high)
        ):
            expected = str(self) + (", or None" if self.optional else "")
            raise OptionError(f"{_flag(name)} is {_shown(value)}: expected {expected}")
        return number


_RANGES = {
    "max_tokens": _Range(int, 1),
    "temperature": _Range(float, 0),
    "top_p": _Range(float, 0, 1),
    "top_k": _Range(int, 0),
    "min_p": _Range(float, 0, 1),
    "repetition_penalty": _Range(float, 0, open=True, optional=True),
    "seed": _Range(int, 0, 2**64 - 1, optional=True),
    "logprobs": _Range(int, 0, MAX_TOP, optional=True),
}


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen, and when to stop. Temperature 0 is greedy.

    Numbers may be numpy's. An extreme value means its limit: the least temperature, `top_p` 0 and
    `min_p` 1 all take the likeliest token.

    Attributes:
        max_tokens: the longest answer; the context ends it in any case.
        top_p: sample from this much probability; 1 is all.
        top_k: sample from this many tokens; 0 is all.
        min_p: sample above this share of the likeliest token's probability.
        repetition_penalty: above 1 makes recent tokens less likely.
        seed: makes an answer repeatable, whatever else is sampled in between.
        stop: texts that end the answer, of 100,000 characters in all; one alone may be a str.
        json_schema: the answer is JSON that meets it: a dict, JSON text, or a pydantic model. It is
            held as JSON text.
        logprobs: how likely each token was is told too, with so many of the likeliest at its
            place, up to 20; None tells nothing.

    Raises:
        OptionError: a value of another type, or outside its range; a schema that can't be followed;
            or one while the `json` extra is not installed.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    json_schema: Any = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, range_ in _RANGES.items():
            object.__setattr__(self, name, range_.read(name, getattr(self, name)))
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", schema_text(self.json_schema))

    def check_vocabulary(self, vocab_size: int) -> None:
        if self.top_k >= vocab_size:
            raise OptionError(
                f"--top-k is {_shown(self.top_k)}: expected less than the vocabulary's "
                f"{vocab_size:,}"
            )


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, list | tuple | set | frozenset):
        raise OptionError(f"--stop is {_shown(stop)}: expected a text, or a list of texts")
    for text in stop:
        if not isinstance(text, str):
            raise OptionError(f"--stop holds {_shown(text)}: expected texts alone")
        if not text:
            raise OptionError("--stop is empty: expected a text that ends the answer")
    characters = sum(map(len, stop))
    if characters > MAX_STOP_CHARACTERS:
        raise OptionError(
            f"--stop holds {characters:,} characters: expected at most {MAX_STOP_CHARACTERS:,} "
            "in all"
        )
    return tuple(stop)


def resolve_options(options: SamplingOptions | None, changes: Mapping[str, Any]) -> SamplingOptions:
    """The options with fields changed by name.

    Raises:
        OptionError: no options, a name that is no field, or as `SamplingOptions`.
    """
    if options is None:
        options = SamplingOptions()
    if not isinstance(options, SamplingOptions):
        raise OptionError(
            f"the options are {_shown(options)}: expected SamplingOptions, or its fields as "
            "keywords"
        )
    names = [field.name for field in fields(SamplingOptions)]
    for name in changes.keys() - set(names):
        nearest = get_close_matches(name, names, 1, 0.4) or names
        raise OptionError(
            f"{_flag(name)} is no option of a generation: did you mean "
            f"{', '.join(map(_flag, nearest))}?"
        )
    return replace(options, **changes)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    """A value in a message: numbers as they are written, texts in quotes, others by their type."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int) and abs(value) >= 10**18:
        return f"a number of {value.bit_length():,} bits"
    if isinstance(value, int | float | np.number):
        return str(value)
    if isinstance(value, str):
        return ascii(value if len(value) <= 40 else value[:40] + "…")
    return f"of type {type(value).__name__}"


class Sampler:
    """Logits [1, V] → a token [1]."""

    def __init__(self, options: SamplingOptions, vocab_size: int):
        self._options = options
        self._greedy = (
            options.temperature < _GREEDY_BELOW
            or options.top_k == 1
            or options.min_p == 1
            # The likeliest token alone has that much.
            or options.top_p <= 1 / vocab_size
        )
        seed = secrets.randbits(64) if options.seed is None else options.seed
        self._key = mx.random.key(seed)

    def __call__(self, logits: mx.array) -> mx.array:
        if self._greedy:
            # Without the sum over the vocabulary, which takes a CPU 2 ms of the 25 for a token.
            return mx.argmax(logits, axis=-1)
        options = self._options
        logprobs = (logits - mx.logsumexp(logits, keepdims=True)).astype(mx.float32)
        if options.top_p < 1:
            logprobs = sampling.apply_top_p(logprobs, options.top_p)
        if options.min_p > 0:
            logprobs = sampling.apply_min_p(logprobs, options.min_p)
        if options.top_k > 0:
            logprobs = sampling.apply_top_k(logprobs, options.top_k)
        logprobs = logprobs - mx.max(logprobs, axis=-1, keepdims=True)
        self._key, key = mx.random.split(self._key)
        # Never 0, which would make NaN of what was left out as -∞.
        return mx.random.categorical(logprobs * max(1 / options.temperature, _LEAST), key=key)


def processors(options: SamplingOptions) -> list[Callable[[mx.array, mx.array], mx.array]]:
    """What changes logits [1, V] by the tokens [L] before them."""
    if options.repetition_penalty is None:
        return []
    penalty = min(max(options.repetition_penalty, _LEAST), _MOST)

    def penalize(tokens: mx.array, logits: mx.array) -> mx.array:
        recent = tokens[-_CONTEXT:]
        logits = logits.astype(mx.float32)
        found = logits[:, recent]
        logits[:, recent] = mx.where(found < 0, found * penalty, found / penalty)
        return logits

    return [penalize]
