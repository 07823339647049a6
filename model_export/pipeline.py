"""The export, step by step: the bundle is made beside its destination and appears there whole."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_mlx.bundle import MANIFEST, PACKAGE, SCHEMA_VERSION, Bundle, hash_tree
from fastvlm_mlx.errors import DestinationError, GateError
from fastvlm_mlx.vision.package import PackageInfo
from model_export import (
    calibrated,
    compress,
    coreml,
    fastvithd,
    layouts,
    llm,
    mlx_layout,
    recipes,
    search,
    verify,
)
from model_export.calibration import Calibration, load_calibration
from model_export.checkpoint import Checkpoint
from model_export.destination import appearing, check_replaceable, resolve
from model_export.encoder_sensitivity import calibration_pixels
from model_export.interruption import Progress, interruptible
from model_export.mixed import mixed
from model_export.options import ExportOptions
from model_export.pictures import Reference, source_references
from model_export.recipes import Scheme
from model_export.tokenizer import ExportedTokenizer, export_tokenizer, extended
from model_export.verify import Gate

TOOLS = (
    "fastvlm-mlx",
    "mlx",
    "mlx-lm",
    "coremltools",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pillow",
)
# What a package adds to its weights: the program's text and the manifest.
PACKAGE_OVERHEAD_BYTES = 1_000_000
# Room for the biases and the few weights that stay fp16 in a compressed encoder.
UNCOMPRESSED_SHARE = 1.05


@dataclass(frozen=True)
class ExportResult:
    """The finished bundle, with what its manifest says, and what the user should be told."""

    path: Path
    manifest: dict[str, Any]
    gates: tuple[Gate, ...]
    notes: tuple[str, ...] = ()


def export(
    checkpoint_path: str | Path,
    destination: str | Path,
    options: ExportOptions,
    progress: Progress = lambda stage, done: None,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
) -> ExportResult:
    """Turn a checkpoint into a bundle at `destination`, checked by every gate.

    Args:
        checkpoint_path: a directory or a hub id, of any kind that `sources` knows.
        base: for an adapter or a projector, in place of the base that it names.
        revision: of a hub id.

    Raises:
        CheckpointError, ConfigError: the checkpoint is not a whole FastVLM.
        OptionError: the options don't fit it.
        DestinationError: `destination` exists or can't be written.
        GateError: a figure fell short, and `allow_failed_gates` is off.
    """
    with interruptible(progress) as stage:
        stage("checkpoint", None)
        # Before a hub's gigabytes are fetched for nothing.
        destination = resolve(destination)
        check_replaceable(destination, overwrite=options.overwrite)
        checkpoint = Checkpoint(
            checkpoint_path, base=base, revision=revision, image_size=options.image_size
        )
        return _export(checkpoint, destination, options, stage)


def _export(
    checkpoint: Checkpoint,
    destination: Path,
    options: ExportOptions,
    progress: Progress,
) -> ExportResult:
    _check_overlap(destination, checkpoint)
    # Reads the checkpoint's tokenizer, so that nothing is written if there is none.
    tokenizer = export_tokenizer(checkpoint)
    checkpoint = extended(checkpoint, tokenizer.tokenizer, tokenizer.image_token_id + 1)
    found = _search(checkpoint, tokenizer, options, progress)
    chosen = (
        found.scheme if found else recipes.scheme(checkpoint.llm_specs, checkpoint.config, options)
    )
    calibration = _calibration(checkpoint, chosen, options)
    with appearing(destination) as directory:
        _check_space(directory, checkpoint, chosen, options)
        _write_small_files(checkpoint, chosen, options, tokenizer, directory)
        encoder = _export_encoder(checkpoint, directory / PACKAGE, options, progress)
        with tempfile.TemporaryDirectory(dir=directory) as waiting:
            ready: llm.Ready = {}
            if calibration is not None:
                ready = calibrated.quantize(
                    checkpoint, tokenizer, calibration, chosen, options, Path(waiting), progress
                )
            summary = _export_llm(checkpoint, chosen, directory, options, ready, progress)
        bundle = Bundle.open(directory)
        progress("check layout", None)
        _check_layout(bundle, encoder)
        progress("check encoder", None)
        gates, features = _check_encoder(checkpoint, bundle, encoder, options)
        progress("check answers", None)
        gates += verify.answer_gates(
            checkpoint, bundle, tokenizer.tokenizer, encoder.references, features, options
        )
        _judge(gates, options)
        progress("manifest", None)
        manifest = _manifest(
            checkpoint, chosen, options, encoder.package, summary, gates, directory
        )
        if found is not None:
            manifest["llm"]["search"] = found.to_dict()
        if calibration is not None:
            size = checkpoint.config.vision.image_size
            manifest["llm"]["calibration"] = calibrated.record(calibration, options.method, size)
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    data = calibration or (found and found.calibration)
    note = data and data.note()
    return ExportResult(destination, manifest, tuple(gates), (note,) if note else ())


def _calibration(
    checkpoint: Checkpoint, chosen: Scheme, options: ExportOptions
) -> Calibration | None:
    """What the method looks at, read and checked before any work."""
    if options.method == "rtn":
        return None
    calibrated.check(chosen, options.method)
    return load_calibration(options.calibration, checkpoint.config.vision)


def _search(
    checkpoint: Checkpoint, tokenizer: ExportedTokenizer, options: ExportOptions, progress: Progress
) -> search.Found | None:
    if options.llm_bpw is None:
        return None
    placeholder = tokenizer.image_token_id
    return search.search(
        checkpoint, tokenizer.tokenizer, placeholder, options, options.llm_bpw, progress
    )


def _write_small_files(
    checkpoint: Checkpoint,
    chosen: Scheme,
    options: ExportOptions,
    tokenizer: ExportedTokenizer,
    directory: Path,
) -> None:
    tokenizer.save(directory)
    config = layouts.app_config(checkpoint, chosen, options, tokenizer.image_token_id)
    if options.layout == "app":
        layouts.write_app_configs(checkpoint, config, directory)
    else:
        mlx_layout.write_mlx_configs(checkpoint, options, tokenizer, config, directory)
    # The base's first, so that a fine-tune's own stands where both have one.
    for source in reversed(checkpoint.directories):
        for file in source.glob("LICENSE*"):
            shutil.copyfile(file, directory / file.name)


@dataclass(frozen=True)
class _ExportedEncoder:
    """What the source's encoder makes of the gates' pictures; an `mlx` bundle has no package."""

    references: list[Reference]
    package: PackageInfo | None


def _export_encoder(
    checkpoint: Checkpoint, package: Path, options: ExportOptions, progress: Progress
) -> _ExportedEncoder:
    progress("reference encoder", None)
    references = source_references(checkpoint)
    if options.layout == "mlx":
        return _ExportedEncoder(references, None)
    module = _folded(checkpoint)
    compression = _compression(checkpoint, module, options, progress)
    progress("Core ML encoder", None)
    metadata = coreml.EncoderMetadata(
        source=checkpoint.name, license=checkpoint.license, version=version("fastvlm-mlx")
    )
    info = coreml.export_encoder(
        module,
        checkpoint.config.vision,
        package,
        precision="fp32" if options.encoder_precision == "fp32" else "fp16",
        metadata=metadata,
        compression=compression,
        target=options.target,
    )
    return _ExportedEncoder(references, info)


def _folded(checkpoint: Checkpoint) -> fastvithd.FastViTHD:
    return fastvithd.fold(checkpoint.encoder_state(), checkpoint.config.vision)


def _compression(
    checkpoint: Checkpoint,
    module: fastvithd.FastViTHD,
    options: ExportOptions,
    progress: Progress,
) -> compress.Compression:
    """How the encoder's weights are stored. A mixed choice writes what it rounds into `module`."""

    def advance(done: float) -> None:
        progress("compress encoder", done)

    if not options.compressed:
        return coreml.NOT_COMPRESSED
    advance(0.0)
    if options.encoder_precision != "mixed":
        return compress.uniform(module, options.encoder_precision, advance)
    config = checkpoint.config
    pictures = [p.image for p in load_calibration(options.calibration, config.vision).pictures]
    pixels = calibration_pixels(pictures, config.vision, config.image_aspect_ratio)
    return mixed(module, pixels, options.encoder_bits, advance)


def _check_layout(bundle: Bundle, encoder: _ExportedEncoder) -> None:
    if encoder.package is None:
        mlx_layout.check_mlx(bundle)
    else:
        layouts.check_app(bundle, encoder.package)


def _check_encoder(
    checkpoint: Checkpoint, bundle: Bundle, encoder: _ExportedEncoder, options: ExportOptions
) -> tuple[list[Gate], list[np.ndarray]]:
    if encoder.package is None:
        return verify.mlx_encoder_gates(bundle, encoder.references, options)
    folded = partial(_folded, checkpoint)
    return verify.encoder_gates(bundle.package, folded, encoder.references, options)


def _export_llm(
    checkpoint: Checkpoint,
    chosen: Scheme,
    directory: Path,
    options: ExportOptions,
    ready: llm.Ready,
    progress: Progress,
) -> llm.Summary:
    total = llm.total_bytes(checkpoint, chosen, options)
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        progress("language model", written / total)

    progress("language model", 0.0)
    return llm.write(checkpoint, chosen, options, directory, advance, ready)


def _judge(gates: list[Gate], options: ExportOptions) -> None:
    failed = [gate for gate in gates if not gate.passed]
    if failed and not options.allow_failed_gates:
        raise GateError(
            f"the export failed {len(failed)} of its {len(gates)} gates ("
            + "; ".join(gate.sentence() for gate in failed)
            + "): choose more bits, or keep it with --allow-failed-gates"
        )


def _manifest(
    checkpoint: Checkpoint,
    chosen: Scheme,
    options: ExportOptions,
    info: PackageInfo | None,
    summary: llm.Summary,
    gates: list[Gate],
    directory: Path,
) -> dict[str, Any]:
    vision = checkpoint.config.vision
    return {
        "schema_version": SCHEMA_VERSION,
        "layout": options.layout,
        "source": checkpoint.source(),
        "options": options.resolved(recipes.layer_bits(chosen, checkpoint.llm_specs)),
        "encoder": {
            "precision": options.encoder_format,
            "image_size": vision.image_size,
            "tokens_per_image": vision.num_tokens,
            "channels": vision.hidden_size,
            "bytes": summary.encoder_bytes,
        }
        | ({} if info is None else _package_facts(info)),
        "llm": {
            "bits": recipes.layer_bits(chosen, checkpoint.llm_specs),
            "group_size": options.group_size if options.format else None,
            "formats": {path: form and form.to_dict() for path, form in chosen.items()},
            "dtype": options.dtype,
            "parameters": summary.parameters,
            "bytes": summary.bytes,
            "bits_per_weight": round(summary.bits_per_weight, 3),
            "left_unquantized": summary.unquantized,
        },
        **_fits(checkpoint, options),
        "gates": [gate.to_dict() for gate in gates],
        "gates_passed": all(gate.passed for gate in gates),
        "versions": {name: version(name) for name in TOOLS}
        | {"python": platform.python_version(), "platform": platform.platform()},
        "files": hash_tree(directory),
    }


def _package_facts(info: PackageInfo) -> dict[str, Any]:
    formats = info.metadata.get("weight_formats")
    return {
        "precision": info.precision,
        "deployment_target": info.deployment_target,
        "bytes": info.bytes,
        "ops": info.ops,
    } | ({"weight_formats": json.loads(formats)} if formats else {})


def _fits(checkpoint: Checkpoint, options: ExportOptions) -> dict[str, bool]:
    if options.layout == "app":
        return {"fits_unmodified_app": layouts.fits_unmodified_app(checkpoint.config)}
    return {"fits_unmodified_mlx_vlm": mlx_layout.fits_unmodified_mlx_vlm(checkpoint.config)}


def _check_overlap(destination: Path, checkpoint: Checkpoint) -> None:
    target = destination.resolve()
    for directory in checkpoint.directories:
        source = directory.resolve()
        if target == source or source in target.parents or target in source.parents:
            raise DestinationError(
                f"{destination} overlaps the checkpoint {directory}, which is never written to: "
                "choose a directory of its own"
            )


def _check_space(
    directory: Path, checkpoint: Checkpoint, chosen: Scheme, options: ExportOptions
) -> None:
    encoder = int(checkpoint.encoder_parameters * options.encoder_bits / 8 * UNCOMPRESSED_SHARE)
    if options.layout == "mlx":
        encoder = 0  # in the language model's files
    language = llm.total_bytes(checkpoint, chosen, options)
    if options.method != "rtn":
        language *= 2  # what is calibrated waits beside what is written
    # coremltools writes the encoder's weights twice, before there is a language model.
    needed = encoder + max(language, encoder) + PACKAGE_OVERHEAD_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DestinationError(
            f"{directory.parent} has {free / 1e6:,.0f} MB free and the bundle needs "
            f"{needed / 1e6:,.0f} MB: make room, or choose another disk"
        )
