"""What a language model will lose by its formats and a method's weights, before it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastvlm_mlx.quantization import Format
from model_export import llm, qwen2
from model_export.checkpoint import Checkpoint
from model_export.pictures import Reference
from model_export.recipes import Scheme
from model_export.tensors import ALL, safe_tensors
from model_export.tokenizer import ExportedTokenizer


@dataclass(frozen=True)
class RoundedMatrix(qwen2.Matrix):
    """A source's weight as plain rounding keeps it."""

    rounding: Format | None = None

    def float(self, rows: slice = ALL) -> Tensor:
        weight = super().float(rows)
        return weight if self.rounding is None else qwen2.rounded(weight, self.rounding)


@dataclass(frozen=True)
class Candidate:
    """The weights of a bundle that is not written yet: `ready` where it has them, else rounded."""

    source: qwen2.SourceWeights
    chosen: Scheme
    ready: llm.Ready = field(default_factory=dict)

    def matrix(self, name: str) -> qwen2.Matrix:
        form = self.chosen.get(name.removesuffix(".weight"))
        if name not in self.ready:
            return RoundedMatrix(self.source.matrix(name).weight, rounding=form)
        tensors, stem = safe_tensors(self.ready[name]), name.removesuffix("weight")
        if form is None:
            return qwen2.Matrix(tensors[name])
        scales, biases = tensors[stem + "scales"], tensors[stem + "biases"]
        return qwen2.Matrix(tensors[name], scales, biases, form)


@torch.inference_mode()
def losses(
    checkpoint: Checkpoint,
    tokenizer: ExportedTokenizer,
    references: Sequence[Reference],
    candidates: Sequence[Candidate],
) -> list[float]:
    """KL divergence from the source of each candidate, in nats, the mean over the answers' tokens.

    Args:
        references: pictures with questions, and what the source's encoder makes of them.
    """
    text = replace(checkpoint.config.text, tie_word_embeddings=checkpoint.tied)
    weights: list[qwen2.Weights] = [qwen2.SourceWeights(checkpoint), *candidates]
    total, places = [0.0] * len(candidates), 0
    for reference in references:
        dialogue = qwen2.Dialogue.build(
            tokenizer.tokenizer,
            reference.picture.questions,
            tokenizer.image_token_id,
            checkpoint.config.vision.num_tokens,
        )
        features = torch.from_numpy(reference.features)
        sides = [qwen2.Side(side, features) for side in weights]
        expected, *found = qwen2.run(text, dialogue, sides)
        for i, outcome in enumerate(found):
            total[i] += float(outcome.divergence(expected).sum(dtype=torch.float64))
        places += len(dialogue.scored)
    return [nats / places for nats in total]
