"""A bundle is made beside its destination, checked by every gate, and appears there whole."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from fastvlm_mlx.bundle.bundle import PACKAGE, Bundle
from fastvlm_mlx.bundle.manifest import MANIFEST
from fastvlm_mlx.bundle.schema import to_json
from fastvlm_mlx.errors import GateError
from model_export.bundle_spec import BundleSpec, WrittenLLM
from model_export.checkpoint.licenses import copy_licenses
from model_export.destination.destination import Destination, appearing
from model_export.destination.failed import keep_failed
from model_export.encoder.references import Reference
from model_export.encoder_package import export_package, folded, source_features
from model_export.gates import equality
from model_export.gates.answers import answer_gates
from model_export.gates.encoder import gates_of_sizes
from model_export.gates.gate import Gate
from model_export.interruption import Progress
from model_export.layouts.dispatch import check_layout, write_configs
from model_export.manifest import make_manifest
from model_export.results import ExportResult
from model_export.space import check_space

# By input size, what the source's encoder makes of the gates' images.
References = dict[int, list[Reference]]


def build(spec: BundleSpec, destination: Destination, progress: Progress) -> ExportResult:
    """Make the bundle beside `destination`, check it, and put it there.

    Raises:
        CheckpointError, OptionError: the weights can't be written as they are asked for.
        DestinationError: the disk is full, or `destination` can't be written.
        GateError: a figure fell short, and `allow_failed_gates` is off.
    """
    with appearing(destination) as directory:
        check_space(destination.path.parent, spec)
        _write_small_files(spec, directory)
        references = source_features(spec, progress)
        # An `mlx` bundle's encoder is written with the language model.
        package = None
        if spec.layout == "app":
            package = export_package(spec, directory / PACKAGE, progress)
        written = spec.write_llm(directory, progress)
        bundle = Bundle.open(directory)
        progress("check layout", None)
        check_layout(bundle, package)
        gates = _run_gates(spec, bundle, references, written, progress)
        progress("manifest", None)
        written = _with_merged_hashes(spec, bundle, written)
        manifest = make_manifest(spec, package, written, gates, directory)
        (directory / MANIFEST).write_text(to_json(manifest) + "\n", encoding="utf-8")
        failed = [gate for gate in gates if not gate.passed]
        if failed and not spec.gate_options.destination.allow_failed_gates:
            kept = keep_failed(directory, destination.path)
            raise _refusal(failed, len(gates), kept, spec.advice)
    notes = (*spec.tokenizer.notes, *written.notes)
    return ExportResult(destination.path, manifest, tuple(gates), notes)


def _write_small_files(spec: BundleSpec, directory: Path) -> None:
    """Write everything but the weights."""
    checkpoint, dtype = spec.checkpoint, spec.options.llm.dtype
    spec.tokenizer.save(directory)
    write_configs(checkpoint, spec.tokenizer, spec.formats, spec.layout, dtype, directory)
    copy_licenses(checkpoint.directories, directory)


def _run_gates(
    spec: BundleSpec,
    bundle: Bundle,
    references: References,
    written: WrittenLLM,
    progress: Progress,
) -> list[Gate]:
    """Compare what was written with the source."""
    checkpoint, options = spec.checkpoint, spec.gate_options
    progress("check tensors", None)
    exact = [equality.settings_gate(checkpoint, bundle), *spec.tensor_gates(bundle, written)]
    progress("check encoder", None)
    fold = partial(folded, checkpoint)
    gates, features = gates_of_sizes(bundle, fold, references, options)
    progress("check answers", None)
    gates += answer_gates(
        checkpoint,
        bundle,
        spec.tokenizer.tokenizer,
        references[checkpoint.config.vision.image_size],
        features,
        options,
        spec.source_bundle,
        is_plain=options.llm.method == "rtn" and all(gate.passed for gate in exact),
    )
    return gates + exact


def _with_merged_hashes(spec: BundleSpec, bundle: Bundle, written: WrittenLLM) -> WrittenLLM:
    """The hashes of tensors that an adapter was merged into: who verifies the bundle may merge
    them with other last bits."""
    if spec.source_bundle is not None:
        return written
    merged = equality.merged_hashes(spec.checkpoint, bundle)
    if not merged:
        return written
    hashes = merged | written.facts.get(equality.TENSORS, {})
    return replace(written, facts=written.facts | {equality.TENSORS: hashes})


def _refusal(failed: list[Gate], count: int, kept: Path, advice: str) -> GateError:
    figures = "; ".join(gate.sentence() for gate in failed)
    return GateError(
        f"the bundle failed {len(failed)} of its {count} gates ({figures}) and is kept at "
        f"{kept}: rename it to use it as it is, judge it again with `fastvlm verify {kept} "
        f"--checkpoint …` and limits of your own, or {advice}",
        figures,
    )
