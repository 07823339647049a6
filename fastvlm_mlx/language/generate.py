"""From ids and a projected image to text: prefill, decode, stream, and the time of each.

`decode` makes the tokens. What is here is what surrounds it: the clock, the text, and that an
answer is computed a token at a time on the model's own thread.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import finalize

import mlx.core as mx
from tokenizers import Tokenizer

from fastvlm_mlx.bundle.config import TextConfig
from fastvlm_mlx.errors import FastVLMError, PromptError
from fastvlm_mlx.language.decode import decode
from fastvlm_mlx.language.detokenizer import Text
from fastvlm_mlx.language.sampling import Sampler, SamplingOptions, processors
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


@dataclass(frozen=True)
class GenerationResult:
    """An answer. `finish_reason` is "stop" (end token or stop string) or "length".

    `compute` says what the language model ran on and in which type, such as "MLX float16".

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
        # MLX refuses that a stream of one thread is left by another, as collecting would do.
        self._leave = finalize(self, worker.post, steps.close)
        self._leave.atexit = False
        worker.opened(steps)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self._worker.check()
        with self._turn:
            while not self._over:
                step = self._step()
                if isinstance(step, str):
                    if step:
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

    def close(self) -> None:
        """Give the answer up, and what it holds in memory; of no effect on one that is whole."""
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


def generate(
    model: RunningModel,
    tokenizer: Tokenizer,
    *,
    prompt: str,
    ids: list[int],
    projected: mx.array | None,
    options: SamplingOptions,
    eos_token_ids: frozenset[int],
    spent: Timings,
    prompt_s: float,
) -> Generator[str | GenerationResult]:
    """The text of each token, which may be empty, and last the result.

    Args:
        ids: the prompt with N placeholders where the image goes, [L].
        projected: the image, [N, D], or None.
        spent: seconds the image has cost so far; they count towards `ttft_s`.
        prompt_s: seconds that it took to make ids of the prompt; they are part of the prefill.

    Raises:
        PromptError: the prompt does not fit the context.
    """
    started = time.perf_counter() - prompt_s
    vocab_size = model.config.text.vocab_size
    room = check_room(model.config.text, ids)
    options.check_vocabulary(vocab_size)
    prompt_ids = mx.array(ids)
    steps = wired(
        decode(
            model.language_model,
            prompt_ids,
            model.embed_inputs(prompt_ids, projected),
            max_tokens=min(options.max_tokens, room),
            sampler=Sampler(options, vocab_size),
            processors=processors(options),
            ahead=model.lazy,
        )
    )
    tokens: list[int] = []
    text = Text(tokenizer, options.stop)
    finish_reason = "length"
    count = 0
    first = last = time.perf_counter()
    # However this ends, the memory is let go of by the thread that computes.
    with closing(steps):
        for token in steps:
            last = time.perf_counter()
            first = last if count == 0 else first
            count += 1
            if token in eos_token_ids:
                finish_reason = "stop"
                break
            tokens.append(token)
            yield text.add(token)
            if text.stopped:
                finish_reason = "stop"
                break
    yield text.flush()
    decode_s = last - first
    image_s = spent.preprocess_s + spent.encode_s + spent.project_s
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
            ttft_s=image_s + first - started,
            decode_s=decode_s,
            tokens_per_s=(count - 1) / decode_s if count > 1 and decode_s else 0.0,
        ),
        peak_memory_bytes=peak_memory_bytes(),
        compute=model.compute,
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


def peak_memory_bytes() -> int:
    """The process's peak resident memory, or MLX's own peak where a GPU holds more than that."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(peak if sys.platform == "darwin" else peak * 1024, mx.get_peak_memory())
