"""Store the encoder's weights in fewer bits, as palettes of a few values or as 8-bit integers.

A palette is a look-up table of 2^bits values for one weight tensor. Its values minimize the squared
rounding error. They are found by k-means in one dimension on the histogram of the tensor's fp16
values, which is exact because there are at most 65,536 of them. In the uniform choices the
depthwise convolutions and the stem, which has three input channels, stay fp16. They are 1.3 of 122
million weights, and at 6 bits they would make two thirds of all the noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.vision.package import MIXED, quiet_coremltools
from model_export.encoder.fastvithd import FastViTHD
from model_export.options import PALETTE_BITS

# What coremltools' passes append to the name of a constant that they replace.
_SUFFIXES = ("", "_palettized", "_quantized")
_ROUNDS = 200
_QUANTILES = 4096
_WORTHWHILE = 1e-3
_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Compression:
    """How the weights of convolutions are stored, by the name of the convolution.

    Attributes:
        palettes: the convolutions that are stored as palettes; each is float16 [2^bits],
            ascending.
        int8: the convolutions that are stored as symmetric integers with a scale for each output
            channel. Those in neither stay fp16.
        calibration: what the choice was measured on, for the record.
    """

    palettes: Mapping[str, np.ndarray] = field(default_factory=dict)
    int8: frozenset[str] = frozenset()
    calibration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def formats(self) -> dict[str, str]:
        """The format of each compressed convolution: palette4, palette6, palette8 or int8."""
        widths = {2**bits: name for name, bits in PALETTE_BITS.items()}
        return {n: widths[len(p)] for n, p in self.palettes.items()} | dict.fromkeys(
            sorted(self.int8), "int8"
        )

    @property
    def precision(self) -> str:
        """The name that `fastvlm_mlx.vision.package.describe` gives to what is written."""
        formats = sorted(set(self.formats.values()))
        return MIXED if len(formats) > 1 else formats[0] if formats else "fp16"

    def metadata(self) -> dict[str, str]:
        """Make the entries that describe it in the package."""
        entries = {"weight_formats": self.formats, "calibration": dict(self.calibration)}
        return {key: json.dumps(value) for key, value in entries.items() if value}


def convolutions(module: FastViTHD) -> dict[str, nn.Conv2d]:
    """Find every convolution by its name; the encoder has no other weights."""
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Conv2d)}


def uniform(
    module: FastViTHD, precision: str, progress: Callable[[float], None] = lambda done: None
) -> Compression:
    """Give every convolution but the depthwise ones and the stem int8, palette6 or palette4.

    This needs no data, and does not write to `module`.
    """
    names = {n: c for n, c in convolutions(module).items() if c.groups == 1 and c.in_channels > 3}
    if precision == "int8":
        return Compression(int8=frozenset(names))
    palettes = {}
    for count, (name, convolution) in enumerate(names.items()):
        palettes[name] = Histogram.of(convolution.weight).palette(PALETTE_BITS[precision])[0]
        progress((count + 1) / len(names))
    return Compression(palettes)


@dataclass(frozen=True)
class Histogram:
    """The distinct fp16 values of a tensor, ascending, and how much each counts."""

    values: np.ndarray
    counts: np.ndarray

    @staticmethod
    def of(weight: Tensor, importance: Tensor | None = None) -> Histogram:
        """Count the values of a weight.

        Args:
            importance: how much the squared error of each element counts; all count the same
                unless it is given.

        Raises:
            EncoderError: a weight is not a finite fp16 number.
        """
        codes = weight.detach().half().numpy().view(np.uint16).ravel()
        # A weight that nothing depends on gets a palette all the same.
        if importance is not None and not importance.any():
            importance = None
        weights = None if importance is None else importance.numpy().ravel()
        counts = np.bincount(codes, weights, minlength=2**16).astype(np.float64)
        # Minus zero is zero.
        counts[0] += counts[0x8000]
        counts[0x8000] = 0
        present = np.flatnonzero(counts > 0)
        values = present.astype(np.uint16).view(np.float16).astype(np.float64)
        if not np.isfinite(values).all():
            raise EncoderError(
                "an encoder weight is beyond fp16's 65,504: expected finite numbers, export with "
                "--encoder-precision fp32"
            )
        order = np.argsort(values, kind="stable")
        return Histogram(values[order], counts[present][order])

    def palette(self, bits: int) -> tuple[np.ndarray, float]:
        """Find the float16 [2^bits] palette of least squared error, and the sum of that error."""
        size = 2**bits
        values, counts = self.values, self.counts
        if len(values) <= size:
            return np.pad(values, (0, size - len(values)), "edge").astype(np.float16), 0.0
        cells = _Cells.over(values, counts)
        palette, error = cells.settled(_companded(values, counts, size))
        for _ in range(size):
            # Lloyd's steps never move a level over a gap between values, so a level is taken away
            # in one place and added in another.
            moved, smaller = cells.settled(cells.exchanged(palette))
            if smaller > (1 - _WORTHWHILE) * error:
                break
            palette, error = moved, smaller
        palette = np.sort(palette.astype(np.float16))
        nearest = palette[_indices(palette, values)].astype(np.float64)
        return palette, float((counts * (values - nearest) ** 2).sum())


@dataclass(frozen=True)
class _Cells:
    """Sums over any range of a histogram's values: of the counts, the values and their squares."""

    values: np.ndarray
    sums: np.ndarray

    @staticmethod
    def over(values: np.ndarray, counts: np.ndarray) -> _Cells:
        moments = np.cumsum(counts * np.stack([np.ones_like(values), values, values**2]), axis=1)
        return _Cells(values, np.pad(moments, ((0, 0), (1, 0))))

    def around(self, palette: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compute count, mean and squared error of the values that are nearest to each of the
        ascending levels."""
        edges = np.searchsorted(self.values, (palette[1:] + palette[:-1]) / 2)
        ends = np.concatenate([[0], edges, [len(self.values)]])
        count, total, squares = np.diff(self.sums[:, ends], axis=1)
        mean = np.where(count > 0, total / np.where(count > 0, count, 1), palette)
        # Where a cell holds next to nothing, the difference of two sums may be all rounding error.
        low = self.values[np.minimum(ends[:-1], len(self.values) - 1)]
        high = self.values[np.maximum(ends[1:] - 1, 0)]
        mean = np.where(ends[1:] > ends[:-1], np.clip(mean, low, np.maximum(low, high)), palette)
        return count, mean, np.maximum(squares - total * mean, 0)

    def settled(self, palette: np.ndarray) -> tuple[np.ndarray, float]:
        """Run Lloyd's algorithm from `palette`; return its last levels and their error."""
        for _ in range(_ROUNDS):
            _, better, errors = self.around(palette)
            if np.array_equal(better, palette):
                break
            palette = better
        return palette, float(errors.sum())

    def exchanged(self, palette: np.ndarray) -> np.ndarray:
        """Join the two neighbours that lose least by it, and split the worst level in two."""
        count, mean, errors = self.around(palette)
        both = count[1:] + count[:-1]
        lost = count[1:] * count[:-1] / np.where(both > 0, both, 1) * np.diff(mean) ** 2
        worst = int(errors.argmax())
        lost[max(0, worst - 1) : worst + 1] = np.inf
        gone = int(lost.argmin())
        joined = np.average(mean[gone : gone + 2], weights=count[gone : gone + 2] + _TINY)
        spread = np.sqrt(errors[worst] / max(count[worst], _TINY))
        rest = np.delete(mean, [gone, gone + 1, worst])
        levels = [*rest, joined, mean[worst] - spread, mean[worst] + spread]
        return np.sort(np.clip(levels, self.values[0], self.values[-1]))


def _companded(values: np.ndarray, counts: np.ndarray, size: int) -> np.ndarray:
    """Place levels as densely as the cube root of the values' density, which for many levels is
    optimal (Panter and Dite)."""
    mass = np.cumsum(counts)
    shares = np.linspace(0, mass[-1], _QUANTILES)
    edges = values[np.minimum(np.searchsorted(mass, shares), len(values) - 1)]
    # Between quantiles of equal mass the density is one over the width.
    cumulative = np.concatenate([[0.0], np.cumsum(np.diff(edges) ** (2 / 3))])
    return np.interp((np.arange(size) + 0.5) / size * cumulative[-1], cumulative, edges)


def _indices(palette: np.ndarray, values: np.ndarray) -> np.ndarray:
    levels = palette.astype(np.float64)
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, values)


def rounded(weight: Tensor, palette: Tensor) -> Tensor:
    """Round each element to the nearest value in the ascending `palette`."""
    return palette[torch.bucketize(weight, (palette[1:] + palette[:-1]) / 2)]


def compressed(model: Any, compression: Compression) -> Any:
    """Store the weights of a converted fp16 model (coremltools' MLModel) as `compression` says."""
    with quiet_coremltools():
        import coremltools.optimize.coreml as cto

        if compression.palettes:
            palettizers = {
                _constant_name(name, "weight"): cto.OpPalettizerConfig(
                    mode="custom", lut_function=partial(_looked_up, palette), weight_threshold=0
                )
                for name, palette in compression.palettes.items()
            }
            model = cto.palettize_weights(
                model, cto.OptimizationConfig(op_name_configs=palettizers)
            )
        if compression.int8:
            quantizer = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=0)
            names = {_constant_name(name, "weight"): quantizer for name in compression.int8}
            model = cto.linear_quantize_weights(
                model, cto.OptimizationConfig(op_name_configs=names)
            )
    return model


def _looked_up(palette: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return palette, _indices(palette, weight.ravel()).astype(np.uint8)


def _constant_name(convolution: str, part: str) -> str:
    """Make the name that the converter gives to a parameter of the module in an fp16 program."""
    return f"p_{convolution}_{part}_to_fp16".replace(".", "_")


def stored_parameters(
    module: FastViTHD, constants: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name of each parameter, the parameter, and what a package holds in its place.

    Args:
        constants: the constants of the package, decompressed (`MLProgramEncoder.constants`).

    Raises:
        EncoderError: the package is not one that was exported from this shape of encoder.
    """
    for name, convolution in convolutions(module).items():
        for part, parameter in convolution.named_parameters():
            prefix = _constant_name(name, part)
            stored = [constants[prefix + s] for s in _SUFFIXES if prefix + s in constants]
            if len(stored) != 1 or stored[0].shape != parameter.shape:
                raise EncoderError(
                    f"the encoder package has no {part} of {name}: expected one that fastvlm "
                    "exported from this checkpoint, export it again"
                )
            yield f"{name}.{part}", parameter, stored[0]
