"""`--llm-bpw` searches for the bits of every matrix that lose least at a given size.

Each matrix is rounded alone to every form that it may get, and the loss of that is measured. The
assignments that lose least by these figures are found exactly. Where bits are few, the losses of
single matrices do not add up, so these assignments are measured as whole models, together with the
plain choices that fit the size, on images that were kept back. The best of them is taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any

from fastvlm_mlx.bundle.quantization import Format
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import ExportedTokenizer
from model_export.encoder.references import Reference, reference_features
from model_export.language.recipes import Scheme, path_of
from model_export.options import ExportOptions
from model_export.quantization.bits import sensitivity, trial
from model_export.quantization.bits.candidates import Candidate, Space, a_little_above, at_or_below
from model_export.quantization.bits.measurements import Measurements
from model_export.quantization.bits.sensitivity import Losses
from model_export.samples.calibration import Calibration
from model_export.samples.images import Sample

# The version of the way to measure losses. It is part of the name under which they are kept, so
# that losses that were measured in another way are not reused.
METHOD = 2
# Single matrices are compared with each other on smaller images and fewer questions, because the
# tokens of large images would take most of the time, and all matrices are treated alike.
MEASURED_SIZE = 512
QUESTIONS = 2
# How many operations, two for each weight and token, may be spent on measuring single matrices and
# on choosing among whole models. Each takes some minutes on two cores.
MEASURING = 4e13
CHOOSING = 2e13
MEASURED_IMAGES = 8
DECIDING_IMAGES = 24
# How many tokens the questions about an image have with their answers, to estimate the time.
TEXT_TOKENS = 80
# How many whole models are measured at least on the images that were kept back.
FINALISTS = 8
# The user is told where prediction and measurement differ by more than this factor, unless the loss
# is below NOISE_NATS.
FAR = 3.0
NOISE_NATS = 1e-5
# The user is told of a slightly larger choice that leaves at most this share of the loss.
MUCH = 0.2

# The forms that each matrix is to be measured in.
FormatsByPath = Mapping[str, Sequence[Format]]


@dataclass(frozen=True)
class MeasuredCandidate:
    """A candidate with the loss that was predicted, and that of the whole model as measured."""

    name: str
    bits_per_weight: float
    predicted_kl_nats: float
    measured_kl_nats: float


@dataclass(frozen=True)
class SearchResult:
    """The assignment of bits that a search took, with what it was chosen from.

    Attributes:
        tried: the candidates that were measured as whole models on the held-out images, the one
            that was taken first.
        larger: plain choices a little above the size, measured with them.
        measured_on, chosen_on: names of the images that single matrices were measured on, and of
            the held-out images.
    """

    scheme: Scheme
    target_bits_per_weight: float
    tried: tuple[MeasuredCandidate, ...]
    larger: tuple[MeasuredCandidate, ...]
    calibration: Calibration
    measured_on: tuple[str, ...]
    chosen_on: tuple[str, ...]

    @property
    def taken(self) -> MeasuredCandidate:
        return self.tried[0]

    def to_dict(self) -> dict[str, Any]:
        """Describe the search for the manifest."""
        return {
            "target_bits_per_weight": self.target_bits_per_weight,
            "taken": self.taken.name,
            "predicted_kl_nats": self.taken.predicted_kl_nats,
            "measured_kl_nats": self.taken.measured_kl_nats,
            "tried": [vars(each) for each in self.tried],
            "a_little_larger": [vars(each) for each in self.larger],
            "calibration_sha256": self.calibration.digest,
            "measured_on": list(self.measured_on),
            "chosen_on": list(self.chosen_on),
            "skipped": list(self.calibration.skipped),
        }

    def notes(self) -> list[str]:
        """Say what the user should know, in one sentence each."""
        taken = self.taken
        notes: list[str] = []
        lost = taken.measured_kl_nats
        low, high = sorted((taken.predicted_kl_nats, lost))
        if high > FAR * low and lost > NOISE_NATS:
            notes.append(
                f"--llm-bpw {self.target_bits_per_weight:g}: losses of single matrices add up to "
                f"{taken.predicted_kl_nats:.2g} nats and all of them together lose "
                f"{lost:.2g}, which is the least of {len(self.tried)} "
                f"assignments measured ({taken.name})"
            )
        better = [each for each in self.larger if each.measured_kl_nats <= MUCH * lost]
        if better and lost > NOISE_NATS:
            more = min(better, key=lambda each: each.bits_per_weight)
            # Rounded up, so that it fits.
            bits = ceil(more.bits_per_weight * 100) / 100
            notes.append(
                f"a little more buys much: --llm-bpw {bits:g} ({more.name}) loses "
                f"{more.measured_kl_nats:.2g} nats in place of {lost:.2g}"
            )
        if set(self.measured_on) & set(self.chosen_on):
            notes.append(
                "--llm-bpw was decided on the images that its bits were measured on: give "
                "--calibration two images or more"
            )
        return notes


def search(
    checkpoint: Checkpoint,
    tokenizer: ExportedTokenizer,
    calibration: Calibration,
    options: ExportOptions,
    target: float,
    progress: Callable[[str, float | None], None],
) -> SearchResult:
    """Find the scheme of `target` bits per weight or fewer that loses least of those measured.

    Raises:
        OptionError: the size can't be reached, or the group size does not fit.
    """
    space = Space(checkpoint.llm_specs, checkpoint.config, options)
    # Before minutes of measuring.
    space.check(target)
    formats = _formats_to_measure(space, target)
    size = checkpoint.config.vision.image_size
    small, whole = (_cost(checkpoint, side) for side in (min(size, MEASURED_SIZE), size))
    samples = calibration.samples
    # Up to the layer of the matrix that is measured, the source's results serve again. That is half
    # of all layers in the mean.
    rows = sum(map(len, formats.values())) / 2
    some = _few(samples[::2], min(MEASURED_IMAGES, int(MEASURING / small / rows)))
    measuring_set = [replace(sample, questions=sample.questions[:QUESTIONS]) for sample in some]
    room = int(CHOOSING / whole)
    held_out_set = _few(samples[1::2] or samples, min(DECIDING_IMAGES, room // FINALISTS))
    progress("calibration images", None)
    state = checkpoint.encoder_state()
    references = reference_features(state, checkpoint, measuring_set, min(size, MEASURED_SIZE))
    deciding = reference_features(state, checkpoint, held_out_set)
    del state

    def measured(on: Sequence[Reference], of: Sequence[Candidate], stage: str) -> list[float]:
        divergences = trial.divergences(
            checkpoint,
            tokenizer,
            on,
            [candidate.scheme for candidate in of],
            options.llm.dtype,
            partial(progress, stage),
        )
        return trial.means(divergences)

    def measure(missing: FormatsByPath) -> Losses:
        report = partial(progress, "sensitivities")
        return sensitivity.measure(
            checkpoint, tokenizer, references, missing, options.llm.dtype, report
        )

    kept = _measurements(checkpoint, measuring_set, options.llm.dtype)
    losses = _losses(kept, formats, measure)
    fitting = at_or_below(space, losses, target)
    finalists = max(FINALISTS, room // len(held_out_set))
    if len(fitting) > finalists:
        first = measured(references, fitting, "assignments")
        order = sorted(range(len(fitting)), key=first.__getitem__)
        fitting = [fitting[i] for i in order[:finalists]]
    larger = a_little_above(space, losses, target)
    lost = measured(deciding, [*fitting, *larger], "best assignments")
    tried = list(zip(fitting, lost[: len(fitting)], strict=True))
    tried.sort(key=lambda pair: (pair[1], pair[0].bytes))
    return SearchResult(
        scheme=tried[0][0].scheme,
        target_bits_per_weight=target,
        tried=tuple(_tried(space, *pair) for pair in tried),
        larger=tuple(map(partial(_tried, space), larger, lost[len(fitting) :])),
        calibration=calibration,
        measured_on=tuple(sample.name for sample in measuring_set),
        chosen_on=tuple(sample.name for sample in held_out_set),
    )


def _tried(space: Space, candidate: Candidate, loss: float) -> MeasuredCandidate:
    bits = space.bits_per_weight(candidate.bytes)
    return MeasuredCandidate(candidate.name, bits, candidate.predicted, loss)


def _formats_to_measure(space: Space, target: float) -> FormatsByPath:
    """List the forms that each matrix may get: those near the size for the matrices of the layers,
    and every form for the few others."""
    near = space.near(target)
    paths = map(path_of, space.matrices)
    whole = near if space.options.destination.layout == "app" else space.forms
    return {path: near if space.part(path) == "layers" else whole for path in paths}


def _cost(checkpoint: Checkpoint, image_size: int) -> float:
    """Estimate the operations of a whole model for an image of this many pixels a side and its
    questions."""
    tokens = (image_size // checkpoint.config.vision.patch_size) ** 2
    return 2.0 * checkpoint.llm_parameters * (tokens + TEXT_TOKENS)


def _few(samples: Sequence[Sample], count: int) -> tuple[Sample, ...]:
    return Calibration(tuple(samples), ()).spread(max(1, count))


def _measurements(checkpoint: Checkpoint, samples: Sequence[Sample], dtype: str) -> Measurements:
    """Open what is kept of losses that were measured from the same weights, images and type, by the
    same method."""
    config, digest = checkpoint.config, Calibration(tuple(samples), ()).digest
    facts = [config.text.vocab_size, config.vision.image_size, MEASURED_SIZE, dtype, METHOD]
    text = json.dumps([checkpoint.source(), digest, *facts], sort_keys=True)
    return Measurements(hashlib.sha256(text.encode()).hexdigest()[:32])


def _losses(
    measurements: Measurements,
    formats: FormatsByPath,
    measure: Callable[[FormatsByPath], Losses],
) -> Losses:
    """Read the losses that were kept; measure and keep those that were not."""
    forms = {form for forms in formats.values() for form in forms}
    kept = {form: measurements.read(form) for form in forms}
    missing = {
        path: [form for form in forms if path not in kept[form]] for path, forms in formats.items()
    }
    missing = {path: forms for path, forms in missing.items() if forms}
    if missing:
        measured = measure(missing)
        for form in forms:
            new = {path: by_form[form] for path, by_form in measured.items() if form in by_form}
            if new:
                kept[form] |= new
                measurements.write(form, new)
    return {path: {form: kept[form][path] for form in forms} for path, forms in formats.items()}
