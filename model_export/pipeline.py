"""The export of a checkpoint: what is asked for becomes a specification, and that a bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.extras import needs_extra
from model_export.build import build
from model_export.bundle_spec import BundleSpec, WrittenLLM
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import ExportedTokenizer, export_tokenizer, extended
from model_export.destination.destination import check_overlap, check_replaceable, resolve
from model_export.gates import equality
from model_export.gates.gate import Gate
from model_export.interruption import ONE_AT_A_TIME, Progress, counted, interruptible
from model_export.language import llm, recipes
from model_export.language.recipes import Scheme
from model_export.options import ExportOptions
from model_export.quantization.bits import search
from model_export.quantization.rounding import layerwise
from model_export.results import ExportResult
from model_export.samples.calibration import Calibration, load_calibration

DEFAULTS = ExportOptions()


@needs_extra()
def export(
    checkpoint: str | Path,
    destination: str | Path,
    options: ExportOptions = DEFAULTS,
    progress: Progress | None = None,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
) -> ExportResult:
    """Turn a checkpoint into a bundle at `destination`, checked by every gate.

    Args:
        checkpoint: a directory or a hub id of a checkpoint, an adapter or a projector.
        destination: a directory that does not exist, or with `overwrite` one that holds a bundle.
        options: what is asked for; `ExportOptions.of(llm_bits=4)` takes the command line's names.
        progress: called with each stage's name and, where it is known, the share that is done.
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
        size = options.encoder.default_size
        source = Checkpoint(checkpoint, base=base, revision=revision, image_size=size)
        check_overlap(place.path, source.directories)
        return build(_spec(source, options, stage), place, stage)


def _spec(checkpoint: Checkpoint, options: ExportOptions, progress: Progress) -> BundleSpec:
    """Decide all that can be decided before anything is written."""
    # Reads the checkpoint's tokenizer, so that nothing is written if there is none.
    tokenizer = export_tokenizer(checkpoint)
    checkpoint = extended(checkpoint, tokenizer.tokenizer, tokenizer.image_token_id + 1)
    calibration: Calibration | None = None
    notes: tuple[str, ...] = ()
    if options.calibrates:
        calibration = load_calibration(options.calibration, checkpoint.config.vision)
        notes = tuple(calibration.notes())
    facts: dict[str, Any] = {}
    if calibration and options.llm.bpw is not None:
        result = search.search(
            checkpoint, tokenizer, calibration, options, options.llm.bpw, progress
        )
        formats, facts = result.scheme, {"search": result.to_dict()}
        notes += tuple(result.notes())
    else:
        layout = options.destination.layout
        formats = recipes.scheme(checkpoint.llm_specs, checkpoint.config, options.llm, layout)
    if options.llm.method != "rtn":
        layerwise.check(formats, options.llm.method)
    model = _LanguageModel(checkpoint, tokenizer, calibration, formats, options, facts, notes)
    return BundleSpec(
        checkpoint=checkpoint,
        calibration=calibration,
        source_bundle=None,
        tokenizer=tokenizer,
        formats=formats,
        options=options,
        gate_options=options,
        llm_bytes=model.bytes,
        write_llm=model.write,
        tensor_gates=model.gates,
        provenance=lambda: {"source": checkpoint.source()},
        advice="choose more bits",
    )


@dataclass(frozen=True)
class _LanguageModel:
    """The language model of an export: how it is written, and how its tensors are checked.

    Attributes:
        facts, notes: what is known of it before it is written, as in `WrittenLLM`.
    """

    checkpoint: Checkpoint
    tokenizer: ExportedTokenizer
    calibration: Calibration | None
    formats: Scheme
    options: ExportOptions
    facts: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        layout, dtype = self.options.destination.layout, self.options.llm.dtype
        return llm.total_bytes(self.checkpoint, self.formats, layout, dtype)

    def write(self, directory: Path, progress: Progress) -> WrittenLLM:
        """Cast or round every tensor into `directory`, or write what a method made of it."""
        write = self._writer(directory)
        if self.calibration is None or self.options.llm.method == "rtn":
            return WrittenLLM(write(counted(progress, self.bytes)), self.facts, self.notes)
        # What the method makes waits there; it is gone before the bundle is complete.
        with tempfile.TemporaryDirectory(dir=directory) as waiting:
            made = layerwise.quantize(
                self.checkpoint,
                self.tokenizer,
                self.calibration,
                self.formats,
                self.options,
                Path(waiting),
                progress,
            )
            hashes = equality.hash_tensors(made.ready)
            summary = write(counted(progress, self.bytes), made.ready)
        facts = self.facts | {"calibration": made.facts, equality.TENSORS: hashes}
        return WrittenLLM(summary, facts, (*self.notes, *made.notes))

    def gates(self, bundle: Bundle, written: WrittenLLM) -> list[Gate]:
        """Compare every tensor with the checkpoint's, bit by bit."""
        dtype = getattr(torch, self.options.llm.dtype)
        made = equality.Made(self.formats, dtype, written.facts.get(equality.TENSORS, {}))
        return [equality.tensor_gate(self.checkpoint, bundle, made)]

    def _writer(self, directory: Path) -> Callable[..., llm.Summary]:
        layout, dtype = self.options.destination.layout, self.options.llm.dtype
        return partial(llm.write, self.checkpoint, self.formats, layout, dtype, directory)
