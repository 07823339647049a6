"""manifest.json: where a bundle comes from, how it was made, what it holds, what was measured."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastvlm_mlx import __version__
from fastvlm_mlx.bundle.config import fits_mlx_vlm
from fastvlm_mlx.bundle.manifest import SCHEMA_VERSION, hash_tree
from fastvlm_mlx.vision.package import PackageInfo, fits_app
from model_export.bundle_spec import BundleSpec, WrittenLLM
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.gates.gate import Gate
from model_export.language import recipes

TOOLS = (
    "mlx",
    "mlx-lm",
    "coremltools",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pillow",
)
# What a compressed encoder's own metadata says about it.
RECORDED = ("weight_formats", "calibration")


def make_manifest(
    spec: BundleSpec,
    info: PackageInfo | None,
    written: WrittenLLM,
    gates: list[Gate],
    directory: Path,
) -> dict[str, Any]:
    """What is known of a bundle that is whole but for this.

    Args:
        info: of the encoder's package; an `mlx` bundle has none.
    """
    checkpoint, formats, options = spec.checkpoint, spec.formats, spec.options
    summary = written.summary
    vision = checkpoint.config.vision
    return {
        "schema_version": SCHEMA_VERSION,
        "layout": spec.layout,
        **spec.provenance(),
        "options": options.to_record(),
        "encoder": {
            "precision": options.encoder_format,
            "image_size": vision.image_size,
            "tokens_per_image": vision.num_tokens,
            "channels": vision.hidden_size,
            "bytes": summary.encoder_bytes,
        }
        | ({"image_sizes": sorted(sizes)} if (sizes := options.encoder.image_sizes) else {})
        | ({} if info is None else _package_facts(info)),
        "llm": {
            "bits": recipes.layer_bits(formats, checkpoint.llm_specs),
            "group_size": options.llm.format.group_size if options.llm.format else None,
            "formats": {path: form and form.to_dict() for path, form in formats.items()},
            "dtype": options.llm.dtype,
            "parameters": summary.parameters,
            "bytes": summary.bytes,
            "bits_per_weight": round(summary.bits_per_weight, 3),
            "left_unquantized": summary.unquantized,
            **written.facts,
        },
        **_fits(checkpoint, info),
        "gates": [gate.to_dict() for gate in gates if not gate.left_out],
        "gates_left_out": {gate.name: gate.left_out for gate in gates if gate.left_out},
        "gates_passed": all(gate.passed for gate in gates),
        "versions": {"fastvlm-mlx": __version__}
        | {name: version(name) for name in TOOLS}
        | {"python": platform.python_version(), "platform": platform.platform()},
        "files": hash_tree(directory),
    }


def _package_facts(info: PackageInfo) -> dict[str, Any]:
    return {
        "precision": info.precision,
        "deployment_target": info.deployment_target,
        "bytes": info.bytes,
        "ops": info.ops,
        **{key: json.loads(info.metadata[key]) for key in RECORDED if key in info.metadata},
    }


def _fits(checkpoint: Checkpoint, info: PackageInfo | None) -> dict[str, Any]:
    if info is not None:
        return fits_app(info)
    return fits_mlx_vlm(checkpoint.config.vision)
