"""Several models asked the same questions about the same images: one walk for every comparison.

The gates, the held-out set and `compare` differ in the models that they run and in what they
compute from the outcomes. The way through images and questions is the one below.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer

from fastvlm_mlx.bundle.config import TextConfig
from model_export.language import qwen2
from model_export.language.dialogue import Dialogue
from model_export.language.weights import Weights
from model_export.samples.images import Sample


class EncodedSample(Protocol):
    """A sample with the features [1, N, C] of its image, as a `Reference` is."""

    @property
    def sample(self) -> Sample: ...

    @property
    def features(self) -> np.ndarray: ...


@dataclass(frozen=True)
class ComparedModel:
    """A language model, and the image features that it reads.

    Attributes:
        features: float32 [1, N, C] for each image.
        config: the model's own, where it may differ from the one that all models run under.
    """

    weights: Weights
    features: Sequence[np.ndarray]
    config: TextConfig | None = None


def dialogues_of(
    tokenizer: Tokenizer, image_token_id: int, samples: Iterable[EncodedSample]
) -> Iterator[Dialogue]:
    """Build the dialogue of each sample, with as many image tokens as it has features."""
    for each in samples:
        count = each.features.shape[1]
        yield Dialogue.build(tokenizer, each.sample.questions, image_token_id, count)


def outcomes(
    config: TextConfig, dialogues: Iterable[Dialogue], models: Sequence[ComparedModel]
) -> Iterator[list[qwen2.Outcome]]:
    """Run all models in step through one dialogue after the other.

    Args:
        config: of the models that have none of their own.
        dialogues: one for each image, in the order of the models' features.

    Yields:
        The outcome of each model, in the order of `models`.
    """
    for index, dialogue in enumerate(dialogues):
        sides = [
            qwen2.Side(model.weights, torch.from_numpy(model.features[index]), model.config)
            for model in models
        ]
        yield qwen2.run(config, dialogue, sides)
