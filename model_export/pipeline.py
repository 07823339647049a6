"""The export, step by step: the bundle is made beside its destination and appears there whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch

from fastvlm_mlx.bundle.bundle import PACKAGE, Bundle
from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.bundle.files import read_bytes
from fastvlm_mlx.bundle.manifest import MANIFEST
from fastvlm_mlx.bundle.schema import read_json
from fastvlm_mlx.errors import CheckpointError, DestinationError, GateError
from fastvlm_mlx.vision.package import PackageInfo
from model_export.bundle_spec import Job, Written
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import export_tokenizer, extended
from model_export.destination.destination import (
    Destination,
    appearing,
    check_replaceable,
    look_at,
    resolve,
)
from model_export.encoder import compression as compress
from model_export.encoder import coreml, fastvithd, multifunction
from model_export.gates import equality, verify
from model_export.gates.gate import Gate
from model_export.interruption import ONE_AT_A_TIME, Progress, interruptible
from model_export.language import llm, recipes
from model_export.layouts import app, mlx
from model_export.manifest import make_manifest
from model_export.options import ExportOptions
from model_export.quantization import layerwise, search
from model_export.quantization.encoder_sensitivity import calibration_pixels
from model_export.quantization.mixed import mixed
from model_export.samples.calibration import load_calibration
from model_export.samples.images import Reference, references_of_sizes

# What a package adds to its weights: the program's text and the manifest.
PACKAGE_OVERHEAD_BYTES = 1_000_000
# Any text of a licence with room to spare, and names that no terminal or card is confused by.
LICENSE_BYTES = 1_000_000
LICENSE_NAME = re.compile(r"LICENSE[\w.-]{0,100}", re.ASCII)
# Room for the biases and the few weights that stay fp16 in a compressed encoder.
UNCOMPRESSED_SHARE = 1.05
# Added to the destination's name for a bundle that failed a gate.
FAILED_SUFFIX = ".failed-gates"


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
    options: ExportOptions = ExportOptions(),  # noqa: B008
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
    with ONE_AT_A_TIME, interruptible(progress) as stage:
        stage("checkpoint", None)
        # Before a hub's gigabytes are fetched for nothing.
        place = check_replaceable(resolve(destination), overwrite=options.destination.overwrite)
        checkpoint = Checkpoint(
            checkpoint_path, base=base, revision=revision, image_size=options.encoder.default_size
        )
        check_overlap(place.path, checkpoint.directories)
        return build(_job(checkpoint, options, stage), place, stage)


def _job(checkpoint: Checkpoint, options: ExportOptions, progress: Progress) -> Job:
    # Reads the checkpoint's tokenizer, so that nothing is written if there is none.
    tokenizer = export_tokenizer(checkpoint)
    checkpoint = extended(checkpoint, tokenizer.tokenizer, tokenizer.image_token_id + 1)
    calibration, found, layout = None, None, options.destination.layout
    if options.calibrates:
        calibration = load_calibration(options.calibration, checkpoint.config.vision)
    if calibration and options.llm.bpw is not None:
        found = search.search(
            checkpoint, tokenizer, calibration, options, options.llm.bpw, progress
        )
    chosen = (
        found.scheme
        if found
        else recipes.scheme(checkpoint.llm_specs, checkpoint.config, options.llm, layout)
    )
    if options.llm.method != "rtn":
        layerwise.check(chosen, options.llm.method)
    total = llm.total_bytes(checkpoint, chosen, layout, options.llm.dtype)
    facts: dict[str, Any] = {"search": found.to_dict()} if found else {}
    notes = tuple(calibration.notes()) if calibration else ()
    notes += tuple(found.notes()) if found else ()

    def write_llm(directory: Path, progress: Progress) -> Written:
        write = partial(llm.write, checkpoint, chosen, layout, options.llm.dtype, directory)
        if calibration is None or options.llm.method == "rtn":
            return Written(write(counted(progress, total)), facts, notes)
        # What the method makes waits there; it is gone before the bundle is complete.
        with tempfile.TemporaryDirectory(dir=directory) as waiting:
            made = layerwise.quantize(
                checkpoint, tokenizer, calibration, chosen, options, Path(waiting), progress
            )
            hashes = equality.hash_tensors(made.ready)
            summary = write(counted(progress, total), made.ready)
        told = {"calibration": made.facts, equality.TENSORS: hashes}
        return Written(summary, facts | told, (*notes, *made.notes))

    def compare(bundle: Bundle, written: Written) -> list[Gate]:
        dtype = getattr(torch, options.llm.dtype)
        made = equality.Made(chosen, dtype, written.facts.get(equality.TENSORS, {}))
        return [equality.tensor_gate(checkpoint, bundle, made)]

    return Job(
        checkpoint=checkpoint,
        calibration=calibration,
        source=None,
        tokenizer=tokenizer,
        chosen=chosen,
        options=options,
        limits=options,
        llm_bytes=total,
        write_llm=write_llm,
        own_gates=compare,
        origin=lambda: {"source": checkpoint.source()},
        remedy="choose more bits",
    )


def build(job: Job, destination: Destination, progress: Progress) -> ExportResult:
    """Make the bundle beside `destination`, check it, and put it there.

    Raises:
        As `export`, where it writes and checks.
    """
    with appearing(destination) as directory:
        _check_space(destination.path.parent, job)
        _write_small_files(job, directory)
        encoder = _export_encoder(job, directory / PACKAGE, progress)
        written = job.write_llm(directory, progress)
        bundle = Bundle.open(directory)
        progress("check layout", None)
        _check_layout(bundle, encoder)
        progress("check encoder", None)
        folded = partial(_folded, job.checkpoint)
        gates, features = verify.gates_of_sizes(bundle, folded, encoder.references, job.limits)
        progress("check answers", None)
        seen = encoder.references[job.checkpoint.config.vision.image_size]
        gates += verify.answer_gates(
            job.checkpoint,
            bundle,
            job.tokenizer.tokenizer,
            seen,
            features,
            job.limits,
            job.source,
        )
        progress("check tensors", None)
        gates += [equality.settings_gate(job.checkpoint, bundle), *job.own_gates(bundle, written)]
        progress("manifest", None)
        if job.source is None and (merged := equality.merged_hashes(job.checkpoint, bundle)):
            hashes = merged | written.facts.get(equality.TENSORS, {})
            written = replace(written, facts=written.facts | {equality.TENSORS: hashes})
        manifest = make_manifest(job, encoder.package, written, gates, directory)
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        failed = [gate for gate in gates if not gate.passed]
        if failed and not job.limits.destination.allow_failed_gates:
            raise _refused(failed, gates, _keep(directory, destination.path), job)
    notes = (*job.tokenizer.notes, *written.notes)
    return ExportResult(destination.path, manifest, tuple(gates), notes)


def _keep(directory: Path, destination: Path) -> Path:
    """Move a whole bundle that failed a gate beside the destination, where it takes the place of
    one that failed before."""
    kept = destination.with_name(destination.name + FAILED_SUFFIX)
    number = 1
    while os.path.lexists(kept) and not _failed_before(kept):
        number += 1
        kept = destination.with_name(f"{destination.name}{FAILED_SUFFIX}-{number}")
    with appearing(look_at(kept)) as other:
        for path in directory.iterdir():
            path.rename(other / path.name)
    return kept


def _failed_before(path: Path) -> bool:
    try:
        check_replaceable(path, overwrite=True)
        manifest = read_json(path, path / MANIFEST, DestinationError, remedy="")
    except DestinationError:
        return False
    return manifest.get("gates_passed") is False


def _refused(failed: list[Gate], gates: list[Gate], kept: Path, job: Job) -> GateError:
    return GateError(
        f"the bundle failed {len(failed)} of its {len(gates)} gates ("
        + "; ".join(gate.sentence() for gate in failed)
        + f") and is kept at {kept}: rename it to use it as it is, judge it again with `fastvlm "
        f"verify {kept}` and limits of your own, or {job.remedy}"
    )


def _write_small_files(job: Job, directory: Path) -> None:
    checkpoint, options, tokenizer = job.checkpoint, job.options, job.tokenizer
    layout = options.destination.layout
    tokenizer.save(directory)
    config = app.app_config(
        checkpoint, job.chosen, layout, options.llm.dtype, tokenizer.image_token_id
    )
    if layout == "app":
        app.write_app_configs(checkpoint, tokenizer, config, directory)
    else:
        mlx.write_mlx_configs(checkpoint, tokenizer, config, directory)
    # The base's first, so that a fine-tune's own stands where both have one.
    for source in reversed(checkpoint.directories):
        for file in sorted(source.glob("LICENSE*")):
            if LICENSE_NAME.fullmatch(file.name):
                data = read_bytes(source, file, CheckpointError, LICENSE_BYTES)
                (directory / file.name).write_bytes(data)


@dataclass(frozen=True)
class _ExportedEncoder:
    """What the source's encoder makes of the gates' images at each size, the default first; an
    `mlx` bundle has no package."""

    references: dict[int, list[Reference]]
    package: PackageInfo | None


def _export_encoder(job: Job, package: Path, progress: Progress) -> _ExportedEncoder:
    checkpoint, options = job.checkpoint, job.options
    progress("reference encoder", None)
    references = references_of_sizes(
        checkpoint.encoder_state(), checkpoint, options.encoder.other_sizes
    )
    if options.destination.layout == "mlx":
        return _ExportedEncoder(references, None)
    vision = checkpoint.config.vision
    module = _folded(checkpoint, vision)
    compression = _compression(job, module, progress)
    progress("Core ML encoder", 0.0 if options.encoder.other_sizes else None)
    metadata = coreml.EncoderMetadata(
        source=checkpoint.name, license=checkpoint.license, version=version("fastvlm-mlx")
    )
    form = coreml.Form(
        precision="fp32" if options.encoder.precision == "fp32" else "fp16",
        metadata=metadata,
        compression=compression,
        target=options.encoder.target,
        image_input=options.encoder.image_input,
    )
    info = multifunction.export_sizes(
        module,
        [replace(vision, image_size=size) for size in references],
        package,
        form,
        partial(progress, "Core ML encoder"),
    )
    return _ExportedEncoder(references, info)


def _folded(checkpoint: Checkpoint, vision: VisionConfig) -> fastvithd.FastViTHD:
    return fastvithd.fold(checkpoint.encoder_state(), vision)


def _compression(job: Job, module: fastvithd.FastViTHD, progress: Progress) -> compress.Compression:
    """How the encoder's weights are stored. A mixed choice writes what it rounds into `module`."""

    def advance(done: float) -> None:
        progress("compress encoder", done)

    options, calibration, config = job.options, job.calibration, job.checkpoint.config
    if not options.encoder.compressed:
        return coreml.NOT_COMPRESSED
    advance(0.0)
    if calibration is None or options.encoder.precision != "mixed":
        return compress.uniform(module, options.encoder.precision, advance)
    pixels = calibration_pixels(calibration, config.vision, config.image_aspect_ratio)
    chosen = mixed(module, pixels, options.encoder.bits_per_weight, advance)
    record = {"sha256": calibration.digest, "skipped": list(calibration.skipped)}
    return replace(chosen, calibration=record)


def _check_layout(bundle: Bundle, encoder: _ExportedEncoder) -> None:
    if encoder.package is None:
        mlx.check_mlx(bundle)
    else:
        app.check_app(bundle, encoder.package)


def counted(progress: Progress, total: int) -> Callable[[int], None]:
    """A callback for bytes of the language model just written."""
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        progress("language model", written / total)

    progress("language model", 0.0)
    return advance


def check_overlap(destination: Path, sources: Iterable[Path]) -> None:
    """Raises DestinationError: it is a directory of what the bundle is made from, or around one."""
    target = destination.resolve()
    for directory in sources:
        source = directory.resolve()
        if target == source or source in target.parents or target in source.parents:
            raise DestinationError(
                f"{destination} overlaps its source {directory}, which is never written to: "
                "choose a directory of its own"
            )


def _check_space(directory: Path, job: Job) -> None:
    options = job.options
    parameters = job.checkpoint.encoder_parameters
    encoder = int(parameters * options.encoder.bits_per_weight / 8 * UNCOMPRESSED_SHARE)
    if options.destination.layout == "mlx":
        encoder = 0  # in the language model's files
    language = job.llm_bytes
    if options.llm.method != "rtn":
        language *= 2  # what is calibrated waits beside what is written
    if options.llm.method == "dwq":
        language += sum(prod(spec.shape) for spec in job.checkpoint.llm_specs)  # codes, unpacked
    # coremltools writes the encoder's weights twice, before there is a language model; where there
    # are several sizes, beside a package of each.
    others = len(options.encoder.other_sizes)
    copies = others + 2 if others else 1
    after = max(language, copies * encoder)
    needed = encoder + after + PACKAGE_OVERHEAD_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DestinationError(
            f"{directory} has {free / 1e6:,.0f} MB free and the bundle needs "
            f"{needed / 1e6:,.0f} MB: make room, or choose another disk"
        )
