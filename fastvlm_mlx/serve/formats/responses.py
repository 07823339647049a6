"""The requests and answers of `responses`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from secrets import token_hex
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from fastvlm_mlx.language.generate import GenerationResult
from fastvlm_mlx.language.logprobs import TokenLogprob, logprobs_of
from fastvlm_mlx.serve.errors import ApiError
from fastvlm_mlx.serve.formats.completions import event, timings, told
from fastvlm_mlx.serve.formats.requests import (
    Detail,
    ImageRef,
    Messages,
    Role,
    Temperature,
    Tokens,
    TopLogprobs,
    TopP,
    Turn,
    Wanted,
    check_unsupported,
    convert,
    logprobs,
    parse,
    schema_of,
    wanted,
)
from fastvlm_mlx.serve.limits import Settings


class InputText(Struct, frozen=True, tag="input_text"):
    """A text of the user's."""

    text: str


class OutputText(Struct, frozen=True, tag="output_text"):
    """A text of an earlier answer."""

    text: str


class InputImage(Struct, frozen=True, tag="input_image"):
    """An image of the user's."""

    image_url: str
    detail: Detail | None = None


class Item(Struct, frozen=True):
    """A turn of `responses`."""

    role: Role
    content: str | list[InputText | OutputText | InputImage]
    type: Literal["message"] = "message"


class TextOptions(Struct, frozen=True):
    """The form of the answer."""

    format: dict[str, Any] | None = None


Metadata = dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]]


class ResponsesRequest(Struct, frozen=True):
    """The body of `responses`, as far as it is looked at."""

    model: str
    input: str | Annotated[list[Item], Messages]
    instructions: str | None = None
    max_output_tokens: Tokens = None
    temperature: Temperature = None
    top_p: TopP = None
    stream: bool | None = None
    text: TextOptions | None = None
    # As OpenAI limits it; it comes back in the answer.
    metadata: Annotated[Metadata, Meta(max_length=16)] | None = None
    top_logprobs: TopLogprobs = None


# What `include` names the log-probabilities of the answer's tokens.
_LOGPROBS = "message.output_text.logprobs"
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "previous_response_id": (None,),
    "conversation": (None,),
    "prompt": (None,),
    "background": (None, False),
    "include": (None, [], [_LOGPROBS]),
    "truncation": (None, "disabled"),
}


def read_responses(body: bytes, settings: Settings) -> Wanted:
    """The body of `responses`.

    Raises:
        ApiError: it is no such request, or asks for what there is not.
    """
    found = parse(body)
    check_unsupported(found, _UNSUPPORTED)
    asked = convert(found, ResponsesRequest)
    form = asked.text.format if asked.text else None
    turns = [] if asked.instructions is None else [Turn("system", [asked.instructions])]
    if isinstance(asked.input, str):
        turns.append(Turn("user", [asked.input]))
    else:
        turns += [Turn(item.role, _parts(item.content)) for item in asked.input]
    return wanted(
        asked.model,
        turns,
        settings,
        max_tokens=("max_output_tokens", asked.max_output_tokens),
        temperature=asked.temperature,
        top_p=asked.top_p,
        logprobs=logprobs(
            bool(found.get("include")), asked.top_logprobs, f'include: ["{_LOGPROBS}"]'
        ),
        schema=schema_of(form, form, "text.format"),
        stream=bool(asked.stream),
        about={
            "instructions": asked.instructions,
            "metadata": asked.metadata or {},
            "top_logprobs": asked.top_logprobs or 0,
            "text": {"format": form or {"type": "text"}},
        },
    )


def _parts(content: str | list[InputText | OutputText | InputImage]) -> list[str | ImageRef]:
    if isinstance(content, str):
        return [content]
    parts: list[str | ImageRef] = []
    for part in content:
        if isinstance(part, InputImage):
            parts.append(ImageRef(part.image_url, part.detail))
        else:
            parts.append(part.text)
    return parts


class Responses:
    """The answer to a request in the form of a response, with one message in it."""

    def __init__(self, wanted: Wanted):
        self._wanted = wanted
        self._id, self._item = f"resp_{token_hex(12)}", f"msg_{token_hex(12)}"
        self._created = int(time.time())
        self._count = 0

    def whole(self, results: list[GenerationResult]) -> dict[str, Any]:
        return self._response(results[0])

    def begin(self) -> Iterator[bytes]:
        yield self._event("response.created", response=self._response())
        yield self._event("response.in_progress", response=self._response())
        yield self._event(
            "response.output_item.added", output_index=0, item=self._message("in_progress", [])
        )
        yield self._of_part("response.content_part.added", part=_text(""))

    def piece(self, index: int, text: str) -> Iterator[bytes]:
        yield self._of_part(
            "response.output_text.delta", delta=str(text), logprobs=told(logprobs_of(text))
        )

    def ended(self, index: int, result: GenerationResult) -> Iterator[bytes]:
        text, status, scored = result.text, _status(result), result.logprobs or ()
        yield self._of_part("response.output_text.done", text=text, logprobs=told(scored))
        yield self._of_part("response.content_part.done", part=_text(text, scored))
        item = self._message(status, [_text(text, scored)])
        yield self._event("response.output_item.done", output_index=0, item=item)

    def end(self, results: list[GenerationResult]) -> Iterator[bytes]:
        response = self._response(results[0])
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, error: ApiError) -> Iterator[bytes]:
        response = self._response() | {
            "status": "failed",
            "error": {"code": error.code or "server_error", "message": str(error)},
        }
        yield self._event("response.failed", response=response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._count += 1
        return event({"type": kind, "sequence_number": self._count - 1, **fields}, kind)

    def _of_part(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._item, output_index=0, content_index=0, **fields)

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._item,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _response(self, result: GenerationResult | None = None) -> dict[str, Any]:
        options = self._wanted.options
        status = "in_progress" if result is None else _status(result)
        made: dict[str, Any] = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._wanted.model,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "max_output_tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "usage": None,
            **self._wanted.about,
        }
        if result is not None:
            content = [_text(result.text, result.logprobs or ())]
            made["output"] = [self._message(status, content)]
            made["usage"] = _usage(result)
            made["timings"] = timings([result])
        if status == "incomplete":
            made["incomplete_details"] = {"reason": "max_output_tokens"}
        return made


def _status(result: GenerationResult) -> str:
    return "completed" if result.finish_reason == "stop" else "incomplete"


def _text(text: str, scored: Iterable[TokenLogprob] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": told(scored)}


def _usage(result: GenerationResult) -> dict[str, Any]:
    return {
        "input_tokens": result.prompt_tokens,
        "input_tokens_details": {"cached_tokens": result.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": result.generation_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": result.prompt_tokens + result.generation_tokens,
    }
