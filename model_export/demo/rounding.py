"""Weights as affine quantization would leave them, in PyTorch: for training, and for measuring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def round_weight(weight: Tensor, bits: int, group: int) -> Tensor:
    """A weight as `mlx.core.quantize` (affine) keeps it: an end of each group's range is exact."""
    groups = weight.unflatten(-1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    steps = 2**bits - 1
    scale = ((high - low) / steps).clamp_min(1e-7)
    from_low = low.abs() > high.abs()
    scale = torch.where(from_low, scale, -scale)
    edge = torch.where(from_low, low, high)
    whole = (edge / scale).round()
    scale = torch.where(whole == 0, scale, edge / whole)
    bias = torch.where(whole == 0, 0.0, edge)
    return (((groups - bias) / scale).round().clamp(0, steps) * scale + bias).flatten(-2)


@contextmanager
def rounded(language: nn.Module, bits: int, group: int = 64) -> Iterator[None]:
    """Linear layers and embedding as `bits` leave them, inside; as they were, afterwards.

    A gradient computed inside is applied to the weights that come back: the straight-through
    estimate. Does nothing where `bits` is 0.
    """
    if not bits:
        yield
        return
    layers = [m for m in language.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    kept = [layer.weight.detach().clone() for layer in layers]
    with torch.no_grad():
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight.copy_(round_weight(weight, bits, group))
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, kept, strict=True):
                layer.weight.copy_(weight)
