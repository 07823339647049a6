"""Bits where they count: each weight its own palette or none, and the error fed back.

The bits are assigned by what the rounding of each weight costs at the output, solved exactly for
the size asked for. Rounding then follows GPTQ (Frantar et al., arXiv 2210.17323): a 1×1
convolution's inputs are correlated, so that the weights not yet rounded can take up the error of
those that are. The mean of the inputs, of which most of that error comes, goes into the bias and
the covariance decides the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_export.encoder.compression import Compression, Histogram, convolutions, rounded
from model_export.encoder.fastvithd import FastViTHD
from model_export.options import PALETTE_BITS
from model_export.quantization.bits.allocation import Choice, allocate
from model_export.quantization.bits.encoder_sensitivity import (
    Moments,
    Sensitivity,
    moments,
    sensitivities,
)

# The covariance of some hundred samples is not the true one: part of it is taken for noise.
_SHRINK = 0.1
_DAMP = 0.01
_BLOCK = 128
# In the name of the squeeze-excite gate's two convolutions.
_GATE = ".se."


def mixed(
    module: FastViTHD,
    pixels: Sequence[np.ndarray],
    bits_per_weight: float,
    progress: Callable[[float], None] = lambda done: None,
) -> Compression:
    """Choose 4, 6 or 8 bits or fp16 for every convolution's weight, and round.

    Args:
        module: gets the rounded weights, and the biases that go with them.
        pixels: float32 [1, 3, S, S] each, of what the encoder is going to see.
        bits_per_weight: of all weights and palettes; biases and the program's text come on top.

    Raises:
        OptionError: the size can't be reached; says the least that can.
        EncoderError: a weight is beyond fp16.
    """
    costs = sensitivities(module, pixels)
    progress(0.3)
    # The gate sees one input for each image: too few for a covariance, and for what it costs.
    seen = {n: m for n, m in moments(module, pixels).items() if _GATE not in n}
    feedback = {n: Feedback.of(m) for n, m in seen.items()}
    progress(0.7)
    parts = {
        name: _palettes(
            convolution.weight,
            costs[name],
            feedback.get(name),
            PALETTE_BITS.values() if _GATE not in name else (8,),
        )
        for name, convolution in convolutions(module).items()
    }
    weights = sum(c.weight.numel() for c in convolutions(module).values())
    chosen = allocate(
        [[choice for choice, _ in part] for part in parts.values()],
        int(bits_per_weight * weights / 8),
    )
    palettes = {}
    for (name, part), index in zip(parts.items(), chosen, strict=True):
        _, palette = part[index]
        if palette is not None:
            palettes[name] = palette
            _round(module, name, torch.from_numpy(palette).float(), feedback.get(name))
    progress(1.0)
    return Compression(palettes)


def _palettes(
    weight: Tensor, cost: Sensitivity, feedback: Feedback | None, widths: Iterable[int]
) -> list[tuple[Choice, np.ndarray | None]]:
    """Every way to store a weight, with its palette; fp16 is without one and taken as lossless."""
    histogram = Histogram.of(weight, cost.importance)
    made: list[tuple[Choice, np.ndarray | None]] = [(Choice(2 * weight.numel(), 0.0), None)]
    for bits in widths:
        palette, loss = histogram.palette(bits)
        size = -(-weight.numel() * bits // 8) + palette.nbytes
        made.append((Choice(size, loss * (feedback.gain if feedback else 1.0)), palette))
    return made


def _round(module: FastViTHD, name: str, palette: Tensor, feedback: Feedback | None) -> None:
    convolution = convolutions(module)[name]
    weight = convolution.weight.data
    if feedback is None:
        convolution.weight.data = rounded(weight, palette)
        return
    matrix = weight.flatten(1)
    stored = feedback.round(matrix, palette)
    convolution.weight.data = stored.reshape(weight.shape)
    if convolution.bias is not None:
        convolution.bias.data += (matrix - stored) @ feedback.mean


@dataclass(frozen=True)
class Feedback:
    """How the error of one input's weights is made good by the inputs that come after it.

    Attributes:
        mean: [I], of the inputs.
        order: [I], the loudest input first.
        inverse: [I, I] upper triangular U in that order, with UᵀU the inverse of the covariance.
        gain: the noise power that is left, as a share of plain rounding's.
    """

    mean: Tensor
    order: Tensor
    inverse: Tensor
    gain: float

    @staticmethod
    def of(inputs: Moments) -> Feedback:
        power = inputs.covariance.diagonal().clamp_min(0)
        order = torch.argsort(power, descending=True, stable=True)
        shrunk = inputs.covariance * (1 - _SHRINK)
        shrunk.diagonal().copy_(power + _DAMP * power.mean() + torch.finfo(power.dtype).tiny)
        # R upper with R Rᵀ the covariance, from the Cholesky factor of both axes reversed.
        backwards = order.flip(0)
        factor = torch.linalg.cholesky(shrunk[backwards][:, backwards]).flip(0, 1)
        left = float(factor.diagonal().square().sum())
        before = float(power.sum() + inputs.mean.square().sum())
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(order)), upper=True)
        return Feedback(inputs.mean, order, inverse, min(1.0, left / before) if before else 1.0)

    def round(self, weight: Tensor, palette: Tensor) -> Tensor:
        """A matrix [O, I] in values of `palette`."""
        rest = weight.T[self.order].contiguous()
        stored = torch.empty_like(rest)
        for start in range(0, len(rest), _BLOCK):
            stop = min(start + _BLOCK, len(rest))
            errors = rest.new_empty(stop - start, rest.shape[1])
            for i in range(start, stop):
                stored[i] = rounded(rest[i], palette)
                error = (rest[i] - stored[i]) / self.inverse[i, i]
                rest[i + 1 : stop].addr_(self.inverse[i, i + 1 : stop], error, alpha=-1)
                errors[i - start] = error
            # What lies behind the block takes up its errors in one product.
            rest[stop:].addmm_(self.inverse[start:stop, stop:].T, errors, alpha=-1)
        result = torch.empty_like(stored)
        result[self.order] = stored
        return result.T.contiguous()
