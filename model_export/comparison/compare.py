"""Bundles and checkpoints side by side: what each takes, and what it loses against one of them.

Every model is asked the same questions about the same images, and given the answers that the
reference itself chooses, token by token, so that all are asked for the next token at the same
places. An answer has changed where a model chooses another token anywhere in it: its own greedy
answer, and the reference's, part there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from statistics import median, pstdev
from typing import Any

import numpy as np
import torch

from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.language.prompt.template import TURN_END
from model_export.comparison import check_count
from model_export.comparison.models import Model, open_model
from model_export.gates.encoder import mean_cosine, snr_db
from model_export.interruption import Progress
from model_export.language import qwen2
from model_export.language.dialogue import Dialogue, encode_text
from model_export.language.evaluation import ComparedModel, outcomes
from model_export.samples import scenes
from model_export.samples.calibration import load_calibration
from model_export.samples.images import Sample, gate_samples

# Of the scenes' questions; 1 % of them is two.
QUESTIONS = 200
# Longest answer that is followed.
MAX_TOKENS = 48
# From the gates' on, all kept from the demo's training.
FIRST_SEED = 100


@dataclass
class Row:
    """What one model takes, and what it loses against the reference.

    Attributes:
        bytes: encoder, llm (the projector's included), total.
        snr_db, cosine: of the encoder's features, over all images; cosine the mean over tokens.
        llm_kl_nats, llm_agreement: with the reference's features.
        kl_nats, agreement: with its own, over all places. Agreement is the share of places with
            the same choice.
        kl_median_nats, kl_deviation_nats: of the answers, the mean over its places for each: how a
            mean came about that one answer may carry. None of the reference.
        changed, questions: answers, end to end.
        best: none of the models compared is both smaller and nearer to the reference.
    """

    name: str
    kind: str
    bytes: dict[str, int]
    bits_per_weight: float
    snr_db: float | None = None
    cosine: float | None = None
    llm_kl_nats: float = 0.0
    llm_agreement: float = 1.0
    kl_nats: float = 0.0
    kl_median_nats: float | None = None
    kl_deviation_nats: float | None = None
    agreement: float = 1.0
    changed: int = 0
    questions: int = 0
    reference: bool = False
    best: bool = False

    def to_dict(self) -> dict[str, Any]:
        # JSON has no infinity.
        snr = None if self.snr_db is None or not isfinite(self.snr_db) else self.snr_db
        return {**asdict(self), "snr_db": snr}


def compare(
    paths: Sequence[str | Path],
    reference: str | Path | None,
    questions: str | Path | None,
    count: int,
    progress: Progress,
) -> list[Row]:
    """Compare every model with the reference.

    Args:
        reference: a checkpoint or a bundle; without one the first checkpoint among `paths`, or
            else the largest bundle.
        questions: images or JSON lines as for calibration; else scenes, or a photograph.
        count: how many of the scenes' questions are asked at least.

    Raises:
        OptionError: fewer than two models, models of different shapes, or no question.
        BundleError, CheckpointError: one of them can't be read.
    """
    check_count(count)
    models = [open_model(path) for path in dict.fromkeys(map(str, paths))]
    chosen = open_model(reference) if reference is not None else _reference(models)
    if not any(model.name == chosen.name for model in models):
        models = [chosen, *models]
    if len(models) < 2:
        again = f"{chosen.name} is given twice and no other model with it"
        found = again if len(paths) > 1 else "only one model is given"
        raise OptionError(f"{found}: name two or more bundles or checkpoints")
    for model in models:
        if model.shape != chosen.shape:
            raise OptionError(
                f"{model.name} and {chosen.name} are of different shapes: compare models of one "
                "architecture, at one input size"
            )
    bench = Bench.of(chosen, samples_of(chosen, questions, count), progress)
    rows = []
    for number, model in enumerate(models):
        progress(f"compare {model.name}", number / len(models))
        rows.append(bench.row(model))
    return mark_best(rows)


def _reference(models: Sequence[Model]) -> Model:
    checkpoints = [model for model in models if model.kind == "checkpoint"]
    return (checkpoints or sorted(models, key=lambda m: -m.sizes["llm"] - m.sizes["encoder"]))[0]


def samples_of(model: Model, path: str | Path | None, count: int) -> list[Sample]:
    """The user's, or held-out scenes with `count` questions; for a large encoder the gates'."""
    vision = model.config.vision
    if path is not None:
        return list(load_calibration(path, vision, "--questions").samples)
    gates = gate_samples(vision)
    if not gates[0].name.startswith("scene"):
        return gates
    samples: list[Sample] = []
    seed = FIRST_SEED
    while sum(len(sample.questions) for sample in samples) < count:
        scene = scenes.generate(seed, held_out=True)
        asked = tuple((q.prompt, q.answer) for q in scene.questions(seed))
        samples.append(Sample(f"scene {seed}", scene.draw(vision.image_size), asked))
        seed += 1
    return samples


@dataclass(frozen=True)
class Bench:
    """The reference, what it sees in every image, and its answers.

    Attributes:
        complete: of each image's answers, whether it ended or was cut off.
    """

    reference: Model
    samples: Sequence[Sample]
    features: Sequence[np.ndarray]
    dialogues: Sequence[Dialogue]
    complete: Sequence[tuple[bool, ...]]

    @classmethod
    def of(cls, reference: Model, samples: Sequence[Sample], progress: Progress) -> Bench:
        """Let the reference look and answer."""
        samples = [sample for sample in samples if sample.questions]
        progress("reference encoder", None)
        features = reference.encode(samples)
        dialogues, complete = [], []
        for number, (sample, seen) in enumerate(zip(samples, features, strict=True)):
            progress("reference answers", number / len(samples))
            dialogue, ended = answers(reference, sample, seen)
            dialogues.append(dialogue)
            complete.append(ended)
        return cls(reference, samples, features, dialogues, complete)

    def row(self, model: Model) -> Row:
        """What `model` takes and loses."""
        encoder, llm = int(model.sizes["encoder"]), int(model.sizes["llm"])
        size = {"encoder": encoder, "llm": llm, "total": encoder + llm}
        row = Row(model.name, model.kind, size, model.sizes["bits_per_weight"])
        row.questions = sum(len(sample.questions) for sample in self.samples)
        if model.name == self.reference.name:
            row.reference = True
            return row
        own = model.encode(self.samples)
        source, found = np.concatenate(self.features), np.concatenate(own)
        row.snr_db, row.cosine = snr_db(source, found), mean_cosine(source, found)
        alone, whole = _Tally(), _Tally()
        models = [
            ComparedModel(self.reference.weights, self.features),
            ComparedModel(model.weights, self.features),
            ComparedModel(model.weights, own),
        ]
        walk = outcomes(self.reference.config.text, self.dialogues, models)
        for dialogue, ended, results in zip(self.dialogues, self.complete, walk, strict=True):
            p, q, r = _common([outcome.log_probabilities for outcome in results])
            alone.add(p, q, dialogue, ended)
            whole.add(p, r, dialogue, ended)
        row.llm_kl_nats, row.llm_agreement = alone.kl, alone.agreement
        row.kl_nats, row.agreement, row.changed = whole.kl, whole.agreement, whole.changed
        row.kl_median_nats, row.kl_deviation_nats = median(whole.by_answer), pstdev(whole.by_answer)
        return row


def answers(
    model: Model, sample: Sample, features: np.ndarray
) -> tuple[Dialogue, tuple[bool, ...]]:
    """The image's questions with the greedy answers of `model`, and which of them have ended.

    The answers that the image comes with are guesses: a whole one is checked in one pass, and
    each pass corrects at least one token.
    """
    tokenizer, end_id = model.tokenizer, model.tokenizer.token_to_id(TURN_END)
    guesses = [encode_text(tokenizer, a)[:MAX_TOKENS] for _, a in sample.questions]
    ended: list[bool | None] = [None] * len(guesses)
    prompts = [prompt for prompt, _ in sample.questions]
    side = qwen2.Side(model.weights, torch.from_numpy(features))
    while True:
        pairs = list(zip(prompts, guesses, strict=True))
        dialogue = Dialogue.of_ids(
            tokenizer, pairs, model.placeholder, model.config.vision.num_tokens
        )
        if all(end is not None for end in ended):
            return dialogue, tuple(bool(end) for end in ended)
        (outcome,) = qwen2.run(model.config.text, dialogue, [side])
        chosen = outcome.log_probabilities.argmax(1)
        for i, (span, guess) in enumerate(zip(dialogue.answers, guesses, strict=True)):
            if ended[i] is None:
                guesses[i], ended[i] = _corrected(guess, chosen[span].tolist(), end_id)


def _corrected(
    guess: list[int], chosen: list[int], end_id: int | None
) -> tuple[list[int], bool | None]:
    """A guess up to where the model chooses otherwise, its choice there, and the guess's rest.

    Returns:
        The new guess, and whether it has ended (True), was cut off (False) or goes on (None).
    """
    # The last choice is of what follows the guess.
    pairs = enumerate(zip(guess, chosen[:-1], strict=True))
    wrong = next((i for i, (a, b) in pairs if a != b), None)
    place = len(guess) if wrong is None else wrong
    if chosen[place] == end_id:
        return guess[:place], True
    if place >= MAX_TOKENS:
        return guess, False
    return [*guess[:place], chosen[place], *guess[place + 1 :]][:MAX_TOKENS], None


class _Tally:
    """Divergence, agreement and changed answers, summed over images."""

    def __init__(self) -> None:
        self._kl = self._same = self._places = 0.0
        self.changed = 0
        self.by_answer: list[float] = []

    def add(
        self,
        source: torch.Tensor,
        found: torch.Tensor,
        dialogue: Dialogue,
        ended: Sequence[bool],
    ) -> None:
        lost = (source.exp() * (source - found)).sum(1, dtype=torch.float64)
        self._kl += float(lost.sum())
        same = source.argmax(1) == found.argmax(1)
        self._same += float(same.sum())
        self._places += len(same)
        for span, whole in zip(dialogue.answers, ended, strict=True):
            self.by_answer.append(max(0.0, float(lost[span].mean())))
            # What follows an answer that was cut off is not part of it.
            stop = span.stop if whole else span.stop - 1
            self.changed += not bool(same[span.start : stop].all())

    @property
    def kl(self) -> float:
        return max(0.0, self._kl / self._places)

    @property
    def agreement(self) -> float:
        return self._same / self._places


def _common(log_probabilities: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Log-probabilities over the ids that all have: an export may add rows for <image>."""
    rows = min(found.shape[1] for found in log_probabilities)
    return [found[:, :rows].log_softmax(1) for found in log_probabilities]


def mark_best(rows: list[Row]) -> list[Row]:
    """The Pareto front of size and divergence; the reference, which can't lose, is left out."""
    others = [row for row in rows if not row.reference]
    for row in others:
        row.best = not any(
            (o.bytes["total"], o.kl_nats) != (row.bytes["total"], row.kl_nats)
            and o.bytes["total"] <= row.bytes["total"]
            and o.kl_nats <= row.kl_nats
            for o in others
        )
    return rows
