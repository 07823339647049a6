"""What is asked: an image that is new each time, and a question of a given number of tokens."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.fastvlm import FastVLM
from fastvlm_mlx.image.decode import load_image
from fastvlm_mlx.language.prompt.template import encode_text
from fastvlm_mlx.loading import load

# Of the generated image, width and height: what a telephone's screenshot or a web page has.
GENERATED = (1600, 1200)
GENERATED_NAME = f"generated, {GENERATED[0]}×{GENERATED[1]}"
# The side of the square that tells the images of two runs apart, in pixels.
_MARK = 32
_ENDS = ("", ".", "?", "!", " .")
FIRST = (
    "Describe the image. Name every object that you see, say where it is and which colour it has, "
    "and read out whatever is written. Then say what is in the background, and what the light and "
    "the weather are like. "
)
SECOND = (
    "Which of these objects is the largest? Compare it with those beside it, and say what it may "
    "be used for, who may have put it there, and at what time of the day the image was made. "
)


def generated_image() -> Image.Image:
    """A soft pattern in colours with noise on it, which no stage can make a shortcut of."""
    width, height = GENERATED
    x, y = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]
    waves = [np.sin(9 * x + 5 * y), np.cos(7 * x * y + 1), np.sin(11 * y - 3 * x)]
    pattern = np.stack(np.broadcast_arrays(*waves), -1) * 90 + 127
    noise = np.random.default_rng(0).normal(0, 12, pattern.shape)
    return Image.fromarray(np.clip(pattern + noise, 0, 255).astype(np.uint8))


def marked(image: Image.Image, number: int) -> Image.Image:
    """A copy with a small square whose colour is `number`'s, so that nothing that an earlier run
    has left in a cache answers for this one."""
    copy = image.copy()
    side = min(_MARK, *image.size)
    colour = (37 * number % 256, number // 256 % 256, 128)
    copy.paste(colour, (0, 0, side, side))
    return copy


def question(model: FastVLM, text: str, tokens: int) -> str:
    """As much of `text`, repeated, as `tokens` tokens have.

    Raises:
        OptionError: the tokenizer makes no text of just so many.
    """

    def count(asked: str) -> int:
        return len(encode_text(model.tokenizer, f"\n{asked}")) - newline

    newline = len(encode_text(model.tokenizer, "\n"))
    # A token has one character at least, and a few dozen at most.
    long = text * (tokens * 32 // len(text) + 1)
    near = bisect_left(range(len(long)), tokens, key=lambda length: count(long[:length]))
    # The last letters of a word may be more tokens than the whole word, and the next word two.
    for length in range(max(1, near - 16), min(near + 64, len(long))):
        for end in _ENDS:
            asked = long[:length] + end
            if not asked.endswith(" ") and count(asked) == tokens:
                return asked
    raise OptionError(
        f"--prompt-tokens {tokens}: the bundle's tokenizer makes no question of just so many "
        "tokens, choose another number"
    )


class Subject:
    """A loaded bundle at one setting."""

    def __init__(self, job: dict[str, Any]):
        """Load it.

        Args:
            job: `bundle`, `image` (a file or None), `prompt_tokens` or the two `prompts`,
                `max_tokens`, and `load`, keywords of `fastvlm_mlx.load`.

        Raises:
            FastVLMError: the bundle, the image or an option can't be used.
        """
        model = load(Path(job["bundle"]), **job["load"])
        # Without end tokens every answer has as many tokens as were asked for.
        self.model = replace(model, eos_token_ids=frozenset())
        self.image = load_image(job["image"]) if job["image"] else generated_image()
        self.max_tokens = job["max_tokens"]
        self.prompts = job.get("prompts") or [
            question(model, text, job["prompt_tokens"]) for text in (FIRST, SECOND)
        ]

    def run(self, number: int) -> dict[str, Any]:
        """Ask both questions about a new image; seconds of each stage of the first.

        Raises:
            OptionError: the context has no room for so many tokens.
        """
        image = marked(self.image, number)
        first, second = self.model.ask(image, self.prompts, max_tokens=self.max_tokens)
        result, timings = first.result, first.result.timings
        if result.generation_tokens < self.max_tokens:
            raise OptionError(
                f"--max-tokens {self.max_tokens} is more than the {result.generation_tokens} that "
                f"the context has room for after a prompt of {result.prompt_tokens:,} tokens: "
                "choose fewer"
            )
        return {
            "preprocess_s": timings.preprocess_s,
            "encode_s": timings.encode_s,
            "project_s": timings.project_s,
            "prefill_s": timings.prefill_s,
            "ttft_s": timings.ttft_s,
            "next_ttft_s": second.result.timings.ttft_s,
            "decode_s": timings.decode_s,
            "tokens_per_s": timings.tokens_per_s,
            "load_s": timings.load_s,
            "image_tokens": result.image_tokens,
            "text_tokens": result.prompt_tokens - result.image_tokens,
            "generation_tokens": result.generation_tokens,
            "image_size": self.model.image_processor.size,
            "compute": result.compute,
            "encoder": self.model.encoder.backend,
            "text": result.text,
        }
