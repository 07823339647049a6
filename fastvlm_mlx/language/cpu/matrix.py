"""A bundle's matrices as torch multiplies them on a CPU, from the forms in which MLX stores them.

MLX's own kernels for a CPU are 10 to 60 times slower than the hardware allows. A product for one
token reads the 4-bit codes themselves: `torch.ops.aten._weight_int4pack_mm_for_cpu` computes
(code − 8) · scale + zero for a group of weights, which is MLX's affine form with zero = bias +
8 · scale. Narrower codes fit into four bits; wider ones are two products, one with their upper bits
and one with their lower four. A product for the many tokens of a prompt multiplies dequantized
weights.

Which of the two it is depends on the number of tokens alone, so a prompt gives the same numbers
each time. The first takes the sequences of a batch one row at a time: each has the numbers that it
has alone, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Tokens of a prompt that read packed codes where dequantized weights would have to be made for each
# product. More are faster dequantized, which takes as long as this many rows.
FEW_TOKENS = 32
# What the kernel divides the outputs and the inputs into.
_ROWS_MULTIPLE, _COLUMNS_MULTIPLE = 32, 32
# Of rows that are converted at once; the kernel packs 64 of them together at most. Larger blocks
# leave holes in the heap between what stays, and are no faster.
_BLOCK_ROWS = 512
# Codes that lie in whole bytes: bits → (bytes, codes in them). MLX packs without gaps, the lowest
# bits first.
_PERIODS = {2: (1, 4), 3: (3, 8), 4: (1, 2), 5: (5, 8), 6: (3, 4), 8: (1, 1)}


@dataclass(frozen=True)
class Arithmetic:
    """How a CPU computes.

    Attributes:
        dtype: of dense weights and of what they multiply.
        packed: whether products for one token read packed codes, in bfloat16.
        keep_dense: whether dequantized weights stay in memory once they were made.
    """

    dtype: torch.dtype
    packed: bool
    keep_dense: bool

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


class Matrix(Protocol):
    """A matrix [N, K] with its bias, if it has one."""

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [..., L, K] → float32 [..., L, N], for L tokens of each sequence."""

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix by number, float32 [len(ids), K]."""


def matrix(modules: Sequence[nn.Module], arithmetic: Arithmetic) -> Matrix:
    """Modules of equal inputs and equal form as one matrix, their outputs one after the other.

    Args:
        modules: MLX's linear layers or embeddings, quantized or not; their arrays are in memory.
    """
    import torch

    first = modules[0]
    bias = None
    if "bias" in first:
        bias = torch.cat([as_torch(module["bias"]).float() for module in modules])
    if "scales" not in first:
        weight = torch.cat([as_torch(module["weight"]) for module in modules])
        return DenseMatrix(weight.to(arithmetic.dtype), bias)
    if first.mode != "affine":
        whole = [
            mx.dequantize(m["weight"], m["scales"], None, m.group_size, m.bits, m.mode)
            for m in modules
        ]
        return DenseMatrix(torch.cat([as_torch(w).to(arithmetic.dtype) for w in whole]), bias)
    stored = [
        Codes(
            as_torch(module["weight"]).view(torch.uint8),
            as_torch(module["scales"]),
            as_torch(module["biases"]),
            first.bits,
        )
        for module in modules
    ]
    return AffineMatrix(stored, bias, arithmetic, isinstance(first, nn.QuantizedEmbedding))


class DenseMatrix:
    """Weights [N, K] in the type that they are multiplied in."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        import torch.nn.functional as F

        return _plus(F.linear(x.to(self.weight.dtype), self.weight).float(), self.bias)

    def rows(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float()


@dataclass(frozen=True)
class Codes:
    """A matrix as MLX stores it, in MLX's own memory.

    Attributes:
        words: uint8 [N, K · bits / 8].
        scales, biases: of a group of codes along K, [N, K / group].
    """

    words: Tensor
    scales: Tensor
    biases: Tensor
    bits: int

    def rows(self, part: slice | Tensor) -> Tensor:
        """Dequantized, float32 [rows, K]."""
        numbers = (self.scales[part].float(), self.biases[part].float())
        return _dequantized(self.words[part], *numbers, self.bits)


class AffineMatrix:
    """Codes in groups along K with a scale and a bias each, of one matrix or several in a row.

    What is made of the codes is made when it is first needed: dequantized weights by the first
    product with many rows, packed codes by the first with few. Where both stay, the codes are let
    go of, unless rows are looked up in them.
    """

    def __init__(
        self,
        stored: Sequence[Codes],
        bias: Tensor | None,
        arithmetic: Arithmetic,
        looked_up: bool = False,
    ):
        self.stored, self.bias, self.arithmetic = list(stored), bias, arithmetic
        rows = sum(len(codes.words) for codes in stored)
        columns = stored[0].words.shape[1] * 8 // stored[0].bits
        self.shape = rows, columns
        self.group_size = columns // stored[0].scales.shape[1]
        self.packs = (
            arithmetic.packed and not rows % _ROWS_MULTIPLE and not columns % _COLUMNS_MULTIPLE
        )
        self._few = 1 if arithmetic.keep_dense else FEW_TOKENS
        self._dense: Tensor | None = None
        self._planes: list[tuple[Tensor, Tensor]] | None = None
        self._looked_up = looked_up

    def __call__(self, x: Tensor) -> Tensor:
        import torch
        import torch.nn.functional as F

        if self.packs and x.shape[-2] <= self._few:
            rounded = x.reshape(-1, x.shape[-1]).bfloat16()
            product = sum(
                torch.ops.aten._weight_int4pack_mm_for_cpu(
                    rounded, codes, self.group_size, scales_and_zeros
                ).float()
                for codes, scales_and_zeros in self._packed()
            ).view(*x.shape[:-1], -1)
        else:
            product = F.linear(x.to(self.arithmetic.dtype), self._weight()).float()
        return _plus(product, self.bias)

    def rows(self, ids: Tensor) -> Tensor:
        import torch

        found = torch.empty(len(ids), self.shape[1])
        start = 0
        for codes in self.stored:
            end = start + len(codes.words)
            here = (ids >= start) & (ids < end)
            found[here] = codes.rows(ids[here] - start)
            start = end
        return found

    def _weight(self) -> Tensor:
        import torch

        if self._dense is not None:
            return self._dense
        dense = torch.empty(self.shape, dtype=self.arithmetic.dtype)
        end = 0
        for codes in self.stored:
            # A part at a time: in float32 the whole is twice what is kept.
            for start in range(0, len(codes.words), _BLOCK_ROWS):
                rows = codes.rows(slice(start, start + _BLOCK_ROWS))
                dense[end : end + len(rows)] = rows
                end += len(rows)
        if self.arithmetic.keep_dense:
            self._dense = dense
            self._let_go()
        return dense

    def _packed(self) -> list[tuple[Tensor, Tensor]]:
        import torch

        if self._planes is None:
            bits = self.stored[0].bits
            scales, biases = (
                torch.cat([getattr(codes, name).float() for codes in self.stored])
                for name in ("scales", "biases")
            )
            parts = [codes.words for codes in self.stored]
            words = parts[0] if len(parts) == 1 else torch.cat(parts)
            # Codes are moved to the middle of the kernel's: what their scale and zero lose in
            # bfloat16 is the less, the smaller (code − 8) is.
            middle = biases + 2 ** (bits - 1) * scales
            if bits <= 4:
                self._planes = [
                    _plane(words, bits, lambda c: c + 8 - 2 ** (bits - 1), scales, middle)
                ]
            else:
                self._planes = [
                    _plane(
                        words,
                        bits,
                        lambda c: (c >> 4) + 8 - 2 ** (bits - 5),
                        16 * scales,
                        middle + 8 * scales,
                    ),
                    _plane(words, bits, lambda c: c & 15, scales, torch.zeros_like(scales)),
                ]
            self._let_go()
        return self._planes

    def _let_go(self) -> None:
        """Of the codes, once all that is made of them is there to stay."""
        made = self._dense is not None and (self._planes is not None or not self.packs)
        if made and not self._looked_up:
            self.stored = []


def _plane(
    words: Tensor, bits: int, moved: Callable[[Tensor], Tensor], scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    # A block of rows at a time: the codes are integers of 32 bits on their way.
    import torch

    packed = torch.cat(
        [
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(moved(unpacked(rows, bits)).int(), 2)
            for rows in words.split(_BLOCK_ROWS)
        ]
    )
    return packed, torch.stack([scales.T, zeros.T], -1).bfloat16().contiguous()


def _plus(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias


def _dequantized(words: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """float32 [N, K]."""
    codes = unpacked(words, bits)
    groups = codes.view(*scales.shape, -1).float()
    # Multiplied and then added: with broadcast operands `addcmul` takes ten times as long.
    return groups.mul_(scales[..., None]).add_(biases[..., None]).view(codes.shape)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """MLX's words as bytes, uint8 [N, K · bits / 8] → codes, uint8 [N, K]."""
    import torch

    count, held = _PERIODS[bits]
    if held == 1:
        return words
    columns = words.view(len(words), -1, count).unbind(-1)
    codes = []
    for index in range(held):
        byte, shift = divmod(index * bits, 8)
        code = columns[byte] >> shift
        if shift + bits > 8:
            code |= columns[byte + 1] << (8 - shift)
        codes.append(code & (2**bits - 1))
    return torch.stack(codes, -1).view(len(words), -1)


def as_torch(array: mx.array) -> Tensor:
    """The same memory in torch; of an array that was evaluated."""
    import torch

    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.asarray(array.view(mx.uint16))).view(torch.bfloat16)
    if array.dtype == mx.uint32:
        return torch.from_numpy(np.asarray(array).view(np.int32))
    return torch.from_numpy(np.asarray(array))
