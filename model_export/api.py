"""`verify`, `compare` and `plan` for Python. They return dataclasses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.extras import needs_extra
from model_export.interruption import Progress
from model_export.options import ExportOptions, GateLimits
from model_export.results import VerifyResult

if TYPE_CHECKING:
    from model_export.comparison.compare import Row

OWN_LIMITS = GateLimits()


@dataclass(frozen=True)
class CompareResult:
    """The models that `compare` compared.

    Attributes:
        rows: one for each model, with its sizes and its losses compared with the reference.
    """

    rows: tuple[Row, ...]

    @property
    def reference(self) -> Row:
        """The model that all others are compared with."""
        return next(row for row in self.rows if row.reference)

    @property
    def best(self) -> tuple[Row, ...]:
        """The models for which no other is both smaller and nearer to the reference."""
        return tuple(row for row in self.rows if row.best)


@dataclass(frozen=True)
class DevicePlan:
    """What a bundle needs on a device, and how fast it will be there, from `plan`.

    Seconds and rates are None where a rate of the chip is not published.

    Attributes:
        device, chip: their names.
        memory_bytes: the memory that each part takes, and all of them in total.
        limit_bytes, limit_with_entitlement_bytes: what the system lets an app have; None where
            there is no limit for one app.
        limit_at_least: the limits are lower bounds.
        verdict: whether it fits, in words.
        fits: whether the bundle runs without being killed for memory.
        encoder_s, project_s, prefill_s, ttft_s: seconds of each step to the first token, and of all
            of them.
        tokens_per_s: tokens per second when the context is full.
        prompt_tokens: how many tokens an image with a question has.
        context: how many tokens the KV cache holds.
        kv_bits: the bits of a quantized KV cache, or None.
        remedies: the smallest changes of options that make it fit, if it does not.
    """

    device: str
    chip: str
    memory_bytes: dict[str, int]
    limit_bytes: int | None
    limit_with_entitlement_bytes: int | None
    limit_at_least: bool
    verdict: str
    fits: bool
    encoder_s: float | None
    project_s: float | None
    prefill_s: float | None
    ttft_s: float | None
    tokens_per_s: float | None
    prompt_tokens: int
    context: int
    kv_bits: int | None
    remedies: list[str]


@needs_extra()
def verify(
    bundle: str | Path,
    checkpoint: str | Path | None = None,
    limits: GateLimits = OWN_LIMITS,
    progress: Progress | None = None,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
) -> VerifyResult:
    """Repeat on a bundle what its export checked. A gate that fails raises nothing: see `passed`.

    Args:
        bundle: a directory.
        checkpoint: the one that the bundle was made from, a directory or a hub id. Without it the
            files and the layout are checked, and nothing is compared.
        limits: those that are given replace the gates' own.
        progress: called with each stage's name and, where it is known, the share that is done.
        base: the base of an adapter or a projector, if it is not the one that it names.
        revision: the branch, tag or commit of a hub id.

    Raises:
        BundleError: a file changed, the layout's rules are broken, or the bundle was made from
            another checkpoint.
        CheckpointError, ConfigError: the checkpoint is not a whole FastVLM.
        OptionError: limits, a base or a revision are given without a checkpoint.
    """
    from model_export.gates.verify import verify as run

    if checkpoint is None and (base or revision):
        raise OptionError("--base or --revision is given without --checkpoint: name that too")
    opened, gates = run(
        Path(bundle),
        checkpoint,
        asdict(limits),
        progress or _silent,
        base=base,
        revision=revision,
    )
    # The manifest does not list itself.
    files = None if opened.manifest is None else len(opened.files) - 1
    return VerifyResult(opened.path, opened.layout, files, tuple(gates))


@needs_extra()
def compare(
    models: Sequence[str | Path],
    reference: str | Path | None = None,
    progress: Progress | None = None,
    *,
    questions: str | Path | None = None,
    count: int = 200,
) -> CompareResult:
    """Measure the sizes of bundles and checkpoints, and what each loses compared with one of them.

    Args:
        models: directories of bundles and checkpoints, or hub ids of checkpoints.
        reference: the model that all are compared with; unless given, the first checkpoint among
            `models`, or else the largest bundle.
        progress: called with each stage's name and, where it is known, the share that is done.
        questions: a directory of images, or a file of JSON lines with image, prompt and answer;
            unless given, generated scenes, or a photograph for a large encoder.
        count: how many questions about the scenes are asked at least.

    Raises:
        OptionError: fewer than two models, or models of different shapes.
        BundleError, CheckpointError: one of them can't be read.
    """
    from model_export.comparison.compare import compare as run

    if isinstance(models, str | Path):
        raise OptionError(f"models is {str(models)!r}: expected a list of two or more")
    return CompareResult(tuple(run(models, reference, questions, count, progress or _silent)))


@needs_extra()
def plan(
    model: str | Path,
    device: str | None = None,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    context: int | None = None,
    kv_bits: int | None = None,
) -> list[DevicePlan]:
    """Predict memory and time on a device, without exporting.

    Args:
        model: the directory of a bundle or a checkpoint, or a checkpoint's hub id.
        device: a phone, or a Mac by its chip, as iphone-16-pro or m4; all known ones unless given.
        options: those of the export that a checkpoint would go through; a bundle takes none.
        progress: called with each stage's name and, where it is known, the share that is done.
        base: the base of an adapter or a projector, if it is not the one that it names.
        revision: the branch, tag or commit of a hub id.
        context: how many tokens the KV cache holds; 2048, or all that the model has, unless given.
        kv_bits: 4 or 8 quantizes the KV cache.

    Returns:
        A plan for each device.

    Raises:
        BundleError, CheckpointError, ConfigError, EncoderError: the model is not whole.
        OptionError: the device is not known, or the options don't fit the model.
    """
    from model_export.planning.plan import run

    (progress or _silent)("shapes", None)
    plans = run(
        model,
        device,
        options,
        base=None if base is None else str(base),
        revision=revision,
        context=context,
        kv_bits=kv_bits,
    )
    return [DevicePlan(**row) for row in plans]


def _silent(stage: str, done: float | None) -> None:
    """Report no progress."""
