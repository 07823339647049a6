"""Weights as affine quantization would leave them, in PyTorch: for training, and for measuring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from model_export.language.affine import round_weight


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
