"""Cast and quantize the language model and the projector, tensor by tensor, into safetensors.

Every destination's name, dtype and shape is known before a weight is read, so the header is
written first and each tensor goes to the file as soon as it is computed, a block of rows at a time:
what is resident is two blocks, the scales and biases of one tensor, and nothing of the rest.
"""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import chain, cycle
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

import mlx.core as mx
import numpy as np

from fastvlm_mlx.bundle.quantization import Format
from fastvlm_mlx.errors import OptionError
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.names import TensorSpec, bundle_specs, in_encoder
from model_export.checkpoint.weights.tensors import ALL, magnitude, row_blocks, safe_tensors
from model_export.language.recipes import PROJECTOR, Scheme, is_matrix, path_of
from model_export.options import FLOAT16_MAX

if TYPE_CHECKING:
    import torch

# mlx dtype, safetensors' name, bytes.
DTYPES: dict[str, tuple[mx.Dtype, str, int]] = {
    "float16": (mx.float16, "F16", 2),
    "bfloat16": (mx.bfloat16, "BF16", 2),
    "float32": (mx.float32, "F32", 4),
}
# Metadata that mlx-lm and the Swift loaders look for in a file of MLX weights.
FILE_METADATA = {"format": "mlx"}
SHARD_BYTES = 5_000_000_000
# Arrays that are computed while one is written: a matrix makes three, most of them small.
AHEAD = 6

# For each tensor that is finished already, by its name in the bundle, the file that it waits in.
Ready = Mapping[str, Path]


@dataclass(frozen=True)
class Stored:
    """A tensor as the bundle stores it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Summary:
    """What was written: parameters and bytes, and which weights were left at `dtype`.

    The encoder of an `mlx` bundle is in the same files, and is counted apart.
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
    """The tensors that one weight becomes, and a function that reads or computes them.

    It yields the arrays of the tensors in their order, each whole or by blocks of rows.
    """

    entries: list[Stored]
    arrays: Callable[[], Iterator[mx.array]]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)


def stored(spec: TensorSpec, scheme: Scheme, dtype: str) -> list[Stored]:
    """List the tensors that `spec` becomes: itself at `dtype`, or weight, scales and biases."""
    form = format_of(spec, scheme)
    if form is None:
        _, name, size = DTYPES[dtype]
        return [Stored(spec.name, name, spec.shape, prod(spec.shape) * size)]
    return packed(spec, form, dtype)


def format_of(spec: TensorSpec, scheme: Scheme) -> Format | None:
    return scheme.get(path_of(spec)) if is_matrix(spec) else None


def packed(spec: TensorSpec, form: Format, dtype: str) -> list[Stored]:
    """List the tensors of a quantized weight in MLX's layout.

    Codes of `bits` bits are packed into uint32 along the last axis.

    Each group of `group_size` has a scale: affine's, with a bias, of `dtype`; one byte otherwise.
    """
    rows, columns = spec.shape
    words, groups = columns * form.bits // 32, columns // form.group_size
    stem = spec.name.removesuffix("weight")
    affine = form.mode == "affine"
    _, name, size = DTYPES[dtype] if affine else (None, "U8", 1)
    return [
        Stored(spec.name, "U32", (rows, words), rows * words * 4),
        *(
            Stored(stem + part, name, (rows, groups), rows * groups * size)
            for part in (("scales", "biases") if affine else ("scales",))
        ),
    ]


def convert(
    checkpoint: Checkpoint, spec: TensorSpec, scheme: Scheme, dtype: str
) -> Iterator[mx.array]:
    """Yield the arrays of `stored(spec, scheme, dtype)` in that order, the first by blocks of rows.

    Raises:
        CheckpointError: the source holds NaN or infinity.
        OptionError: a weight does not fit float16.
    """
    if spec.source not in checkpoint.tensors:
        # The classification head: transformers' checkpoints have none, both loaders want one.
        yield mx.zeros(spec.shape, DTYPES[dtype][0])
        return
    form = format_of(spec, scheme)
    rest: list[list[mx.array]] = []
    for rows in [ALL] if spec.axes is not None else row_blocks(spec.shape):
        # What MLX quantizes fastest on a CPU, and numpy knows: it has no bfloat16.
        weight = checkpoint.array(spec.source, rows).astype(mx.float32)
        check_range(spec.source, np.asarray(weight), dtype)
        if spec.axes is not None:
            weight = weight.transpose(spec.axes)
        with mx.stream(next(_streams())):
            first, *others = finish(weight, form, dtype)
        mx.async_eval(first, *others)
        yield first
        rest.append(others)
    for later in zip(*rest, strict=True):
        yield from later


@cache
def _streams() -> Iterator[mx.ThreadLocalStream]:
    """Yield the streams that blocks are computed on, in turn. On a CPU a stream is a thread, so a
    block is computed while the next is read and checked. Each thread that exports has both streams
    for itself.

    They are on the CPU on every machine, so that a Mac writes the bits that another machine checks.
    """
    return cycle([mx.new_thread_local_stream(mx.Device(mx.cpu)) for _ in range(2)])


def check_range(name: str, weight: torch.Tensor | np.ndarray, dtype: str) -> None:
    """Check that a weight is finite and fits the dtype; raises as `convert` does."""
    largest = magnitude(name, weight)
    if dtype == "float16" and largest > FLOAT16_MAX:
        raise OptionError(
            f"{name} reaches {largest:.3g}, beyond float16's {FLOAT16_MAX:,}: use --dtype bfloat16"
        )


def finish(weight: mx.array, form: Format | None, dtype: str) -> list[mx.array]:
    """Cast a weight, or quantize it by plain rounding, into the arrays that are written."""
    if form is None:
        return [weight.astype(DTYPES[dtype][0])]
    # float32 holds what any source does, and on a CPU is the type that MLX quantizes fastest. It
    # takes half precision to float32 first and rounds affine's scales and biases last, as here.
    words, *others = mx.quantize(weight.astype(mx.float32), **asdict(form))
    affine = form.mode == "affine"
    return [words, *(a.astype(DTYPES[dtype][0]) if affine else a for a in others)]


def write(
    checkpoint: Checkpoint,
    scheme: Scheme,
    layout: str,
    dtype: str,
    directory: Path,
    progress: Callable[[int], None],
    ready: Ready = MappingProxyType({}),
) -> Summary:
    """Write the projector, the language model and an `mlx` bundle's encoder into `directory`.

    Args:
        scheme: each matrix's format, from `recipes.scheme`.
        dtype: the type of what is not quantized.
        progress: called with the bytes just written.
        ready: what is not converted here, from `layerwise.quantize`.

    Raises:
        CheckpointError, OptionError: as `convert`. OSError: the disk is full or not writable.
    """
    specs = bundle_specs(checkpoint.config, tied=checkpoint.tied, layout=layout)
    parts = []
    for spec in specs:
        entries = stored(spec, scheme, dtype)
        arrays = partial(convert, checkpoint, spec, scheme, dtype)
        if spec.name in ready:
            arrays = partial(take, ready[spec.name], entries)
        parts.append(Part(entries, arrays))
    return write_parts(specs, parts, scheme, directory, progress)


def write_parts(
    specs: list[TensorSpec],
    parts: list[Part],
    scheme: Scheme,
    directory: Path,
    progress: Callable[[int], None],
) -> Summary:
    """Write one file, or several with an index; the parts are computed one at a time.

    Args:
        parts: what each of `specs` becomes.
        scheme, progress: as for `write`.

    Raises:
        OSError: the disk is full or not writable; and what the parts raise.
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
            for array in _ahead(chain.from_iterable(part.arrays() for part in shard)):
                progress(_write_array(stream, array))
        mx.clear_cache()
    total = sum(part.bytes for part in parts)
    encoder = sum(part.bytes for spec, part in zip(specs, parts, strict=True) if in_encoder(spec))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return Summary(
        parameters=sum(prod(spec.shape) for spec in specs if not in_encoder(spec)),
        bytes=total - encoder,
        encoder_bytes=encoder,
        unquantized=_unquantized(specs, scheme),
        files=tuple(names),
    )


def _ahead(arrays: Iterator[mx.array]) -> Iterator[mx.array]:
    """Yield the same arrays; the next ones are begun before one is handed on."""
    begun: deque[mx.array] = deque()
    for array in arrays:
        begun.append(array)
        if len(begun) > AHEAD:
            yield begun.popleft()
    yield from begun


def take(file: Path, entries: list[Stored]) -> Iterator[mx.array]:
    """Read tensors that wait in a safetensors file under the names that they will have."""
    tensors = safe_tensors(file)
    return (tensors[entry.name].read() for entry in entries)


def total_bytes(checkpoint: Checkpoint, scheme: Scheme, layout: str, dtype: str) -> int:
    """Count the bytes that `write` will write, without headers."""
    specs = bundle_specs(checkpoint.config, tied=checkpoint.tied, layout=layout)
    return sum(entry.bytes for spec in specs for entry in stored(spec, scheme, dtype))


def _unquantized(specs: list[TensorSpec], scheme: Scheme) -> dict[str, str]:
    """List the matrices that are not quantized while others are, each with the reason."""
    if not any(scheme.values()):
        return {}
    return {
        spec.name: "projector: few weights, read by every image token"
        if path_of(spec).startswith(PROJECTOR)
        else "asked for"
        for spec in specs
        if is_matrix(spec) and scheme[path_of(spec)] is None
    }


def header(plan: list[Stored]) -> bytes:
    """Make a safetensors header: its length in 8 bytes, then JSON padded to 8 bytes."""
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
        if shard and size + part.bytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(part)
        size += part.bytes
    yield shard


def _write_array(stream: BinaryIO, array: mx.array) -> int:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    data = np.asarray(mx.contiguous(array))
    stream.write(data.data)
    return data.nbytes
