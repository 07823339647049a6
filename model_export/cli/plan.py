"""`fastvlm plan`: the verb, and what it prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm_mlx.cli.common import needs_export_extra, print_json

if TYPE_CHECKING:
    from rich.console import Console

Whole = Annotated[int | None, typer.Option(help="As for export.")]
Word = Annotated[str | None, typer.Option(help="As for export.")]


def plan(
    context_of_call: typer.Context,
    path: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="A checkpoint's or a bundle's directory, or a hub id."
        ),
    ],
    device: Annotated[
        str | None, typer.Option(help="A phone, or a Mac by its chip: iphone-16-pro, m4. Else all.")
    ] = None,
    preset: Word = None,
    llm_bits: Whole = None,
    llm_bpw: Annotated[float | None, typer.Option(help="As for export.")] = None,
    group_size: Whole = None,
    llm_mode: Word = None,
    embed_bits: Whole = None,
    head_bits: Whole = None,
    projector_bits: Whole = None,
    recipe: Word = None,
    method: Word = None,
    calibration: Word = None,
    dtype: Word = None,
    encoder_precision: Word = None,
    encoder_bpw: Annotated[float | None, typer.Option(help="As for export.")] = None,
    deployment_target: Word = None,
    layout: Word = None,
    image_size: Whole = None,
    image_sizes: Word = None,
    image_input: Annotated[bool, typer.Option("--image-input", help="As for export.")] = False,
    base: Word = None,
    revision: Word = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens in the KV cache; 2048 if the model has as many.")
    ] = None,
    kv_bits: Annotated[int | None, typer.Option(help="Of a quantized KV cache: 4 or 8.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Foresee memory, time to the first token and speed on a device, without exporting."""
    with needs_export_extra():
        from model_export.options import ExportOptions, parse_sizes
        from model_export.planning.plan import run

    own = ("path", "device", "base", "revision", "context", "kv_bits", "as_json")
    # An option that is not given is None, a flag False.
    given = {
        name: value
        for name, value in context_of_call.params.items()
        if value is not None and value is not False and name not in own
    }
    if image_sizes is not None:
        given["image_sizes"] = parse_sizes(image_sizes)
    options = ExportOptions.of(**given) if given else None
    plans = run(
        path, device, options, base=base, revision=revision, context=context, kv_bits=kv_bits
    )
    if as_json:
        print_json({"path": path, "devices": plans})
        return
    from rich.console import Console

    if device is None:
        print_plans(plans, Console())
    else:
        print_plan(plans[0], Console())


def print_plan(plan: dict[str, Any], out: Console) -> None:
    """A forecast as `plan` shows it: memory by part, limits, times, and what would make it fit."""
    from rich.table import Table

    from fastvlm_mlx.cli.show import shown_bytes

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
    out.print(table, soft_wrap=True)
    if not plan["fits"]:
        changes = " or ".join(plan["remedies"])
        out.print(
            f"It fits with {changes}."
            if changes
            else "No bits and no context make it fit: take another device or a smaller model.",
            highlight=False,
            soft_wrap=True,
        )


def print_plans(plans: list[dict[str, Any]], out: Console) -> None:
    """A row for each device."""
    from rich.table import Column, Table

    from fastvlm_mlx.cli.show import shown_bytes

    out.print(
        f"{shown_bytes(plans[0]['memory_bytes']['total'])} resident with "
        f"{plans[0]['context']:,} tokens of context, prompts of {plans[0]['prompt_tokens']:,}",
        highlight=False,
        soft_wrap=True,
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
    out.print(table, soft_wrap=True)


def _milliseconds(seconds: float | None) -> str:
    return "no rate published" if seconds is None else f"{seconds * 1000:,.1f} ms"
