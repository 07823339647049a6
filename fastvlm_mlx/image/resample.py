"""PIL's bicubic along one axis, for a part of its outputs.

PIL resizes whole images. For one that is thousands of times longer than wide nearly all of
that work is thrown away by the crop, or done on padding, and does not fit memory.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_BLOCK_PIXELS = 1 << 22


def support(length: int, resized: int, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first input of each output and the one past the last, int64 [m].

    This and the weights follow libImaging/Resample.c, precompute_coeffs.
    """
    scale = length / resized
    reach = 2.0 * max(scale, 1.0)
    centre = (outputs + 0.5) * scale
    low = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    high = np.minimum((centre + reach + 0.5).astype(np.int64), length)
    return low, high


def reached(first: int, last: int, length: int, resized: int) -> tuple[int, int]:
    """The outputs that inputs first…last-1 have a part in: the first, and one past the last."""
    low, high = support(length, resized, np.arange(resized))
    indices = np.flatnonzero((high > first) & (low < last))
    return int(indices[0]), int(indices[-1]) + 1


def _weights(
    length: int, resized: int, outputs: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """float64 [m, k]: each output's weights from `low` on, zeros after, in units of 2⁻²²."""
    scale = length / resized
    index = low[:, None] + np.arange(int((high - low).max()))
    x = np.abs((index - (outputs[:, None] + 0.5) * scale + 0.5) / max(scale, 1.0))
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0)) * (index < high[:, None])
    weights /= weights.sum(1, keepdims=True)
    return np.trunc(weights * 2**22 + np.copysign(0.5, weights))


def resample(
    image: Image.Image,
    axis: int,
    offset: int,
    length: int,
    resized: int,
    first: int,
    last: int,
    background: tuple[int, ...],
) -> Image.Image:
    """One pass of PIL's bicubic, bit for bit, for outputs first…last-1 of `resized`.

    Along `axis` (0 down, 1 across) `image` is inputs offset… of `length`, the others are
    `background`. Exact, since all products and sums are integers below 2⁵³.
    """
    pixels = np.moveaxis(np.asarray(image), axis, 0)
    outputs = np.arange(first, last)
    low, high = support(length, resized, outputs)
    weights = _weights(length, resized, outputs, low, high)
    matrix = np.zeros((last - first, len(pixels)))
    for row, start, stop, weight in zip(matrix, low, high, weights, strict=True):
        inside = slice(max(start, offset), min(stop, offset + len(pixels)))
        row[inside.start - offset : inside.stop - offset] = weight[
            inside.start - start : inside.stop - start
        ]
    outside = (weights.sum(1) - matrix.sum(1))[:, None] * np.array(background)
    result = np.empty((last - first, *pixels.shape[1:]), np.uint8)
    step = max(1, _BLOCK_PIXELS // len(pixels))
    for at in range(0, pixels.shape[1], step):
        part = pixels[:, at : at + step]
        sums = matrix @ part.reshape(len(pixels), -1).astype(np.float64)
        sums = sums.reshape(len(matrix), -1, 3) + outside[:, None]
        result[:, at : at + step] = np.clip(np.floor((sums + 2**21) / 2**22), 0, 255)
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(result, 0, axis)))
