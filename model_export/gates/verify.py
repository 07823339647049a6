"""The numeric gates: encoder and answers of what was written, against the source checkpoint.

Encoder. The package as written to disk is evaluated op by op, twice, and compared by
signal-to-noise ratio: RMS of the reference over RMS of the error, in dB.
With each fp16 operation's result rounded to fp16, against the unfolded torch module of the source
weights: what the precision costs. On macOS Core ML's own output is held to the same floor.
With nothing rounded, against the folded module with its weights rounded as the package's are, or
with the package's own where they are compressed, which are compared by themselves: what the
conversion changed. Nothing but the order of sums may differ, so the floor is as high for fp16
as for fp32, and one wrong weight or operation shows that the first figure would hide.

Language model, end to end. Both sides answer the same questions about the same images, each
with its own encoder's features, its own pixels and its own settings; the right answers are given,
so that both are asked for the next token at the same places. Measured are the mean KL divergence
of the bundle's distribution from the source's, and how often both choose the same token.

What the divergence may be. That the right weights are there, under the right settings, is proven
bit by bit elsewhere (`equality`). Left are two questions, and the ceiling is the lower answer.
What should it cost? A third side has the source's weights as plain rounding stores them in the
recorded forms, and the bundle's features: the divergence of that, measured at the same places, is
what the choice of bits and of encoder costs. A bundle by plain rounding repeats it to the last
digits, one by a method is below it; `PLAIN_FACTOR` is room for a method that gains elsewhere and
loses on these few images. A number for each width of bits would have to suit the tensors that
round worst, and lets a thousand times as much pass in the others.
Is it still the model? A choice can cost too much with nothing wrong in how it was carried out.
`USABLE_NATS` is where the bundle gives what the source says half of its probability, in the
(geometric) mean of the places: a model that babbles is at several times that. `USABLE_SHARE` asks
the same of the first choice. Who wants the bundle all the same gives limits of their own, which
stand in place of these.

A share is counted where the source is sure, which gives its choice at least twice the probability
of its second: nearer ties may fall either way. It is judged from `COUNTED_PLACES` on: there a
bundle that truly agrees in 95 of 100 places is below the floor of 0.8 in less than one case of a
hundred, and one that agrees in half of them above it in less than one. Of fewer, nothing follows
either way, and the manifest says that nothing was judged.
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

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.errors import BundleError, OptionError
from fastvlm_mlx.fastvlm import image_processor, load_bundle_encoder, placeholder_id
from fastvlm_mlx.vision.mlprogram import MLProgramEncoder
from fastvlm_mlx.vision.package import describe
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import export_tokenizer, extended
from model_export.encoder.compression import stored_parameters
from model_export.gates.core_ml import core_ml_gates
from model_export.gates.gate import Gate, Magnitude, overflow_gates
from model_export.gates.mlx_encoder import RoundedEncoder
from model_export.layouts import app, mlx
from model_export.options import FLOAT16_MAX, PRECISIONS, ExportOptions, GateLimits
from model_export.samples.images import Reference, references_of_sizes

if TYPE_CHECKING:
    import torch

    from model_export.encoder.fastvithd import FastViTHD
    from model_export.language import qwen2

DECIDED_NATS = log(2)
USABLE_NATS = log(2)
USABLE_SHARE = 0.8
COUNTED_PLACES = 20
PLAIN_FACTOR = 2.0
# What float32 leaves of a divergence of zero.
EXACT_NATS = 1e-6
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
    """SNR of an `mlx` bundle's encoder, and its largest magnitude.

    Every operation's result is rounded to the bundle's type; where MLX has a GPU, the GPU's own
    output is held to the same floor.

    Returns:
        The gates, and the features of every image.
    """
    encoder = RoundedEncoder(bundle, options.llm.dtype)
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
    """`encoder_gates` or `mlx_encoder_gates` at every size that the encoder takes.

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


def answer_gates(
    checkpoint: Checkpoint,
    bundle: Bundle,
    tokenizer: Tokenizer,
    references: Sequence[Reference],
    features: Sequence[np.ndarray],
    options: ExportOptions,
    source_bundle: Bundle | None = None,
) -> list[Gate]:
    """KL divergence, agreement and the largest magnitude, over every image with questions.

    Args:
        tokenizer: the source's; the bundle's own must give the same ids.
        features: the bundle's own, for the same images as `references`.
        source_bundle: read in place of the checkpoint's language model, as it may be quantized.

    Raises:
        BundleError: the bundle's tokenizer gives other ids.
    """
    import torch

    from model_export.gates import equality
    from model_export.language import qwen2

    text = replace(checkpoint.config.text, tie_word_embeddings=checkpoint.tied)
    of_checkpoint = qwen2.SourceWeights(checkpoint)
    source: qwen2.Weights = of_checkpoint
    plain: qwen2.Weights = equality.PlainWeights(of_checkpoint, equality.Made.shown(bundle))
    if source_bundle is not None:
        # Its tensors are taken over as they are.
        source = plain = qwen2.BundleWeights(source_bundle)
    written = qwen2.BundleWeights(bundle)
    divergence, expected, agreed, decided, largest = [], [], [], [], 0.0
    for reference, found in zip(references, features, strict=True):
        if not reference.sample.questions:
            continue
        dialogue = _dialogue(checkpoint, bundle, tokenizer, reference)
        seen = torch.from_numpy(found)
        sides = [
            qwen2.Side(source, torch.from_numpy(reference.features)),
            qwen2.Side(written, seen, bundle.config.text),
            qwen2.Side(plain, seen),
        ]
        p, q, rounded = qwen2.run(text, dialogue, sides)
        divergence.append(q.divergence(p))
        expected.append(rounded.divergence(p))
        top = p.log_probabilities.topk(2, 1)
        decided.append(top.values[:, 0] - top.values[:, 1] >= DECIDED_NATS)
        agreed.append(top.indices[:, 0] == q.log_probabilities.argmax(1))
        largest = float(np.maximum(largest, q.largest))
    ceiling = options.limits.max_kl_nats
    if ceiling is None:
        cost = float(torch.cat(expected).mean())
        # In so many digits as are shown.
        ceiling = float(f"{min(USABLE_NATS, PLAIN_FACTOR * cost + EXACT_NATS):.3g}")
    kl = float(torch.cat(divergence).mean())
    gates = [
        Gate("KL divergence", kl, "nats", ceiling, False),
        _agreement(torch.cat(agreed)[torch.cat(decided)], options),
    ]
    if options.llm.dtype == "float16":
        gates.append(Gate("LLM largest magnitude", largest, "", FLOAT16_MAX, False))
    return gates


def _agreement(agreed: torch.Tensor, options: ExportOptions) -> Gate:
    """Of the places where the source is sure: bool [P]."""
    floor = USABLE_SHARE if options.limits.min_agreement is None else options.limits.min_agreement
    places = len(agreed)
    share = float(agreed.float().mean()) if places else 0.0
    why = ""
    if places < COUNTED_PLACES:
        why = (
            f"the source is sure of its next token at {places} places, and a share is judged from "
            f"{COUNTED_PLACES} on"
        )
    return Gate("greedy agreement", share, "", floor, True, left_out=why)


def _dialogue(
    checkpoint: Checkpoint, bundle: Bundle, tokenizer: Tokenizer, reference: Reference
) -> qwen2.Dialogue:
    """The questions about an image in the source's ids, which must be the bundle's.

    Raises:
        BundleError: they are not.
    """
    from model_export.language import qwen2

    own = bundle.tokenizer()
    sides = [
        qwen2.Dialogue.build(each, reference.sample.questions, placeholder, vision.num_tokens)
        for each, placeholder, vision in (
            (tokenizer, placeholder_id(tokenizer, bundle), checkpoint.config.vision),
            (own, placeholder_id(own, bundle), bundle.config.vision),
        )
    ]
    if sides[0].ids.tolist() != sides[1].ids.tolist():
        raise BundleError(
            f"the tokenizer of {bundle.path} gives other ids than the checkpoint's: expected the "
            "same for every prompt, export the checkpoint again"
        )
    return sides[0]


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
        limits: fields of `GateLimits` to judge by in place of the manifest's, where not None.

    Raises:
        BundleError: a file changed, the layout's rules are broken, or another checkpoint is given.
        OptionError: limits without a checkpoint.
    """
    bundle = Bundle.open(path)
    progress("check files", None)
    bundle.check_files()
    progress("check layout", None)
    if bundle.layout == "app":
        app.check_app(bundle, describe(bundle.package))
    else:
        mlx.check_mlx(bundle)
    options = _own_limits(recorded_options(bundle))
    given = {k: v for k, v in limits.items() if v is not None}
    options = replace(options, limits=replace(options.limits, **given))
    other_sizes = _other_sizes(bundle, options)
    if checkpoint_path is None:
        if any(limit is not None for limit in limits.values()):
            raise OptionError(
                "limits compare a bundle with its source, which was not given: add --checkpoint"
            )
        progress("check encoder", None)
        exact = options.encoder_format == "fp32"
        return bundle, [] if exact else overflow_gates(bundle, options, other_sizes)
    from model_export.gates import equality

    progress("checkpoint", None)
    tokenizer = bundle.tokenizer()
    checkpoint = _source(bundle, tokenizer, checkpoint_path, base, revision)
    progress("check tensors", None)
    exact_gates = [equality.settings_gate(checkpoint, bundle)]
    if bundle.manifest is None:
        why = "no manifest says how the tensors were made"
        exact_gates.append(Gate("tensors changed", 0, "", 0, False, left_out=why))
    else:
        made = equality.Made.recorded(bundle.manifest, checkpoint)
        exact_gates.append(equality.tensor_gate(checkpoint, bundle, made))
    progress("reference encoder", None)
    state = checkpoint.encoder_state()
    references = references_of_sizes(state, checkpoint, other_sizes)
    progress("check encoder", None)
    fold = partial(_folded, state, bundle, options)
    gates, features = gates_of_sizes(bundle, fold, references, options)
    del state
    progress("check answers", None)
    seen = references[checkpoint.config.vision.image_size]
    own = export_tokenizer(checkpoint).tokenizer
    gates += answer_gates(checkpoint, bundle, own, seen, features, options)
    return bundle, gates + exact_gates


def _folded(
    state: dict[str, torch.Tensor], bundle: Bundle, options: ExportOptions, vision: VisionConfig
) -> FastViTHD:
    """The module that the package was made from: of a conversion's weights, what was left of them
    in the bundle that was converted."""
    import torch

    from model_export.encoder import fastvithd

    if "converted_from" in (bundle.manifest or {}):
        dtype = getattr(torch, options.llm.dtype)
        state = {name: tensor.to(dtype).float() for name, tensor in state.items()}
    return fastvithd.fold(state, vision)


def _other_sizes(bundle: Bundle, options: ExportOptions) -> list[int]:
    """What the encoder takes besides its default size: a package says it, else the manifest."""
    sizes = options.encoder.other_sizes
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


def _own_limits(recorded: ExportOptions) -> ExportOptions:
    """By our limits, whatever a bundle says of itself; but for a stricter one of the encoder's."""
    ours = replace(recorded, limits=GateLimits())
    strict = max(recorded.snr_floor_db, ours.snr_floor_db)
    return replace(ours, limits=GateLimits(min_snr_db=strict))


def recorded_options(bundle: Bundle) -> ExportOptions:
    """The options that the manifest says the bundle was made with; else what its files show."""
    if bundle.manifest is not None:
        return ExportOptions.from_record(bundle.manifest["options"])
    precision = describe(bundle.package).precision if bundle.layout == "app" else "fp16"
    return ExportOptions.of(
        dtype=bundle.config.dtype,  # type: ignore[arg-type]
        encoder_precision=precision if precision in PRECISIONS else "fp16",  # type: ignore[arg-type]
        layout=bundle.layout,  # type: ignore[arg-type]
    )
