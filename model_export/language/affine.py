"""MLX's affine form in torch: the grid of a group, its codes, and how codes are packed."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import torch
from torch import Tensor

from fastvlm_mlx.bundle.quantization import Format
from model_export.checkpoint.weights.tensors import from_torch


def grid(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Choose scale and bias [..., 1] of groups [..., G] as `mlx.core.quantize` does.

    An end of each group's range is exact, and so is zero where it lies inside.
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-7)
    from_low = low.abs() > high.abs()
    scale = torch.where(from_low, scale, -scale)
    edge = torch.where(from_low, low, high)
    whole = (edge / scale).round()
    scale = torch.where(whole == 0, scale, edge / whole)
    return scale, torch.where(whole == 0, 0.0, edge)


def encode(groups: Tensor, scale: Tensor, bias: Tensor, bits: int) -> Tensor:
    """Compute the codes of groups [..., G] on their grids, as float32."""
    return ((groups - bias) / scale).round_().clamp_(0, 2**bits - 1)


def round_weight(weight: Tensor, bits: int, group: int) -> Tensor:
    """Round a weight as `mlx.core.quantize` (affine) does."""
    groups = weight.unflatten(-1, (-1, group))
    scale, bias = grid(groups, bits)
    return encode(groups, scale, bias, bits).mul_(scale).add_(bias).flatten(-2)


@dataclass(frozen=True)
class Coded:
    """A weight [R, C] in codes.

    Attributes:
        codes: uint8 [R, C].
        scales, biases: [R, C / group_size], of the type that they are stored in.
    """

    codes: Tensor
    scales: Tensor
    biases: Tensor
    form: Format

    def float(self) -> Tensor:
        """float32 [R, C]: what the codes stand for."""
        grouped = self.codes.float().view(*self.scales.shape, -1)
        grouped = grouped.mul_(self.scales.float()[..., None])
        return grouped.add_(self.biases.float()[..., None]).view(self.codes.shape)

    def arrays(self) -> list[mx.array]:
        """Weight, scales and biases as `mlx.core.quantize` returns them."""
        words = from_torch(pack(self.codes, self.form.bits)).view(mx.uint32)
        return [words, from_torch(self.scales), from_torch(self.biases)]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [R, C] → uint8 [R, C * bits / 8], end to end from the lowest bit."""
    eight = codes.view(codes.shape[0], -1, 8)
    data = torch.zeros((*eight.shape[:2], bits), dtype=torch.uint8)
    for i in range(8):
        byte, shift = divmod(bits * i, 8)
        # A shift beyond eight bits leaves what belongs to the next byte.
        data[..., byte] |= eight[..., i] << shift
        if shift + bits > 8:
            data[..., byte + 1] |= eight[..., i] >> (8 - shift)
    return data.view(codes.shape[0], -1)
