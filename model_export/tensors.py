"""Tensors as files hold them: headers first, values one tensor at a time and kept by nobody."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from fastvlm_mlx.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# I64 is BatchNorm's counter's.
DTYPES = ("F32", "F16", "BF16", "I64")
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

    def read(self) -> mx.array:
        """Raises CheckpointError if a file can't be read any more."""
        ...


@dataclass(frozen=True)
class SafeTensor:
    """In a safetensors file."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def read(self) -> mx.array:
        try:
            # A new lazy map each time: an array that was evaluated stays in its map, and memory.
            return mx.load(str(self.file))[self.key]  # type: ignore[call-overload,return-value]
        except RuntimeError as error:
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

    def tensor(self, key: str) -> torch.Tensor:
        """Raises CheckpointError: as for the header, if the file changed meanwhile."""
        if self._map is None or self._read_bytes > MAPPED_BYTES:
            self._map, self._read_bytes = unpickle(self.path), 0
        if key not in self._map:
            raise CheckpointError(f"{self.path} changed while it was read: run the export again")
        tensor = self._map[key]
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

    def read(self) -> mx.array:
        return from_torch(self.file.tensor(self.key))


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

    def read(self) -> mx.array:
        matrix = self.source.read()
        row = matrix[self.copied : self.copied + 1]
        return mx.concatenate([matrix, mx.repeat(row, self.rows - matrix.shape[0], axis=0)])


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


def magnitude(name: str, tensor: torch.Tensor) -> float:
    """The largest magnitude in the tensor of this name.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    # The extremes carry NaN and infinity, and unlike isfinite() need no temporary.
    low, high = (float(extreme) for extreme in tensor.aminmax())
    if not isfinite(low) or not isfinite(high):
        raise CheckpointError(
            f"{name} holds NaN or infinity, expected finite weights: the checkpoint is damaged, or "
            "its training diverged"
        )
    return max(-low, high)


def read_json(file: Path) -> dict[str, Any]:
    """Raises CheckpointError if `file` is not a JSON object."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} can't be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds a {type(data).__name__}, expected a JSON object")
    return data


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
    whole = [files for files in (safe, pickled) if files and all(f.is_file() for f in files)]
    if not safe and not pickled:
        raise CheckpointError(
            f"{directory} holds no weights: expected model.safetensors or pytorch_model.bin, or "
            "several with an index"
        )
    files = whole[0] if whole else safe or pickled
    for file in files:
        if not file.is_file():
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
        header = _safe_header(file) if file.suffix == ".safetensors" else _pickled_header(file)
        for key, tensor in header.items():
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
    present = {file.name for file in found if not file.name.startswith(("adapter_", "mm_proj"))}
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
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.strip("."):
            raise CheckpointError(
                f"{index} points to {name!r}: expected files of its own directory"
            )
    return set(weight_map.values())


def _safe_header(file: Path) -> dict[str, SafeTensor]:
    try:
        with safe_open(str(file), framework="numpy") as stream:
            entries = {key: stream.get_slice(key) for key in stream.keys()}  # noqa: SIM118
            tensors = {
                key: SafeTensor(file, key, entry.get_dtype(), tuple(entry.get_shape()))
                for key, entry in entries.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}): download it again"
        ) from error
    for key, tensor in tensors.items():
        _check_dtype(key, tensor.dtype)
    return tensors


def _pickled_header(file: Path) -> dict[str, PickledTensor]:
    names = _dtype_names()
    tensors = {}
    stored = PickledFile(file)
    for key, tensor in unpickle(file).items():
        dtype = names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        _check_dtype(key, dtype)
        tensors[key] = PickledTensor(stored, key, dtype, tuple(tensor.shape))
    return tensors


def _check_dtype(key: str, dtype: str) -> None:
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{key} is stored as {dtype}: expected F32, F16 or BF16, an unquantized PyTorch "
            "checkpoint and not a bundle"
        )


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

    import torch

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
        if not isinstance(key, str) or not plain or value.device.type != "cpu":
            raise CheckpointError(
                f"{file} holds {key!r}, a {type(value).__name__}, expected named tensors alone: "
                "save the model's state_dict again"
            )
    return data
