"""What clients ask for: the bodies of `chat/completions` and `responses`, read within limits."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from fastvlm_mlx.bundle import schema
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.language.logprobs import MAX_TOP
from fastvlm_mlx.language.sampling import MAX_STOP_CHARACTERS, SamplingOptions
from fastvlm_mlx.serve.errors import ApiError
from fastvlm_mlx.serve.limits import MAX_CHOICES, MAX_STOPS, Settings

T = TypeVar("T")
# More than there can be in a prompt and a schema. What JSON becomes is many times its bytes, and
# while it is made nobody else is served.
_MAX_VALUES = 200_000
_OPTION = re.compile(r"--([a-z-]+)")
_REMEDY = "docs/serve.md says what a request may hold"

Role = Literal["system", "developer", "user", "assistant"]
Detail = Literal["auto", "low", "high", "original"]
Text = Annotated[str, Meta(max_length=MAX_STOP_CHARACTERS, min_length=1)]
Stop = Text | Annotated[list[Text], Meta(max_length=MAX_STOPS)] | None
Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)] | None
Temperature = Annotated[float, Meta(ge=0, le=2)] | None
TopP = Annotated[float, Meta(ge=0, le=1)] | None
Messages = Meta(min_length=1, max_length=10_000)
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)] | None
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP)] | None


class ImageURL(Struct, frozen=True):
    """An image of `chat/completions`."""

    url: str
    detail: Detail | None = None


class TextPart(Struct, frozen=True, tag="text"):
    """A text among other parts."""

    text: str


class ImagePart(Struct, frozen=True, tag="image_url"):
    """An image among other parts."""

    image_url: ImageURL


class Message(Struct, frozen=True):
    """A turn of `chat/completions`."""

    role: Role
    content: str | list[TextPart | ImagePart]


class StreamOptions(Struct, frozen=True):
    """Whether the last chunk says what the answer took."""

    include_usage: bool | None = None


class ChatRequest(Struct, frozen=True):
    """The body of `chat/completions`, as far as it is looked at."""

    model: str
    messages: Annotated[list[Message], Messages]
    max_tokens: Tokens = None
    max_completion_tokens: Tokens = None
    temperature: Temperature = None
    top_p: TopP = None
    stop: Stop = None
    seed: Seed = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs = None


@dataclass(frozen=True)
class ImageRef:
    """An image as a request names it."""

    url: str
    detail: Detail | None = None


@dataclass(frozen=True)
class Turn:
    """A message: texts and images in their order."""

    role: str
    parts: list[str | ImageRef]


@dataclass(frozen=True)
class Wanted:
    """A request of either kind.

    Attributes:
        turns: the conversation, which the user's message ends.
        n: answers to it.
        stream: whether pieces are wanted as they come.
        include_usage: whether the end of the stream says what the answer took.
        about: what the answer repeats of the request.
    """

    model: str
    turns: list[Turn]
    options: SamplingOptions
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[ImageRef]:
        return [part for turn in self.turns for part in turn.parts if isinstance(part, ImageRef)]


# What can't be honoured, and the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "modalities": (None, ["text"]),
}


def read_chat(body: bytes, settings: Settings) -> Wanted:
    """The body of `chat/completions`.

    Raises:
        ApiError: it is no such request, or asks for what there is not.
    """
    found = parse(body)
    check_unsupported(found, _UNSUPPORTED)
    asked = convert(found, ChatRequest)
    form = asked.response_format
    inner = form.get("json_schema") if form else None
    turns = [Turn(message.role, _parts(message.content)) for message in asked.messages]
    most = asked.max_tokens
    if asked.max_completion_tokens is not None:
        most = asked.max_completion_tokens
    stream_options = asked.stream_options or StreamOptions()
    return wanted(
        asked.model,
        turns,
        settings,
        max_tokens=("max_tokens", most),
        temperature=asked.temperature,
        top_p=asked.top_p,
        seed=asked.seed,
        stop=asked.stop,
        logprobs=logprobs(bool(asked.logprobs), asked.top_logprobs, "logprobs: true"),
        schema=schema_of(form, inner, "response_format"),
        n=asked.n or 1,
        stream=bool(asked.stream),
        include_usage=bool(stream_options.include_usage),
    )


def wanted(
    model: str,
    turns: list[Turn],
    settings: Settings,
    *,
    max_tokens: tuple[str, int | None],
    temperature: float | None,
    top_p: float | None,
    seed: int | None = None,
    stop: str | list[str] | None = None,
    logprobs: int | None = None,
    schema: dict[str, Any] | None = None,
    **more: Any,
) -> Wanted:
    """What both kinds of request have in common, within the limits."""
    name, most = max_tokens
    if most is not None and most > settings.max_tokens:
        raise ApiError(
            f"{name} is {most:,}: expected at most the {settings.max_tokens:,} of this server's "
            "--max-tokens",
            param=name,
        )
    try:
        options = SamplingOptions(
            max_tokens=most or settings.max_tokens,
            temperature=temperature or 0.0,
            top_p=1.0 if top_p is None else top_p,
            seed=seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            json_schema=schema,
            logprobs=logprobs,
        )
    except FastVLMError as error:
        # It names options as the command line does.
        raise ApiError(_OPTION.sub(lambda name: name[1].replace("-", "_"), str(error))) from error
    made = Wanted(model, _one_system(turns), options, **more)
    if len(made.images) > settings.max_images:
        raise ApiError(
            f"the request has {len(made.images):,} images: expected at most the "
            f"{settings.max_images:,} of this server's --max-images",
            param="messages",
        )
    return made


def _parts(content: str | list[TextPart | ImagePart]) -> list[str | ImageRef]:
    if isinstance(content, str):
        return [content]
    parts: list[str | ImageRef] = []
    for part in content:
        if isinstance(part, TextPart):
            parts.append(part.text)
        else:
            parts.append(ImageRef(part.image_url.url, part.image_url.detail))
    return parts


def _one_system(turns: list[Turn]) -> list[Turn]:
    """Instructions that come first are one, whatever they are called: the model knows one."""
    rules: list[str | ImageRef] = []
    rest = list(turns)
    while rest and rest[0].role in ("system", "developer"):
        rules += ["\n\n"] * bool(rules) + rest.pop(0).parts
    rest = [replace(turn, role="system") if turn.role == "developer" else turn for turn in rest]
    return [Turn("system", rules), *rest] if rules else rest


def parse(body: bytes) -> dict[str, Any]:
    """A request's JSON object. Raises ApiError: it is none, or has too much in it."""
    # Those in texts count too: to know which they are takes parsing.
    if sum(map(body.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise ApiError(
            f"the request has more than {_MAX_VALUES:,} commas and opening brackets: expected "
            "fewer keys, list items and parts of messages"
        )
    return schema.parse(body, "the request", ApiError, remedy=_REMEDY)


def convert(found: dict[str, Any], kind: type[T]) -> T:
    """A request's JSON as a `kind`. Raises ApiError: it is none, told with the key."""
    try:
        return schema.check(found, kind, "the request", ApiError, remedy=_REMEDY)
    except ApiError as error:
        if isinstance(error.__cause__, msgspec.ValidationError):
            _, _, place = str(error.__cause__).partition(" - at `$")
            error.param = place.strip("`").lstrip(".") or None
        raise


def check_unsupported(found: dict[str, Any], table: dict[str, tuple[Any, ...]]) -> None:
    """Raises ApiError: the request asks for what this server does not have."""
    for name, harmless in table.items():
        if found.get(name) not in harmless:
            raise ApiError(
                f"{name} is not supported by this server: leave it out",
                param=name,
                code="unsupported_parameter",
            )


def logprobs(wanted: bool, top: int | None, remedy: str) -> int | None:
    """How many of the likeliest tokens are told beside each, or None if nothing is.

    Raises:
        ApiError: there are such without what they stand beside.
    """
    if top and not wanted:
        raise ApiError(
            f"top_logprobs is {top} without log-probabilities: add {remedy}", param="top_logprobs"
        )
    return (top or 0) if wanted else None


def schema_of(form: dict[str, Any] | None, holder: Any, name: str) -> dict[str, Any] | None:
    """The JSON schema that an answer's form asks for.

    Args:
        holder: where the form has its schema.

    Raises:
        ApiError: a form that there is not, or one without its schema.
    """
    kind = "text" if form is None else form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise ApiError(
            f"the type of {name} is another one: expected text, json_object or json_schema",
            param=name,
        )
    found = holder.get("schema") if isinstance(holder, dict) else None
    if not isinstance(found, dict):
        raise ApiError(f"{name} has no JSON schema: expected an object under schema", param=name)
    return found
