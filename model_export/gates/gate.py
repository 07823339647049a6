"""A gate is a figure with its limit; the largest magnitude is the one that needs no source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.components import image_processor
from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder, flat
from model_export.gates.mlx_encoder import EmulatedMLXEncoder
from model_export.options import FLOAT16_MAX, ExportOptions
from model_export.samples.images import gate_samples

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gate:
    """One figure and its limit.

    Attributes:
        name: what is measured.
        value: the figure, in `unit`.
        limit: a floor where `at_least`, else a ceiling.
        detail: what the figure is of, by name.
        left_out: why nothing is judged, where there is not enough to judge by.
    """

    name: str
    value: float
    unit: str
    limit: float
    at_least: bool
    detail: str = ""
    left_out: str = ""

    @property
    def passed(self) -> bool:
        if self.left_out:
            return True
        # A NaN passes neither way.
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def to_dict(self) -> dict[str, Any]:
        # JSON has neither infinity nor NaN.
        value = self.value if isfinite(self.value) else str(self.value)
        told = {key: text for key, text in asdict(self).items() if text != ""} | {"unit": self.unit}
        return {**told, "value": value, "passed": self.passed}

    def sentence(self) -> str:
        side = "below its floor of" if self.at_least else "above its ceiling of"
        unit = f" {self.unit}" if self.unit else ""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.name} is {self.value:.4g}{unit}, {side} {self.limit:.4g}{unit}{detail}"


class Magnitude:
    """Observer of every operation's largest magnitude; NaN counts as infinite."""

    def __init__(self) -> None:
        self.largest = 0.0

    def __call__(self, name: str, kind: str, value: torch.Tensor) -> None:
        if value.is_floating_point():
            low, high = (float(extreme) for extreme in flat(value).aminmax())
            found = max(-low, high)
            self.largest = max(self.largest, found if found == found else inf)


def overflow_gates(
    bundle: Bundle, options: ExportOptions, other_sizes: Sequence[int] = ()
) -> list[Gate]:
    """Make the gates that need no checkpoint: they tell whether fp16 overflows."""
    gates = [_overflow(bundle, options)]
    for size in other_sizes:
        gate = _overflow(bundle.at(size), options)
        gates.append(replace(gate, name=f"{gate.name} at {size}"))
    return gates


def _overflow(bundle: Bundle, options: ExportOptions) -> Gate:
    config = bundle.config
    process = image_processor(bundle, config.vision.image_size, config.image_aspect_ratio)
    image = gate_samples(config.vision)[-1].image
    if bundle.layout == "mlx":
        rounded = EmulatedMLXEncoder(bundle, options.llm.dtype)
        rounded(process(image))
        return Gate("encoder largest magnitude", rounded.largest, "", rounded.limit, False)
    encoder = MLProgramEncoder(bundle.package, config.vision.image_size)
    magnitude = Magnitude()
    encoder.evaluate(process(image), round_fp16=True, observe=magnitude)
    return Gate("encoder largest magnitude", magnitude.largest, "", FLOAT16_MAX, False)
