"""The messages of a conversation, as transformers and the clients of OpenAI's API write them.

A message is a dict with a role and a content, and a content is text or a list of parts:

    {"role": "system" | "user" | "assistant", "content": "…" or [part, …]}
    {"type": "text", "text": "…"}
    {"type": "image", "image": what `load_image` reads, or ImageFeatures}

An image may have a "detail" too, by which it chooses its size, as the module
`sizes` says; features have theirs already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastvlm_mlx.errors import PromptError, printable

ROLES = ("system", "user", "assistant")
# Those of OpenAI's API. An image without one has the first.
DETAILS = AUTO, LOW, HIGH, ORIGINAL = ("auto", "low", "high", "original")
# Characters of a key or a value that a sentence shows.
_SHOWN = 60


@dataclass(frozen=True)
class Image:
    """An image where it stands in a message, and its detail, which `sizes` checks."""

    image: Any
    detail: Any = AUTO


@dataclass(frozen=True)
class Message:
    """A message that was checked: texts that stand side by side are one."""

    role: str
    parts: tuple[str | Image, ...]

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[Image]:
        return [part for part in self.parts if isinstance(part, Image)]


def user_message(text: str, images: Sequence[Any] = (), detail: str = AUTO) -> dict[str, Any]:
    """The images, all in one detail, and then the text."""
    if not images:
        return {"role": "user", "content": text}
    parts = [image_part(image, detail) for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def image_part(image: Any, detail: str = AUTO) -> dict[str, Any]:
    part = {"type": "image", "image": image}
    return part if detail == AUTO else part | {"detail": detail}


def read_messages(messages: Any) -> list[Message]:
    """Check a conversation that the assistant is to answer.

    Raises:
        PromptError: as `history`; the last message is not the user's, or has no text to answer.
    """
    read = history(messages)
    if not read:
        raise PromptError("the list of messages is empty: expected one of the user's at its end")
    if read[-1].role != "user":
        raise PromptError(
            f"the last message is the {read[-1].role}'s: expected one of the user's, which is to "
            "be answered"
        )
    asked: list[Message] = []
    for message in reversed(read):
        if message.role != "user":
            break
        asked.append(message)
    if not any(message.text.strip() for message in asked):
        what = " with the image" if any(message.images for message in asked) else ""
        raise PromptError(f"the prompt is empty: say what to do{what}")
    return read


def history(messages: Any) -> list[Message]:
    """Check messages of which the last one may be anybody's.

    Raises:
        PromptError: it is no list of messages, a role is unknown, or a system message is not the
            first.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise PromptError(
            f"the messages are of type {type(messages).__name__}: expected a list of dicts with "
            "role and content"
        )
    return [_message(message, place) for place, message in enumerate(messages, 1)]


def _message(message: Any, place: int) -> Message:
    name = f"message {place}"
    role, content = _fields(message, ("role", "content"), name)
    if not isinstance(role, str) or role not in ROLES:
        raise PromptError(
            f"the role of {name} is {_value(role)}: expected one of {', '.join(ROLES)}"
        )
    if role == "system" and place > 1:
        raise PromptError(f"{name} is a system message: expected that as the first one only")
    if isinstance(content, str):
        return Message(role, (content,) if content else ())
    if isinstance(content, bytes | bytearray) or not isinstance(content, Sequence):
        raise PromptError(
            f"the content of {name} is of type {type(content).__name__}: expected text, or a list "
            "of parts"
        )
    parts: list[str | Image] = []
    for number, given in enumerate(content, 1):
        part = _part(given, f"part {number} of {name}")
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        elif part != "":
            parts.append(part)
    if role != "user" and any(isinstance(part, Image) for part in parts):
        raise PromptError(
            f"{name} is the {role}'s and holds an image: expected images in the user's messages "
            "only"
        )
    return Message(role, tuple(parts))


def _part(part: Any, name: str) -> str | Image:
    if not isinstance(part, Mapping):
        raise PromptError(f"{name} is of type {type(part).__name__}: expected a dict")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in ("text", "image"):
        raise PromptError(f"the type of {name} is {_value(kind)}: expected text or image")
    if kind == "image":
        _, value = _fields(part, ("type", kind), name, "detail")
        return Image(value, part.get("detail", AUTO))
    _, value = _fields(part, ("type", kind), name)
    if not isinstance(value, str):
        raise PromptError(f"the text of {name} is of type {type(value).__name__}: expected a str")
    return value


def _fields(given: Any, names: tuple[str, str], name: str, *more: str) -> tuple[Any, Any]:
    """The values of two keys, beside which there may be some of `more`."""
    if not isinstance(given, Mapping):
        raise PromptError(f"{name} is of type {type(given).__name__}: expected a dict")
    for key in names:
        if key not in given:
            raise PromptError(f"{name} has no {key}: expected a dict with {' and '.join(names)}")
    for key in given:
        if key not in (*names, *more):
            raise PromptError(
                f"{name} has a key {_value(key)}: expected nothing but {' and '.join(names)}"
            )
    return given[names[0]], given[names[1]]


def _value(value: Any) -> str:
    """A value that may be nested deeply or be somebody's own, in few characters."""
    if isinstance(value, str):
        return printable(repr(value[: 2 * _SHOWN]), _SHOWN)
    return "None" if value is None else f"of type {type(value).__name__}"
