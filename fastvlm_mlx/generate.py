"""From ids and a projected picture to text: prefill, decode, stream, and the time of each.

The loop is mlx-lm's `generate_step`. What is here is what surrounds it: sampling options, stop
strings, text that never ends in half a character, and the clock.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import mlx.core as mx
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from fastvlm_mlx.config import TextConfig
from fastvlm_mlx.errors import OptionError, PromptError
from fastvlm_mlx.imports import part
from fastvlm_mlx.model import Model

sampling = part("mlx_lm.sample_utils")


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen, and when to stop. Temperature 0 is greedy.

    Raises:
        OptionError: a value outside its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_tokens", 1, float("inf")),
            ("temperature", 0, float("inf")),
            ("top_p", 0, 1),
            ("top_k", 0, float("inf")),
            ("min_p", 0, 1),
            ("repetition_penalty", 1e-3, float("inf")),
            ("seed", 0, 2**64 - 1),
        ):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and low <= value <= high):
                limit = f"{low} or more" if high == float("inf") else f"from {low} to {high}"
                raise OptionError(f"--{name.replace('_', '-')} is {value}: expected {limit}")
        if "" in self.stop:
            raise OptionError("--stop is empty: expected a text that ends the answer")

    def check_vocabulary(self, vocab_size: int) -> None:
        if self.top_k >= vocab_size:
            raise OptionError(
                f"--top-k is {self.top_k}: expected less than the vocabulary's {vocab_size:,}"
            )


@dataclass(frozen=True)
class Timings:
    """Seconds, each stage by itself. `ttft_s` runs from the picture in memory and the prompt to
    the first token; the stages of the picture are zero where its features were reused. `load_s`
    is all that loading has taken so far, what was put off to the first use included."""

    load_s: float = 0.0
    preprocess_s: float = 0.0
    encode_s: float = 0.0
    project_s: float = 0.0
    prefill_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    tokens_per_s: float = 0.0


@dataclass(frozen=True)
class GenerationResult:
    """An answer. `finish_reason` is "stop" (end token or stop string) or "length".

    `tokens` are the generated ids without the end token; `generation_tokens` counts what was
    decoded, the end token included. `peak_memory_bytes` is the process's.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    image_tokens: int
    generation_tokens: int
    finish_reason: str
    timings: Timings
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        del data["tokens"]
        return data


class Generation:
    """An answer on its way: iterate over it for text as it comes, then read `result`."""

    def __init__(self, pieces: Iterator[str | GenerationResult]):
        self._pieces = pieces
        self._result: GenerationResult | None = None

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            if isinstance(piece, GenerationResult):
                self._result = piece
            else:
                yield piece

    @property
    def result(self) -> GenerationResult:
        """The whole answer; what has not been iterated over yet is generated first."""
        for _ in self:
            pass
        if self._result is None:
            raise RuntimeError("the generation was interrupted before it had a result")
        return self._result


def generate(
    model: Model,
    tokenizer: Tokenizer,
    *,
    prompt: str,
    ids: list[int],
    projected: mx.array | None,
    options: SamplingOptions,
    eos_token_ids: frozenset[int],
    spent: Timings,
    started: float,
) -> Iterator[str | GenerationResult]:
    """Pieces of text, and last the result.

    Args:
        ids: the prompt with N placeholders where the picture goes, [L].
        projected: the picture, [N, D], or None.
        spent: seconds the picture has cost so far; they count towards `ttft_s`.
        started: `time.perf_counter()` when the prompt was given.

    Raises:
        PromptError: the prompt does not fit the context.
    """
    from mlx_lm.generate import generate_step

    from fastvlm_mlx.wired import wired

    room = check_room(model.config.text, ids)
    options.check_vocabulary(model.config.text.vocab_size)
    if options.seed is not None:
        mx.random.seed(options.seed)
    prompt_ids = mx.array(ids)
    steps = generate_step(
        prompt_ids,
        model.language_model,
        input_embeddings=model.embed_inputs(prompt_ids, projected),
        # One step more than wanted is computed in any case; the limit is kept below.
        max_tokens=min(options.max_tokens, room),
        sampler=sampling.make_sampler(
            options.temperature, options.top_p, options.min_p, 1, options.top_k
        ),
        logits_processors=sampling.make_logits_processors(
            repetition_penalty=options.repetition_penalty
        ),
    )
    tokens: list[int] = []
    text = _Text(tokenizer, options.stop)
    finish_reason = "length"
    count = 0
    steps = wired(steps)
    first = last = time.perf_counter()
    for token, _ in steps:
        last = time.perf_counter()
        first = last if count == 0 else first
        count += 1
        if token in eos_token_ids:
            finish_reason = "stop"
            break
        tokens.append(token)
        if piece := text.add(token):
            yield piece
        if text.stopped:
            finish_reason = "stop"
            break
    if piece := text.flush():
        yield piece
    decode_s = last - first
    picture_s = spent.preprocess_s + spent.encode_s + spent.project_s
    yield GenerationResult(
        prompt=prompt,
        text=text.shown,
        tokens=tuple(tokens),
        prompt_tokens=len(ids),
        image_tokens=0 if projected is None else projected.shape[0],
        generation_tokens=count,
        finish_reason=finish_reason,
        timings=Timings(
            load_s=spent.load_s,
            preprocess_s=spent.preprocess_s,
            encode_s=spent.encode_s,
            project_s=spent.project_s,
            prefill_s=first - started,
            ttft_s=picture_s + first - started,
            decode_s=decode_s,
            tokens_per_s=(count - 1) / decode_s if count > 1 and decode_s else 0.0,
        ),
        peak_memory_bytes=peak_memory_bytes(),
    )


def check_room(config: TextConfig, ids: list[int]) -> int:
    """Tokens that the context has left after the prompt.

    Raises:
        PromptError: none.
    """
    room = config.max_position_embeddings - len(ids)
    if room < 1:
        raise PromptError(
            f"the prompt has {len(ids):,} tokens and the context is "
            f"{config.max_position_embeddings:,}: shorten the prompt"
        )
    return room


class _Text:
    """Tokens in, text out: whole characters only, and nothing that may begin a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._pending = ""
        self.shown = ""
        self.stopped = False

    def add(self, token: int) -> str:
        self._pending += self._decoder.step(self._tokenizer, token) or ""
        found = [at for stop in self._stop if (at := self._pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._show(min(found), drop=True)
        return self._show(len(self._pending) - self._held())

    def flush(self) -> str:
        """What was held back for a stop string that did not come."""
        return "" if self.stopped else self._show(len(self._pending))

    def _held(self) -> int:
        """Length of the longest end of the pending text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-length:]) for stop in self._stop):
                return length
        return 0

    def _show(self, length: int, *, drop: bool = False) -> str:
        piece, rest = self._pending[:length], self._pending[length:]
        self._pending = "" if drop else rest
        self.shown += piece
        return piece


def peak_memory_bytes() -> int:
    """The process's peak resident memory, or MLX's own peak where a GPU holds more than that."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(peak if sys.platform == "darwin" else peak * 1024, mx.get_peak_memory())
