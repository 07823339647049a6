"""Turn a FastVLM checkpoint into a verified bundle, and judge what came of it.

    from model_export import ExportOptions, export
    result = export("apple/FastVLM-0.5B", "bundle", ExportOptions.of(llm_bits=4), print)

export              turn a checkpoint into a bundle, checked by every gate
convert             turn an mlx bundle into an app bundle
verify              repeat a bundle's checks, and compare it with its checkpoint
compare             measure sizes and losses of bundles and checkpoints, side by side
plan                predict memory and time on a device, before anything is exported
resolve             the bundle of a checkpoint or a published model, exported once into a cache

ExportOptions       what an export is asked for, in these groups:
EncoderOptions        the vision encoder: precision, input sizes, deployment target
LLMOptions            the language model and the projector: bits, mode, method, recipe
GateLimits            the limits that a bundle is judged by
DestinationOptions    layout, overwrite, and bundles that failed
presets             named sets of options

Checkpoint          a checkpoint of any kind, opened and checked
ExportResult        what export and convert give back: path, manifest, gates, notes
VerifyResult        what verify gives back: gates, and whether they passed
CompareResult       what compare gives back: a row for each model
DevicePlan          what plan gives back for each device
Gate                one figure with its limit
Progress            the type of a progress callback: the stage's name, the share that is done

Importing this package loads neither torch nor coremltools; a function loads what it needs. A user's
mistake raises a `fastvlm_mlx.errors.FastVLMError` of one sentence.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_export import presets
    from model_export.api import CompareResult, DevicePlan, compare, plan, verify
    from model_export.cached import resolve
    from model_export.checkpoint.checkpoint import Checkpoint
    from model_export.conversion import convert
    from model_export.gates.gate import Gate
    from model_export.interruption import Progress
    from model_export.options import (
        DestinationOptions,
        EncoderOptions,
        ExportOptions,
        GateLimits,
        LLMOptions,
    )
    from model_export.pipeline import export
    from model_export.results import ExportResult, VerifyResult

_HOME = {
    "export": "pipeline",
    "convert": "conversion",
    "verify": "api",
    "compare": "api",
    "plan": "api",
    "resolve": "cached",
    "CompareResult": "api",
    "DevicePlan": "api",
    "ExportResult": "results",
    "VerifyResult": "results",
    "ExportOptions": "options",
    "EncoderOptions": "options",
    "LLMOptions": "options",
    "GateLimits": "options",
    "DestinationOptions": "options",
    "Checkpoint": "checkpoint.checkpoint",
    "Gate": "gates.gate",
    "Progress": "interruption",
}

__all__ = [
    "Checkpoint",
    "CompareResult",
    "DestinationOptions",
    "DevicePlan",
    "EncoderOptions",
    "ExportOptions",
    "ExportResult",
    "Gate",
    "GateLimits",
    "LLMOptions",
    "Progress",
    "VerifyResult",
    "compare",
    "convert",
    "export",
    "plan",
    "presets",
    "resolve",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "presets":
        return import_module("model_export.presets")
    if name in _HOME:
        from fastvlm_mlx.extras import needs_extra

        with needs_extra():
            return getattr(import_module(f"model_export.{_HOME[name]}"), name)
    raise AttributeError(f"module 'model_export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
