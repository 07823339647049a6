"""`--method`: AWQ, GPTQ or DWQ of the language model's layers, kept where it gains.

The calibration set goes through the source's encoder and projector once, and then through the
layers as the method asks: AWQ and GPTQ quantize one layer after the other, DWQ trains all of them
together. A part of the images is held out: where the method does not gain on those, the bundle
gets plain rounding.

mlx-lm has these methods, over whole models in MLX; on a CPU MLX takes hours for them. Ours are in
torch, on the layers that the gates run, and a test holds them to mlx-lm's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastvlm_mlx.errors import OptionError
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import ExportedTokenizer
from model_export.encoder.references import each_reference
from model_export.language import llm, qwen2
from model_export.language.recipes import Scheme
from model_export.language.weights import SourceWeights
from model_export.options import ExportOptions
from model_export.quantization.rounding import awq, dwq, gptq, held_out
from model_export.quantization.rounding.layers import (
    LAYERS,
    HiddenStates,
    LayerInputs,
    Work,
    first_states,
)
from model_export.samples.calibration import Calibration, record, split


def check(scheme: Scheme, method: str) -> None:
    """Check that the method has something to quantize, and can.

    Raises:
        OptionError: no matrix of a layer is quantized, or one has a format other than affine.
    """
    formats = {form for path, form in scheme.items() if path.startswith(LAYERS) and form}
    if not formats:
        raise OptionError(
            f"--method {method} is given and no layer is quantized: choose fewer --llm-bits, or "
            "leave it out"
        )
    if other := sorted(str(form) for form in formats if form.mode != "affine"):
        raise OptionError(
            f"--method {method} can't quantize to {other[0]}: it is for affine bits, use "
            "--llm-mode affine, or leave it out"
        )


@dataclass(frozen=True)
class Calibrated:
    """What the method made, if it gains over plain rounding, and what to tell about it.

    Attributes:
        ready: the file of each tensor that the method made, by its name in the bundle.
        facts: for the manifest.
        notes: for the user.
    """

    ready: llm.Ready
    facts: dict[str, Any]
    notes: tuple[str, ...]


@torch.no_grad()
def quantize(
    checkpoint: Checkpoint,
    tokenizer: ExportedTokenizer,
    calibration: Calibration,
    formats: Scheme,
    options: ExportOptions,
    directory: Path,
    progress: Callable[[str, float | None], None],
) -> Calibrated:
    """Quantize the layers into files in `directory`, and compare with plain rounding.

    Args:
        formats: of every matrix; the layers' are quantized by the method.
        options: `method` is "awq", "gptq" or "dwq".

    Raises:
        CheckpointError, OptionError: as `llm.convert`.
    """
    method, name = options.llm.method, options.llm.method.upper()
    size = checkpoint.config.vision.image_size
    calibration_set, held_out_set = split(calibration, size, held_out.LEAST_IMAGES)
    samples = [*calibration_set, *held_out_set]
    facts: dict[str, Any] = {
        "sha256": calibration.digest,
        "skipped": list(calibration.skipped),
        "level": held_out.LEVEL,
    }
    if len(held_out_set) < held_out.LEAST_IMAGES:
        facts |= {"method": "rtn", "images": 0}
        return Calibrated({}, facts, (_too_few(name, len(samples)),))
    facts |= {
        "images": len(calibration_set),
        "calibrated_on": record(calibration_set),
        "judged_on": record(held_out_set),
    }
    progress("calibration images", None)
    computed = each_reference(checkpoint.encoder_state(), checkpoint, samples)
    # Only features are read from here on.
    references = [replace(each, pixels=each.pixels[:0].copy()) for each in computed]
    calibrated_on = references[: len(calibration_set)]
    tested_on = references[len(calibration_set) :]
    source = SourceWeights(checkpoint)
    source_states = first_states(checkpoint, tokenizer, calibrated_on, source)
    work = Work(checkpoint, formats, options, directory, partial(progress, name))
    if method == "dwq":
        rounded = held_out.PlannedWeights(source, formats)
        rounded_states = first_states(checkpoint, tokenizer, calibrated_on, rounded)
        ready = dwq.train_layers(work, source_states, rounded_states)
    else:
        ready = _layer_by_layer(work, source_states)
    progress(f"{name} or rounding", None)
    candidates = [held_out.PlannedWeights(source, formats, made) for made in ({}, ready)]
    rounding, calibrated = held_out.losses(checkpoint, tokenizer, tested_on, candidates)
    test = held_out.PairedTest(rounding, calibrated)
    facts |= {
        "method": method if test.gains else "rtn",
        "kl_nats": {"rtn": rounding.to_dict(), method: calibrated.to_dict()},
        "p_value": test.p_value,
    }
    note = (
        f"{name} loses {calibrated} on the {len(held_out_set)} images that are held out, and plain "
        f"rounding {rounding}: {test}"
    )
    if test.gains:
        return Calibrated(ready, facts, (note,))
    return Calibrated({}, facts, (f"{note}: the bundle has plain rounding",))


def _too_few(name: str, count: int) -> str:
    found = "one image is" if count == 1 else f"{count} images are"
    return (
        f"{found} too few to calibrate {name} on some and tell on others whether it gains: the "
        f"bundle has plain rounding; give --calibration {2 * held_out.LEAST_IMAGES} different "
        "images or more, or leave it out"
    )


def _layer_by_layer(work: Work, samples: Sequence[HiddenStates]) -> llm.Ready:
    """Quantize one layer after the other, by AWQ or GPTQ."""
    layer = qwen2.decoder_layer(work.checkpoint.config.text)
    method = gptq.gptq_layer if work.options.llm.method == "gptq" else awq.awq_layer
    ready: dict[str, Path] = {}
    for index, (prefix, state) in enumerate(work.layers()):
        work.progress(index / work.count)
        layer.load_state_dict(state, strict=True, assign=True)
        inputs = LayerInputs(layer, samples, work.formats(prefix), work.options.llm.dtype)
        ready |= work.save(prefix, method(inputs))
    work.progress(1.0)
    return ready
