"""Run FastVLM bundles: `load(path)`, `encode(image)`, `generate(features, prompt)`.

Importing this package loads neither torch nor coremltools, nor MLX: each comes with the first
call that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvlm_mlx.fastvlm import FastVLM, ImageFeatures, load
    from fastvlm_mlx.language.generate import Generation, GenerationResult, SamplingOptions, Timings

# The one place where the version is written. The build reads it without running this file.
__version__ = "0.1.0"

_HOME = {
    "FastVLM": "fastvlm",
    "ImageFeatures": "fastvlm",
    "load": "fastvlm",
    "Generation": "language.generate",
    "GenerationResult": "language.generate",
    "SamplingOptions": "language.generate",
    "Timings": "language.generate",
}

__all__ = [
    "FastVLM",
    "Generation",
    "GenerationResult",
    "ImageFeatures",
    "SamplingOptions",
    "Timings",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"fastvlm_mlx.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fastvlm_mlx' has no attribute {name!r}")
