"""Run FastVLM bundles: look at an image, and answer questions about it.

    import fastvlm_mlx

    model = fastvlm_mlx.load("path/to/bundle")
    print(model.generate("photo.jpg", "Describe the image.").text)

The public names:

    load               loads a bundle and returns a FastVLM.
    FastVLM            a loaded bundle: encode, generate, stream, astream, chat, ask, batch, embed.
    Conversation       questions that know what was asked before them; it can be saved.
    ImageFeatures      an encoded image, which any number of questions may be asked about.
    SamplingOptions    how tokens are chosen, and when an answer stops.
    Generation         an answer as it is made: iterate over it for its text.
    GenerationResult   a whole answer: its text, its tokens, its timings.
    Timings            the seconds that each stage of an answer took.

Importing this package loads neither torch nor coremltools nor MLX. Each is imported by the first
call that needs it. Every error that is raised on purpose is a `fastvlm_mlx.errors.FastVLMError`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvlm_mlx.conversation import Conversation
    from fastvlm_mlx.fastvlm import FastVLM, ImageFeatures
    from fastvlm_mlx.language.generate import Generation, GenerationResult, SamplingOptions, Timings
    from fastvlm_mlx.loading import load

# The one place where the version is written. The build reads it without running this file.
__version__ = "0.1.0"

_HOME = {
    "Conversation": "conversation",
    "FastVLM": "fastvlm",
    "ImageFeatures": "fastvlm",
    "load": "loading",
    "Generation": "language.generate",
    "GenerationResult": "language.generate",
    "SamplingOptions": "language.generate",
    "Timings": "language.generate",
}

__all__ = [
    "Conversation",
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


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", "__doc__", "__all__"})
