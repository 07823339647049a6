"""What a bundle is to be made of, as an export and a conversion each say it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.bundle import Bundle
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import ExportedTokenizer
from model_export.gates.gate import Gate
from model_export.interruption import Progress
from model_export.language.llm import Summary
from model_export.language.recipes import Scheme
from model_export.options import ExportOptions
from model_export.samples.calibration import Calibration


@dataclass(frozen=True)
class BundleSpec:
    """What a bundle is to be made of, and what it is judged by.

    Attributes:
        checkpoint: it gives the configuration and the encoder's weights, and the gates compare the
            bundle with it.
        calibration: the images that measuring and calibrating look at, where anything does.
        source_bundle: the bundle whose language model the gates compare with, where that is not
            the checkpoint's own.
        tokenizer: of the checkpoint, with `<image>`.
        formats: each matrix's format.
        options: as the manifest records them.
        gate_options: the options that the gates judge by.
        llm_bytes: what `write_llm` will write, headers left out.
        write_llm: writes the language model into a directory. It works for minutes where a method
            calibrates.
        tensor_gates: the gates that compare the tensors of the written bundle with their source.
        provenance: makes the manifest's sections on where the bundle comes from.
        advice: what to do about a failed gate.
    """

    checkpoint: Checkpoint
    calibration: Calibration | None
    source_bundle: Bundle | None
    tokenizer: ExportedTokenizer
    formats: Scheme
    options: ExportOptions
    gate_options: ExportOptions
    llm_bytes: int
    write_llm: Callable[[Path, Progress], WrittenLLM]
    tensor_gates: Callable[[Bundle, WrittenLLM], list[Gate]]
    provenance: Callable[[], dict[str, Any]]
    advice: str

    @property
    def layout(self) -> str:
        return self.options.destination.layout


@dataclass(frozen=True)
class WrittenLLM:
    """The language model's files.

    Attributes:
        summary: their sizes and names.
        facts: what the manifest's `llm` section says of how they were made.
        notes: what the user should be told.
    """

    summary: Summary
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()
