"""`fastvlm export`: the verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastvlm_mlx.cli.common import Json, option, print_json
from model_export.cli.options import (
    BUNDLE,
    Base,
    CalibrationSet,
    CheckpointReference,
    DeploymentTarget,
    Dtype,
    EmbedBits,
    EncoderBpw,
    EncoderPrecision,
    GroupSize,
    HeadBits,
    ImageInput,
    ImageSize,
    ImageSizes,
    Layout,
    LlmBits,
    LlmBpw,
    LlmMode,
    MaxKl,
    Method,
    MinAgreement,
    MinSnr,
    Out,
    Overwrite,
    Preset,
    ProjectorBits,
    Recipe,
    Revision,
    export_options,
)

# What is no field of ExportOptions.
OWN = ("checkpoint", "out", "base", "revision", "as_json")


def export(
    call: typer.Context,
    checkpoint: CheckpointReference,
    out: Out,
    preset: Preset = None,
    layout: Layout = None,
    overwrite: Overwrite = False,
    allow_failed_gates: Annotated[
        bool,
        option(
            "Put a bundle that fails its check at OUT all the same; its manifest says so.",
            "--allow-failed-gates",
            group=BUNDLE,
        ),
    ] = False,
    llm_bits: LlmBits = None,
    llm_bpw: LlmBpw = None,
    group_size: GroupSize = None,
    llm_mode: LlmMode = None,
    embed_bits: EmbedBits = None,
    head_bits: HeadBits = None,
    projector_bits: ProjectorBits = None,
    recipe: Recipe = None,
    method: Method = None,
    calibration: CalibrationSet = None,
    dtype: Dtype = None,
    encoder_precision: EncoderPrecision = None,
    encoder_bpw: EncoderBpw = None,
    deployment_target: DeploymentTarget = None,
    image_size: ImageSize = None,
    image_sizes: ImageSizes = None,
    image_input: ImageInput = False,
    base: Base = None,
    revision: Revision = None,
    min_snr_db: MinSnr = None,
    max_kl_nats: MaxKl = None,
    min_agreement: MinAgreement = None,
    as_json: Json = False,
) -> None:
    """The bundle appears at OUT complete and checked, or not at all. Every export ends in gates:
    what was written is compared with the checkpoint, and the figures of that with limits. `fastvlm
    plan` takes the same options and predicts what the bundle needs."""
    from fastvlm_mlx.cli import show
    from fastvlm_mlx.inspection import inspect_bundle
    from model_export.cli import early

    options = export_options(call.params, OWN)
    early.check_export(checkpoint, out, options, base=base, revision=revision)
    from model_export.pipeline import export as run

    with show.stages() as progress:
        result = run(checkpoint, out, options, progress, base=base, revision=revision)
    for note in result.notes:
        show.note(note)
    if as_json:
        print_json({"bundle": str(out), **result.manifest})
    else:
        show.print_facts(inspect_bundle(out))
    note_padding(out)


def note_padding(path: Path) -> None:
    """Tell the user if mlx-vlm, which pads every image, will not answer as the checkpoint does."""
    from fastvlm_mlx.bundle.bundle import Bundle
    from fastvlm_mlx.cli import show

    bundle = Bundle.open(path)
    ratio = bundle.config.image_aspect_ratio
    if bundle.layout == "mlx" and ratio != "pad":
        show.note(
            f"image_aspect_ratio is {ratio!r} and mlx-vlm pads every image: its answers about "
            "images that are not square will differ from the checkpoint's and from fastvlm's"
        )
