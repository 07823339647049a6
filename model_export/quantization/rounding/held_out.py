"""The held-out set: what a quantization loses on it, and whether a method gains over rounding.

Losses are measured before a bundle is written. They have a heavy tail: one question may carry
nearly all of a mean, and which of two roundings gets that one wrong is chance. So a method and
plain rounding are compared image by image, by Wilcoxon's signed-rank test, in which an image counts
by the rank of its difference and not by its size. The unit is an image and not a question, as all
questions about one image are answered from the same features. A method replaces plain rounding
where it gains at this level and in the mean too: a small gain on most images does not pay for a
large loss on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil, isfinite, log2
from statistics import fmean, median, pstdev
from typing import Any

import torch
from torch import Tensor

from fastvlm_mlx.bundle.quantization import Format
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import ExportedTokenizer
from model_export.checkpoint.weights.tensors import ALL, safe_tensors
from model_export.encoder.references import Reference
from model_export.language import llm
from model_export.language.evaluation import ComparedModel, dialogues_of, outcomes
from model_export.language.recipes import Scheme
from model_export.language.weights import Matrix, SourceWeights, Weights, rounded

# The probability of taking a method for better that is not.
LEVEL = 0.05
# With fewer images chance alone gives every one of them a gain more often than that.
LEAST_IMAGES = ceil(-log2(LEVEL))


@dataclass(frozen=True)
class RoundedMatrix(Matrix):
    """A source's weight as plain rounding changes it."""

    rounding: Format | None = None

    def float(self, rows: slice = ALL) -> Tensor:
        weight = super().float(rows)
        return weight if self.rounding is None else rounded(weight, self.rounding)


@dataclass(frozen=True)
class PlannedWeights:
    """The weights of a bundle that is not written yet.

    Attributes:
        formats: of every matrix.
        ready: files of tensors that a method made; all others are rounded plainly.
    """

    source: SourceWeights
    formats: Scheme
    ready: llm.Ready = field(default_factory=dict)

    def matrix(self, name: str) -> Matrix:
        form = self.formats.get(name.removesuffix(".weight"))
        if name not in self.ready:
            return RoundedMatrix(self.source.matrix(name).weight, rounding=form)
        tensors, stem = safe_tensors(self.ready[name]), name.removesuffix("weight")
        if form is None:
            return Matrix(tensors[name])
        scales, biases = tensors[stem + "scales"], tensors[stem + "biases"]
        return Matrix(tensors[name], scales, biases, form)


@dataclass(frozen=True)
class Losses:
    """Nats that a quantization loses on each image, the mean over the places of its answers."""

    by_sample: tuple[float, ...]

    @property
    def summary(self) -> dict[str, float | None]:
        """Mean, median and standard deviation; None where a training diverged: JSON has no NaN."""
        nats = self.by_sample
        if not all(map(isfinite, nats)):
            return dict.fromkeys(("mean", "median", "standard_deviation"))
        return {"mean": fmean(nats), "median": median(nats), "standard_deviation": pstdev(nats)}

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        each = [nats if isfinite(nats) else None for nats in self.by_sample]
        return {**self.summary, "by_sample": each}

    def __str__(self) -> str:
        mean, middle, deviation = self.summary.values()
        if mean is None:
            return "no finite number of nats"
        return f"{mean:.3g} nats (median {middle:.3g}, standard deviation {deviation:.3g})"


@dataclass(frozen=True)
class PairedTest:
    """Wilcoxon's test of a method against plain rounding, on the same images."""

    rounding: Losses
    method: Losses

    @property
    def p_value(self) -> float:
        """The probability that chance alone favours the method as much, one-sided and exact."""
        from scipy.stats import wilcoxon

        pairs = zip(self.rounding.by_sample, self.method.by_sample, strict=True)
        gains = [plain - calibrated for plain, calibrated in pairs]
        # A training that diverges ends in NaN. What is equal speaks for neither.
        if not all(map(isfinite, gains)) or not any(gains):
            return 1.0
        return float(
            wilcoxon([gain for gain in gains if gain], alternative="greater", method="exact").pvalue
        )

    @property
    def less(self) -> bool:
        """Whether the method loses less in the mean."""
        return fmean(self.method.by_sample) < fmean(self.rounding.by_sample)

    @property
    def gains(self) -> bool:
        return self.less and self.p_value <= LEVEL

    def __str__(self) -> str:
        if self.gains:
            return f"a gain, p = {self.p_value:.2g}"
        if self.p_value > LEVEL:
            return f"no gain that chance would not give, p = {self.p_value:.2g} of {LEVEL:g}"
        return f"less on most (p = {self.p_value:.2g}) and not in the mean"


@torch.inference_mode()
def divergences(
    checkpoint: Checkpoint,
    tokenizer: ExportedTokenizer,
    references: Sequence[Reference],
    candidates: Sequence[PlannedWeights],
) -> list[Tensor]:
    """Measure the nats that each candidate loses against the source at each place of the answers.

    Args:
        references: images with questions.

    Returns:
        For each reference float64 [candidates, places].
    """
    text = replace(checkpoint.config.text, tie_word_embeddings=checkpoint.tied)
    features = [reference.features for reference in references]
    dialogues = dialogues_of(tokenizer.tokenizer, tokenizer.image_token_id, references)
    weights: list[Weights] = [SourceWeights(checkpoint), *candidates]
    models = [ComparedModel(each, features) for each in weights]
    return [
        torch.stack([outcome.divergence(expected).double() for outcome in rest])
        for expected, *rest in outcomes(text, dialogues, models)
    ]


def losses(
    checkpoint: Checkpoint,
    tokenizer: ExportedTokenizer,
    references: Sequence[Reference],
    candidates: Sequence[PlannedWeights],
) -> list[Losses]:
    """Measure what each candidate loses on each image, as `divergences` does."""
    by_place = divergences(checkpoint, tokenizer, references, candidates)
    by_sample = torch.stack([lost.mean(1) for lost in by_place], 1)
    return [Losses(tuple(row)) for row in by_sample.tolist()]
