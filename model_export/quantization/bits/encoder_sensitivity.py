"""What an error in each of the encoder's weights does to its output, measured on images.

Small errors of independent tensors add up as powers, so that one figure for each weight says what
any rounding of it costs. Backwards from a random direction of the output, the squared gradient of
a weight is, in the mean over directions, the power at the output of a unit error in that weight
(Hutchinson's estimate of the diagonal of JᵀJ). Over a tensor it is close to a product of what its
output channel counts and what its input counts, and only these two are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.image.preprocess import ImageProcessor
from model_export.encoder.compression import convolutions
from model_export.encoder.fastvithd import FastViTHD
from model_export.samples.calibration import Calibration

# Tokens that the last layers see: their covariances need some hundreds of them.
_TOKENS = 1024
_PROBE_PIXELS = 2**21
_MIRRORS = ((3,), (2,), (2, 3))
_SEED = 0
# What the images do not show still counts, as a share of the mean.
_UNSEEN = 0.05
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Sensitivity:
    """Of the output's mean square to errors of a weight [O, I, kH, kW].

    `rows` [O] times `columns` [I·kH·kW] is the noise power for an error of one in each weight.
    """

    rows: Tensor
    columns: Tensor

    @property
    def importance(self) -> Tensor:
        """[O, I·kH·kW]; an input or output that no image excites is not free to be anything."""
        rows = self.rows + _UNSEEN * self.rows.mean()
        return rows[:, None] * (self.columns + _UNSEEN * self.columns.mean())


@dataclass(frozen=True)
class Moments:
    """Mean [I] and covariance [I, I] of what a 1×1 convolution reads, over images and pixels."""

    mean: Tensor
    covariance: Tensor


def calibration_pixels(
    calibration: Calibration, vision: VisionConfig, aspect_ratio: str | None
) -> list[np.ndarray]:
    """float32 [1, 3, S, S] each, as many as make a thousand tokens; mirrored if there are few."""
    process = ImageProcessor(vision.image_size, aspect_ratio)
    count = -(-_TOKENS // vision.num_tokens)
    pixels = [process(sample.image) for sample in calibration.spread(count)]
    views = [np.ascontiguousarray(np.flip(p, axis)) for axis in _MIRRORS for p in pixels]
    return (pixels + views)[:count]


def sensitivities(module: FastViTHD, pixels: Sequence[np.ndarray]) -> dict[str, Sensitivity]:
    """Of every convolution's weight. Two passes back at 1024×1024, more where they are cheaper."""
    probed = pixels[: max(2, _PROBE_PIXELS // pixels[0][0, 0].size)]
    generator = torch.Generator().manual_seed(_SEED)
    sums = {name: _zeros(convolution) for name, convolution in convolutions(module).items()}
    with _gradients(module, sums):
        for images in probed:
            output = _forward(module, torch.from_numpy(images))
            direction = torch.empty_like(output).normal_(generator=generator)
            # Divided by its length, the sum is the noise in the mean of the output's squares.
            ((output * direction).sum() / (output.numel() * len(probed)) ** 0.5).backward()
    return {
        name: Sensitivity(s.rows / s.rows.sum().clamp_min(_TINY), s.columns)
        for name, s in sums.items()
    }


def _zeros(convolution: nn.Conv2d) -> Sensitivity:
    matrix = convolution.weight.flatten(1)
    return Sensitivity(torch.zeros(matrix.shape[0]), torch.zeros(matrix.shape[1]))


@contextmanager
def _gradients(module: FastViTHD, sums: dict[str, Sensitivity]) -> Iterator[None]:
    """Within, every backward pass adds each weight's squared gradients by row and by column."""

    def take(name: str, weight: Tensor) -> None:
        if weight.grad is None:
            return
        squared = weight.grad.flatten(1).square()
        sums[name].rows.add_(squared.sum(1))
        sums[name].columns.add_(squared.sum(0))
        weight.grad = None

    weights = {name: c.weight for name, c in convolutions(module).items()}
    hooks = []
    for name, weight in weights.items():
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(partial(take, name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight in weights.values():
            weight.requires_grad_(False)


def _forward(module: FastViTHD, images: Tensor) -> Tensor:
    """The module block by block, each computed again on the way back: a sixth of the memory."""
    x = module.patch_embed(images.to(memory_format=torch.channels_last))
    for stage in module.network:
        for block in stage if isinstance(stage, nn.Sequential) else (stage,):
            x = recomputed(block, x, use_reentrant=False)
    x = module.conv_exp(x)
    return x.reshape(1, module.hidden_size, module.num_tokens).transpose(1, 2)


def moments(module: FastViTHD, pixels: Sequence[np.ndarray]) -> dict[str, Moments]:
    """Of what each 1×1 convolution reads; those that see one pixel an image are left out.

    Holds a square matrix for each: 0.8 GB for the published encoder.
    """
    shifts: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def take(name: str, convolution: nn.Module, operands: tuple[Tensor, ...]) -> None:
        x = operands[0][0].flatten(1)
        if x.shape[1] == 1:
            return
        if name not in shifts:
            # The first image's mean: what is left to subtract at the end is small.
            shifts[name] = x.mean(1, keepdim=True)
            sums[name], products[name] = x.new_zeros(len(x)), x.new_zeros(len(x), len(x))
            counts[name] = 0
        x = x - shifts[name]
        sums[name] += x.sum(1)
        products[name].addmm_(x, x.T)
        counts[name] += x.shape[1]

    pointwise = {n: c for n, c in convolutions(module).items() if c.kernel_size == (1, 1)}
    hooks = [c.register_forward_pre_hook(partial(take, n)) for n, c in pointwise.items()]
    try:
        with torch.no_grad():
            for images in pixels:
                module(torch.from_numpy(images).to(memory_format=torch.channels_last))
    finally:
        for hook in hooks:
            hook.remove()
    made = {}
    for name, product in products.items():
        rest = sums[name] / counts[name]
        covariance = product.div_(counts[name]).addr_(rest, rest, alpha=-1)
        made[name] = Moments(shifts[name][:, 0] + rest, covariance)
    return made
