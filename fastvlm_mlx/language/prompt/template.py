"""The conversation as token ids: chat template, and N placeholders where an image goes.

The reference builds one string, cuts it at `<image>` and tokenizes the pieces with every control
token active. Here the control tokens are put in by id and the user's text is tokenized as text,
so that nothing written in a prompt can act as control; ordinary prompts give the same ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from fastvlm_mlx.bundle.config import IMAGE_TOKEN, TextConfig
from fastvlm_mlx.bundle.manifest import EXPORT_AGAIN
from fastvlm_mlx.bundle.tokenizer import no_panic
from fastvlm_mlx.errors import BundleError, PromptError
from fastvlm_mlx.language.prompt.messages import (
    AUTO,
    ORIGINAL,
    Image,
    Message,
    read_messages,
    user_message,
)

SYSTEM_PROMPT = "You are a helpful assistant."
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

# Characters of a prompt that are tokenized first, for each position of the context.
_PART = 4

# Qwen2's own. For one user message whose content is "<image>\n{prompt}" it renders what
# conv_templates["qwen_2"] of the reference (llava/conversation.py) does.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids, ready for the assistant's answer.

    Attributes:
        ids: the placeholders in place; their number is the number of positions in the KV cache.
        images: what the messages hold as images, in their order, each with its detail.
        places: of each image where its placeholders stand.
        prompt: the text of the last message.
        turns: how many messages are the user's.
    """

    ids: list[int]
    images: tuple[Image, ...]
    places: tuple[range, ...]
    prompt: str
    turns: int


def encode_messages(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    *,
    image_token_id: int | None = None,
    num_image_tokens: int | Callable[[Image], int] = 0,
    context: int | None = None,
) -> Encoded:
    """A conversation in ChatML.

    The ids are those of the reference (`conv_templates["qwen_2"]`, then `tokenizer_image_token`)
    for the string with `<image>` where an image stands, which is cut there and tokenized piece by
    piece. An image at the beginning of a message, or after others there, is followed by a line end,
    as each was in training. Elsewhere nothing is added: the text before and after it is taken as
    it is, and so is text that is given in several parts.

    Args:
        tokenizer: has `<|im_start|>` and `<|im_end|>`.
        messages: as the module `messages` describes them; without a system message the
            model's own comes first. Control tokens and `<image>` in a text are text.
        image_token_id: the placeholder; the tokenizer's `<image>` where not given.
        num_image_tokens: N placeholders for each image, or how many an image has.
        context: positions that there are. Of a conversation that is far longer only the beginning
            is tokenized, so that a mistaken one of many megabytes is refused at once.

    Raises:
        PromptError: no conversation, far beyond the context, or it can't be encoded.
        BundleError: the tokenizer lacks a control token, or fails.
    """
    read = read_messages(messages)
    if read[0].role != "system":
        read.insert(0, Message("system", (SYSTEM_PROMPT,)))
    images = tuple(image for message in read for image in message.images)
    if image_token_id is None and images:
        image_token_id = _control_id(tokenizer, IMAGE_TOKEN)
    placeholder = -1 if image_token_id is None else image_token_id
    start = _control_id(tokenizer, TURN_START)
    end = _control_id(tokenizer, TURN_END)
    counts = [
        num_image_tokens(image) if callable(num_image_tokens) else num_image_tokens
        for image in images
    ]
    if context is not None:
        _check_images(counts, context)
    newline = encode_text(tokenizer, "\n")
    ids: list[int] = []
    places: list[range] = []
    following = iter(counts)
    for message in read:
        if context is not None and len(ids) > 2 * context:
            raise PromptError(
                f"the conversation has more than {2 * context:,} tokens and the context is "
                f"{context:,}: begin a new one"
            )
        ids.append(start)
        text, leading = f"{message.role}\n", True
        for part in message.parts:
            if isinstance(part, str):
                if context is not None:
                    _check_length(tokenizer, part, context)
                text, leading = text + part, False
                continue
            ids += encode_text(tokenizer, text)
            count = next(following)
            places.append(range(len(ids), len(ids) + count))
            ids += [placeholder] * count
            text = "\n" if leading else ""
        ids += [*encode_text(tokenizer, text), end, *newline]
    ids += [start, *encode_text(tokenizer, "assistant\n")]
    turns = sum(message.role == "user" for message in read)
    return Encoded(ids, images, tuple(places), read[-1].text, turns)


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str,
    *,
    image_token_id: int | None = None,
    num_image_tokens: int = 0,
    system: str = SYSTEM_PROMPT,
    context: int | None = None,
) -> list[int]:
    """The ids of one question: `encode_messages` of a system message and one of the user's.

    Args:
        num_image_tokens: N placeholders on a line before the prompt; 0 leaves the line out.

    Raises:
        PromptError, BundleError: as `encode_messages`.
    """
    check_prompt(prompt)
    messages = [
        {"role": "system", "content": system},
        user_message(prompt, [None] if num_image_tokens else ()),
    ]
    return encode_messages(
        tokenizer,
        messages,
        image_token_id=image_token_id,
        num_image_tokens=num_image_tokens,
        context=context,
    ).ids


def image_places(ids: list[int], image_token_id: int, lengths: Sequence[int]) -> list[range]:
    """Where the placeholders of each image stand, given how many each has: images side by side
    share a run of them."""
    found: list[range] = []
    end = 0
    for length in lengths:
        start = ids.index(image_token_id, end)
        end = start + length
        found.append(range(start, end))
    return found


def asked(images: Any, prompt: Any, detail: str = AUTO) -> list[dict[str, Any]]:
    """One question as messages.

    Args:
        images: an image, a list of them, or None.
        detail: of all of them.
    """
    if not isinstance(images, list | tuple):
        images = [] if images is None else [images]
    return [user_message(check_prompt(prompt), images, detail)]


def check_prompt(prompt: Any) -> str:
    """Raises PromptError: no text, or blank."""
    if not isinstance(prompt, str):
        raise PromptError(
            f"the prompt is of type {type(prompt).__name__}: expected text, of type str"
        )
    if not prompt or prompt.isspace():
        raise PromptError("the prompt is empty: say what to do with the image")
    return prompt


def _check_images(counts: Sequence[int], context: int) -> None:
    """Raises PromptError: the images alone are beyond the context."""
    if sum(counts) <= context:
        return
    if len(counts) == 1:
        raise PromptError(
            f"the image has {counts[0]:,} tokens and the context is {context:,}: give it a lower "
            "detail"
        )
    each = f"{counts[0]:,} tokens each" if len(set(counts)) == 1 else f"{sum(counts):,} tokens"
    raise PromptError(
        f"there are {len(counts):,} images of {each} and the context is {context:,}: give fewer "
        "images"
    )


def _check_length(tokenizer: Tokenizer, prompt: str, context: int) -> None:
    """Tokenize ever longer beginnings of a long prompt, until one is far beyond the context.

    Twice the context, since what follows may join the last tokens of a beginning.
    """
    length = _PART * context
    while length < len(prompt):
        if len(encode_text(tokenizer, prompt[:length])) > 2 * context:
            raise PromptError(
                f"the prompt has {len(prompt):,} characters, of which the first {length:,} are "
                f"more than {2 * context:,} tokens, and the context is {context:,}: shorten the "
                "prompt"
            )
        length *= 2


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenize text in which control tokens mean nothing.

    Each control token that is spelled out in `text` is cut after its first character and the
    parts are tokenized apart. (`Tokenizer.encode_special_tokens` would do most of this, but it
    changes a tokenizer that other threads may be using, and leaves out `<image>` where that
    was not added as special.)

    Raises:
        PromptError: the text holds half a surrogate pair, which no tokenizer can encode.
        BundleError: the tokenizer fails.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt holds half a character ({text[error.start]!a}): expected valid Unicode, "
            "write the character again"
        ) from error
    added = tokenizer.get_added_tokens_decoder().values()
    control = {token.content for token in added if token.special} | {IMAGE_TOKEN}
    spelled = re.compile("(?=" + "|".join(map(re.escape, sorted(control))) + ")")
    cuts = [0, *(match.start() + 1 for match in spelled.finditer(text)), len(text)]
    ids: list[int] = []
    with no_panic("the tokenizer can't encode the prompt", BundleError, EXPORT_AGAIN):
        for first, last in pairwise(cuts):
            ids += tokenizer.encode(text[first:last], add_special_tokens=False).ids
    return ids


def _control_id(tokenizer: Tokenizer, token: str) -> int:
    token_id: int | None = tokenizer.token_to_id(token)
    if token_id is None:
        raise BundleError(f"the tokenizer lacks {token}: expected the tokenizer of a FastVLM")
    return token_id


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
