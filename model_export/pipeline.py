"""The export, step by step: the bundle is made beside its destination and appears there whole."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from fastvlm_mlx.bundle import MANIFEST, PACKAGE, SCHEMA_VERSION, Bundle, hash_tree
from fastvlm_mlx.errors import DestinationError, GateError
from fastvlm_mlx.vision.package import PackageInfo
from model_export import coreml, fastvithd, layouts, llm, mlx_layout, verify
from model_export.checkpoint import Checkpoint
from model_export.destination import appearing, check_replaceable, resolve
from model_export.options import ExportOptions
from model_export.pictures import (
    Reference,
    gate_pictures,
    reference_features,
    source_references,
)
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

# Called with the stage's name and, where it is known, the share of it that is done.
Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Recipe:
    """What a bundle is made of, and what it is judged by.

    Attributes:
        checkpoint: the configuration, the encoder's weights, and what the gates compare with.
        tokenizer: of the checkpoint, with `<image>`.
        options: as the manifest records them.
        limits: the options that the gates judge by.
        source: the bundle that holds the checkpoint's language model, if it is not its own files.
        llm_bytes: what `write_llm` will write, headers left out.
        write_llm: into a directory, called back with the bytes just written.
        own_gates: what is checked of the written bundle besides encoder and answers.
        origin: the manifest's entries on where the bundle comes from.
        remedy: what to do about a failed gate.
    """

    checkpoint: Checkpoint
    tokenizer: ExportedTokenizer
    options: ExportOptions
    limits: ExportOptions
    source: Bundle | None
    llm_bytes: int
    write_llm: Callable[[Path, Callable[[int], None]], llm.Summary]
    own_gates: Callable[[Bundle], list[Gate]]
    origin: Callable[[], dict[str, Any]]
    remedy: str


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
    with interruptible(progress) as stage:
        stage("checkpoint", None)
        # Before a hub's gigabytes are fetched for nothing.
        destination = resolve(destination)
        check_replaceable(destination, overwrite=options.overwrite)
        checkpoint = Checkpoint(
            checkpoint_path, base=base, revision=revision, image_size=options.image_size
        )
        options.check_widths(checkpoint.config)
        # Reads the checkpoint's tokenizer, so that nothing is written if there is none.
        tokenizer = export_tokenizer(checkpoint)
        checkpoint = extended(checkpoint, tokenizer.tokenizer, tokenizer.image_token_id + 1)
        recipe = Recipe(
            checkpoint,
            tokenizer,
            options,
            limits=options,
            source=None,
            llm_bytes=llm.total_bytes(checkpoint, options),
            write_llm=partial(llm.write, checkpoint, options),
            own_gates=lambda bundle: [],
            origin=lambda: {"source": checkpoint.source()},
            remedy="choose more bits, or keep it with --allow-failed-gates",
        )
        return build(recipe, destination, stage)


def build(recipe: Recipe, destination: Path, progress: Progress) -> ExportResult:
    """Make the bundle beside `destination`, check it, and put it there.

    Raises:
        As `export`, where it writes and checks.
    """
    checkpoint, options = recipe.checkpoint, recipe.options
    _check_overlap(destination, checkpoint)
    with appearing(destination) as directory:
        _check_space(directory, recipe)
        _write_small_files(checkpoint, options, recipe.tokenizer, directory)
        encoder = _export_encoder(checkpoint, directory / PACKAGE, options, progress)
        summary = _write_llm(recipe, directory, progress)
        bundle = Bundle.open(directory)
        progress("check layout", None)
        _check_layout(bundle, encoder)
        progress("check encoder", None)
        gates, features = _check_encoder(bundle, encoder, recipe.limits)
        progress("check answers", None)
        gates += verify.answer_gates(
            checkpoint,
            bundle,
            recipe.tokenizer.tokenizer,
            encoder.references,
            features,
            recipe.limits,
            recipe.source,
        )
        gates += recipe.own_gates(bundle)
        _judge(gates, recipe)
        progress("manifest", None)
        info = encoder.package.info if encoder.package else None
        manifest = _manifest(recipe, info, summary, gates, directory)
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return ExportResult(destination, manifest, tuple(gates))


def _write_small_files(
    checkpoint: Checkpoint, options: ExportOptions, tokenizer: ExportedTokenizer, directory: Path
) -> None:
    tokenizer.save(directory)
    if options.layout == "app":
        layouts.write_app_configs(checkpoint, options, tokenizer.image_token_id, directory)
    else:
        common = layouts.app_config(checkpoint, options, tokenizer.image_token_id)
        mlx_layout.write_mlx_configs(checkpoint, options, tokenizer, common, directory)
    # The base's first, so that a fine-tune's own stands where both have one.
    for source in reversed(checkpoint.directories):
        for file in source.glob("LICENSE*"):
            shutil.copyfile(file, directory / file.name)


@dataclass(frozen=True)
class _Package:
    """The written package, and the folded module it was made from."""

    info: PackageInfo
    module: fastvithd.FastViTHD


@dataclass(frozen=True)
class _ExportedEncoder:
    """What the source's encoder makes of the gates' pictures; an `mlx` bundle has no package."""

    references: list[Reference]
    package: _Package | None


def _export_encoder(
    checkpoint: Checkpoint, package: Path, options: ExportOptions, progress: Progress
) -> _ExportedEncoder:
    progress("reference encoder", None)
    if options.layout == "mlx":
        return _ExportedEncoder(source_references(checkpoint), None)
    state = checkpoint.encoder_state()
    pictures = gate_pictures(checkpoint.config.vision)
    references = reference_features(state, checkpoint, pictures)
    module = fastvithd.fold(state, checkpoint.config.vision)
    del state
    progress("Core ML encoder", None)
    metadata = coreml.EncoderMetadata(
        source=checkpoint.name, license=checkpoint.license, version=version("fastvlm-mlx")
    )
    info = coreml.export_encoder(
        module,
        checkpoint.config.vision,
        package,
        precision=options.encoder_precision,
        metadata=metadata,
    )
    return _ExportedEncoder(references, _Package(info, module))


def _check_layout(bundle: Bundle, encoder: _ExportedEncoder) -> None:
    if encoder.package is None:
        mlx_layout.check_mlx(bundle)
    else:
        layouts.check_app(bundle, encoder.package.info)


def _check_encoder(
    bundle: Bundle, encoder: _ExportedEncoder, options: ExportOptions
) -> tuple[list[Gate], list[np.ndarray]]:
    if encoder.package is None:
        return verify.mlx_encoder_gates(bundle, encoder.references, options)
    return verify.encoder_gates(bundle.package, encoder.package.module, encoder.references, options)


def _write_llm(recipe: Recipe, directory: Path, progress: Progress) -> llm.Summary:
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        progress("language model", written / recipe.llm_bytes)

    progress("language model", 0.0)
    return recipe.write_llm(directory, advance)


def _judge(gates: list[Gate], recipe: Recipe) -> None:
    failed = [gate for gate in gates if not gate.passed]
    if failed and not recipe.limits.allow_failed_gates:
        raise GateError(
            f"the bundle failed {len(failed)} of its {len(gates)} gates ("
            + "; ".join(gate.sentence() for gate in failed)
            + f"): {recipe.remedy}"
        )


def _manifest(
    recipe: Recipe,
    info: PackageInfo | None,
    summary: llm.Summary,
    gates: list[Gate],
    directory: Path,
) -> dict[str, Any]:
    checkpoint, options = recipe.checkpoint, recipe.options
    vision = checkpoint.config.vision
    return {
        "schema_version": SCHEMA_VERSION,
        "layout": options.layout,
        **recipe.origin(),
        "options": options.resolved(),
        "encoder": {
            "precision": options.encoder_format,
            "image_size": vision.image_size,
            "tokens_per_image": vision.num_tokens,
            "channels": vision.hidden_size,
            "bytes": summary.encoder_bytes,
        }
        | ({} if info is None else _package_facts(info)),
        "llm": {
            "bits": options.llm_bits,
            "group_size": options.group_size if options.quantized else None,
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
    return {
        "precision": info.precision,
        "deployment_target": info.deployment_target,
        "bytes": info.bytes,
        "ops": info.ops,
    }


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
                f"{destination} overlaps its source {directory}, which is never written to: "
                "choose a directory of its own"
            )


def _check_space(directory: Path, recipe: Recipe) -> None:
    options = recipe.options
    bytes_each = 4 if options.encoder_precision == "fp32" else 2
    encoder = recipe.checkpoint.encoder_parameters * bytes_each
    if options.layout == "mlx":
        encoder = 0  # in the language model's files
    needed = recipe.llm_bytes + encoder + PACKAGE_OVERHEAD_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DestinationError(
            f"{directory.parent} has {free / 1e6:,.0f} MB free and the bundle needs "
            f"{needed / 1e6:,.0f} MB: make room, or choose another disk"
        )


@contextmanager
def interruptible(progress: Progress) -> Iterator[Progress]:
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
