"""The conversation as token ids: chat template, and N placeholders where the image goes.

The reference builds one string, cuts it at `<image>` and tokenizes the pieces with every control
token active. Here the control tokens are put in by id and the user's text is tokenized as text,
so that nothing written in a prompt can act as control; ordinary prompts give the same ids.
"""

from __future__ import annotations

import re
from itertools import pairwise

from tokenizers import Tokenizer

from fastvlm_mlx.bundle.config import IMAGE_TOKEN
from fastvlm_mlx.bundle.manifest import EXPORT_AGAIN
from fastvlm_mlx.bundle.tokenizer import no_panic
from fastvlm_mlx.errors import BundleError, PromptError

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


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str,
    *,
    image_token_id: int | None = None,
    num_image_tokens: int = 0,
    system: str = SYSTEM_PROMPT,
    context: int | None = None,
) -> list[int]:
    """One user turn in ChatML, ready for the assistant's answer.

    Args:
        tokenizer: has `<|im_start|>` and `<|im_end|>`.
        prompt: the user's text; control tokens and `<image>` in it are text.
        image_token_id: the placeholder; the tokenizer's `<image>` where not given.
        num_image_tokens: N placeholders on a line before the prompt; 0 leaves the line out.
        system: the system message, text like the prompt.
        context: positions that there are. Of a prompt that is far longer only the beginning is
            tokenized, so that a mistaken one of many megabytes is refused at once.

    Returns:
        Ids, the placeholders in place; their number is the number of positions in the KV cache.

    Raises:
        PromptError: the prompt is no text, blank, far beyond the context, or can't be encoded.
        BundleError: the tokenizer lacks a control token, or fails.
    """
    if not isinstance(prompt, str):
        raise PromptError(
            f"the prompt is of type {type(prompt).__name__}: expected text, of type str"
        )
    if not prompt or prompt.isspace():
        raise PromptError("the prompt is empty: say what to do with the image")
    start = _control_id(tokenizer, TURN_START)
    end = _control_id(tokenizer, TURN_END)
    if context is not None:
        _check_length(tokenizer, prompt, context)
    newline = encode_text(tokenizer, "\n")
    ids = [start, *encode_text(tokenizer, f"system\n{system}"), end, *newline, start]
    if num_image_tokens:
        if image_token_id is None:
            image_token_id = _control_id(tokenizer, IMAGE_TOKEN)
        ids += encode_text(tokenizer, "user\n")
        ids += [image_token_id] * num_image_tokens
        ids += encode_text(tokenizer, f"\n{prompt}")
    else:
        ids += encode_text(tokenizer, f"user\n{prompt}")
    return [*ids, end, *newline, start, *encode_text(tokenizer, "assistant\n")]


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
