"""A dialogue: one image with its questions and answers, as the ids of one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastvlm_mlx.language.prompt.template import encode_prompt


@dataclass(frozen=True)
class Dialogue:
    """One image and several questions with their answers, in one sequence.

    Each question is a branch: it sees the system prompt, the image and itself, at the positions
    it would have alone. One pass over the image serves them all, and no answer reads another.

    Attributes:
        ids: [L]. positions: [L]. visible: bool [L, L], row may attend to column.
        scored: the places whose next token belongs to an answer.
        answers: for each question the slice of `scored` that is its answer's, the end's included.
        image: the slice of the placeholders.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    scored: Tensor
    answers: tuple[slice, ...]
    image: slice

    @property
    def mask(self) -> Tensor:
        """What is added to the attention's scores: float32 [1, 1, L, L]."""
        return torch.zeros(self.visible.shape).masked_fill(~self.visible, -inf)[None, None]

    @classmethod
    def build(
        cls,
        tokenizer: Tokenizer,
        questions: Sequence[tuple[str, str]],
        image_token_id: int,
        num_image_tokens: int,
    ) -> Dialogue:
        """`questions` are pairs of prompt and answer."""
        pairs = [(prompt, encode_text(tokenizer, answer)) for prompt, answer in questions]
        return cls.of_ids(tokenizer, pairs, image_token_id, num_image_tokens)

    @classmethod
    def of_ids(
        cls,
        tokenizer: Tokenizer,
        questions: Sequence[tuple[str, Sequence[int]]],
        image_token_id: int,
        num_image_tokens: int,
    ) -> Dialogue:
        """`questions` are pairs of a prompt and an answer's ids."""
        ids: list[int] = []
        positions: list[int] = []
        branch: list[int] = []
        scored: list[int] = []
        answers: list[slice] = []
        for number, (prompt, answer) in enumerate(questions, 1):
            asked = encode_prompt(
                tokenizer,
                prompt,
                image_token_id=image_token_id,
                num_image_tokens=num_image_tokens,
            )
            start = asked.index(image_token_id)
            end = start + num_image_tokens
            if not ids:
                ids, positions, branch = asked[:end], list(range(end)), [0] * end
            tail = [*asked[end:], *answer]
            answers.append(slice(len(scored), len(scored) + len(answer) + 1))
            scored += range(len(ids) + len(asked) - end - 1, len(ids) + len(tail))
            ids += tail
            positions += range(end, end + len(tail))
            branch += [number] * len(tail)
        tokens = torch.tensor(ids)
        # The encoder's features stand there, and not every model has the placeholder's row.
        tokens[start:end] = tokens[0]
        of = torch.tensor(branch)
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        visible = causal & ((of[None] == 0) | (of[None] == of[:, None]))
        return cls(
            tokens,
            torch.tensor(positions),
            visible,
            torch.tensor(scored),
            tuple(answers),
            slice(start, end),
        )


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of an answer, without anything before or after it."""
    return tokenizer.encode(text, add_special_tokens=False).ids
