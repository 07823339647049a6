"""Cast and quantize the language model and the projector, tensor by tensor, into safetensors.

Every destination's name, dtype and shape is known before a weight is read, so the header is
written first and each tensor goes to the file as soon as it is computed: what is resident is one
tensor, its quantized form, and nothing of the rest.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from fastvlm_mlx.errors import OptionError
from model_export.checkpoint import Checkpoint, magnitude, to_torch
from model_export.options import FLOAT16_MAX, ExportOptions
from model_export.weights import TensorSpec, bundle_specs, in_encoder

# mlx dtype, safetensors' name, bytes.
DTYPES: dict[str, tuple[mx.Dtype, str, int]] = {
    "float16": (mx.float16, "F16", 2),
    "bfloat16": (mx.bfloat16, "BF16", 2),
    "float32": (mx.float32, "F32", 4),
}
# Metadata that mlx-lm and the Swift loaders look for in a file of MLX weights.
FILE_METADATA = {"format": "mlx"}
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Stored:
    """A tensor as the bundle holds it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Summary:
    """What was written: parameters and bytes, and which weights were left at `dtype`.

    An `mlx` bundle's encoder is in the same files and counted apart.
    """

    parameters: int
    bytes: int
    unquantized: dict[str, str]
    files: tuple[str, ...]
    encoder_bytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters


@dataclass(frozen=True)
class Part:
    """What goes into a file together: tensors, and a function that reads or computes them."""

    entries: list[Stored]
    arrays: Callable[[], list[mx.array]]


def is_quantized(spec: TensorSpec, options: ExportOptions) -> bool:
    """Linear and embedding weights of the language model; the projector stays at `dtype`."""
    return (
        options.quantized
        and len(spec.shape) == 2
        and spec.name.startswith("language_model.")
        and spec.name.endswith(".weight")
    )


def stored(spec: TensorSpec, options: ExportOptions) -> list[Stored]:
    """The tensors that `spec` becomes: itself, or weight, scales and biases."""
    _, name, size = DTYPES[options.dtype]
    if not is_quantized(spec, options):
        return [Stored(spec.name, name, spec.shape, prod(spec.shape) * size)]
    return affine(spec, options.llm_bits, options.group_size, options.dtype)


def affine(spec: TensorSpec, bits: int, group_size: int, dtype: str) -> list[Stored]:
    """A weight in MLX's affine layout: `bits`-wide integers packed into uint32 along the last axis,
    one scale and one bias for each group of `group_size`."""
    _, name, size = DTYPES[dtype]
    rows, columns = spec.shape
    packed, groups = columns * bits // 32, columns // group_size
    stem = spec.name.removesuffix("weight")
    return [
        Stored(spec.name, "U32", (rows, packed), rows * packed * 4),
        Stored(stem + "scales", name, (rows, groups), rows * groups * size),
        Stored(stem + "biases", name, (rows, groups), rows * groups * size),
    ]


def convert(checkpoint: Checkpoint, spec: TensorSpec, options: ExportOptions) -> list[mx.array]:
    """The arrays of `stored(spec, options)`, in that order.

    Raises:
        CheckpointError: the source holds NaN or infinity.
        OptionError: a weight does not fit float16.
    """
    dtype = DTYPES[options.dtype][0]
    if spec.source not in checkpoint.tensors:
        # The classification head: transformers' checkpoints have none, both loaders want one.
        return [mx.zeros(spec.shape, dtype)]
    weight = checkpoint.array(spec.source)
    largest = magnitude(spec.source, to_torch(weight))
    if options.dtype == "float16" and largest > FLOAT16_MAX:
        raise OptionError(
            f"{spec.source} reaches {largest:.3g}, beyond float16's {FLOAT16_MAX:,}: use --dtype "
            "bfloat16"
        )
    if spec.axes is not None:
        weight = weight.transpose(spec.axes)
    cast = weight.astype(dtype)
    if not is_quantized(spec, options):
        return [cast]
    return list(mx.quantize(cast, group_size=options.group_size, bits=options.llm_bits))


def write(
    checkpoint: Checkpoint,
    options: ExportOptions,
    directory: Path,
    progress: Callable[[int], None],
) -> Summary:
    """Write the projector, the language model and an `mlx` bundle's encoder into `directory`.

    Args:
        progress: called with the bytes just written.

    Raises:
        CheckpointError, OptionError: as `convert`. OSError: the disk is full or not writable.
    """
    specs = bundle_specs(checkpoint.config, tied=checkpoint.tied, layout=options.layout)
    parts = [
        Part(stored(spec, options), partial(convert, checkpoint, spec, options)) for spec in specs
    ]
    names = write_parts(parts, directory, progress)
    sizes = [sum(entry.bytes for entry in part.entries) for part in parts]
    encoder = [in_encoder(spec) for spec in specs]
    return Summary(
        parameters=sum(prod(spec.shape) for spec in specs if not in_encoder(spec)),
        bytes=sum(size for size, of in zip(sizes, encoder, strict=True) if not of),
        encoder_bytes=sum(size for size, of in zip(sizes, encoder, strict=True) if of),
        unquantized={
            spec.name: "projector: few weights, read by every image token"
            for spec in specs
            if options.quantized
            and len(spec.shape) == 2
            and not is_quantized(spec, options)
            and not in_encoder(spec)
        },
        files=names,
    )


def write_parts(
    parts: list[Part], directory: Path, progress: Callable[[int], None]
) -> tuple[str, ...]:
    """Write one file, or several with an index; the parts are computed one at a time.

    Args:
        progress: called with the bytes just written.

    Returns:
        The files' names.
    """
    shards = list(_shards(parts))
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    weight_map: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        plan = [entry for part in shard for entry in part.entries]
        weight_map |= {entry.name: name for entry in plan}
        with (directory / name).open("wb") as stream:
            stream.write(header(plan))
            for part in shard:
                for array in part.arrays():
                    progress(_write_array(stream, array))
                mx.clear_cache()
    if len(shards) > 1:
        total = sum(entry.bytes for part in parts for entry in part.entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return tuple(names)


def total_bytes(checkpoint: Checkpoint, options: ExportOptions) -> int:
    """What `write` will write, headers left out."""
    specs = bundle_specs(checkpoint.config, tied=checkpoint.tied, layout=options.layout)
    return sum(entry.bytes for spec in specs for entry in stored(spec, options))


def header(plan: list[Stored]) -> bytes:
    """A safetensors header: its length in 8 bytes, then JSON padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": FILE_METADATA}
    offset = 0
    for entry in plan:
        entries[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _shards(parts: list[Part]) -> Iterator[list[Part]]:
    shard: list[Part] = []
    size = 0
    for part in parts:
        wanted = sum(entry.bytes for entry in part.entries)
        if shard and size + wanted > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(part)
        size += wanted
    yield shard


def _write_array(stream: BinaryIO, array: mx.array) -> int:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    data = np.asarray(mx.contiguous(array))
    stream.write(data.data)
    return data.nbytes
