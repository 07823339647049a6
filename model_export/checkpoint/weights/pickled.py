"""Tensors in files that `torch.save` wrote: mapped, read by rows, and never executed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from fastvlm_mlx.bundle.files import inside
from fastvlm_mlx.errors import CheckpointError

if TYPE_CHECKING:
    import torch
from model_export.checkpoint.weights.tensors import ALL, DTYPES, from_torch

MAPPED_BYTES = 100_000_000


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
        """Read rows of a tensor; raises CheckpointError if the file changed meanwhile."""
        if self._map is None or self._read_bytes > MAPPED_BYTES:
            self._map, self._read_bytes = unpickle(self.path), 0
        if key not in self._map:
            raise CheckpointError(f"{self.path} changed while it was read: run the export again")
        tensor = self._map[key][rows] if self._map[key].dim() else self._map[key]
        self._read_bytes += tensor.nbytes
        return tensor


@dataclass(frozen=True)
class PickledTensor:
    """A tensor in a file that `torch.save` wrote."""

    file: PickledFile
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file.path,)

    def read(self, rows: slice = ALL) -> mx.array:
        return from_torch(self.file.tensor(self.key, rows))


def pickled_tensors(file: Path) -> dict[str, PickledTensor]:
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
    """Map what `torch.save` wrote, without reading it, if it is a dictionary of plain tensors.

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
