"""What a bundle is, as facts: sizes by part, bits per weight, encoder, gates, licence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.config import fits_mlx_vlm
from fastvlm_mlx.vision.package import IMAGE, describe, fits_app


def inspect_bundle(path: Path) -> dict[str, Any]:
    """Sizes by part, bits per weight, encoder, gates, licence. From the files, not the manifest."""
    bundle = Bundle.open(path)
    manifest = bundle.manifest or {}
    encoder = _package_facts(bundle) if bundle.layout == "app" else _mlx_encoder_facts(bundle)
    package_license = encoder.pop("license", None)
    sizes = _llm_sizes(bundle)
    return {
        "kind": "bundle",
        "path": str(path),
        "source": manifest.get("source", {}).get("name"),
        **_converted_from(manifest),
        "license": manifest.get("source", {}).get("license") or package_license,
        "layout": bundle.layout,
        "encoder": encoder,
        "llm": {
            **_formats(bundle, sizes["bits_per_weight"]),
            **_method(manifest),
            "dtype": bundle.config.dtype,
            "layers": bundle.config.text.num_hidden_layers,
            "hidden_size": bundle.config.text.hidden_size,
            **sizes,
        },
        "total_bytes": sum(stamp.bytes for stamp in bundle.stamps.values()),
        "image_aspect_ratio": bundle.config.image_aspect_ratio,
        **_fits(bundle),
        "gates": manifest.get("gates"),
        "gates_passed": manifest.get("gates_passed"),
    }


def _converted_from(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the gates compare with, where it is a bundle and not the source."""
    converted = manifest.get("converted_from")
    if converted is None:
        return {}
    return {"converted_from": {key: converted[key] for key in ("directory", "layout")}}


def _fits(bundle: Bundle) -> dict[str, Any]:
    if bundle.layout == "app":
        return fits_app(describe(bundle.package))
    return fits_mlx_vlm(bundle.config.vision)


def _package_facts(bundle: Bundle) -> dict[str, Any]:
    info, vision = describe(bundle.package), bundle.config.vision
    shapes = info.outputs[0].shape
    return {
        "license": info.license or None,
        "package": bundle.package.name,
        "precision": info.precision,
        "image_size": info.inputs[0].shape[-1] if info.inputs[0].shape else vision.image_size,
        "tokens_per_image": shapes[1] if len(shapes) == 3 else vision.num_tokens,
        "channels": vision.hidden_size,
        "deployment_target": info.deployment_target,
        "bytes": info.bytes,
        **_sizes(list(info.functions.values())),
        **({"image_input": True} if info.inputs[0].dtype == IMAGE else {}),
    }


def _sizes(image_sizes: list[int]) -> dict[str, Any]:
    """Only of an encoder that was exported for several."""
    return {"image_sizes": sorted(image_sizes)} if len(image_sizes) > 1 else {}


def _mlx_encoder_facts(bundle: Bundle) -> dict[str, Any]:
    arrays, vision = bundle.encoder_arrays(), bundle.config.vision
    dtypes = sorted({str(array.dtype).removeprefix("mlx.core.") for array in arrays.values()})
    return {
        "precision": ", ".join(dtypes),
        "image_size": vision.image_size,
        "tokens_per_image": vision.num_tokens,
        "channels": vision.hidden_size,
        "bytes": sum(array.nbytes for array in arrays.values()),
        **_sizes((bundle.manifest or {}).get("encoder", {}).get("image_sizes", [])),
    }


def _llm_sizes(bundle: Bundle) -> dict[str, Any]:
    """Bytes by part, and bits per weight of the parameters that they stand for."""
    parts: Counter[str] = Counter()
    parameters = 0
    tensors = bundle.model_tensors()
    for name, array in tensors.items():
        parts[_part(name)] += array.nbytes
        stem, _, kind = name.rpartition(".")
        stored = bundle.format_of(stem) if f"{stem}.scales" in tensors else None
        if stored is not None and kind == "weight":
            parameters += array.size * 32 // stored.bits
        elif kind not in ("scales", "biases"):
            parameters += array.size
    total = sum(parts.values())
    return {
        "parameters": parameters,
        "bytes": total,
        "bits_per_weight": round(8 * total / parameters, 3),
        "bytes_by_part": dict(sorted(parts.items())),
    }


def _formats(bundle: Bundle, bits_per_weight: float) -> dict[str, Any]:
    """One format's bits and group size; of several, which there are."""
    quantization = bundle.config.quantization
    if quantization is None:
        return {"bits": bits_per_weight, "group_size": None}
    if len(quantization.formats()) == 1 and quantization.default.mode == "affine":
        return {"bits": quantization.default.bits, "group_size": quantization.default.group_size}
    return {"formats": ", ".join(sorted(str(stored) for stored in quantization.formats()))}


def _method(manifest: dict[str, Any]) -> dict[str, Any]:
    calibration = manifest.get("llm", {}).get("calibration")
    if calibration is None:
        return {}
    return {"method": calibration["method"], "calibration_images": calibration["images"]}


def _part(name: str) -> str:
    for part in ("multi_modal_projector", "embed_tokens", "lm_head"):
        if part in name:
            return part
    return "layers" if ".layers." in name else "other"
