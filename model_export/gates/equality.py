"""The exact gates: the tensors and the settings that were written are the source's.

Tensors. Each is the source's, cast or rounded by the recorded form, bit for bit. The rounding is
this module's own, in torch (MLX's for the modes of floats), and not the writer's. What a calibrated
method made can't be had from the source again: it is what the method's hash at export says. Nor,
on another machine, can an adapter merged into its base, which is a sum in float32: of that the
export compares the tensor and records the hash.

Settings. What config.json and the preprocessor's say of the model is what the checkpoint says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import torch
from torch import Tensor

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.quantization import Format
from fastvlm_mlx.components import image_processor
from fastvlm_mlx.image.preprocess import ImageProcessor
from fastvlm_mlx.language.prompt.template import TURN_END
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.lora import MergedTensor
from model_export.checkpoint.names import NORM, TensorSpec, bundle_specs
from model_export.checkpoint.tokenizer import export_tokenizer
from model_export.checkpoint.weights.tensors import (
    ALL,
    ExtendedRows,
    SafeTensor,
    SourceTensor,
    from_torch,
    row_blocks,
    safe_tensors,
    to_torch,
)
from model_export.gates.gate import Gate
from model_export.language import affine, recipes
from model_export.language.recipes import Scheme
from model_export.language.weights import Matrix, SourceWeights, dequantize

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# Of the manifest's section on the language model.
TENSORS = "tensors"
SHOWN = 3


@dataclass(frozen=True)
class Made:
    """How a bundle's tensors were made from the source's.

    Attributes:
        formats: of every matrix, None where it is cast to `dtype`.
        dtype: of what is not quantized, and of affine scales and biases.
        hashes: SHA-256 of what can't be had from the source, by the names of stored tensors.
    """

    formats: Scheme
    dtype: torch.dtype
    hashes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def recorded(cls, manifest: Mapping[str, Any], checkpoint: Checkpoint) -> Made:
        """As the manifest says it: hashes of what a method made, and else of merged tensors alone,
        since all others can be had from the checkpoint."""
        llm = manifest["llm"]
        formats = {path: form and Format(**form) for path, form in llm["formats"].items()}
        hashes = llm.get(TENSORS, {})
        if (llm.get("calibration") or {}).get("method", "rtn") == "rtn":
            merged = {*_merged_names(checkpoint, manifest["layout"])}
            hashes = {name: value for name, value in hashes.items() if name in merged}
        return cls(formats, getattr(torch, llm["dtype"]), hashes)

    @classmethod
    def shown(cls, bundle: Bundle) -> Made:
        """As the files show it."""
        return cls(recipes.scheme_of(bundle), DTYPES[_held(bundle)[NORM[1]].dtype])


def hash_tensors(ready: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of each stored tensor of what a method made.

    Args:
        ready: as `calibrated.quantize` gives it: files, by the names of whole tensors.
    """
    return {
        name: _hash(tensor)
        for file in sorted({*ready.values()})
        for name, tensor in safe_tensors(file).items()
    }


def merged_hashes(checkpoint: Checkpoint, bundle: Bundle) -> dict[str, str]:
    """SHA-256 of the stored tensors whose source is an adapter merged into its base."""
    held = _held(bundle)
    names = _merged_names(checkpoint, bundle.layout)
    return {name: _hash(held[name]) for name in names if name in held}


def _merged_names(checkpoint: Checkpoint, layout: str) -> list[str]:
    specs = bundle_specs(checkpoint.config, tied=checkpoint.tied, layout=layout)
    merged = [s for s in specs if _is_merged(checkpoint.tensors.get(s.source))]
    stems = [spec.name.removesuffix("weight") for spec in merged]
    names = [spec.name for spec in merged]
    return names + [stem + part for stem in stems for part in ("scales", "biases")]


def tensor_gate(checkpoint: Checkpoint, bundle: Bundle, made: Made) -> Gate:
    """How many stored tensors are not exactly what `made` says, and the names of the first.

    A block of rows at a time; what is resident is the largest tensor with permuted axes.
    """
    held = _held(bundle)
    specs = bundle_specs(checkpoint.config, tied=checkpoint.tied, layout=bundle.layout)
    changed = [name for spec in specs for name in _changed(checkpoint, held, spec, made)]
    changed += sorted(held)
    return Gate("tensors changed", len(changed), "", 0, False, _some(changed))


def settings_gate(checkpoint: Checkpoint, bundle: Bundle) -> Gate:
    """How many settings are not the checkpoint's, and which.

    Raises:
        ConfigError: the preprocessor's say what FastVLM's never do.
    """
    config, found = checkpoint.config, bundle.config
    size = config.vision.image_size
    text = replace(config.text, tie_word_embeddings=checkpoint.tied)
    pairs: list[tuple[Any, Any]] = [
        (text, found.text),
        (config.vision, found.vision),
        (
            ImageProcessor(size, config.image_aspect_ratio),
            image_processor(bundle, size, found.image_aspect_ratio),
        ),
    ]
    changed = [
        f"{part.name} {getattr(ours, part.name)} for {getattr(source, part.name)}"
        for source, ours in pairs
        for part in fields(source)
        if getattr(source, part.name) != getattr(ours, part.name)
    ]
    if bundle.manifest is not None:
        changed += _reading_changed(checkpoint, bundle)
    return Gate("settings changed", len(changed), "", 0, False, _some(changed))


def _reading_changed(checkpoint: Checkpoint, bundle: Bundle) -> list[str]:
    """What of the tokenizer, and of what ends an answer, is not as an export writes it."""
    tokenizer = export_tokenizer(checkpoint).tokenizer
    source = json.loads(tokenizer.to_str())
    found = bundle.read_json(bundle.tokenizer_file.name)
    names = sorted(source.keys() | found.keys())
    changed = [f"tokenizer.json {n}" for n in names if source.get(n) != found.get(n)]
    ends = {tokenizer.token_to_id(TURN_END)}
    for stated in (checkpoint.generation_config, checkpoint.raw_config):
        ids = stated.get("eos_token_id")
        ends.update(ids if isinstance(ids, list) else [ids])
    if foreign := sorted(bundle.eos_token_ids - ends):
        changed.append(f"eos_token_id {foreign[0]}")
    return changed


def as_stored(weight: Tensor, form: Format | None, dtype: torch.dtype) -> list[mx.array]:
    """A weight [R, C], or of any shape where it is only cast, as plain rounding stores it."""
    if form is None:
        return [from_torch(weight.to(dtype))]
    weight = weight.float()
    if form.mode != "affine":
        # Their own definition; on a CPU it is the same everywhere.
        return list(mx.quantize(mx.array(weight.numpy()), **asdict(form), stream=mx.cpu))
    groups = weight.unflatten(-1, (-1, form.group_size))
    scales, biases = affine.grid(groups, form.bits)
    codes = affine.encode(groups, scales, biases, form.bits).to(torch.uint8).view(weight.shape)
    stored = (scales[..., 0].to(dtype), biases[..., 0].to(dtype))
    return affine.Coded(codes, *stored, form).arrays()


@dataclass(frozen=True)
class PlainMatrix(Matrix):
    """A source's weight as plain rounding stores it, and as it is then read."""

    rounding: Format | None = None
    dtype: torch.dtype = torch.float16

    def float(self, rows: slice = ALL) -> Tensor:
        stored = as_stored(to_torch(self.weight.read(rows)), self.rounding, self.dtype)
        if self.rounding is None:
            return to_torch(stored[0]).float()
        return dequantize(self.rounding, *stored)


@dataclass(frozen=True)
class PlainWeights:
    """The language model that plain rounding makes of a checkpoint's."""

    source: SourceWeights
    made: Made

    def matrix(self, name: str) -> Matrix:
        form = self.made.formats.get(name.removesuffix(".weight"))
        return PlainMatrix(self.source.matrix(name).weight, rounding=form, dtype=self.made.dtype)


def _held(bundle: Bundle) -> dict[str, SafeTensor]:
    return {n: t for file in bundle.weight_files for n, t in safe_tensors(file).items()}


def _is_merged(tensor: SourceTensor | None) -> bool:
    if isinstance(tensor, ExtendedRows):
        return _is_merged(tensor.source)
    return isinstance(tensor, MergedTensor)


def _changed(
    checkpoint: Checkpoint, held: dict[str, SafeTensor], spec: TensorSpec, made: Made
) -> Iterator[str]:
    """Names of those stored tensors of `spec` that are not as they should be; `held` gives up
    all of them."""
    form = made.formats.get(recipes.path_of(spec)) if recipes.is_matrix(spec) else None
    stem, names = spec.name.removesuffix("weight"), [spec.name]
    if form is not None:
        names += [stem + part for part in ("scales", "biases")[: 2 if form.mode == "affine" else 1]]
    found = [held.pop(name, None) for name in names]
    if any(name in made.hashes for name in names):
        for name, tensor in zip(names, found, strict=True):
            if tensor is None or _hash(tensor) != made.hashes.get(name):
                yield name
        return
    wrong = {name for name, tensor in zip(names, found, strict=True) if tensor is None}
    for rows in [ALL] if spec.axes is not None else row_blocks(spec.shape):
        expected = as_stored(_source(checkpoint, spec, rows), form, made.dtype)
        for name, tensor, block in zip(names, found, expected, strict=True):
            if name not in wrong and tensor is not None and not _same(tensor, rows, block):
                wrong.add(name)
        if len(wrong) == len(names):
            break
    yield from (name for name in names if name in wrong)


def _source(checkpoint: Checkpoint, spec: TensorSpec, rows: slice) -> Tensor:
    if spec.source not in checkpoint.tensors:
        # The classification head that no part of FastVLM computes: both loaders ask for one.
        return torch.zeros(spec.shape)
    tensor = to_torch(checkpoint.array(spec.source, rows))
    return tensor if spec.axes is None else tensor.permute(spec.axes)


def _same(tensor: SafeTensor, rows: slice, expected: mx.array) -> bool:
    """Bit for bit, type and shape included."""
    if tensor.shape[1:] != expected.shape[1:]:
        return False
    found = tensor.read(rows)
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and bool(mx.array_equal(found.view(mx.uint8), expected.view(mx.uint8)))
    )


def _hash(tensor: SafeTensor) -> str:
    """SHA-256 of its bytes in the file, after its type and its shape."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    for rows in row_blocks(tensor.shape):
        digest.update(to_torch(tensor.read(rows).view(mx.uint8)).numpy().tobytes())
    return digest.hexdigest()


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
