"""Many questions about an image in one training sequence, and the loss of their answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model_export.demo.model import DemoModel
from model_export.demo.tokenizer import AFTER_IMAGE, BEFORE_IMAGE
from model_export.samples.scenes import GRID, Question

# Segments of a training sequence: text before the image, the image, then one per question.
PADDING, BEFORE, IMAGE = 99, 0, 1


@dataclass(frozen=True)
class Batch:
    """Several questions about each image in one sequence, behind one copy of the image.

    A question sees the image and itself, and its positions start after the image, so that it
    is computed as if it stood alone. `ids`, `positions`, `segments`: [B, L]. One entry for each
    token of each answer: `where` (row and position that predict it), `targets`, `weights`,
    `question` (its index among all questions).
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    where: Tensor
    targets: Tensor
    weights: Tensor
    question: Tensor


def collate(model: DemoModel, asked: list[list[Question]], device: str) -> Batch:
    """One sequence for each list of questions."""
    end = model.config["eos_token_id"]
    before = model.tokenizer.encode(BEFORE_IMAGE).ids
    prefix = len(before) + GRID**2
    rows, positions, segments = [], [], []
    where, targets, weights, index = [], [], [], []
    count = 0
    for row_number, questions in enumerate(asked):
        row = before + [end] * GRID**2
        position = list(range(prefix))
        segment = [BEFORE] * len(before) + [IMAGE] * GRID**2
        for number, question in enumerate(questions, IMAGE + 1):
            suffix = model.tokenizer.encode(AFTER_IMAGE.format(question.prompt)).ids
            answer = model.tokenizer.encode(question.answer).ids
            length = len(answer) + 1
            first = len(row) + len(suffix) - 1
            where += [(row_number, first + i) for i in range(length)]
            targets += [*answer, end]
            # Between a mean over tokens, all description, and a mean over questions.
            weights += [length**-0.5] * length
            index += [count] * length
            row = row + suffix + answer
            position += range(prefix, prefix + len(suffix) + len(answer))
            segment += [number] * (len(suffix) + len(answer))
            count += 1
        rows.append(row)
        positions.append(position)
        segments.append(segment)
    longest = max(map(len, rows))

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([v + [fill] * (longest - len(v)) for v in values], device=device)

    return Batch(
        padded(rows, 0),
        padded(positions, 0),
        padded(segments, PADDING),
        torch.tensor(where, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(weights, device=device),
        torch.tensor(index, device=device),
    )


def answer_loss(model: DemoModel, batch: Batch, features: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted next-token loss over answers, and which of their tokens were right."""
    table = model.language.embed_tokens.weight
    segments = batch.segments
    embeddings = F.embedding(batch.ids, table)
    embeddings = embeddings.masked_scatter(
        (segments == IMAGE)[..., None], model.projector(features)
    )
    causal = torch.ones(2 * segments.shape[1:], dtype=torch.bool, device=segments.device).tril()
    mask = (segments[:, None, :] <= IMAGE) | (segments[:, None, :] == segments[:, :, None])
    state = model.language(
        inputs_embeds=embeddings,
        attention_mask=(mask & causal)[:, None],
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    logits = state[batch.where[:, 0], batch.where[:, 1]] @ table.T
    losses = F.cross_entropy(logits, batch.targets, reduction="none")
    loss = (losses * batch.weights).sum() / batch.weights.sum()
    return loss, logits.argmax(-1) == batch.targets
