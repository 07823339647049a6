"""The answers of `chat/completions`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from secrets import token_hex
from typing import Any

import msgspec

from fastvlm_mlx.language.generate import GenerationResult
from fastvlm_mlx.language.logprobs import TokenLogprob, logprobs_of
from fastvlm_mlx.serve.errors import ApiError
from fastvlm_mlx.serve.formats.requests import Wanted


class Completions:
    """Answers to a request in the form of chat completions."""

    def __init__(self, wanted: Wanted):
        self._wanted = wanted
        self._about = {
            "id": f"chatcmpl-{token_hex(12)}",
            "created": int(time.time()),
            "model": wanted.model,
        }

    def whole(self, results: list[GenerationResult]) -> dict[str, Any]:
        return {
            **self._about,
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": result.text, "refusal": None},
                    "logprobs": self._logprobs(result.logprobs or ()),
                    "finish_reason": result.finish_reason,
                }
                for index, result in enumerate(results)
            ],
            "usage": usage(results),
            "timings": timings(results),
        }

    def begin(self) -> Iterator[bytes]:
        for index in range(self._wanted.n):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str) -> Iterator[bytes]:
        logprobs = self._logprobs(logprobs_of(text))
        yield self._chunk(index, {"content": str(text)}, logprobs=logprobs)

    def ended(self, index: int, result: GenerationResult) -> Iterator[bytes]:
        yield self._chunk(index, {}, result.finish_reason)

    def end(self, results: list[GenerationResult]) -> Iterator[bytes]:
        if self._wanted.include_usage:
            yield event(
                {
                    **self._about,
                    "object": "chat.completion.chunk",
                    "choices": [],
                    "usage": usage(results),
                    "timings": timings(results),
                }
            )
        yield b"data: [DONE]\n\n"

    def failed(self, error: ApiError) -> Iterable[bytes]:
        yield event(error.body())

    def _logprobs(self, each: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if self._wanted.options.logprobs is None:
            return None
        return {"content": told(each), "refusal": None}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._about, "object": "chat.completion.chunk", "choices": [choice]}
        if self._wanted.include_usage:
            chunk["usage"] = None
        return event(chunk)


def event(data: dict[str, Any], name: str = "") -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


def told(each: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """Log-probabilities in the form that both kinds of answer have."""
    return [{**_one(token), "top_logprobs": [_one(other) for other in token.top]} for token in each]


def _one(token: TokenLogprob) -> dict[str, Any]:
    data = None if token.bytes is None else list(token.bytes)
    return {"token": token.text, "logprob": token.logprob, "bytes": data}


def usage(results: list[GenerationResult]) -> dict[str, Any]:
    """Tokens; the prompt counts once, however many answers it has."""
    prompt, answers = results[0], sum(result.generation_tokens for result in results)
    return {
        "prompt_tokens": prompt.prompt_tokens,
        "completion_tokens": answers,
        "total_tokens": prompt.prompt_tokens + answers,
        "prompt_tokens_details": {"cached_tokens": prompt.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def timings(results: list[GenerationResult]) -> dict[str, float]:
    """Seconds of the first answer's stages, which OpenAI does not tell."""
    times = msgspec.to_builtins(results[0].timings)
    return {name: round(value, 6) for name, value in times.items()}
