"""`fastvlm bench`: the verb, and its table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm_mlx.cli.common import OUTPUT, Json, Model, option, print_json, resolve
from fastvlm_mlx.cli.options import COMPUTE_UNITS, ENCODER_COMPUTES

if TYPE_CHECKING:
    from fastvlm_mlx.bench.measure import Comparison, Row
    from fastvlm_mlx.bench.settings import Plan

ASKED, MEASURED = "What is asked", "How it is measured"


def bench(
    call: typer.Context,
    model: Model,
    image: Annotated[
        Path | None,
        option(
            "The image to ask about.",
            group=ASKED,
            value="FILE",
            default="a generated one of 1600×1200",
        ),
    ] = None,
    image_sizes: Annotated[
        str | None,
        option(
            "The encoder's input sizes in pixels, with commas between them.",
            group=ASKED,
            value="PIXELS,…",
            default="the bundle's own",
        ),
    ] = None,
    prompt_tokens: Annotated[
        str,
        option(
            "The tokens that the question has, with commas between several numbers.",
            group=ASKED,
            value="N,…",
        ),
    ] = "32",
    max_tokens: Annotated[
        int,
        option("Decode exactly this many tokens; end tokens are ignored.", group=ASKED, value="N"),
    ] = 64,
    runs: Annotated[
        int, option("Measure so often at each setting.", group=MEASURED, value="N")
    ] = 5,
    warmup: Annotated[
        int, option("Run so often before that, without measuring.", group=MEASURED, value="N")
    ] = 1,
    against: Annotated[
        str | None,
        option(
            "Measure another model in turns with this one, and compare them.",
            group=MEASURED,
            value="MODEL",
        ),
    ] = None,
    compute_units: Annotated[
        str,
        option(
            f"Where Core ML runs the encoder, on macOS only: some of {', '.join(COMPUTE_UNITS)}, "
            "with commas between them.",
            group=MEASURED,
            value="UNITS,…",
        ),
    ] = "auto",
    encoder_compute: Annotated[
        str,
        option(
            "What torch computes the encoder in, on Linux; as for generate.",
            group=MEASURED,
            choices=ENCODER_COMPUTES,
        ),
    ] = "auto",
    plot: Annotated[
        Path | None,
        option(
            "Draw the stages as bars into a PNG, SVG or PDF; needs the export extra.",
            group=OUTPUT,
            value="FILE",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """The table has the time to the first token (TTFT) by stage, the TTFT of a second question
    about the same image, tokens per second, loading, and the peak of memory. Each number is a
    median; in brackets stand the quartiles, between which half of the runs lie. Each setting has a
    process of its own, and each run an image that is new. After Ctrl-C the table has what was
    measured."""
    from fastvlm_mlx import plotting
    from fastvlm_mlx.bench import environment, measure, settings
    from fastvlm_mlx.cli import show

    sizes = settings.numbers("--image-sizes", image_sizes) if image_sizes is not None else (None,)
    if plot is not None:
        plotting.check(plot)
    bundles = tuple(resolve(call, one) for one in (model, against) if one is not None)
    plan = settings.Plan(
        bundles=bundles,
        image=image,
        image_sizes=sizes,
        prompt_tokens=settings.numbers("--prompt-tokens", prompt_tokens),
        compute_units=settings.names("--compute-units", compute_units, COMPUTE_UNITS),
        max_tokens=max_tokens,
        runs=runs,
        warmup=warmup,
        encoder_compute=encoder_compute,
    )
    measure.check(plan)
    # Before, so that the load average is that of the others.
    described = environment.describe()
    rows: list[Row] = []
    try:
        with show.stages() as progress:
            for row in measure.measure(plan, progress):
                if rows and row.setting != rows[-1].setting:
                    _tell([each for each in rows if each.setting == rows[-1].setting])
                rows.append(row)
    finally:
        measured = [row for row in rows if row.runs]
        # An error's sentence stands alone; what was measured before an interruption is shown.
        if measured and isinstance(sys.exception(), KeyboardInterrupt | None):
            _deliver(plan, described, measured, plot, as_json=as_json)


def _tell(rows: Sequence[Row]) -> None:
    """What was measured at a setting, while the next one is measured."""
    from fastvlm_mlx.bench.measure import shown
    from fastvlm_mlx.cli import show

    for row in rows:
        name = f"{row.bundle}, " if len(rows) > 1 else ""
        ttft, speed = row.spread("ttft_s").text(), row.spread("tokens_per_s").text(1)
        show.note(f"{name}{shown(row.setting)}: TTFT {ttft} s, {speed} tokens/s")


def _deliver(
    plan: Plan,
    described: dict[str, Any],
    rows: Sequence[Row],
    plot: Path | None,
    *,
    as_json: bool,
) -> None:
    from fastvlm_mlx import plotting
    from fastvlm_mlx.bench import environment
    from fastvlm_mlx.bench import plot as chart
    from fastvlm_mlx.bench.measure import compare

    comparisons = compare(list(rows))
    if plot is not None:
        plotting.save(chart.chart(rows), plot)
    if as_json:
        from fastvlm_mlx.bench.subject import GENERATED_NAME

        print_json(
            {
                "machine": described,
                "image": str(plan.image) if plan.image else GENERATED_NAME,
                "runs": plan.runs,
                "warmup": plan.warmup,
                "rows": [row.to_dict() for row in rows],
                "against": [one.to_dict() for one in comparisons],
            }
        )
        return
    print(environment.sentence(described))
    print()
    _print_rows(rows)
    if comparisons:
        print()
        _print_comparisons(plan, comparisons, rows)


def _print_rows(rows: Sequence[Row]) -> None:
    from fastvlm_mlx.bench.measure import STAGES

    several = len(rows) > len({row.setting for row in rows})
    header = [*(["bundle"] if several else []), "image", "text", "units", "runs", "load s"]
    header += [stage.replace("_s", " s") for stage in STAGES]
    header += ["TTFT s", "next TTFT s", "tokens/s", "peak GB"]
    cells = []
    for row in rows:
        last = row.runs[-1]
        cells.append(
            [
                *([str(row.bundle)] if several else []),
                f"{last['image_size']} px",
                str(last["text_tokens"]),
                row.setting.compute_units,
                str(len(row.runs)),
                f"{row.load_s:.2f}",
                *(f"{row.spread(stage).median:.3f}" for stage in STAGES),
                row.spread("ttft_s").text(),
                row.spread("next_ttft_s").text(),
                row.spread("tokens_per_s").text(1),
                f"{row.peak_memory_bytes / 1e9:.2f}",
            ]
        )
    _print_table(header, cells)
    for part, name in (("encoder", "encoder"), ("language model", "compute")):
        print(f"{part}: {', '.join(sorted({row.runs[-1][name] for row in rows}))}")


def _print_comparisons(plan: Plan, comparisons: Sequence[Comparison], rows: Sequence[Row]) -> None:
    from fastvlm_mlx.errors import printable

    shown = ("ttft_s", "next_ttft_s", "encode_s", "prefill_s", "decode_s")
    names = ("TTFT", "next TTFT", "encode", "prefill", "decode")
    first, second = (printable(path) for path in plan.bundles)
    print(f"How many times as fast {first} is as {second}, and its share of that one's memory:")
    cells = []
    for one in comparisons:
        size = next(row.runs[-1]["image_size"] for row in rows if row.setting == one.setting)
        cells.append(
            [
                f"{size} px",
                str(one.setting.prompt_tokens),
                one.setting.compute_units,
                *(one.speed[name].text(2) if name in one.speed else "" for name in shown),
                f"{one.memory:.2f}",
            ]
        )
    _print_table(["image", "question", "units", *names, "peak"], cells)


def _print_table(header: Sequence[str], cells: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from fastvlm_mlx.cli import show
    from fastvlm_mlx.errors import printable

    table = Table(
        *(Column(name, justify="right", no_wrap=True) for name in header),
        box=None,
        pad_edge=False,
    )
    for row in cells:
        table.add_row(*(Text(printable(cell)) for cell in row))
    # Wider than the terminal rather than cut.
    width = Console(width=1000).measure(table).maximum
    show.print_table(table, max(Console().width, width))
