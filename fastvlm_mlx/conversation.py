"""A conversation: questions about images that are asked one after the other, and can be saved."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.schema import read_json, to_json
from fastvlm_mlx.errors import FastVLMError, OptionError, PromptError, escaped, printable
from fastvlm_mlx.fastvlm import FastVLM, Images
from fastvlm_mlx.language.generate import Generation
from fastvlm_mlx.language.prompt.messages import AUTO, history
from fastvlm_mlx.language.prompt.template import asked
from fastvlm_mlx.language.sampling import SamplingOptions, resolve_options

# What a saved conversation says that it is.
FORMAT = "fastvlm-conversation-1"
_REMEDY = "give a file that a conversation was saved to"
_MAX_NAME = 300


class Conversation:
    """Questions to a model that know what was asked before them, and the answers.

        talk = Conversation(model)
        for piece in talk.ask("What is in the image?", "photo.jpg"):
            print(piece, end="")
        print(talk.ask("What colour is it?").result.text)

    Each answer is the one that `model.chat(talk.messages)` gives. An image is encoded once, and the
    turns before the last one are computed once as long as the model keeps them (`kept_bytes`). An
    answer that was given up with `close` is part of the conversation as far as it was iterated
    over; a question of which nothing came, or whose answer failed, is not.

    The model may be shared by any number of conversations in any threads; a conversation belongs to
    one thread at a time.
    """

    def __init__(
        self,
        model: FastVLM,
        *,
        system: str | None = None,
        options: SamplingOptions | None = None,
        **sampling: Any,
    ):
        """
        Args:
            system: the system message; the model's own where None.
            options: how to sample, unless `ask` says something else; or its fields as keywords.

        Raises:
            PromptError, OptionError: a system message that is no text; options that are none.
        """
        if system is not None and not isinstance(system, str):
            raise PromptError(
                f"the system message is of type {type(system).__name__}: expected text, of type str"
            )
        self.model = model
        self.options = resolve_options(options, sampling)
        self._messages: list[dict[str, Any]] = []
        if system is not None:
            self._messages.append({"role": "system", "content": system})
        # Of each image in the messages its features, or itself as long as it was not encoded.
        self._images: list[Any] = []
        self._latest: Generation | None = None
        self._with_latest: tuple[list[dict[str, Any]], list[Any]] = [], []

    def ask(
        self,
        text: str,
        images: Images = None,
        options: SamplingOptions | None = None,
        *,
        detail: str = AUTO,
        **sampling: Any,
    ) -> Generation:
        """Ask, and get the answer piece by piece, as of `FastVLM.stream`.

        Args:
            images: one or a list, which come before the text; None asks about the earlier ones.
            detail: of these images, as `FastVLM.encode` takes it.

        Raises:
            ImageError, PromptError, OptionError: before anything is computed, also if the context
                has no room for the question, or the answer before this one has not ended.
        """
        self._settle()
        if self._latest is not None:
            raise PromptError(
                "the answer to the last question has not ended: iterate over it, read its result "
                "or close it, and ask again"
            )
        chosen = self.options if options is None and not sampling else None
        chosen = chosen or resolve_options(options, sampling)
        messages = [*self._messages, *asked(images, text, detail)]
        given = [*self._images, *_images(messages[-1:])]
        generation, features = self.model.begin(_with_images(messages, given), chosen)
        self._latest, self._with_latest = generation, (messages, list(features))
        return generation

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages so far, as `FastVLM.chat` takes them, the images as they were given. As long
        as the last question is being answered, it stands at the end."""
        self._settle()
        messages = self._messages if self._latest is None else self._with_latest[0]
        return _with_images(messages, _images(messages))

    def clear(self) -> None:
        """Forget all messages but the system's, and give up an answer that has not ended."""
        if self._latest is not None:
            self._latest.close()
        self._latest = None
        self._messages = [each for each in self._messages if each["role"] == "system"]
        self._images = []

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the messages to a JSON file, which appears whole; images are written as paths.

        A file that is there is replaced if it holds a conversation.

        Raises:
            OptionError: an image was not given as a path, the file holds something else, or it
                can't be written.
        """
        messages = self.messages
        paths = [_path(image, number) for number, image in enumerate(_images(messages), 1)]
        file = _file(path)
        if os.path.exists(file):
            try:
                _read(file)
            except FastVLMError as error:
                raise OptionError(
                    f"{_name(file)} exists and holds no conversation: give another name"
                ) from error
        text = to_json({"format": FORMAT, "messages": _with_images(messages, paths)}) + "\n"
        _write(file, text)

    @classmethod
    def load(
        cls,
        model: FastVLM,
        path: str | os.PathLike[str],
        options: SamplingOptions | None = None,
        **sampling: Any,
    ) -> Conversation:
        """Go on with a conversation that was saved. Its images are read with the next question.

        Raises:
            OptionError, PromptError: the file can't be read, or holds no conversation.
        """
        talk = cls(model, options=options, **sampling)
        talk._messages = _read(_file(path))
        talk._images = _images(talk._messages)
        return talk

    def _settle(self) -> None:
        """Take in the latest answer, if it has ended."""
        if self._latest is None or not self._latest.is_over:
            return
        messages, images = self._with_latest
        try:
            answer: str | None = self._latest.result.text
        except FastVLMError:
            # It was closed, or has failed.
            answer = self._latest.text if self._latest.is_closed else None
        if answer is not None and (answer or not self._latest.is_closed):
            self._messages = [*messages, {"role": "assistant", "content": answer}]
            self._images = images
        self._latest = None


def _images(messages: Sequence[dict[str, Any]]) -> list[Any]:
    return [each.image for message in history(messages) for each in message.images]


def _with_images(messages: Sequence[dict[str, Any]], images: Sequence[Any]) -> list[dict[str, Any]]:
    """A copy of the messages with other images in the places of theirs."""
    following = iter(images)

    def part(given: dict[str, Any]) -> dict[str, Any]:
        return dict(given) if given["type"] == "text" else given | {"image": next(following)}

    return [
        dict(message)
        if isinstance(message["content"], str)
        else message | {"content": [part(each) for each in message["content"]]}
        for message in messages
    ]


def _path(image: Any, number: int) -> str:
    if not isinstance(image, str | os.PathLike):
        raise OptionError(
            f"image {number} of the conversation was given as {type(image).__name__} and not as a "
            "path: save the image to a file and ask about that"
        )
    path = os.path.abspath(os.path.expanduser(os.fsdecode(image)))
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            f"the path {_name(path)} is not valid Unicode and can't be written to JSON: rename the "
            "file"
        ) from error
    return path


def _file(path: Any) -> Path:
    try:
        return Path(os.fsdecode(path)).expanduser()
    except (TypeError, RuntimeError) as error:
        raise OptionError(f"{_name(path)} is no path ({error}): {_REMEDY}") from error


def _read(file: Path) -> list[dict[str, Any]]:
    found = read_json(None, file, OptionError, remedy=_REMEDY)
    if found.get("format") != FORMAT or not isinstance(found.get("messages"), list):
        raise OptionError(f"{_name(file)} holds no conversation: {_REMEDY}")
    messages: list[dict[str, Any]] = found["messages"]
    try:
        images = _images(messages)
    except PromptError as error:
        raise OptionError(f"{_name(file)} holds no conversation ({error}): {_REMEDY}") from error
    if not all(isinstance(image, str) for image in images):
        raise OptionError(f"{_name(file)} has an image that is no path: {_REMEDY}")
    for image in images:
        if _is_special(image):
            raise OptionError(
                f"{_name(image)} in {_name(file)} is a device, a pipe or a socket: expected the "
                "path of an image, correct it"
            )
    return messages


def _is_special(path: str) -> bool:
    """Whether opening it may wait for a writer, or take what was meant for others. Somebody else
    may have written the path."""
    try:
        mode = Path(path).expanduser().stat().st_mode
    # Reading it with the next question says what is wrong.
    except (OSError, RuntimeError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _write(file: Path, text: str) -> None:
    """Whole or not at all: beside the file first, and then in its place."""
    try:
        handle, beside = tempfile.mkstemp(prefix=f".{file.name[:40]}.", dir=file.parent)
        with ExitStack() as undo:
            undo.callback(Path(beside).unlink, missing_ok=True)
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(beside, file)
            undo.pop_all()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(
            f"{_name(file)} can't be written ({reason}): give a file in a directory that can be "
            "written to"
        ) from error


def _name(path: object) -> str:
    return printable(escaped(path), _MAX_NAME)
