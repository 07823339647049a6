"""How a matrix is stored in MLX's quantized forms, and config.json's account of which is in which.

Modes, widths and group sizes are those of `mlx.core.quantize`. mlx-lm, mlx-vlm and mlx-swift-lm
read one format for all, and under a module's path another for it, or false for none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastvlm_mlx.errors import ConfigError

# Bits, group sizes, and the bytes of what a group shares: an affine scale and bias have the type
# of the weights, the others one byte of exponent or float8.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


@dataclass(frozen=True)
class Format:
    """A quantized form: `group_size` weights of `bits` each share what `mode` says."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __str__(self) -> str:
        name = f"{self.bits} bits" if self.mode == "affine" else self.mode
        return f"{name} in groups of {self.group_size}"

    @property
    def exists(self) -> bool:
        """Whether MLX has it."""
        bits, groups = MODES.get(self.mode, ((), ()))
        return self.bits in bits and self.group_size in groups

    def to_dict(self) -> dict[str, Any]:
        """As config.json says it; affine is what is meant where no mode is."""
        data: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits}
        return data if self.mode == "affine" else data | {"mode": self.mode}


@dataclass(frozen=True)
class Quantization:
    """config.json's `quantization`: a format for all, and other ones by a module's path.

    A path with None is not quantized; nor is a module whose weights have no scales.
    """

    default: Format
    layers: Mapping[str, Format | None] = field(default_factory=dict)

    def of(self, path: str) -> Format | None:
        """The format of the module at `path`, if it is quantized at all."""
        return self.layers.get(path, self.default)

    def formats(self) -> set[Format]:
        """Every format that occurs."""
        return {self.default, *(f for f in self.layers.values() if f is not None)}

    def to_dict(self) -> dict[str, Any]:
        layers = {path: f.to_dict() if f else False for path, f in self.layers.items()}
        return self.default.to_dict() | layers

    @classmethod
    def from_dict(cls, data: Any) -> Quantization:
        """Raises ConfigError: it holds a format that MLX does not have."""
        if not isinstance(data, dict):
            raise ConfigError(
                f"config.json: quantization is {data!r}, expected an object with bits and "
                "group_size: correct it"
            )
        settings = ("bits", "group_size", "mode")
        layers: dict[str, Format | None] = {}
        for path, value in data.items():
            if value is False:
                layers[path] = None
            elif isinstance(value, dict) and path not in settings:
                layers[path] = _format(value, path)
        return cls(_format(data, "quantization"), layers)


def _format(data: Mapping[str, Any], path: str) -> Format:
    found = [data.get("bits"), data.get("group_size"), data.get("mode", "affine")]
    if [type(value) for value in found] == [int, int, str]:
        made = Format(*found)
        if made.exists:
            return made
    raise ConfigError(
        f"config.json: {path} is {dict(zip(('bits', 'group_size', 'mode'), found, strict=True))}, "
        f"expected {' or '.join(f'{m} with {b} bits in {g}' for m, (b, g) in MODES.items())}"
    )
