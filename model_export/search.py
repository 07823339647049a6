"""`--llm-bpw`: which matrix gets how many bits, to lose least at a size, by measured losses.

Losses are taken to add up, and the assignment is solved exactly. What the layout's loaders can
read decides what is chosen from: every affine width for each matrix, or, for the demo app, one
width and 16 bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.quantization import MODES, Format
from model_export import llm, sensitivity
from model_export.allocate import Choice, allocate
from model_export.calibration import Calibration
from model_export.checkpoint import Checkpoint
from model_export.options import ExportOptions
from model_export.pictures import reference_features
from model_export.recipes import Scheme, is_matrix, path_of
from model_export.sensitivity import Losses
from model_export.tokenizer import ExportedTokenizer
from model_export.weights import TensorSpec

# What is measured; the other widths follow from it.
MEASURED_BITS = 4
# Of pictures that are measured on together: one at 1024×1024, or so many smaller ones.
IMAGE_TOKENS = 256
# Part of the name under which losses are kept: of another way to measure them nothing is reused.
METHOD = 1


@dataclass(frozen=True)
class Found:
    """An assignment of bits, what it was found from, and what it is expected to lose."""

    scheme: Scheme
    predicted_kl_nats: float
    target_bits_per_weight: float
    calibration: Calibration
    measured_on: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "target_bits_per_weight": self.target_bits_per_weight,
            "predicted_kl_nats": self.predicted_kl_nats,
            "calibration_sha256": self.calibration.digest,
            "measured_on": list(self.measured_on),
            "skipped": list(self.calibration.skipped),
        }


def search(
    checkpoint: Checkpoint,
    tokenizer: ExportedTokenizer,
    calibration: Calibration,
    options: ExportOptions,
    target: float,
    progress: Callable[[str, float | None], None],
) -> Found:
    """The scheme of `target` bits per weight, or the nearest below, that loses least.

    Raises:
        OptionError: the size can't be reached, or the group size does not fit.
    """
    formats = [Format(bits, options.group_size) for bits in MODES["affine"][0]]
    if not _divides(checkpoint.llm_specs, options.group_size):
        raise OptionError(
            f"group size {options.group_size} does not divide the widths of this model: choose "
            "another --group-size"
        )
    # Before minutes of measuring.
    _check_reachable(checkpoint.llm_specs, options, target, formats)
    pictures = calibration.spread(max(1, IMAGE_TOKENS // checkpoint.config.vision.num_tokens))
    measured = Calibration(pictures, ())
    file = _cache() / f"{_key(checkpoint, measured, options.group_size)}.json"
    losses = _read(file, formats)
    if losses is None:
        progress("calibration pictures", None)
        references = reference_features(checkpoint.encoder_state(), checkpoint, pictures)
        losses = sensitivity.measure(
            checkpoint,
            tokenizer.tokenizer,
            tokenizer.image_token_id,
            references,
            formats,
            Format(MEASURED_BITS, options.group_size),
            lambda done: progress("sensitivities", done),
        )
        _write(file, losses)
    scheme, predicted = assign(checkpoint.llm_specs, losses, options, target)
    names = tuple(picture.name for picture in pictures)
    return Found(scheme, predicted, target, calibration, names)


def assign(
    specs: Sequence[TensorSpec], losses: Losses, options: ExportOptions, target: float
) -> tuple[Scheme, float]:
    """The assignment that fits `target` bits per weight and loses least, and what it loses.

    Raises:
        OptionError: the size can't be reached.
    """
    formats = tuple(next(iter(losses.values())))
    _check_reachable(specs, options, target, formats)
    solved = [
        _solve(specs, losses, candidates, options, target)
        for candidates in _candidates(formats, options)
    ]
    return min((found for found in solved if found is not None), key=lambda found: found[1])


def _candidates(
    formats: Sequence[Format], options: ExportOptions
) -> list[tuple[Format | None, ...]]:
    """What matrices may be chosen from together."""
    if options.layout == "app":
        return [(form, None) for form in formats]
    return [(*formats, None)]


def _solve(
    specs: Sequence[TensorSpec],
    losses: Losses,
    candidates: Sequence[Format | None],
    options: ExportOptions,
    target: float,
) -> tuple[Scheme, float] | None:
    """None if the candidates are too large."""
    matrices = [spec for spec in specs if is_matrix(spec)]
    parts = [
        [
            Choice(_bytes(spec, form, options), losses[path_of(spec)][form] if form else 0.0)
            for form in candidates
        ]
        for spec in matrices
    ]
    budget = _budget(specs, options, target)
    if sum(min(choice.bytes for choice in part) for part in parts) > budget:
        return None
    chosen = allocate(parts, budget)
    scheme = {path_of(spec): candidates[i] for spec, i in zip(matrices, chosen, strict=True)}
    return scheme, sum(part[i].loss for part, i in zip(parts, chosen, strict=True))


def _budget(specs: Sequence[TensorSpec], options: ExportOptions, target: float) -> int:
    """Bytes that the target leaves for matrices: norms and biases are as they are."""
    # No more is ever needed than all of it in the widest type.
    wanted = min(target, 32.0) * sum(prod(spec.shape) for spec in specs) / 8
    return int(wanted) - sum(_bytes(spec, None, options) for spec in specs if not is_matrix(spec))


def _check_reachable(
    specs: Sequence[TensorSpec],
    options: ExportOptions,
    target: float,
    formats: Sequence[Format],
) -> None:
    smallest = min(formats, key=lambda form: form.bits)
    least = sum(_bytes(spec, smallest if is_matrix(spec) else None, options) for spec in specs)
    bits = 8 * least / sum(prod(spec.shape) for spec in specs)
    if target < bits:
        # Rounded up, so that what is advised can be reached.
        raise OptionError(
            f"--llm-bpw is {target:g} and {smallest} everywhere take {bits:.3f} bits per weight, "
            f"scales included: ask for {bits + 0.005:.2f} or more, or a larger --group-size"
        )


def _bytes(spec: TensorSpec, form: Format | None, options: ExportOptions) -> int:
    return sum(entry.bytes for entry in llm.stored(spec, {path_of(spec): form}, options.dtype))


def _divides(specs: Sequence[TensorSpec], group_size: int) -> bool:
    return all(spec.shape[1] % group_size == 0 for spec in specs if is_matrix(spec))


def _cache() -> Path:
    """Where what has been measured is kept, by the platform's custom."""
    custom = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    home = os.environ.get("XDG_CACHE_HOME") or custom
    return Path(home).expanduser() / "fastvlm-mlx" / "sensitivities"


def _key(checkpoint: Checkpoint, measured: Calibration, group_size: int) -> str:
    """What the losses depend on: the weights, the pictures, the formats and the method."""
    vision = checkpoint.config.vision
    parts = [checkpoint.source(), measured.digest, group_size, vision.image_size, METHOD]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _read(file: Path, formats: Sequence[Format]) -> Losses | None:
    """None where there is nothing, or nothing whole."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return {
            path: {form: float(by_bits[str(form.bits)]) for form in formats}
            for path, by_bits in data.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(file: Path, losses: Losses) -> None:
    """A cache that can't be written costs the next run its minutes, and this one nothing."""
    data: Mapping[str, Any] = {
        path: {str(form.bits): loss for form, loss in by_format.items()}
        for path, by_format in losses.items()
    }
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as stream:
            json.dump(data, stream)
        os.replace(stream.name, file)
