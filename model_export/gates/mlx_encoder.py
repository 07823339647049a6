"""The encoder of an `mlx` bundle, with the arithmetic of its dtype emulated on any machine."""

from __future__ import annotations

from math import inf

import mlx.core as mx
import numpy as np

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.vision.fastvithd import FastViTHD


class EmulatedMLXEncoder:
    """FastViTHD in float32, with the result of every operation rounded to the weights' type.

    A GPU computes in that type; a CPU, where MLX does so only very slowly, can show what it costs.

    Attributes:
        largest: the largest magnitude of any result so far, before rounding; NaN counts as
            infinite.
        limit: the largest number of the type.
    """

    def __init__(self, bundle: Bundle, dtype: str):
        """`dtype` is "float16", "bfloat16" or "float32". Errors as FastViTHD's."""
        self._dtype: mx.Dtype = getattr(mx, dtype)
        self.largest = 0.0
        self.limit = float(mx.finfo(self._dtype).max)
        config = bundle.config
        self._encoder = FastViTHD(
            bundle.encoder_arrays(), config.vision, config.quantization, observe=self._round
        )

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] → [1, N, C]."""
        return self._encoder(pixels)

    def _round(self, result: mx.array) -> mx.array:
        found = float(result.abs().max())
        self.largest = max(self.largest, found if found == found else inf)
        return result.astype(self._dtype).astype(result.dtype)
