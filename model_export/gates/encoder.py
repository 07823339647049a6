"""The encoder's gates: features of what was written, against the source checkpoint's.

The package as written to disk is evaluated twice, op by op, and compared by signal-to-noise ratio:
RMS of the reference over RMS of the error, in dB.

The first evaluation rounds each fp16 operation's result to fp16, and is compared with the unfolded
torch module of the source weights: it tells what the precision costs. On macOS Core ML's own output
is held to the same floor.

The second one rounds nothing, and is compared with the folded module, whose weights are rounded as
the package's are: it tells what the conversion changed. (Compressed weights are taken from the
package, and compared by themselves.) Nothing but the order of sums may differ, so the floor is as
high for fp16 as for fp32, and one wrong weight or operation shows that the first figure would hide.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf, log10
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.components import image_processor, load_bundle_encoder
from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder
from model_export.encoder.compression import stored_parameters
from model_export.encoder.references import Reference
from model_export.gates.core_ml import core_ml_gates
from model_export.gates.gate import Gate, Magnitude
from model_export.gates.mlx_encoder import EmulatedMLXEncoder
from model_export.options import FLOAT16_MAX, ExportOptions

if TYPE_CHECKING:
    import torch

    from model_export.encoder.fastvithd import FastViTHD

CONVERSION_SNR_DB = 80.0
# A token's direction is lost below.
COMPRESSED_COSINE = 0.5


def snr_db(reference: np.ndarray, found: np.ndarray) -> float:
    """Compute the signal-to-noise ratio in dB; it is infinite where there is no error."""
    reference = reference.astype(np.float64)
    signal = float(np.square(reference).mean())
    noise = float(np.square(found - reference).mean())
    return inf if noise == 0 else 10 * log10(signal / noise) if signal else -inf


def mean_cosine(reference: np.ndarray, found: np.ndarray) -> float:
    """Compute the cosine between the tokens [1, N, C] of both sides, the mean over tokens."""
    a, b = reference.astype(np.float64), found.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / np.maximum(lengths, np.finfo(np.float64).tiny)).mean())


def encoder_gates(
    package: Path,
    folded: Callable[[], FastViTHD],
    references: Sequence[Reference],
    options: ExportOptions,
) -> tuple[list[Gate], list[np.ndarray]]:
    """Measure the package as written to disk: its SNR and its largest magnitude.

    Args:
        folded: makes the module of the source weights, folded, once the package's own evaluation
            is no longer in memory.

    Returns:
        The gates, and the features of every image.
    """
    encoder = MLProgramEncoder(package, references[0].pixels.shape[-1])
    magnitude = Magnitude()
    features = [encoder.evaluate(r.pixels, round_fp16=True, observe=magnitude) for r in references]
    # numpy's minimum and maximum carry NaN; Python's lose it.
    worst = np.min([snr_db(r.features, f) for r, f in zip(references, features, strict=True)])
    floor = options.snr_floor_db
    exact = encoder(references[-1].pixels)
    constants = encoder.constants if options.encoder.compressed else {}
    del encoder
    module = folded()
    gates = [Gate("encoder SNR", float(worst), "dB", floor, True)]
    if options.encoder.compressed:
        pairs = zip(references, features, strict=True)
        cosine = np.min([mean_cosine(r.features, f) for r, f in pairs])
        weights = _take_stored(module, constants)
        gates += [
            Gate("encoder cosine", float(cosine), "", COMPRESSED_COSINE, True),
            Gate("encoder weights SNR", weights, "dB", options.encoder.weights_floor_db, True),
        ]
    conversion = snr_db(_rounded_features(module, options, references[-1].pixels), exact)
    gates.append(Gate("encoder conversion SNR", conversion, "dB", CONVERSION_SNR_DB, True))
    if options.encoder.precision != "fp32":
        gates.append(Gate("encoder largest magnitude", magnitude.largest, "", FLOAT16_MAX, False))
    if sys.platform == "darwin":
        gates += core_ml_gates(package, references[-1].pixels, exact, options.limits.min_snr_db)
    return gates, features


def mlx_encoder_gates(
    bundle: Bundle, references: Sequence[Reference], options: ExportOptions
) -> tuple[list[Gate], list[np.ndarray]]:
    """Measure the encoder of an `mlx` bundle: its SNR and its largest magnitude.

    Every operation's result is rounded to the bundle's type; where MLX has a GPU, the GPU's own
    output is held to the same floor.

    Returns:
        The gates, and the features of every image.
    """
    encoder = EmulatedMLXEncoder(bundle, options.llm.dtype)
    features = [encoder(r.pixels) for r in references]
    worst = min(snr_db(r.features, f) for r, f in zip(references, features, strict=True))
    floor = options.snr_floor_db
    gates = [Gate("encoder SNR", worst, "dB", floor, True)]
    if options.llm.dtype == "float16":
        gates.append(Gate("encoder largest magnitude", encoder.largest, "", FLOAT16_MAX, False))
    if mx.default_device() != mx.Device(mx.cpu):
        on_gpu = load_bundle_encoder(bundle)
        worst = min(snr_db(r.features, on_gpu(r.pixels)) for r in references)
        gates.append(Gate("encoder SNR on the GPU", worst, "dB", floor, True))
    return gates, features


def gates_of_sizes(
    bundle: Bundle,
    folded: Callable[[VisionConfig], FastViTHD],
    references: Mapping[int, Sequence[Reference]],
    options: ExportOptions,
) -> tuple[list[Gate], list[np.ndarray]]:
    """Run `encoder_gates` or `mlx_encoder_gates` at every size that the encoder takes.

    Args:
        folded: as in `encoder_gates`, at the size that it is given.
        references: by size; the default one first, and where there are more, their gates say it.

    Returns:
        The gates, and the features of every image at the default size.
    """
    gates: list[Gate] = []
    of_default: list[np.ndarray] | None = None
    for size, seen in references.items():
        sized = bundle.at(size)
        seen = _own_pixels(sized, seen)
        if bundle.layout == "app":
            module = partial(folded, sized.config.vision)
            found, features = encoder_gates(bundle.package, module, seen, options)
        else:
            found, features = mlx_encoder_gates(sized, seen, options)
        if of_default is None:
            of_default = features
        else:
            found = [replace(gate, name=f"{gate.name} at {size}") for gate in found]
        gates += found
    return gates, of_default or []


def _own_pixels(bundle: Bundle, references: Sequence[Reference]) -> list[Reference]:
    """The pixels that the bundle's own settings make of each image; the features stay the
    source's."""
    config = bundle.config
    process = image_processor(bundle, config.vision.image_size, config.image_aspect_ratio)
    return [replace(r, pixels=process(r.sample.image)) for r in references]


def _take_stored(module: FastViTHD, constants: Mapping[str, torch.Tensor]) -> float:
    """Put the package's weights into the module; SNR in dB of the one furthest from its own.

    Biases are left out of the figure: they may carry what rounding changed in the mean.
    """
    worst = inf
    for name, parameter, stored in stored_parameters(module, constants):
        if name.endswith(".weight"):
            worst = min(worst, snr_db(parameter.numpy(), stored.numpy()))
        parameter.data = stored.contiguous()
    return worst


def _rounded_features(module: FastViTHD, options: ExportOptions, pixels: np.ndarray) -> np.ndarray:
    import torch

    if options.encoder.precision == "fp16":
        for parameter in module.parameters():
            parameter.data = parameter.data.half().float()
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.from_numpy(pixels).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        return module(images).contiguous().numpy()
