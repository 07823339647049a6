"""`--llm-bpw`: which matrix gets how many bits, to lose least at a size, by measured losses.

Every matrix is measured alone in every form that it may get, and the assignments that lose least
by that are solved exactly. Losses do not add up where bits are few, so these assignments, and the
plain choices that fit the size, are measured whole before one is taken, on images that were kept
back.
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

# Part of the name under which losses are kept: of another way to measure them nothing is reused.
METHOD = 2
# Matrices are compared with each other on smaller images and few questions: the tokens of large
# ones would take most of the time, and all matrices see the same.
MEASURED_SIZE = 512
QUESTIONS = 2
# Operations, two for each weight and token, that measuring matrices and choosing among whole models
# may each take, as far as there are images: some minutes on two cores.
MEASURING = 4e13
CHOOSING = 2e13
MEASURED_IMAGES = 8
DECIDING_IMAGES = 24
# Of an image's questions with their answers; for an estimate of the time.
TEXT_TOKENS = 80
# Whole models that are at least measured on what was kept back.
FINALISTS = 8
# What was predicted and what is measured are far apart by this factor; of less than so many nats
# nothing is made.
FAR = 3.0
NOISE_NATS = 1e-5
# A little more buys much where it leaves at most this share of the loss.
MUCH = 0.2

# The forms that each matrix is to be measured in.
FormatsByPath = Mapping[str, Sequence[Format]]


@dataclass(frozen=True)
class MeasuredCandidate:
    """A candidate and what it loses, measured whole."""

    name: str
    bits_per_weight: float
    predicted_kl_nats: float
    measured_kl_nats: float


@dataclass(frozen=True)
class SearchResult:
    """An assignment of bits, what it was found from, and what it loses.

    Attributes:
        tried: what was measured whole on the images that decide, the one taken first.
        larger: plain choices a little above the size, measured with them.
        measured_on, chosen_on: names of images.
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
        """For the manifest."""
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
        """What the user should be told."""
        taken, said = self.taken, []
        lost = taken.measured_kl_nats
        low, high = sorted((taken.predicted_kl_nats, lost))
        if high > FAR * low and lost > NOISE_NATS:
            said.append(
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
            said.append(
                f"a little more buys much: --llm-bpw {bits:g} ({more.name}) loses "
                f"{more.measured_kl_nats:.2g} nats in place of {lost:.2g}"
            )
        if set(self.measured_on) & set(self.chosen_on):
            said.append(
                "--llm-bpw was decided on what its bits were measured on: give --calibration two "
                "images or more"
            )
        return said


def search(
    checkpoint: Checkpoint,
    tokenizer: ExportedTokenizer,
    calibration: Calibration,
    options: ExportOptions,
    target: float,
    progress: Callable[[str, float | None], None],
) -> SearchResult:
    """The scheme of `target` bits per weight, or fewer, that loses least of all that were measured.

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
    # A matrix that is measured alone is the source's up to its layer, half of the way in the mean.
    rows = sum(map(len, formats.values())) / 2
    some = _few(samples[::2], min(MEASURED_IMAGES, int(MEASURING / small / rows)))
    seen = [replace(sample, questions=sample.questions[:QUESTIONS]) for sample in some]
    room = int(CHOOSING / whole)
    held_out_set = _few(samples[1::2] or samples, min(DECIDING_IMAGES, room // FINALISTS))
    progress("calibration images", None)
    state = checkpoint.encoder_state()
    references = reference_features(state, checkpoint, seen, min(size, MEASURED_SIZE))
    deciding = reference_features(state, checkpoint, held_out_set)
    del state

    def measured(on: Sequence[Reference], of: Sequence[Candidate], stage: str) -> list[float]:
        found = trial.divergences(
            checkpoint,
            tokenizer,
            on,
            [candidate.scheme for candidate in of],
            options.llm.dtype,
            partial(progress, stage),
        )
        return trial.means(found)

    def measure(missing: FormatsByPath) -> Losses:
        report = partial(progress, "sensitivities")
        return sensitivity.measure(
            checkpoint, tokenizer, references, missing, options.llm.dtype, report
        )

    losses = _losses(_measurements(checkpoint, seen, options.llm.dtype), formats, measure)
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
        measured_on=tuple(sample.name for sample in seen),
        chosen_on=tuple(sample.name for sample in held_out_set),
    )


def _tried(space: Space, candidate: Candidate, loss: float) -> MeasuredCandidate:
    bits = space.bits_per_weight(candidate.bytes)
    return MeasuredCandidate(candidate.name, bits, candidate.predicted, loss)


def _formats_to_measure(space: Space, target: float) -> FormatsByPath:
    """The forms that each matrix may get: of the layers' those near the size, of the few others
    every one."""
    near = space.near(target)
    paths = map(path_of, space.matrices)
    whole = near if space.options.destination.layout == "app" else space.forms
    return {path: near if space.part(path) == "layers" else whole for path in paths}


def _cost(checkpoint: Checkpoint, image_size: int) -> float:
    """Operations that a whole model takes for an image of so many pixels and its questions."""
    tokens = (image_size // checkpoint.config.vision.patch_size) ** 2
    return 2.0 * checkpoint.llm_parameters * (tokens + TEXT_TOKENS)


def _few(samples: Sequence[Sample], count: int) -> tuple[Sample, ...]:
    return Calibration(tuple(samples), ()).spread(max(1, count))


def _measurements(checkpoint: Checkpoint, seen: Sequence[Sample], dtype: str) -> Measurements:
    """What is kept of losses that depend on the same: weights, images, type and method."""
    config, digest = checkpoint.config, Calibration(tuple(seen), ()).digest
    facts = [config.text.vocab_size, config.vision.image_size, MEASURED_SIZE, dtype, METHOD]
    text = json.dumps([checkpoint.source(), digest, *facts], sort_keys=True)
    return Measurements(hashlib.sha256(text.encode()).hexdigest()[:32])


def _losses(
    measurements: Measurements,
    formats: FormatsByPath,
    measure: Callable[[FormatsByPath], Losses],
) -> Losses:
    """What was kept, and the rest measured and kept."""
    forms = {form for forms in formats.values() for form in forms}
    known = {form: measurements.read(form) for form in forms}
    missing = {
        path: [form for form in forms if path not in known[form]] for path, forms in formats.items()
    }
    missing = {path: forms for path, forms in missing.items() if forms}
    if missing:
        made = measure(missing)
        for form in forms:
            new = {path: by_form[form] for path, by_form in made.items() if form in by_form}
            if new:
                known[form] |= new
                measurements.write(form, new)
    return {path: {form: known[form][path] for form in forms} for path, forms in formats.items()}
