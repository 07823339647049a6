"""`fastvlm plan`: the verb, and what it prints."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fastvlm_mlx.cli.common import Json, argument, option, print_json
from model_export.cli.options import (
    Base,
    CalibrationSet,
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
    Method,
    Preset,
    ProjectorBits,
    Recipe,
    Revision,
    fields,
)

DEVICE = "Device"
# What is no field of ExportOptions.
OWN = ("path", "device", "base", "revision", "context", "kv_bits", "as_json")


def plan(
    call: typer.Context,
    path: Annotated[
        str,
        argument("CHECKPOINT", "The directory of a checkpoint or of a bundle, or a hub id."),
    ],
    device: Annotated[
        str | None,
        option(
            "A phone, or a Mac by its chip, such as iphone-16-pro or m4.",
            group=DEVICE,
            value="NAME",
            default="all that are known",
        ),
    ] = None,
    context: Annotated[
        int | None,
        option(
            "How many tokens the KV cache holds.",
            group=DEVICE,
            value="TOKENS",
            default="2048, or all that the model has",
        ),
    ] = None,
    kv_bits: Annotated[
        int | None,
        option("Quantize the KV cache to this many bits.", group=DEVICE, choices=(4, 8)),
    ] = None,
    preset: Preset = None,
    layout: Layout = None,
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
    as_json: Json = False,
) -> None:
    """It takes the options of `fastvlm export` and reads headers only. The prediction has the
    memory of each part, the limit of the device, the time to the first token, the tokens per
    second, and what would make the model fit if it does not."""
    from model_export.options import ExportOptions
    from model_export.planning.plan import run

    given = fields(call.params, OWN)
    options = ExportOptions.of(**given) if given else None
    plans = run(
        path, device, options, base=base, revision=revision, context=context, kv_bits=kv_bits
    )
    if as_json:
        print_json({"path": path, "devices": plans})
        return
    if device is None:
        print_plans(plans)
    else:
        print_plan(plans[0])


def print_plan(plan: dict[str, Any]) -> None:
    """A forecast as `plan` shows it: memory by part, limits, times, and what would make it fit."""
    from rich.table import Table

    from fastvlm_mlx.bundle.files import shown_bytes
    from fastvlm_mlx.cli import show

    table = Table(show_header=False, box=None, pad_edge=False)
    for key in ("device", "chip", "prompt_tokens", "context"):
        value = plan[key]
        table.add_row(key.replace("_", " "), f"{value:,}" if isinstance(value, int) else value)
    for part, size in plan["memory_bytes"].items():
        table.add_row(f"memory, {part}".replace("_", " "), shown_bytes(size))
    at_least = "at least " if plan["limit_at_least"] else ""
    for key in ("limit_bytes", "limit_with_entitlement_bytes"):
        if plan[key] is not None:
            name = key.removesuffix("_bytes").replace("_", " ")
            table.add_row(f"memory, {name}", at_least + shown_bytes(plan[key]))
    table.add_row("verdict", plan["verdict"])
    for key in ("encoder_s", "project_s", "prefill_s", "ttft_s"):
        table.add_row(key.removesuffix("_s").replace("ttft", "TTFT"), _milliseconds(plan[key]))
    speed = plan["tokens_per_s"]
    table.add_row("tokens per second", "no rate published" if speed is None else f"{speed:.0f}")
    show.print_table(table)
    if not plan["fits"]:
        changes = " or ".join(plan["remedies"])
        print(
            f"It fits with {changes}."
            if changes
            else "No bits and no context make it fit: take another device or a smaller model."
        )


def print_plans(plans: list[dict[str, Any]]) -> None:
    """A row for each device."""
    from rich.table import Column, Table

    from fastvlm_mlx.bundle.files import shown_bytes
    from fastvlm_mlx.cli import show

    print(
        f"{shown_bytes(plans[0]['memory_bytes']['total'])} resident with "
        f"{plans[0]['context']:,} tokens of context, prompts of {plans[0]['prompt_tokens']:,}"
    )
    columns = ("device", "chip", "verdict", "TTFT", "tok/s")
    table = Table(*(Column(name, no_wrap=True) for name in columns), box=None, pad_edge=False)
    for plan in plans:
        speed = plan["tokens_per_s"]
        table.add_row(
            plan["device"],
            plan["chip"],
            plan["verdict"],
            _milliseconds(plan["ttft_s"]),
            "no rate published" if speed is None else f"{speed:.0f}",
        )
    show.print_table(table)


def _milliseconds(seconds: float | None) -> str:
    return "no rate published" if seconds is None else f"{seconds * 1000:,.1f} ms"
