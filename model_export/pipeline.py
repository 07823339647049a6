"""The export, step by step: the bundle is made beside its destination and appears there whole."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

from fastvlm_mlx.bundle import MANIFEST, PACKAGE, SCHEMA_VERSION, Bundle, hash_tree
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.errors import DestinationError, GateError
from fastvlm_mlx.vision.package import PackageInfo, fits_app
from model_export import (
    compress,
    coreml,
    fastvithd,
    functions,
    layouts,
    llm,
    mlx_layout,
    recipes,
    search,
    verify,
)
from model_export.calibration import load_calibration
from model_export.checkpoint import Checkpoint
from model_export.destination import appearing, check_replaceable, resolve
from model_export.encoder_sensitivity import calibration_pixels
from model_export.gates import Gate
from model_export.mixed import mixed
from model_export.options import ExportOptions
from model_export.pictures import Reference, references_of_sizes
from model_export.recipes import Scheme
from model_export.tokenizer import ExportedTokenizer, export_tokenizer, extended

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
# What a compressed encoder's own metadata says about it.
RECORDED = ("weight_formats", "calibration")
# Room for the biases and the few weights that stay fp16 in a compressed encoder.
UNCOMPRESSED_SHARE = 1.05

# Called with the stage's name and, where it is known, the share of it that is done.
Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class ExportResult:
    """The finished bundle, with what its manifest says."""

    path: Path
    manifest: dict[str, Any]
    gates: tuple[Gate, ...]


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
    with _interruptible(progress) as stage:
        stage("checkpoint", None)
        # Before a hub's gigabytes are fetched for nothing.
        destination = resolve(destination)
        check_replaceable(destination, overwrite=options.overwrite)
        checkpoint = Checkpoint(
            checkpoint_path, base=base, revision=revision, image_size=options.default_size
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
    with appearing(destination) as directory:
        _check_space(directory, checkpoint, chosen, options)
        _write_small_files(checkpoint, chosen, options, tokenizer, directory)
        encoder = _export_encoder(checkpoint, directory / PACKAGE, options, progress)
        summary = _export_llm(checkpoint, chosen, directory, options, progress)
        bundle = Bundle.open(directory)
        progress("check layout", None)
        _check_layout(bundle, encoder)
        progress("check encoder", None)
        folded = partial(_folded, checkpoint)
        gates, features = verify.gates_of_sizes(bundle, folded, encoder.references, options)
        progress("check answers", None)
        seen = encoder.references[checkpoint.config.vision.image_size]
        gates += verify.answer_gates(
            checkpoint, bundle, tokenizer.tokenizer, seen, features, options
        )
        _judge(gates, options)
        progress("manifest", None)
        manifest = _manifest(
            checkpoint, chosen, options, encoder.package, summary, gates, directory
        )
        if found is not None:
            manifest["llm"]["search"] = found.to_dict()
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return ExportResult(destination, manifest, tuple(gates))


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
    """What the source's encoder makes of the gates' pictures at each size, the default first; an
    `mlx` bundle has no package."""

    references: dict[int, list[Reference]]
    package: PackageInfo | None


def _export_encoder(
    checkpoint: Checkpoint, package: Path, options: ExportOptions, progress: Progress
) -> _ExportedEncoder:
    progress("reference encoder", None)
    references = references_of_sizes(checkpoint.encoder_state(), checkpoint, options.other_sizes)
    if options.layout == "mlx":
        return _ExportedEncoder(references, None)
    vision = checkpoint.config.vision
    module = _folded(checkpoint, vision)
    compression = _compression(checkpoint, module, options, progress)
    progress("Core ML encoder", 0.0 if options.other_sizes else None)
    metadata = coreml.EncoderMetadata(
        source=checkpoint.name, license=checkpoint.license, version=version("fastvlm-mlx")
    )
    info = functions.export_sizes(
        module,
        [replace(vision, image_size=size) for size in references],
        package,
        precision="fp32" if options.encoder_precision == "fp32" else "fp16",
        metadata=metadata,
        compression=compression,
        target=options.target,
        image_input=options.image_input,
        progress=partial(progress, "Core ML encoder"),
    )
    return _ExportedEncoder(references, info)


def _folded(checkpoint: Checkpoint, vision: VisionConfig) -> fastvithd.FastViTHD:
    return fastvithd.fold(checkpoint.encoder_state(), vision)


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
    calibration = load_calibration(options.calibration, config.vision)
    pixels = calibration_pixels(calibration, config.vision, config.image_aspect_ratio)
    chosen = mixed(module, pixels, options.encoder_bits, advance)
    record = {"sha256": calibration.digest, "skipped": list(calibration.skipped)}
    return replace(chosen, calibration=record)


def _check_layout(bundle: Bundle, encoder: _ExportedEncoder) -> None:
    if encoder.package is None:
        mlx_layout.check_mlx(bundle)
    else:
        layouts.check_app(bundle, encoder.package)


def _export_llm(
    checkpoint: Checkpoint,
    chosen: Scheme,
    directory: Path,
    options: ExportOptions,
    progress: Progress,
) -> llm.Summary:
    total = llm.total_bytes(checkpoint, chosen, options)
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        progress("language model", written / total)

    progress("language model", 0.0)
    return llm.write(checkpoint, chosen, options, directory, advance)


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
    mlx_vlm = {"fits_unmodified_mlx_vlm": mlx_layout.fits_unmodified_mlx_vlm(checkpoint.config)}
    fits = mlx_vlm if info is None else fits_app(info)
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
        | ({"image_sizes": sorted(options.image_sizes)} if options.image_sizes else {})
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
        **fits,
        "gates": [gate.to_dict() for gate in gates],
        "gates_passed": all(gate.passed for gate in gates),
        "versions": {name: version(name) for name in TOOLS}
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
    # coremltools writes the encoder's weights twice, before there is a language model; where there
    # are several sizes, beside a package of each.
    others = len(options.other_sizes)
    copies = others + 2 if others else 1
    after = max(llm.total_bytes(checkpoint, chosen, options), copies * encoder)
    needed = encoder + after + PACKAGE_OVERHEAD_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DestinationError(
            f"{directory.parent} has {free / 1e6:,.0f} MB free and the bundle needs "
            f"{needed / 1e6:,.0f} MB: make room, or choose another disk"
        )


@contextmanager
def _interruptible(progress: Progress) -> Iterator[Progress]:
    """A progress callback that raises the interruption that somebody else caught.

    coremltools' imports are in `try … except:`, and a Ctrl-C during one of them is lost. SIGTERM
    and SIGHUP unwind like Ctrl-C, so that nothing is left behind; a second signal changes nothing.
    """
    pressed: BaseException | None = None

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed is None:
            interrupt = number == signal.SIGINT
            pressed = KeyboardInterrupt() if interrupt else SystemExit(128 + number)
            raise pressed

    def stage(name: str, done: float | None) -> None:
        if pressed is not None:
            raise pressed
        progress(name, done)

    # Only the main thread may set handlers, and a caller's own are left alone.
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                previous[number] = signal.signal(number, handler)
    try:
        yield stage
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
