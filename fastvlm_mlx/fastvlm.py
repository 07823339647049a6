"""A loaded bundle, which looks at images and answers questions about them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.image.decode import ImageSource
from fastvlm_mlx.language.batch import DEFAULT_BATCH_SIZE, Answers, Asked, check_batch_size, pairs
from fastvlm_mlx.language.features import (
    ImageFeatures,
    pooled,
)
from fastvlm_mlx.language.generate import (
    Answer,
    Generation,
    GenerationResult,
    Question,
    Timings,
    generate,
)
from fastvlm_mlx.language.prompt.messages import AUTO, Image
from fastvlm_mlx.language.prompt.template import asked, check_room, encode_messages
from fastvlm_mlx.language.sampling import SamplingOptions, resolve_options
from fastvlm_mlx.language.schedule import Schedule
from fastvlm_mlx.looking import Looking, Pixels

# An image as it may be asked about: itself, or its features.
Askable = ImageSource | ImageFeatures
# What one prompt may be about.
Images = Askable | Sequence[Askable] | None
# An image that is ready for the encoder, or its features.
Ready = ImageFeatures | Pixels


@dataclass(frozen=True, repr=False)
class FastVLM(Looking):
    """A loaded bundle, as `fastvlm_mlx.load` returns it.

    It may be used from any thread, and by many at once. What it computes it computes on one thread
    of its own, a token or an image at a time and in the order of asking, so each answer is what it
    would be alone, and a long one holds up others by a token and not by its length. A generation
    may be handed to another thread, and one that nobody goes on with costs nothing. When the
    model is collected, the thread serves the next. A process forked after loading has no such
    thread: there every use, and loading anew, is a FastVLMError.
    """

    def embed(self, image: Askable, detail: str = AUTO) -> np.ndarray:
        """One vector for an image, float32 [D] of length 1: the mean of its projected features.

        The dot product of two vectors of one model says how alike two images look to it.

        Raises:
            ImageError, EncoderError, OptionError: as `encode` and `stream`.
        """
        (features,), _ = self._features([Image(image, detail)])
        return self.worker.run(pooled, features)

    def stream(
        self,
        image: Images,
        prompt: str,
        options: SamplingOptions | None = None,
        *,
        detail: str = AUTO,
        **sampling: Any,
    ) -> Generation:
        """Answer piece by piece: iterate over the generation, then read its `result`.

        Args:
            image: an image, the features of one, or None for a question without an image. Of a
                list every image is put before the prompt, each on a line; FastVLM was trained with
                one.
            options: how to sample; or its fields as keywords (`max_tokens=64`).
            detail: of every image, as `encode` takes it. Features have theirs already.

        Raises:
            ImageError, PromptError, OptionError: before anything is computed.
        """
        return self.chat(asked(image, prompt, detail), options, **sampling)

    def generate(
        self,
        image: Images,
        prompt: str,
        options: SamplingOptions | None = None,
        *,
        detail: str = AUTO,
        **sampling: Any,
    ) -> GenerationResult:
        """Answer in one piece. Arguments and errors are those of `stream`."""
        return self.stream(image, prompt, options, detail=detail, **sampling).result

    async def astream(
        self,
        image: Images,
        prompt: str,
        options: SamplingOptions | None = None,
        *,
        detail: str = AUTO,
        **sampling: Any,
    ) -> AsyncGenerator[str]:
        """As `stream`, without blocking an event loop: `async for piece in model.astream(…)`. An
        answer that is cancelled or left half way is given up."""
        ask = partial(self.stream, image, prompt, options, detail=detail, **sampling)
        async with aclosing(aiter(await asyncio.to_thread(ask))) as pieces:
            async for piece in pieces:
                yield piece

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        options: SamplingOptions | None = None,
        **sampling: Any,
    ) -> Generation:
        """Answer the last of several messages, as `stream` does.

        Args:
            messages: `{"role": "user", "content": "…"}` with the roles system, user and assistant;
                a content may be a list of parts, `{"type": "text", "text": "…"}` and
                `{"type": "image", "image": image}`, and an image stands where its part does. It
                may have a `"detail"` of its own, as `encode` takes it.

        Raises:
            ImageError, PromptError, OptionError: before anything is computed.
        """
        return self.begin(messages, options, **sampling)[0]

    def check(
        self,
        messages: Sequence[dict[str, Any]],
        options: SamplingOptions | None = None,
        **sampling: Any,
    ) -> None:
        """Find out whether `chat` would take the messages, without looking at an image: None, or
        anything else, may stand in the place of one.

        Raises:
            PromptError, OptionError: as `chat`.
        """
        self._question(messages, resolve_options(options, sampling))

    def begin(
        self,
        messages: Sequence[dict[str, Any]],
        options: SamplingOptions | None = None,
        **sampling: Any,
    ) -> tuple[Generation, list[ImageFeatures]]:
        """As `chat`; with the features of the images, in whose place they may be given again."""
        question = self._question(messages, resolve_options(options, sampling))
        features, spent = self._features(question.encoded.images)
        return self._answer(question, features, spent), features

    def _features(self, images: Sequence[Image]) -> tuple[list[ImageFeatures], Timings]:
        """The features of each image, and what encoding those took that had none."""
        given = [each.image for each in images]
        for image in given:
            if isinstance(image, ImageFeatures):
                self._check(image)
        features = [
            each.image
            if isinstance(each.image, ImageFeatures)
            else self.encode(each.image, each.detail)
            for each in images
        ]
        new = [f.timings for f, image in zip(features, given, strict=True) if f is not image]
        return features, Timings.of_images(new)

    def ask(
        self,
        image: Images,
        prompts: Sequence[str],
        options: SamplingOptions | None = None,
        *,
        detail: str = AUTO,
        **sampling: Any,
    ) -> Iterator[Generation]:
        """Ask several questions about an image, or about several, which are encoded once, in the
        first question's time.

        Raises:
            PromptError: no prompts, or one text in place of several; and as `stream`.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
            found = f"of type {type(prompts).__name__}" if prompts else "empty"
            raise PromptError(f"the list of prompts is {found}: expected a list of one or more")
        options = resolve_options(options, sampling)
        messages = [asked(image, each, detail) for each in prompts]
        return self._answers([self._question(each, options) for each in messages])

    def _answers(self, questions: list[Question]) -> Iterator[Generation]:
        features, spent = self._features(questions[0].encoded.images)
        for question in questions:
            yield self._answer(question, features, spent)
            spent = Timings()

    def batch(
        self,
        images: Iterable[Images],
        prompts: str | Iterable[str],
        options: SamplingOptions | None = None,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        detail: str = AUTO,
        **sampling: Any,
    ) -> Answers:
        """Ask about many images, and decode the answers together, each as it would be alone.

        Images are taken as there is room for them, and the next ones made ready meanwhile. Until
        its answer has come, an image is not to be changed.

        Args:
            images: of each question its image, the features of one, a list of them, or None.
            prompts: one for each image, or one text for all.
            batch_size: how many answers are decoded together, 1 or more.
            detail: of every image, as `encode` takes it.

        Returns:
            An iterator over the results in the order of the images. What is wrong with one of them
            is raised in its place; iterating goes on with the one after it.

        Raises:
            ImageError, PromptError, OptionError: one image or one prompt in place of several, or
                options that are none.
        """
        options = resolve_options(options, sampling)
        options.check_vocabulary(self.config.text.vocab_size)
        if options.json_schema is not None:
            self._grammars.constraint(options.json_schema)
        size = check_batch_size(batch_size)
        self.sizes.of(detail)
        questions = (
            Asked(partial(self._ask_about, image, prompt, detail, options), self._begin)
            for image, prompt in pairs(images, prompts)
        )
        return Answers(self.worker, self.model, lambda: self._kept, questions, size)

    def schedule(self, batch_size: int = DEFAULT_BATCH_SIZE) -> Schedule:
        """Decodes together the answers of all who ask at the same time, each as it would be alone.

        Args:
            batch_size: how many answers are decoded together, 1 or more.

        Raises:
            OptionError: no number of answers.
        """
        size = check_batch_size(batch_size)
        return Schedule(self.worker, self.model, lambda: self._kept, size)

    def asked(self, messages: Sequence[dict[str, Any]], options: SamplingOptions) -> Asked:
        """A conversation as `chat` takes it, for a schedule, which looks at it in its turn."""
        return Asked(partial(self._prepare, messages, options), self._begin)

    def _ask_about(
        self, image: Images, prompt: str, detail: str, options: SamplingOptions
    ) -> tuple[Question, list[Ready]]:
        return self._prepare(asked(image, prompt, detail), options)

    def _prepare(
        self, messages: Sequence[dict[str, Any]], options: SamplingOptions
    ) -> tuple[Question, list[Ready]]:
        """What can be done on any thread."""
        question = self._question(messages, options)
        return question, [
            each.image
            if isinstance(each.image, ImageFeatures)
            else self._pixels(each.image, self.sizes.of(each.detail))
            for each in question.encoded.images
        ]

    def _begin(self, prepared: tuple[Question, list[Ready]]) -> Answer:
        """The answer to what was prepared. On the thread that computes."""
        question, images = prepared
        for image in images:
            if isinstance(image, ImageFeatures):
                self._check(image)
        features = [i if isinstance(i, ImageFeatures) else self._look(i) for i in images]
        new = [f.timings for f, i in zip(features, images, strict=True) if f is not i]
        return self._make(question, features, Timings.of_images(new))

    def _question(self, messages: Sequence[dict[str, Any]], options: SamplingOptions) -> Question:
        started = time.perf_counter()
        text = self.config.text
        encoded = encode_messages(
            self.tokenizer,
            messages,
            image_token_id=self.config.image_token_index,
            num_image_tokens=self._num_tokens,
            context=text.max_position_embeddings,
        )
        check_room(text, encoded)
        options.check_vocabulary(text.vocab_size)
        schema = options.json_schema
        constraint = None if schema is None else self._grammars.constraint(schema)
        return Question(encoded, options, time.perf_counter() - started, constraint)

    def _answer(
        self, question: Question, features: list[ImageFeatures], spent: Timings
    ) -> Generation:
        for each in features:
            self._check(each)
        make = partial(self._make, question, features, spent)
        return Generation(self.worker, generate(make, self._kept))

    def _make(self, question: Question, features: list[ImageFeatures], spent: Timings) -> Answer:
        return Answer(
            self.model,
            self.tokenizer,
            question,
            [each.projected for each in features],
            eos_token_ids=self.eos_token_ids,
            spent=replace(spent, load_s=self.load_s),
        )
