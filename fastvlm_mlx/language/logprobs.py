"""How likely each token of an answer was, and which others were likely in its place.

The distribution is the one that temperature 1 draws from: after the repetition penalty and the mask
of a JSON schema, as in mlx-lm, and before temperature, top-p, top-k and min-p.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import Any

import mlx.core as mx
from tokenizers import Tokenizer

MAX_TOP = 20


@dataclass(frozen=True)
class TokenLogprob:
    """A token at one place of an answer.

    Attributes:
        id: of the token.
        text: of the token alone; � stands for the part of a character.
        bytes: UTF-8, or None for a token that stands for no text.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens at its place, the likeliest first. Those that could not come are
            left out.
    """

    id: int
    text: str
    bytes: bytes | None
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


class Piece(str):
    """A piece of an answer whose log-probabilities were asked for.

    Attributes:
        logprobs: of the tokens whose text ends with this piece.
    """

    logprobs: tuple[TokenLogprob, ...]

    def __new__(cls, text: str, logprobs: tuple[TokenLogprob, ...]) -> Piece:
        made = super().__new__(cls, text)
        made.logprobs = logprobs
        return made


def says(piece: str) -> bool:
    """Whether a piece holds anything."""
    return piece != "" or bool(logprobs_of(piece))


def logprobs_of(piece: str) -> tuple[TokenLogprob, ...]:
    return piece.logprobs if isinstance(piece, Piece) else ()


@dataclass(frozen=True)
class Scores:
    """Log-probabilities at one place, which may be computed later.

    Attributes:
        chosen: of the token that was chosen, [1, 1].
        ids, top: the likeliest tokens and theirs, [1, N] each.
    """

    chosen: mx.array
    ids: mx.array
    top: mx.array

    @classmethod
    def of(cls, logits: mx.array, token: mx.array, count: int) -> Scores:
        """
        Args:
            logits: [1, V].
            token: [1].
            count: N, from 0 to `MAX_TOP`.
        """
        logits = logits.astype(mx.float32)
        # Rounding may bring a probability above 1.
        logprobs = mx.minimum(logits - mx.logsumexp(logits, axis=-1, keepdims=True), 0)
        chosen = mx.take_along_axis(logprobs, token[:, None], axis=-1)
        count = min(count, logits.shape[-1])
        ids = mx.argpartition(-logprobs, kth=max(count, 1) - 1, axis=-1)[:, :count]
        top = mx.take_along_axis(logprobs, ids, axis=-1)
        order = mx.argsort(-top, axis=-1)
        return cls(
            chosen, mx.take_along_axis(ids, order, axis=-1), mx.take_along_axis(top, order, axis=-1)
        )

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return self.chosen, self.ids, self.top


class Logprobs:
    """The log-probabilities of one answer, handed out with the text of their tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._added: dict[int, Any] = tokenizer.get_added_tokens_decoder()
        # Each with the places in the text where its own begins and ends.
        self._waiting: deque[tuple[int, int, TokenLogprob]] = deque()
        self.given: list[TokenLogprob] = []

    def add(self, token: int, scores: Scores, begin: int, end: int) -> None:
        """Take a token in.

        Args:
            begin, end: characters of the answer before it and after it.
        """
        ids: Any = scores.ids[0].tolist()
        top: Any = scores.top[0].tolist()
        likeliest = tuple(
            self._named(id, logprob)
            for id, logprob in zip(ids, top, strict=True)
            if isfinite(logprob)
        )
        self._waiting.append((begin, end, self._named(token, scores.chosen.item(), likeliest)))  # type: ignore[arg-type]

    def piece(self, text: str, shown: int) -> Piece:
        """A piece of text that was not empty, or nothing, with the tokens that it completes.

        Args:
            shown: characters of the answer with it.
        """
        taken = []
        while text and self._waiting and self._waiting[0][1] <= shown:
            taken.append(self._waiting.popleft()[2])
        self.given += taken
        return Piece(text, tuple(taken))

    def last(self, text: str, shown: int, *, stopped: bool) -> Piece:
        """The last piece. Of tokens that a stop string has cut off nothing is told."""
        taken = [each for begin, _, each in self._waiting if begin < shown or not stopped]
        self._waiting.clear()
        self.given += taken
        return Piece(text, tuple(taken))

    def _named(self, id: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        text, data = self._text_of(id)
        return TokenLogprob(id, text, data, logprob, top)

    def _text_of(self, id: int) -> tuple[str, bytes | None]:
        if added := self._added.get(id):
            return added.content, None if added.special else added.content.encode()
        token = self._tokenizer.id_to_token(id)
        # The vocabulary of a model may have more rows than its tokenizer has tokens.
        if token is None:
            return "", None
        values = _byte_values()
        # A token in other characters is text as it stands, as the tokenizers library has it.
        is_bytes = values.keys() >= set(token)
        data = bytes(map(values.__getitem__, token)) if is_bytes else token.encode()
        return data.decode(errors="replace"), data


@cache
def _byte_values() -> dict[str, int]:
    """The byte that each character of a byte-level BPE token stands for: printable ones for
    themselves, and from U+0100 on those of the bytes that can't be printed, in their order."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in own]
    return {chr(value): value for value in own} | {
        chr(256 + place): value for place, value in enumerate(others)
    }
