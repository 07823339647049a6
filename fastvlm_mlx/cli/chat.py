"""`fastvlm chat`: the verb."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm_mlx.cli.common import Model, install, option, resolve
from fastvlm_mlx.cli.input import lines
from fastvlm_mlx.cli.options import (
    ComputeUnits,
    Crop,
    Detail,
    EncoderCompute,
    ImageSize,
    JsonSchema,
    MaxPixels,
    MaxTokens,
    MinP,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    pixel_limit,
    sampling,
)
from fastvlm_mlx.errors import FastVLMError, OptionError, printable

if TYPE_CHECKING:
    from fastvlm_mlx.conversation import Conversation

CONVERSATION = "Conversation"
# What can be typed in place of a question, and what follows it.
COMMANDS = {
    "/image": ("FILE", "ask about this image; its path alone, dropped or typed, does the same"),
    "/clear": ("", "forget all questions and images"),
    "/save": ("FILE", "save the conversation as JSON"),
    "/load": ("FILE", "go on with a saved conversation"),
    "/help": ("", "show this list"),
    "/exit": ("", "end; so does Ctrl-D, and Ctrl-C stops an answer"),
}


def chat(
    call: typer.Context,
    model: Model,
    image: Annotated[
        list[str] | None,
        option("Ask the first question about this image.", group=CONVERSATION, value="FILE"),
    ] = None,
    system: Annotated[
        str | None,
        option(
            "What the model is told before the first question.",
            group=CONVERSATION,
            value="TEXT",
            default="You are a helpful assistant.",
        ),
    ] = None,
    saved: Annotated[
        Path | None,
        option("Go on with a saved conversation.", "--load", group=CONVERSATION, value="FILE"),
    ] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    json_schema: JsonSchema = None,
    compute_units: ComputeUnits = "auto",
    encoder_compute: EncoderCompute = "auto",
    image_size: ImageSize = None,
    crop: Crop = False,
    max_pixels: MaxPixels = None,
    detail: Detail = "auto",
) -> None:
    """Type a question; the path of an image in it, typed or dropped onto the terminal, asks about
    that image. /help shows what else can be typed. Lines that are piped in are answered one by one,
    and one that fails makes the exit status 2."""
    from fastvlm_mlx.conversation import Conversation
    from fastvlm_mlx.image.decode import load_image
    from fastvlm_mlx.loading import load
    from fastvlm_mlx.sizes import check_detail

    options = sampling(call)
    check_detail(detail)
    limit = pixel_limit(max_pixels)
    if saved is not None and system is not None:
        raise OptionError(
            "--load and --system are both given, and a saved conversation has a system message of "
            "its own: leave one out"
        )
    for path in image or ():
        lines.check(path)
        load_image(path, max_pixels=limit)
    loaded = load(
        resolve(call, model),
        compute_units=compute_units,
        encoder_compute=encoder_compute,
        image_size=image_size,
        crop=crop,
        max_pixels=limit,
    )
    if saved is None:
        talk = Conversation(loaded, system=system, options=options)
    else:
        talk = Conversation.load(loaded, saved, options)
    if Session(talk, image or [], detail).run():
        raise typer.Exit(2)


class Session:
    """A conversation on a terminal, or with the lines of a pipe.

    Attributes:
        images: the images that the next question is about.
        detail: of all images.
    """

    def __init__(self, talk: Conversation, images: list[str], detail: str = "auto"):
        self.talk, self.images, self.detail = talk, list(images), detail
        self._interactive = lines.is_interactive()
        self._warned = False

    def run(self) -> bool:
        """Answer line by line; return whether one failed that nobody was there to see."""
        read = lines.reader({name: bool(value) for name, (value, _) in COMMANDS.items()})
        if self._interactive:
            self._greet()
        failed = False
        while True:
            try:
                line = read()
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                _note("Ctrl-D or /exit ends the chat.")
                continue
            if line is None or line.strip() in ("/exit", "/quit"):
                return failed and not self._interactive
            try:
                self.take(line.strip())
            except FastVLMError as error:
                failed = True
                _note(f"error: {error}")
            except KeyboardInterrupt:
                # While an image was read, which has no answer yet that could be stopped.
                if not self._interactive:
                    raise
                _note("Stopped.")

    def take(self, line: str) -> None:
        """Do what a line says.

        Raises:
            FastVLMError: it can't be done.
        """
        name, _, rest = line.partition(" ")
        if name in COMMANDS:
            self._command(name, rest.strip())
            return
        # A path has more slashes, or ends as an image does.
        if name.startswith("/") and "/" not in name[1:] and not lines.split_images(name)[0]:
            near = get_close_matches(name, COMMANDS, 1)
            hint = f"use {near[0]}" if near else "/help shows those that there are"
            raise OptionError(f"{printable(name, 60)} is no command: {hint}")
        paths, text = lines.split_images(line)
        self._add(paths)
        if text:
            self._ask(text)
        elif paths:
            self._tell_images()

    def _command(self, name: str, rest: str) -> None:
        from fastvlm_mlx.conversation import Conversation

        takes, _ = COMMANDS[name]
        if takes and not rest:
            raise OptionError(f"{name} is given no file: expected {name} {takes}")
        if rest and not takes:
            raise OptionError(f"{name} is followed by a text: expected {name} alone")
        if name == "/help":
            self._help()
        elif name == "/clear":
            self.talk.clear()
            self.images = []
            _note("All questions and images are forgotten.")
        elif name == "/image":
            paths, text = lines.split_images(rest)
            self._add(paths if paths and not text else [lines.one_path(rest)])
            self._tell_images()
        elif name == "/save":
            file = lines.one_path(rest)
            self.talk.save(file)
            _note(f"The conversation is saved to {file}.")
        elif name == "/load":
            file = lines.one_path(rest)
            self.talk = Conversation.load(self.talk.model, file, self.talk.options)
            self.images = []
            _note(f"The conversation has {len(self.talk.messages)} messages.")

    def _add(self, paths: list[str]) -> None:
        from fastvlm_mlx.image.decode import load_image

        for path in paths:
            lines.check(path)
            # Now is when its sender can still be told.
            load_image(path, max_pixels=self.talk.model.max_pixels)
        self.images += paths

    def _tell_images(self) -> None:
        if self._interactive:
            count = len(self.images)
            _note(
                f"The next question is about {'this image' if count == 1 else f'{count} images'}."
            )

    def _ask(self, text: str) -> None:
        """Ask, and show the answer as it comes; Ctrl-C stops it."""
        from fastvlm_mlx.cli import show

        generation = None
        # They are this question's, also where it fails.
        images, self.images = self.images, []
        try:
            generation = self.talk.ask(text, images, detail=self.detail)
            self._warn()
            for piece in generation:
                print(show.answer(piece), end="", flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            if generation is not None:
                generation.close()
            print(flush=True)
            _note("The answer was stopped.")
            return
        result = generation.result
        if result.finish_reason == "length" and self._interactive:
            _note(f"The answer was cut after {result.generation_tokens} tokens, see --max-tokens.")

    def _warn(self) -> None:
        from fastvlm_mlx.cli import show

        images = sum(
            part["type"] == "image"
            for message in self.talk.messages
            if not isinstance(message["content"], str)
            for part in message["content"]
        )
        if images > 1 and not self._warned:
            self._warned = True
            _note(f"warning: {show.SEVERAL_IMAGES}; /clear begins anew")

    def _greet(self) -> None:
        _note("Drop an image here or type its path, and ask; /help shows what else there is.")
        if lines.find_spec("prompt_toolkit") is None:
            _note(f"History and completion come with {install('chat')}.")

    def _help(self) -> None:
        for name, (takes, text) in COMMANDS.items():
            print(f"{name} {takes}".ljust(14), text, file=sys.stderr)


def _note(text: str) -> None:
    from fastvlm_mlx.cli import show

    sys.stdout.flush()
    show.note(text)
