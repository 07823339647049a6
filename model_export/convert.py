"""A bundle in the other layout, made from the bundle alone.

An `mlx` bundle holds all that an `app` bundle is made of: FastViTHD's weights one by one, and the
projector and the language model under nearly the same names. The other way there is none: a
package holds the encoder folded, and BatchNorm and layer scale can't be had back out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fastvlm_mlx.bundle import ENCODER_PREFIX, Bundle, dequantized, hash_tree, model_name
from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.errors import BundleError
from fastvlm_mlx.fastvlm import image_processor
from fastvlm_mlx.image import ImageProcessor
from model_export import llm, weights
from model_export.checkpoint import Checkpoint
from model_export.destination import check_replaceable, resolve
from model_export.options import ENCODER_SNR_DB, ExportOptions
from model_export.pipeline import ExportResult, Progress, Recipe, build, interruptible
from model_export.sources import Source
from model_export.tensors import SourceTensor
from model_export.tokenizer import ExportedTokenizer, export_tokenizer
from model_export.verify import Gate, recorded_options

# safetensors' names of what MLX's affine form and the three types of weights are made of.
TYPES = {dtype: name for name, (dtype, _, _) in llm.DTYPES.items()}
STORED_AS = {dtype: name for dtype, name, _ in llm.DTYPES.values()} | {mx.uint32: "U32"}
NORM, STEM = weights.NORM[1], ENCODER_PREFIX + "patch_embed.blocks.0.reparam_conv.weight"
EXPORT_AGAIN = "export the checkpoint it was made from with `fastvlm export … --layout {}`"


def convert(
    bundle_path: str | Path,
    destination: str | Path,
    layout: str,
    progress: Progress = lambda stage, done: None,
    *,
    overwrite: bool = False,
) -> ExportResult:
    """Turn a bundle into one of another layout at `destination`, checked against the bundle.

    Args:
        bundle_path: a bundle of layout `mlx`; one without a manifest, as mlx-vlm converts, too.

    Raises:
        BundleError: it is not whole, of the wrong layout, or holds what the other one can't.
        OptionError: an unknown layout.
        DestinationError: `destination` exists or can't be written.
        GateError: what was written is not the same model.
    """
    ExportOptions(layout=layout)  # type: ignore[arg-type]
    with interruptible(progress) as stage:
        stage("bundle", None)
        destination = resolve(destination)
        check_replaceable(destination, overwrite=overwrite)
        bundle = Bundle.open(bundle_path)
        if bundle.layout == layout:
            raise BundleError(
                f"{bundle.path} is of layout {layout} already: expected a bundle of the other "
                "layout, use it as it is"
            )
        if bundle.layout == "app":
            raise BundleError(
                f"{bundle.path} holds its encoder folded into a Core ML package, and layout mlx "
                f"wants the weights it was folded from: {EXPORT_AGAIN.format('mlx')}"
            )
        stage("check files", None)
        bundle.check_files()
        return build(_recipe(bundle), destination, stage)


def _recipe(bundle: Bundle) -> Recipe:
    checkpoint = as_checkpoint(bundle)
    tokenizer = export_tokenizer(checkpoint)
    parts = _llm_parts(bundle, checkpoint)
    _check_same_reading(bundle, tokenizer)
    arrays = bundle.tensors()
    dtype = TYPES[arrays[NORM].dtype]
    exact = arrays[STEM].dtype == mx.float32
    limits = ExportOptions(
        llm_bits=16,
        dtype=dtype,  # type: ignore[arg-type]
        encoder_precision="fp32" if exact else "fp16",
    )
    return Recipe(
        checkpoint,
        tokenizer,
        _options(bundle, parts, limits),
        limits,
        bundle,
        llm_bytes=sum(entry.bytes for part in parts for entry in part.entries),
        write_llm=partial(_write_llm, checkpoint, parts),
        own_gates=lambda written: [_changed_tensors(parts, written)],
        origin=lambda: _origin(bundle, checkpoint, TYPES[arrays[STEM].dtype]),
        remedy=EXPORT_AGAIN.format("app"),
    )


@dataclass(frozen=True)
class BundleTensor:
    """A tensor of an `mlx` bundle as a checkpoint holds it: in full, in torch's order of axes."""

    bundle: Bundle
    name: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.bundle.weight_files)

    def read(self) -> mx.array:
        quantization = self.bundle.config.quantization or {}
        array = dequantized(self.bundle.tensors(), self.name, quantization)
        return array if self.axes is None else mx.contiguous(array.transpose(self.axes))


def as_checkpoint(bundle: Bundle) -> Checkpoint:
    """An `mlx` bundle as the checkpoint that it could have been made from, quantized as it is.

    Raises:
        BundleError: a tensor is missing, or is none of the model's, or is of a type that
            affine quantization does not make.
        CheckpointError: one has another shape than config.json implies.
    """
    arrays = bundle.tensors()
    tied = "language_model." + weights.HEAD[0] not in arrays
    _check_types(bundle, arrays)
    left = set(arrays)
    tensors: dict[str, SourceTensor] = {}
    for spec in weights.bundle_specs(bundle.config, tied=tied, layout="mlx"):
        left -= set(_stored_names(spec.name, arrays))
        if spec.name in arrays:
            tensors[spec.source] = _tensor(bundle, spec, arrays)
        elif not weights.is_unused(spec.name.removeprefix(ENCODER_PREFIX)):
            raise BundleError(
                f"{bundle.path} lacks {spec.name}: expected it for the model that config.json "
                f"describes, {EXPORT_AGAIN.format('app')}"
            )
    if left:
        raise BundleError(
            f"{bundle.path} holds {min(left)}, which is no tensor of the model that config.json "
            "describes: remove the file it came with, or correct config.json"
        )
    config = _apple_config(bundle)
    return Checkpoint.of(Source("mlx bundle", (bundle.path,), config, tensors, tied=tied))


def _check_types(bundle: Bundle, arrays: Mapping[str, mx.array]) -> None:
    for name, array in arrays.items():
        packed = name.endswith("weight") and name.removesuffix("weight") + "scales" in arrays
        if array.dtype not in STORED_AS or (array.dtype == mx.uint32) != packed:
            found = str(array.dtype).removeprefix("mlx.core.")
            raise BundleError(
                f"{bundle.path} stores {name} as {found}: expected {', '.join(llm.DTYPES)}, or "
                f"affine quantization, {EXPORT_AGAIN.format('app')}"
            )


def _tensor(
    bundle: Bundle, spec: weights.TensorSpec, arrays: Mapping[str, mx.array]
) -> BundleTensor:
    # Shape and type of what is not computed before it is read.
    array = dequantized(arrays, spec.name, bundle.config.quantization or {})
    axes = None if spec.axes is None else tuple(int(axis) for axis in np.argsort(spec.axes))
    shape = array.shape if axes is None else tuple(array.shape[axis] for axis in axes)
    return BundleTensor(bundle, spec.name, STORED_AS[array.dtype], shape, axes)


def _apple_config(bundle: Bundle) -> dict[str, Any]:
    """`config.json` without what is the `mlx` layout's, named and licensed as the source is."""
    raw, vision = dict(bundle.raw_config), bundle.config.vision
    for key in ("quantization", "quantization_config", "vision_config"):
        raw.pop(key, None)
    if vision.is_mobileclip_l:
        raw["mm_vision_tower"] = f"mobileclip_l_{vision.image_size}"
    else:
        raw["vision_config"] = vision.to_dict()
    if bundle.manifest is not None:
        source = bundle.manifest["source"]
        raw |= {"_name_or_path": source["name"], "license": source["license"]}
    return raw


def _stored_names(name: str, arrays: Mapping[str, mx.array]) -> list[str]:
    """The tensor's own name, or, of a weight that is quantized, its three parts'."""
    stem = name.removesuffix("weight")
    parts = [name, stem + "scales", stem + "biases"]
    return parts if parts[1] in arrays else [name]


def _llm_parts(bundle: Bundle, checkpoint: Checkpoint) -> list[llm.Part]:
    """Projector and language model as they are stored, under an `app` bundle's names.

    Raises:
        BundleError: a weight is stored in a way that the demo app can't load.
    """
    arrays = bundle.tensors()
    stored = {
        spec.source: spec.name
        for spec in weights.bundle_specs(bundle.config, tied=checkpoint.tied, layout="mlx")
    }
    parts = []
    for spec in checkpoint.llm_specs:
        names = _stored_names(stored[spec.source], arrays)
        if len(names) > 1:
            _check_quantized(bundle, spec, [arrays[name] for name in names])
        entries = [
            llm.Stored(
                model_name(name),
                STORED_AS[arrays[name].dtype],
                arrays[name].shape,
                arrays[name].nbytes,
            )
            for name in names
        ]
        parts.append(llm.Part(entries, partial(_read, bundle, names)))
    return parts


def _check_quantized(bundle: Bundle, spec: weights.TensorSpec, arrays: list[mx.array]) -> None:
    """The demo app has one affine choice of bits and group size for all that is quantized."""
    quantization = bundle.config.quantization or {}
    mode = quantization.get("mode", "affine")
    bits, group_size = quantization.get("bits", 0), quantization.get("group_size", 0)
    if mode == "affine" and bits and len(arrays) == 3:
        expected = llm.affine(spec, bits, group_size, "float16")
        if [entry.shape for entry in expected] == [array.shape for array in arrays]:
            return
    raise BundleError(
        f"{bundle.path} has {spec.name} quantized otherwise than to {bits} bits in groups of "
        f"{group_size}, and an app bundle has one choice for all: {EXPORT_AGAIN.format('app')}"
    )


def _read(bundle: Bundle, names: list[str]) -> list[mx.array]:
    arrays = bundle.tensors()
    return [arrays[name] for name in names]


def _write_llm(
    checkpoint: Checkpoint, parts: list[llm.Part], directory: Path, progress: Callable[[int], None]
) -> llm.Summary:
    files = llm.write_parts(parts, directory, progress)
    specs = checkpoint.llm_specs
    quantized = any(len(part.entries) > 1 for part in parts)
    return llm.Summary(
        parameters=sum(prod(spec.shape) for spec in specs),
        bytes=sum(entry.bytes for part in parts for entry in part.entries),
        unquantized={
            spec.name: "as the bundle that it was converted from has it"
            for spec, part in zip(specs, parts, strict=True)
            if quantized and len(spec.shape) == 2 and len(part.entries) == 1
        },
        files=files,
    )


def _changed_tensors(parts: list[llm.Part], written: Bundle) -> Gate:
    """How many tensors of the language model are not, byte for byte, what they were made from."""
    changed = 0
    for part in parts:
        for entry, array in zip(part.entries, part.arrays(), strict=True):
            found = written.tensors()[entry.name]
            changed += (found.dtype, found.shape) != (array.dtype, array.shape) or (
                _bytes(found) != _bytes(array)
            )
    return Gate("LLM tensors changed", changed, "", 0, False)


def _bytes(array: mx.array) -> memoryview:
    return np.asarray(array.view(mx.uint8)).reshape(-1).data


def _check_same_reading(bundle: Bundle, tokenizer: ExportedTokenizer) -> None:
    """Raises BundleError: an app bundle could not be asked the same about the same pixels."""
    rows = bundle.config.text.vocab_size
    if tokenizer.image_token_id >= rows:
        raise BundleError(
            f"the tokenizer of {bundle.path} leaves none of the embedding's {rows:,} rows for "
            f"{IMAGE_TOKEN}, which an app bundle needs: {EXPORT_AGAIN.format('app')}"
        )
    vision, aspect_ratio = bundle.config.vision, bundle.config.image_aspect_ratio
    found = image_processor(bundle, vision.image_size, aspect_ratio)
    if found != ImageProcessor(vision.image_size, aspect_ratio):
        raise BundleError(
            f"{bundle.path} normalizes pictures (mean {found.image_mean}, deviation "
            f"{found.image_std}): expected FastVLM's pixels from 0 to 1, correct "
            "preprocessor_config.json"
        )


def _options(bundle: Bundle, parts: list[llm.Part], limits: ExportOptions) -> ExportOptions:
    """What the manifest records: the first export's choices and limits, for the other layout."""
    quantization = bundle.config.quantization or {}
    made = ExportOptions() if bundle.manifest is None else recorded_options(bundle)
    floor = made.min_snr_db
    if floor is not None:
        # Of the source the package can't keep more than what it is made from does.
        floor = min(floor, ENCODER_SNR_DB[limits.encoder_precision])
    return replace(
        limits,
        llm_bits=quantization["bits"] if any(len(part.entries) > 1 for part in parts) else 16,
        group_size=quantization.get("group_size", made.group_size),
        image_size=made.image_size,
        min_snr_db=floor,
        max_kl_nats=made.max_kl_nats,
        min_agreement=made.min_agreement,
    )


def _origin(bundle: Bundle, checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """The source's section of the manifest, the bundle's own where it has none, and the bundle."""
    manifest = bundle.manifest or {}
    files = manifest["files"] if manifest else hash_tree(bundle.path)
    directory = bundle.path.resolve().name
    named = {
        "name": checkpoint.name,
        "kind": checkpoint.kind,
        "directory": directory,
        "files": files,
        "license": checkpoint.license,
    }
    converted = {"directory": directory, "layout": bundle.layout, "dtype": dtype, "files": files}
    if manifest:
        converted["gates"] = manifest.get("gates", [])
    return {"source": manifest.get("source", named), "converted_from": converted}
