"""The numeric gates: encoder and answers of what was written, against the source checkpoint.

Encoder. The package as written to disk is evaluated op by op, twice, and compared by
signal-to-noise ratio: RMS of the reference over RMS of the error, in dB.
With each fp16 operation's result rounded to fp16, against the unfolded torch module of the source
weights: what the precision costs. On macOS Core ML's own output is held to the same floor.
With nothing rounded, against the folded module with its weights rounded as the package's are, or
with the package's own where they are compressed, which are compared by themselves: what the
conversion changed. Nothing but the order of sums may differ, so the floor is as high for fp16
as for fp32, and one wrong weight or operation shows that the first figure would hide.

Language model, end to end. Both sides answer the same questions about the same pictures, each
with its own encoder's features; the right answers are given, so that both are asked for the next
token at the same places. Measured are the mean KL divergence of the bundle's distribution from
the source's, and how often both choose the same token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf, log, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer

from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.errors import BundleError, OptionError
from fastvlm_mlx.fastvlm import load_bundle_encoder, placeholder_id
from fastvlm_mlx.vision.mlprogram import MLProgramEncoder
from fastvlm_mlx.vision.package import describe
from model_export import layouts, mlx_layout
from model_export.checkpoint import Checkpoint
from model_export.compress import stored_parameters
from model_export.core_ml_gates import core_ml_gates
from model_export.gates import Gate, Magnitude, overflow_gates
from model_export.options import FLOAT16_MAX, PRECISIONS, ExportOptions
from model_export.pictures import Reference, references_of_sizes
from model_export.recipes import layer_bits, scheme_of
from model_export.rounded import RoundedEncoder
from model_export.tokenizer import extended

if TYPE_CHECKING:
    import torch

    from model_export.fastvithd import FastViTHD

DECIDED_NATS = log(2)
CONVERSION_SNR_DB = 80.0
# A token's direction is lost below.
COMPRESSED_COSINE = 0.5


def snr_db(reference: np.ndarray, found: np.ndarray) -> float:
    """Signal-to-noise ratio in dB; infinite where there is no error."""
    reference = reference.astype(np.float64)
    signal = float(np.square(reference).mean())
    noise = float(np.square(found - reference).mean())
    return inf if noise == 0 else 10 * log10(signal / noise) if signal else -inf


def mean_cosine(reference: np.ndarray, found: np.ndarray) -> float:
    """Of the angle between both sides' tokens [1, N, C], in the mean over the tokens."""
    a, b = reference.astype(np.float64), found.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / np.maximum(lengths, np.finfo(np.float64).tiny)).mean())


def encoder_gates(
    package: Path,
    folded: Callable[[], FastViTHD],
    references: Sequence[Reference],
    options: ExportOptions,
) -> tuple[list[Gate], list[np.ndarray]]:
    """SNR of the package as written to disk, and its largest magnitude.

    Args:
        folded: makes the module of the source weights, folded, once the package's own evaluation
            is no longer in memory.

    Returns:
        The gates, and the features of every picture.
    """
    encoder = MLProgramEncoder(package, references[0].pixels.shape[-1])
    magnitude = Magnitude()
    features = [encoder.evaluate(r.pixels, round_fp16=True, observe=magnitude) for r in references]
    # numpy's minimum and maximum carry NaN; Python's lose it.
    worst = np.min([snr_db(r.features, f) for r, f in zip(references, features, strict=True)])
    floor = options.snr_floor_db
    exact = encoder(references[-1].pixels)
    constants = encoder.constants if options.compressed else {}
    del encoder
    module = folded()
    gates = [Gate("encoder SNR", float(worst), "dB", floor, True)]
    if options.compressed:
        pairs = zip(references, features, strict=True)
        cosine = np.min([mean_cosine(r.features, f) for r, f in pairs])
        weights = _take_stored(module, constants)
        gates += [
            Gate("encoder cosine", float(cosine), "", COMPRESSED_COSINE, True),
            Gate("encoder weights SNR", weights, "dB", options.weights_floor_db, True),
        ]
    conversion = snr_db(_rounded_features(module, options, references[-1].pixels), exact)
    gates.append(Gate("encoder conversion SNR", conversion, "dB", CONVERSION_SNR_DB, True))
    if options.encoder_precision != "fp32":
        gates.append(Gate("encoder largest magnitude", magnitude.largest, "", FLOAT16_MAX, False))
    if sys.platform == "darwin":
        gates += core_ml_gates(package, references[-1].pixels, exact, options.min_snr_db)
    return gates, features


def mlx_encoder_gates(
    bundle: Bundle, references: Sequence[Reference], options: ExportOptions
) -> tuple[list[Gate], list[np.ndarray]]:
    """SNR of an `mlx` bundle's encoder, and its largest magnitude.

    Every operation's result is rounded to the bundle's type; where MLX has a GPU, the GPU's own
    output is held to the same floor.

    Returns:
        The gates, and the features of every picture.
    """
    encoder = RoundedEncoder(bundle, options.dtype)
    features = [encoder(r.pixels) for r in references]
    worst = min(snr_db(r.features, f) for r, f in zip(references, features, strict=True))
    floor = options.snr_floor_db
    gates = [Gate("encoder SNR", worst, "dB", floor, True)]
    if options.dtype == "float16":
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
    """`encoder_gates` or `mlx_encoder_gates` at every size that the encoder takes.

    Args:
        folded: as in `encoder_gates`, at the size that it is given.
        references: by size; the default one first, and where there are more, their gates say it.

    Returns:
        The gates, and the features of every picture at the default size.
    """
    gates: list[Gate] = []
    of_default: list[np.ndarray] | None = None
    for size, seen in references.items():
        sized = bundle.at(size)
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

    if options.encoder_precision == "fp16":
        for parameter in module.parameters():
            parameter.data = parameter.data.half().float()
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.from_numpy(pixels).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        return module(images).contiguous().numpy()


def answer_gates(
    checkpoint: Checkpoint,
    bundle: Bundle,
    tokenizer: Tokenizer,
    references: Sequence[Reference],
    features: Sequence[np.ndarray],
    options: ExportOptions,
    source_bundle: Bundle | None = None,
) -> list[Gate]:
    """KL divergence, agreement and the largest magnitude, over every picture with questions.

    Args:
        features: the bundle's own, for the same pictures as `references`.
        source_bundle: read in place of the checkpoint's language model, as it may be quantized.
    """
    import torch

    from model_export import qwen2

    source: qwen2.Weights = qwen2.SourceWeights(checkpoint)
    if source_bundle is not None:
        source = qwen2.BundleWeights(source_bundle)
    written = qwen2.BundleWeights(bundle)
    text = replace(checkpoint.config.text, tie_word_embeddings=checkpoint.tied)
    divergence, agreed, decided, largest = [], [], [], 0.0
    placeholder = placeholder_id(tokenizer, bundle)
    for reference, found in zip(references, features, strict=True):
        if not reference.picture.questions:
            continue
        dialogue = qwen2.Dialogue.build(
            tokenizer,
            reference.picture.questions,
            placeholder,
            checkpoint.config.vision.num_tokens,
        )
        sides = [
            qwen2.Side(source, torch.from_numpy(reference.features)),
            qwen2.Side(written, torch.from_numpy(found)),
        ]
        p, q = qwen2.run(text, dialogue, sides)
        divergence.append(q.divergence(p))
        top = p.log_probabilities.topk(2, 1)
        decided.append(top.values[:, 0] - top.values[:, 1] >= DECIDED_NATS)
        agreed.append(top.indices[:, 0] == q.log_probabilities.argmax(1))
        largest = float(np.maximum(largest, q.largest))
    kl = float(torch.cat(divergence).mean())
    bits = layer_bits(scheme_of(bundle), checkpoint.llm_specs)
    gates = [Gate("KL divergence", kl, "nats", options.kl_ceiling_nats(bits), False)]
    sure = torch.cat(decided)
    # Random weights decide nothing; a share of no places would be a figure that can't fail.
    if bool(sure.any()):
        share = float(torch.cat(agreed)[sure].float().mean())
        gates.append(Gate("greedy agreement", share, "", options.agreement_floor(bits), True))
    if options.dtype == "float16":
        gates.append(Gate("LLM largest magnitude", largest, "", FLOAT16_MAX, False))
    return gates


def verify(
    path: Path,
    checkpoint_path: str | Path | None,
    limits: Mapping[str, Any],
    progress: Callable[[str, float | None], None],
    *,
    base: str | Path | None = None,
    revision: str | None = None,
) -> tuple[Bundle, list[Gate]]:
    """Repeat on a bundle what its export checked: files, layout, and with its checkpoint the gates.

    Args:
        checkpoint_path, base, revision: as for the export.
        limits: fields of `ExportOptions` to judge by in place of the manifest's, where not None.

    Raises:
        BundleError: a file changed, the layout's rules are broken, or another checkpoint is given.
        OptionError: limits without a checkpoint.
    """
    bundle = Bundle.open(path)
    progress("check files", None)
    bundle.check_files()
    progress("check layout", None)
    if bundle.layout == "app":
        layouts.check_app(bundle, describe(bundle.package))
    else:
        mlx_layout.check_mlx(bundle)
    options = replace(
        recorded_options(bundle), **{k: v for k, v in limits.items() if v is not None}
    )
    other_sizes = _other_sizes(bundle, options)
    if checkpoint_path is None:
        if any(limit is not None for limit in limits.values()):
            raise OptionError(
                "limits compare a bundle with its source, which was not given: add --checkpoint"
            )
        progress("check encoder", None)
        exact = options.encoder_format == "fp32"
        return bundle, [] if exact else overflow_gates(bundle, options, other_sizes)
    progress("checkpoint", None)
    tokenizer = bundle.tokenizer()
    checkpoint = _source(bundle, tokenizer, checkpoint_path, base, revision)
    progress("reference encoder", None)
    state = checkpoint.encoder_state()
    references = references_of_sizes(state, checkpoint, other_sizes)
    progress("check encoder", None)
    fold = partial(_folded, state, bundle, options)
    gates, features = gates_of_sizes(bundle, fold, references, options)
    del state
    progress("check answers", None)
    seen = references[checkpoint.config.vision.image_size]
    gates += answer_gates(checkpoint, bundle, tokenizer, seen, features, options)
    return bundle, gates


def _folded(
    state: dict[str, torch.Tensor], bundle: Bundle, options: ExportOptions, vision: VisionConfig
) -> FastViTHD:
    """The module that the package was made from: of a conversion's weights, what was left of them
    in the bundle that was converted."""
    import torch

    from model_export import fastvithd

    if "converted_from" in (bundle.manifest or {}):
        dtype = getattr(torch, options.dtype)
        state = {name: tensor.to(dtype).float() for name, tensor in state.items()}
    return fastvithd.fold(state, vision)


def _other_sizes(bundle: Bundle, options: ExportOptions) -> list[int]:
    """What the encoder takes besides its default size: a package says it, else the manifest."""
    sizes = options.other_sizes
    if bundle.layout == "app":
        sizes = tuple(describe(bundle.package).functions.values())
    return sorted({*sizes} - {bundle.config.vision.image_size})


def _source(
    bundle: Bundle,
    tokenizer: Tokenizer,
    checkpoint_path: str | Path,
    base: str | Path | None,
    revision: str | None,
) -> Checkpoint:
    """The checkpoint at the bundle's input size, and with its vocabulary.

    It must be the one that the bundle was made from, or, where no manifest says which, at least of
    the same shape.
    """
    checkpoint = Checkpoint(
        checkpoint_path, base=base, revision=revision, image_size=bundle.config.vision.image_size
    )
    rows = bundle.config.text.vocab_size
    if rows >= checkpoint.config.text.vocab_size:
        extended_checkpoint = extended(checkpoint, tokenizer, rows)
        if bundle.manifest is not None:
            same = _hashes(bundle.manifest["source"]) == _hashes(checkpoint.source())
        else:
            tied = {"tie_word_embeddings": checkpoint.tied}
            same = bundle.config.text == replace(extended_checkpoint.config.text, **tied)
        if same:
            return extended_checkpoint
    raise BundleError(
        f"{bundle.path} was not made from {checkpoint.path}, their weights or shapes differ: give "
        "the checkpoint that it was exported from"
    )


def _hashes(source: Mapping[str, Any]) -> list[str]:
    """SHA-256 of every file of a source and of its bases, whatever they are called."""
    own = sorted(entry["sha256"] for entry in source["files"].values())
    return own + (_hashes(source["base"]) if "base" in source else [])


def recorded_options(bundle: Bundle) -> ExportOptions:
    """The options that the manifest says the bundle was made with; else what its files show."""
    if bundle.manifest is not None:
        recorded = bundle.manifest["options"]
        known = {k: recorded[k] for k in ExportOptions.__dataclass_fields__ if k in recorded}
        if known.get("group_size") is None:
            known.pop("group_size", None)
        if known.get("layout") == "mlx":
            # What it says follows from the type.
            known.pop("encoder_precision", None)
        return ExportOptions(**known)
    precision = describe(bundle.package).precision if bundle.layout == "app" else "fp16"
    return ExportOptions(
        dtype=bundle.config.dtype,  # type: ignore[arg-type]
        encoder_precision=precision if precision in PRECISIONS else "fp16",  # type: ignore[arg-type]
        layout=bundle.layout,  # type: ignore[arg-type]
    )
