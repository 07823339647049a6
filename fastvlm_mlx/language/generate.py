"""From ids and a projected image to text: prefill, decode, stream, and the time of each.

`decode` makes the tokens. What is here is what surrounds it: the clock, the text, and that an
answer is computed a token at a time on the model's own thread.
"""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import finalize

import mlx.core as mx
from tokenizers import Tokenizer

from fastvlm_mlx.bundle.config import TextConfig
from fastvlm_mlx.errors import FastVLMError, PromptError
from fastvlm_mlx.language.decode import Continuation, decode
from fastvlm_mlx.language.detokenizer import Text
from fastvlm_mlx.language.kept import Kept, Prompt, Span, content_hash, cut, keys
from fastvlm_mlx.language.prompt.messages import ORIGINAL
from fastvlm_mlx.language.prompt.template import TURN_START, Encoded
from fastvlm_mlx.language.sampling import Sampler, SamplingOptions, processors
from fastvlm_mlx.language.structured.constraint import Constraint
from fastvlm_mlx.language.wired_memory import wired
from fastvlm_mlx.language.worker import Worker

if TYPE_CHECKING:
    from fastvlm_mlx.language.model import RunningModel


@dataclass(frozen=True)
class Timings:
    """Seconds, each stage by itself.

    Attributes:
        load_s: all that loading has taken so far: `load`, which reads the language model, and the
            encoder, which is loaded at the first image. It is no part of `ttft_s`.
        preprocess_s, encode_s, project_s: the stages of the image, zero where its features were
            reused.
        prefill_s: from the prompt to the first token.
        ttft_s: from the image in memory and the prompt to the first token.
        decode_s: from the first token to the last one.
        tokens_per_s: how many tokens follow the first one in a second of `decode_s`.
    """

    load_s: float = 0.0
    preprocess_s: float = 0.0
    encode_s: float = 0.0
    project_s: float = 0.0
    prefill_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    tokens_per_s: float = 0.0

    @classmethod
    def of_images(cls, each: Iterable[Timings]) -> Timings:
        """What several images took together."""
        total = cls()
        for one in each:
            total = replace(
                total,
                preprocess_s=total.preprocess_s + one.preprocess_s,
                encode_s=total.encode_s + one.encode_s,
                project_s=total.project_s + one.project_s,
            )
        return total


@dataclass(frozen=True)
class GenerationResult:
    """An answer. `finish_reason` is "stop" (end token, stop string, or JSON that is whole) or
    "length".

    `compute` says what the language model ran on and in which type, such as "MLX float16".

    `tokens` are the generated ids without the end token; `generation_tokens` counts what was
    decoded, the end token included. `cached_tokens` of the prompt's were computed for an earlier
    question, those of the image among them. `peak_memory_bytes` is the process's.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    generation_tokens: int
    finish_reason: str
    timings: Timings
    peak_memory_bytes: int
    compute: str

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        del data["tokens"]
        return data


class Generation:
    """An answer on its way: iterate over it for text as it comes, then read `result`.

    It is its own iterator and goes on where it was left, in whatever thread. Where several threads
    iterate at once, each piece goes to one of them. What Ctrl-C interrupts is the waiting: the next
    piece is the one that was waited for.
    """

    def __init__(self, worker: Worker, steps: Generator[str | GenerationResult]):
        self._worker = worker
        self._steps = steps
        self._turn = Lock()
        self._awaited: Future[str | GenerationResult | None] | None = None
        self._result: GenerationResult | None = None
        self._error: BaseException | None = None
        self._over = False
        self._closed = False
        self._shown: list[str] = []
        # MLX refuses that a stream of one thread is left by another, as collecting would do.
        self._leave = finalize(self, worker.post, steps.close)
        self._leave.atexit = False
        worker.opened(steps)

    def __iter__(self) -> Iterator[str]:
        return self

    async def __aiter__(self) -> AsyncGenerator[str]:
        """`async for piece in generation`: the event loop is free while a token is computed. What
        is left half way, or cancelled, is closed."""
        try:
            while (piece := await asyncio.to_thread(next, self, None)) is not None:
                yield piece
        finally:
            self.close()

    def __next__(self) -> str:
        self._worker.check()
        with self._turn:
            while not self._over:
                step = self._step()
                if isinstance(step, str):
                    if step:
                        self._shown.append(step)
                        return step
                else:
                    self._result = step
                    self._over = True
        raise StopIteration

    def _step(self) -> str | GenerationResult | None:
        if self._awaited is None:
            self._awaited = self._worker.submit(next, self._steps, None)
        awaited = self._awaited
        try:
            step = awaited.result()
        except BaseException as error:
            if awaited.done() and not awaited.cancelled() and awaited.exception() is error:
                self._error, self._over, self._awaited = error, True, None
            # Or the waiting alone was interrupted.
            raise
        self._awaited = None
        return step

    @property
    def text(self) -> str:
        """What has been iterated over so far."""
        return "".join(self._shown)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come: it is whole, was closed, or has failed."""
        return self._over

    @property
    def is_closed(self) -> bool:
        """Whether it was closed before it was whole."""
        return self._closed

    def close(self) -> None:
        """Give the answer up, and what it holds in memory; of no effect on one that is whole."""
        self._closed |= not self._over
        self._over = True
        self._leave()

    @property
    def result(self) -> GenerationResult:
        """The whole answer; what has not been iterated over yet is generated first.

        Raises:
            FastVLMError: the generation was closed, or has failed.
        """
        for _ in self:
            pass
        if self._result is None:
            if isinstance(self._error, FastVLMError):
                raise self._error
            why = "was closed"
            if self._error is not None:
                why = f"failed ({type(self._error).__name__}: {self._error})"
            raise FastVLMError(
                f"the generation {why} before it had a result: ask again"
            ) from self._error
        return self._result


@dataclass(frozen=True)
class Question:
    """A conversation as token ids with the placeholders, and the seconds that this took.

    Attributes:
        constraint: what the one answer to it must lead to, or None.
    """

    encoded: Encoded
    options: SamplingOptions
    prompt_s: float
    constraint: Constraint | None = None


class Answer:
    """An answer token by token: its text, its end, its times.

    Attributes:
        model: what computes it.
        continued: the prompt, and what follows it.
        ended: whether the latest token was the last.
    """

    def __init__(
        self,
        model: RunningModel,
        tokenizer: Tokenizer,
        question: Question,
        projected: Sequence[mx.array],
        *,
        eos_token_ids: frozenset[int],
        spent: Timings,
    ):
        """
        Args:
            question: its ids with N placeholders where an image goes.
            projected: its images, [N, D] each.
            eos_token_ids: end the answer.
            spent: seconds the images have cost so far; they count towards `ttft_s`.

        Raises:
            PromptError: the prompt does not fit the context.
        """
        options, text = question.options, model.config.text
        self._started = self._first = self._last = time.perf_counter() - question.prompt_s
        room = check_room(text, question.encoded)
        options.check_vocabulary(text.vocab_size)
        self.continued = Continuation(
            _prompt(model, tokenizer, question.encoded, projected),
            max_tokens=min(options.max_tokens, room),
            sampler=Sampler(options, text.vocab_size),
            processors=processors(options),
            constraint=question.constraint,
        )
        self.model, self._question, self._spent = model, question, spent
        self._eos_token_ids = eos_token_ids
        self._text = Text(tokenizer, options.stop)
        self._tokens: list[int] = []
        self._count = 0
        self._finish_reason = "length"
        self.ended = False

    def add(self, token: int) -> str:
        """The text that can be shown now.

        Raises:
            OptionError: the schema can't be followed any further.
        """
        self._last = time.perf_counter()
        if not self._count:
            self._first = self._last
        constraint, whole = self.continued.constraint, False
        if constraint is not None:
            constraint.add(self._count, token)
            whole = constraint.whole
        self._count += 1
        shown = ""
        if token in self._eos_token_ids:
            self._finish_reason, self.ended = "stop", True
        else:
            self._tokens.append(token)
            shown = self._text.add(token)
            if self._text.stopped or whole:
                self._finish_reason, self.ended = "stop", True
        self.ended |= self._count == self.continued.max_tokens
        return shown

    def flush(self) -> str:
        """The text that waited for what did not come."""
        return self._text.flush()

    def result(self) -> GenerationResult:
        """After its end, and after `flush`."""
        encoded, spent = self._question.encoded, self._spent
        decode_s = self._last - self._first
        prefill_s = self._first - self._started
        return GenerationResult(
            prompt=encoded.prompt,
            text=self._text.shown,
            tokens=tuple(self._tokens),
            prompt_tokens=len(encoded.ids),
            image_tokens=sum(map(len, encoded.places)),
            cached_tokens=self.continued.cached_tokens,
            generation_tokens=self._count,
            finish_reason=self._finish_reason,
            timings=replace(
                spent,
                prefill_s=prefill_s,
                ttft_s=spent.preprocess_s + spent.encode_s + spent.project_s + prefill_s,
                decode_s=decode_s,
                tokens_per_s=(self._count - 1) / decode_s if self._count > 1 and decode_s else 0.0,
            ),
            peak_memory_bytes=peak_memory_bytes(),
            compute=self.model.compute,
        )


def _prompt(
    model: RunningModel, tokenizer: Tokenizer, encoded: Encoded, projected: Sequence[mx.array]
) -> Prompt:
    mx.eval(*projected)
    ids, images = (
        encoded.ids,
        [
            Span(place.start, place.stop, content_hash(image))
            for place, image in zip(encoded.places, projected, strict=True)
        ],
    )
    ends = cut(ids, images, tokenizer.token_to_id(TURN_START))
    array = mx.array(ids)
    return Prompt(array, model.embed_inputs(array, *projected), ends, keys(ids, images, ends))


def generate(make: Callable[[], Answer], kept: Kept) -> Generator[str | GenerationResult]:
    """The text of each token, which may be empty, and last the result.

    Args:
        make: the answer. It is called here, on the thread that computes.
        kept: what earlier prompts have computed.

    Raises:
        PromptError: the prompt does not fit the context.
    """
    answer = make()
    model = answer.model
    steps = wired(decode(model.language_model, answer.continued, kept, ahead=model.lazy))
    # However this ends, the memory is let go of by the thread that computes.
    with closing(steps):
        for token in steps:
            yield answer.add(token)
            if answer.ended:
                break
    yield answer.flush()
    yield answer.result()


def check_room(config: TextConfig, encoded: Encoded) -> int:
    """Tokens that the context has left after the prompt.

    Raises:
        PromptError: none.
    """
    room = config.max_position_embeddings - len(encoded.ids)
    if room < 1:
        what, cure = "prompt", "shorten the prompt"
        if encoded.turns > 1:
            what, cure = "conversation", "begin a new one, or ask a shorter question"
        elif len(encoded.places) > 1:
            cure = "give fewer images, or shorten the prompt"
        elif any(image.detail == ORIGINAL for image in encoded.images):
            cure = "give the image a lower detail, or shorten the prompt"
        of_images = sum(map(len, encoded.places))
        count = len(encoded.places)
        shares = f", {of_images:,} of them of {count} images," if count > 1 else ""
        raise PromptError(
            f"the {what} has {len(encoded.ids):,} tokens{shares} and the context is "
            f"{config.max_position_embeddings:,}: {cure}"
        )
    return room


def peak_memory_bytes() -> int:
    """The process's peak resident memory, or MLX's own peak where a GPU holds more than that."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(peak if sys.platform == "darwin" else peak * 1024, mx.get_peak_memory())
