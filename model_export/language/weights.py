"""A language model's matrices as a checkpoint or a bundle stores them, read as float32 in torch.

A bundle's packed integers are unpacked here, by MLX's documented layout and not by its kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import mlx.core as mx
import torch
from torch import Tensor

from fastvlm_mlx.bundle.bundle import Bundle, model_name
from fastvlm_mlx.bundle.quantization import Format
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.weights.tensors import (
    ALL,
    SourceTensor,
    row_blocks,
    safe_tensors,
    to_torch,
)

# The sixteen numbers of E2M1, OCP Microscaling Formats 1.0, 5.3.3.
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_E2M1 = torch.cat([_E2M1, -_E2M1])


@dataclass(frozen=True)
class Matrix:
    """A weight as stored: as it is, or MLX's quantized form (words of codes, scales, biases)."""

    weight: SourceTensor
    scales: SourceTensor | None = None
    biases: SourceTensor | None = None
    form: Format | None = None

    def float(self, rows: slice = ALL) -> Tensor:
        """Read the matrix in float32, whole or the given rows."""
        weight = self.weight.read(rows)
        if self.form is None or self.scales is None:
            return to_torch(weight).float()
        biases = None if self.biases is None else self.biases.read(rows)
        return dequantize(self.form, weight, self.scales.read(rows), biases)

    def blocks(self) -> Iterator[Tensor]:
        """Read the whole matrix in float32, some rows at a time."""
        return (self.float(rows) for rows in row_blocks(self.weight.shape))


def dequantize(
    form: Format, words: mx.array, scales: mx.array, biases: mx.array | None = None
) -> Tensor:
    """Undo `mx.quantize`: return the float32 weight that its arrays stand for."""
    packed = to_torch(words.view(mx.uint8))
    if form.mode == "mxfp8":
        codes = packed.view(torch.float8_e4m3fn).float()
    else:
        codes = unpack(packed, form.bits)
        codes = codes.float() if form.mode == "affine" else _E2M1[codes.int()]
    factors = to_torch(scales)
    # One byte each: exponents (OCP MX's E8M0), or for nvfp4 float8 (E4M3).
    if form.mode in ("mxfp4", "mxfp8"):
        factors = torch.exp2(factors.float() - 127)
    elif form.mode == "nvfp4":
        factors = factors.view(torch.float8_e4m3fn)
    grouped = codes.view(*factors.shape, -1).mul_(factors.float()[..., None])
    if biases is not None:
        grouped.add_(to_torch(biases).float()[..., None])
    return grouped.view(codes.shape)


def rounded(weight: Tensor, form: Format) -> Tensor:
    """Quantize a float32 weight with MLX, and return what is left of it in float32."""
    return dequantize(form, *mx.quantize(mx.array(weight.numpy()), **asdict(form)))


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unpack little-endian words [rows, k], as uint8 [rows, 4k], into codes [rows, 32k / bits].

    Codes lie end to end from the lowest bit, so `bits` bytes hold eight of them, each in one byte
    or across two.
    """
    data = words.reshape(words.shape[0], -1, bits)
    codes = torch.empty((*data.shape[:2], 8), dtype=torch.uint8)
    for i in range(8):
        byte, shift = divmod(bits * i, 8)
        code = data[..., byte] >> shift
        if shift + bits > 8:
            code |= data[..., byte + 1] << (8 - shift)
        torch.bitwise_and(code, (1 << bits) - 1, out=codes[..., i])
    return codes.view(words.shape[0], -1)


class Weights(Protocol):
    """A source of weights, by their names in a bundle."""

    def matrix(self, name: str) -> Matrix: ...


class SourceWeights:
    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._sources = {spec.name: spec.source for spec in checkpoint.llm_specs}

    def matrix(self, name: str) -> Matrix:
        return Matrix(self._checkpoint.tensors[self._sources[name]])


class BundleWeights:
    def __init__(self, bundle: Bundle):
        self._bundle = bundle
        self._tensors = {
            model_name(name): tensor
            for file in bundle.weight_files
            for name, tensor in safe_tensors(file).items()
        }

    def matrix(self, name: str) -> Matrix:
        weight, stem = self._tensors[name], name.removesuffix("weight")
        form = self._bundle.format_of(stem[:-1])
        if form is None or stem + "scales" not in self._tensors:
            return Matrix(weight)
        biases = self._tensors[stem + "biases"] if form.mode == "affine" else None
        return Matrix(weight, self._tensors[stem + "scales"], biases, form)
