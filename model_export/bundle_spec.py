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
class Job:
    """What a bundle is to be made of, and what it is judged by.

    Attributes:
        checkpoint: the configuration, the encoder's weights, and what the gates compare with.
        calibration: what measuring and calibrating look at, where anything does.
        source: the bundle that has the language model that they compare with, if it is not the
            checkpoint's files.
        tokenizer: of the checkpoint, with `<image>`.
        chosen: each matrix's format.
        options: as the manifest records them.
        limits: the options that the gates judge by.
        llm_bytes: what `write_llm` will write, headers left out.
        write_llm: into a directory; there are minutes of work in it where a method is used.
        own_gates: of the tensors that were written, and how.
        origin: the manifest's sections on where the bundle comes from.
        remedy: what to do about a failed gate.
    """

    checkpoint: Checkpoint
    calibration: Calibration | None
    source: Bundle | None
    tokenizer: ExportedTokenizer
    chosen: Scheme
    options: ExportOptions
    limits: ExportOptions
    llm_bytes: int
    write_llm: Callable[[Path, Progress], Written]
    own_gates: Callable[[Bundle, Written], list[Gate]]
    origin: Callable[[], dict[str, Any]]
    remedy: str


@dataclass(frozen=True)
class Written:
    """The language model's files, what the manifest says of how they were found, and what the user
    should be told."""

    summary: Summary
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()
