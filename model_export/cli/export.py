"""`fastvlm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastvlm_mlx.cli.common import (
    Base,
    Json,
    MaxKl,
    MinAgreement,
    MinSnr,
    Revision,
    needs_export_extra,
    print_json,
)

# What is no field of ExportOptions.
OWN = ("checkpoint", "out", "base", "revision", "as_json")


def export(
    call: typer.Context,
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint's directory, an adapter's, or a hub id.")
    ],
    out: Annotated[Path, typer.Argument(help="Where the bundle appears.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="phone, balanced or exact: a set of options, each of which may be given too."
        ),
    ] = None,
    llm_bits: Annotated[
        int | None,
        typer.Option(help="Bits of the LLM's weights: 2, 3, 4, 5, 6, 8; 16 leaves them. Else 8."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale: 32, 64 or 128. Else 64.")
    ] = None,
    llm_mode: Annotated[
        str | None,
        typer.Option(help="affine (default), or mxfp4, mxfp8, nvfp4, which have their own bits."),
    ] = None,
    embed_bits: Annotated[int | None, typer.Option(help="Of the embedding alone.")] = None,
    head_bits: Annotated[int | None, typer.Option(help="Of an untied head alone.")] = None,
    projector_bits: Annotated[int | None, typer.Option(help="Of the projector; else 16.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Bits by layer: a JSON file, or mixed_2_6, _3_4, _3_6, _4_6."),
    ] = None,
    llm_bpw: Annotated[
        float | None, typer.Option(help="Bits per weight: finds which layers need how many.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="rtn (default) rounds; awq, gptq, dwq look at calibration data to lose less."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="What is looked at: a directory of images, or a JSONL file."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Type of what is not quantized: float16 (default), bfloat16 or float32."),
    ] = None,
    encoder_precision: Annotated[
        str | None,
        typer.Option(
            help="Core ML encoder: fp16 (default), fp32, int8, palette6, palette4 or mixed."
        ),
    ] = None,
    encoder_bpw: Annotated[
        float | None, typer.Option(help="Bits per weight of a mixed encoder; 6 unless given.")
    ] = None,
    deployment_target: Annotated[
        str | None,
        typer.Option(help="First iOS that loads the encoder: iOS15 to iOS18; else the lowest."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="Who loads it: app (default; Core ML encoder), mlx (mlx-vlm, Swift)."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Input size in pixels, a multiple of 64; else its own.")
    ] = None,
    image_sizes: Annotated[
        str | None,
        typer.Option(help="Several in one encoder that share the weights: 512,1024."),
    ] = None,
    image_input: Annotated[
        bool,
        typer.Option("--image-input", help="The encoder takes images (ImageType), no arrays."),
    ] = False,
    base: Base = None,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    allow_failed_gates: Annotated[
        bool, typer.Option("--allow-failed-gates", help="Keep a bundle that fails its check.")
    ] = False,
    min_snr_db: MinSnr = None,
    max_kl_nats: MaxKl = None,
    min_agreement: MinAgreement = None,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into a verified bundle for the app, a Mac and Linux."""
    with needs_export_extra():
        from model_export.options import ExportOptions, parse_sizes
        from model_export.pipeline import export as run

    from fastvlm_mlx.cli import show

    given = {k: v for k, v in call.params.items() if v is not None and k not in OWN}
    if image_sizes is not None:
        given["image_sizes"] = parse_sizes(image_sizes)
    with show.stages() as progress:
        result = run(
            checkpoint, out, ExportOptions.of(**given), progress, base=base, revision=revision
        )
    for note in result.notes:
        show.note(note)
    if as_json:
        print_json({"bundle": str(out), **result.manifest})
    else:
        show.print_bundle(show.inspect_bundle(out))
    show.note_padding(out)
