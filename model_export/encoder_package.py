"""The encoder of a bundle: what the source makes of the gates' images, and the Core ML package."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from fastvlm_mlx import __version__
from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.vision.package import PackageInfo
from model_export.bundle_spec import BundleSpec
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.encoder import coreml, fastvithd, multifunction
from model_export.encoder.compression import Compression, uniform
from model_export.encoder.references import Reference, references_of_sizes
from model_export.interruption import Progress
from model_export.quantization.bits.encoder_sensitivity import calibration_pixels
from model_export.quantization.bits.mixed import mixed


def source_features(spec: BundleSpec, progress: Progress) -> dict[int, list[Reference]]:
    """By input size, what the source's encoder makes of the gates' images; the default size is the
    first."""
    progress("reference encoder", None)
    checkpoint, sizes = spec.checkpoint, spec.options.encoder.other_sizes
    return references_of_sizes(checkpoint.encoder_state(), checkpoint, sizes)


def export_package(spec: BundleSpec, package: Path, progress: Progress) -> PackageInfo:
    """Write the Core ML package."""
    checkpoint, options = spec.checkpoint, spec.options.encoder
    vision = checkpoint.config.vision
    module = folded(checkpoint, vision)
    form = coreml.Form(
        precision="fp32" if options.precision == "fp32" else "fp16",
        metadata=coreml.EncoderMetadata(
            source=checkpoint.name, license=checkpoint.license, version=__version__
        ),
        compression=_compression(spec, module, progress),
        target=options.target,
        image_input=options.image_input,
    )
    progress("Core ML encoder", 0.0 if options.other_sizes else None)
    return multifunction.export_sizes(
        module,
        [replace(vision, image_size=size) for size in (vision.image_size, *options.other_sizes)],
        package,
        form,
        partial(progress, "Core ML encoder"),
    )


def folded(checkpoint: Checkpoint, vision: VisionConfig) -> fastvithd.FastViTHD:
    """The module that the package is made from."""
    return fastvithd.fold(checkpoint.encoder_state(), vision)


def _compression(spec: BundleSpec, module: fastvithd.FastViTHD, progress: Progress) -> Compression:
    """How the encoder's weights are stored. A mixed choice writes what it rounds into `module`."""

    def advance(done: float) -> None:
        progress("compress encoder", done)

    options, calibration = spec.options.encoder, spec.calibration
    if not options.compressed:
        return coreml.NOT_COMPRESSED
    advance(0.0)
    if calibration is None or options.precision != "mixed":
        return uniform(module, options.precision, advance)
    config = spec.checkpoint.config
    pixels = calibration_pixels(calibration, config.vision, config.image_aspect_ratio)
    compression = mixed(module, pixels, options.bits_per_weight, advance)
    record = {"sha256": calibration.digest, "skipped": list(calibration.skipped)}
    return replace(compression, calibration=record)
