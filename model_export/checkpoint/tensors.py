"""Tensors as files hold them: headers first; values whole or by rows, and kept by nobody."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from fastvlm_mlx.bundle import schema
from fastvlm_mlx.bundle.files import MAX_FILES, inside, is_file, left_behind
from fastvlm_mlx.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# safetensors' names: what numpy reads them as (it has no bfloat16), and MLX's type. I64 is
# BatchNorm's counter's; a bundle has U32 for packed codes and U8 for the scales of float formats.
FORMATS: dict[str, tuple[str, mx.Dtype]] = {
    "F32": ("<f4", mx.float32),
    "F16": ("<f2", mx.float16),
    "BF16": ("<u2", mx.bfloat16),
    "I64": ("<i8", mx.int64),
    "U32": ("<u4", mx.uint32),
    "U8": ("u1", mx.uint8),
}
DTYPES = ("F32", "F16", "BF16", "I64")
ALL = slice(None)
# Small enough for what is computed from a block to stay in the processor's cache and in memory that
# the allocator has at hand: on a CPU whole matrices of 100 MB take twice as long.
BLOCK_ELEMENTS = 2**22
MAPPED_BYTES = 100_000_000
# Files of full weights, by preference; an adapter's and a projector's have names of their own.
SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


class SourceTensor(Protocol):
    """A tensor that can be read: from a file, or computed from what files hold when it is read."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    def read(self, rows: slice = ALL) -> mx.array:
        """Those rows (entries of the first axis), consecutive; of a scalar the scalar.

        Raises CheckpointError if a file can't be read any more.
        """
        ...


@dataclass(frozen=True)
class SafeTensor:
    """In a safetensors file, its first byte at `offset`."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def read(self, rows: slice = ALL) -> mx.array:
        kind, dtype = FORMATS[self.dtype]
        row = prod(self.shape[1:])
        start, stop, _ = rows.indices(self.shape[0]) if self.shape else (0, 1, 1)
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        offset = self.offset + start * row * np.dtype(kind).itemsize
        try:
            data = np.fromfile(self.file, kind, (stop - start) * row, offset=offset)
            # A file that became shorter gives fewer numbers.
            return mx.array(data.reshape(shape)).view(dtype)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.file} can't be read: {error}") from error


class PickledFile:
    """A file that `torch.save` wrote, mapped.

    Pages that were read count as resident until the map is gone, and making one unpickles the
    names of all tensors: a map serves until `MAPPED_BYTES` were read through it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._map: dict[str, torch.Tensor] | None = None
        self._read_bytes = 0

    def tensor(self, key: str, rows: slice) -> torch.Tensor:
        """Raises CheckpointError: as for the header, if the file changed meanwhile."""
        if self._map is None or self._read_bytes > MAPPED_BYTES:
            self._map, self._read_bytes = unpickle(self.path), 0
        if key not in self._map:
            raise CheckpointError(f"{self.path} changed while it was read: run the export again")
        tensor = self._map[key][rows] if self._map[key].dim() else self._map[key]
        self._read_bytes += tensor.nbytes
        return tensor


@dataclass(frozen=True)
class PickledTensor:
    """In a file that `torch.save` wrote."""

    file: PickledFile
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file.path,)

    def read(self, rows: slice = ALL) -> mx.array:
        return from_torch(self.file.tensor(self.key, rows))


@dataclass(frozen=True)
class ExtendedRows:
    """A matrix with rows added at its end, each a copy of one that it has."""

    source: SourceTensor
    rows: int
    copied: int

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.source.shape[1:])

    @property
    def files(self) -> tuple[Path, ...]:
        return self.source.files

    def read(self, rows: slice = ALL) -> mx.array:
        start, stop, _ = rows.indices(self.rows)
        held = self.source.shape[0]
        matrix = self.source.read(slice(min(start, held), min(stop, held)))
        if stop <= held:
            return matrix
        row = self.source.read(slice(self.copied, self.copied + 1))
        return mx.concatenate([matrix, mx.repeat(row, stop - max(start, held), axis=0)])


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """The rows of a tensor of this shape, `BLOCK_ELEMENTS` or one row at a time."""
    rows = max(1, BLOCK_ELEMENTS // prod(shape[1:]))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def to_torch(array: mx.array) -> torch.Tensor:
    """The same memory as a torch tensor, bfloat16 included, which numpy does not have."""
    import torch

    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.asarray(array.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.asarray(array))


def from_torch(tensor: torch.Tensor) -> mx.array:
    """A copy as an MLX array, bfloat16 included."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())


def magnitude(name: str, tensor: torch.Tensor | np.ndarray) -> float:
    """The largest magnitude in the tensor of this name.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    # The extremes carry NaN and infinity, and unlike isfinite() need no temporary.
    low, high = float(tensor.min()), float(tensor.max())
    if not isfinite(low) or not isfinite(high):
        raise CheckpointError(
            f"{name} holds NaN or infinity, expected finite weights: the checkpoint is damaged, or "
            "its training diverged"
        )
    return max(-low, high)


def read_json(file: Path) -> dict[str, Any]:
    """Raises CheckpointError if `file` is not a JSON object, or not a file of its directory."""
    return schema.read_json(file.parent, file, CheckpointError, remedy="download it again")


def read_weights(directory: Path) -> dict[str, SourceTensor]:
    """The tensors of a directory's full weights, by their names there; headers only.

    Both forms of one checkpoint are often published together: the safetensors are read, unless
    files of theirs are missing and the other form is complete.

    Raises:
        CheckpointError: no weights, two different sets of them, a file that is missing or not
            whole, an index that points elsewhere.
    """
    safe = _weight_files(directory, SAFETENSORS)
    pickled = _weight_files(directory, PICKLED)
    whole = [files for files in (safe, pickled) if files and all(map(is_file, files))]
    if not safe and not pickled:
        raise CheckpointError(
            f"{directory} holds no weights: expected model.safetensors or pytorch_model.bin, or "
            "several with an index"
        )
    files = whole[0] if whole else safe or pickled
    for file in files:
        if not is_file(file):
            raise CheckpointError(
                f"{file} is missing: expected the {len(files)} files that the index names, "
                "download it again"
            )
    return read_tensors(files)


def has_weights(directory: Path) -> bool:
    """Whether the directory holds full weights, whole or not."""
    return any(_weight_files(directory, name) for name in (SAFETENSORS, PICKLED))


def read_tensors(files: list[Path]) -> dict[str, SourceTensor]:
    """Headers of several safetensors or `.bin` files.

    Raises:
        CheckpointError: a file is not whole, holds something other than tensors, or a tensor is
            in two of them.
    """
    tensors: dict[str, SourceTensor] = {}
    for file in files:
        header: Mapping[str, SourceTensor]
        header = safe_tensors(file) if file.suffix == ".safetensors" else _pickled_header(file)
        for key, tensor in header.items():
            if tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{key} is stored as {tensor.dtype}: expected F32, F16 or BF16, an unquantized "
                    "PyTorch checkpoint and not a bundle"
                )
            if key in tensors:
                raise CheckpointError(
                    f"{key} is in both {tensors[key].files[0].name} and {file.name}: expected it "
                    "once, remove the file that does not belong to this checkpoint"
                )
            tensors[key] = tensor
    return tensors


def _weight_files(directory: Path, name: str) -> list[Path]:
    """The files of one form, `name` being that of a single one; those of an index may not exist."""
    stem, suffix = Path(name).stem, Path(name).suffix
    # Safetensors of any name are weights, as in older exports; pickles of other names are anything.
    found = directory.glob("*.safetensors" if name == SAFETENSORS else f"{stem}*.bin")
    present = {
        file.name
        for file in found
        if not file.name.startswith(("adapter_", "mm_proj")) and not left_behind(file.name)
    }
    index = directory / f"{name}.index.json"
    if not index.is_file():
        if name in present and any(re.fullmatch(rf"{stem}-\d+-of-\d+{suffix}", n) for n in present):
            raise CheckpointError(
                f"{directory} holds two checkpoints, {name} and {stem}-…{suffix}: expected one, "
                "remove the other"
            )
        return [directory / file for file in sorted(present)]
    named = _index_names(index)
    if extra := sorted(n for n in present - named if n.startswith(stem)):
        raise CheckpointError(
            f"{directory} holds two checkpoints, {extra[0]} and the one of {index.name}: expected "
            "one, remove the other"
        )
    return [directory / file for file in sorted(named)]


def _index_names(index: Path) -> set[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} has no weight_map: expected each tensor's file, download it again"
        )
    # Some hundred thousand tensors are in a few files.
    texts = {name for name in weight_map.values() if isinstance(name, str)}
    others = [name for name in weight_map.values() if not isinstance(name, str)]
    for name in [*others[:1], *sorted(texts)]:
        if not isinstance(name, str) or Path(name).name != name or not name.strip("."):
            raise CheckpointError(
                f"{index} points to {name!r}: expected files of its own directory, download "
                "the checkpoint again"
            )
        if len(texts) > MAX_FILES:
            raise CheckpointError(
                f"{index} points to {len(texts):,} files: expected {MAX_FILES:,} at most"
            )
    return texts


def safe_tensors(file: Path) -> dict[str, SafeTensor]:
    """A safetensors file's tensors, of whatever type.

    Raises:
        CheckpointError: it is not whole.
    """
    inside(file.parent, file, CheckpointError)
    try:
        # Checks the header and that it accounts for every byte; where these lie it does not say.
        with safe_open(str(file), framework="numpy"), file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entries = json.loads(stream.read(length))
    # The second may meet another file than the first.
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}): download it again"
        ) from error
    return {
        key: SafeTensor(
            file, key, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )
        for key, entry in entries.items()
        if key != "__metadata__"
    }


def _pickled_header(file: Path) -> dict[str, PickledTensor]:
    tensors = {}
    stored, header = PickledFile(file), unpickle(file)
    names = _dtype_names()
    for key, tensor in header.items():
        dtype = names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        tensors[key] = PickledTensor(stored, key, dtype, tuple(tensor.shape))
    return tensors


@cache
def _dtype_names() -> Mapping[Any, str]:
    import torch

    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int64)
    return dict(zip(dtypes, DTYPES, strict=True))


def unpickle(file: Path) -> dict[str, torch.Tensor]:
    """What `torch.save` wrote, mapped and not read, if it is a dictionary of plain tensors.

    Raises:
        CheckpointError: it is anything else. Nothing in it is executed.
    """
    import pickle

    inside(file.parent, file, CheckpointError)
    try:
        import torch
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{file} is a pickle, which torch alone reads, and torch is not installed: run pip "
            'install "fastvlm-mlx[export]", or save the weights as safetensors'
        ) from error
    try:
        data = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"refers to {found.group(1)}" if found else "is not a file of tensors"
        raise CheckpointError(
            f"{file} {what}: expected tensors alone, nothing else in it is loaded; save the "
            "model's state_dict again"
        ) from error
    # A damaged archive raises whatever the code that meets the damage does.
    except Exception as error:
        reason = (
            "written by torch before 1.6, or damaged" if "mmap can only" in str(error) else error
        )
        raise CheckpointError(
            f"{file} can't be read ({reason}): download it again, or save it again with a current "
            "torch"
        ) from error
    if not isinstance(data, dict) or not data:
        raise CheckpointError(
            f"{file} holds a {type(data).__name__}, expected named tensors: save the model's "
            "state_dict again"
        )
    for key, value in data.items():
        plain = isinstance(value, torch.Tensor) and value.layout is torch.strided
        # One number can stand for any number of them, where its stride is nothing.
        plain = plain and value.nbytes <= value.untyped_storage().nbytes()
        if not isinstance(key, str) or not plain or value.device.type != "cpu":
            raise CheckpointError(
                f"{file} holds {key!r} of type {type(value).__name__}, expected named tensors "
                "alone: save the model's state_dict again"
            )
    return data
