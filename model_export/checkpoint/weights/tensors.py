"""Tensors in files: headers are read first, values later, whole or by rows; nobody keeps them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from fastvlm_mlx.bundle.files import inside
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


class SourceTensor(Protocol):
    """A tensor that can be read: from a file, or computed from what files hold when it is read."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    def read(self, rows: slice = ALL) -> mx.array:
        """Read consecutive rows (entries of the first axis); of a scalar, the scalar.

        Raises CheckpointError if a file can't be read any more.
        """
        ...


@dataclass(frozen=True)
class SafeTensor:
    """A tensor in a safetensors file; its first byte is at `offset`."""

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
    """Split the rows of a tensor into blocks of `BLOCK_ELEMENTS`, or of one row."""
    rows = max(1, BLOCK_ELEMENTS // prod(shape[1:]))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def to_torch(array: mx.array) -> torch.Tensor:
    """Share an array's memory with a torch tensor, also in bfloat16, which numpy lacks."""
    import torch

    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.asarray(array.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.asarray(array))


def from_torch(tensor: torch.Tensor) -> mx.array:
    """Copy a torch tensor to an MLX array, also in bfloat16."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())


def magnitude(name: str, tensor: torch.Tensor | np.ndarray) -> float:
    """Return the largest magnitude in the tensor of this name.

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


def safe_tensors(file: Path) -> dict[str, SafeTensor]:
    """List a safetensors file's tensors, of whatever type.

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
