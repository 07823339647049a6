"""`fastvlm compare` and `fastvlm sweep`: the verbs, and what they print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm_mlx.bundle.files import left_behind
from fastvlm_mlx.cli.common import print_json

if TYPE_CHECKING:
    from model_export.comparison.compare import Row

Questions = Annotated[
    str | None,
    typer.Option(help="A directory of images, or JSON lines of image, prompt and answer."),
]
Count = Annotated[int, typer.Option(help="How many of the scenes' questions, at least.")]
Plot = Annotated[
    Path | None, typer.Option(help="Draw size against loss into this file (.png, .svg, .pdf).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def compare(
    paths: Annotated[
        list[str], typer.Argument(metavar="A B [C…]", help="Bundles, checkpoints or hub ids.")
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="What all are held to; else a checkpoint among them, or the largest."),
    ] = None,
    questions: Questions = None,
    count: Count = 200,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Hold bundles and checkpoints to one of them: sizes, losses, answers changed."""
    from fastvlm_mlx.cli import show
    from model_export.comparison import plot as chart
    from model_export.comparison.compare import compare as run
    from model_export.comparison.sweep import RESULTS

    if plot is not None:
        chart.check(plot)
    # What a sweep leaves beside its bundles, which `sweep/*` names too.
    models = [p for p in paths if (name := Path(p).name) != RESULTS and not left_behind(name)]
    with show.stages() as progress:
        rows = run(models, reference, questions, count, progress)
    _deliver(rows, plot, as_json, {})


def sweep(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's directory, or a hub id.")],
    out: Annotated[Path, typer.Option(help="Where the bundles and sweep.json are kept.")],
    layout: Annotated[str, typer.Option(help="As for export.")] = "app",
    choices: Annotated[
        Path | None, typer.Option(help='A JSON file: {"name": {"llm_bits": 4}, …}; else our own.')
    ] = None,
    questions: Questions = None,
    count: Count = 200,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Export a checkpoint in many ways and compare them all; run again, it goes on."""
    from fastvlm_mlx.cli import show
    from model_export.comparison import plot as chart
    from model_export.comparison.sweep import read_choices
    from model_export.comparison.sweep import sweep as run

    if plot is not None:
        chart.check(plot)
    wanted = read_choices(choices, layout)
    with show.stages() as progress:
        rows, refused = run(checkpoint, out, wanted, layout, questions, count, progress)
    _deliver(rows, plot, as_json, {"refused": refused})
    for name, reason in refused.items():
        show.note(f"{name}: {reason}")


def _deliver(rows: list[Row], plot: Path | None, as_json: bool, more: dict[str, Any]) -> None:
    from model_export.comparison import plot as chart

    if plot is not None:
        chart.draw(rows, plot)
    if as_json:
        print_json({"rows": [row.to_dict() for row in rows], **more})
    else:
        print_rows(rows)


def print_rows(rows: list[Row]) -> None:
    """A row for each model; • stands before what no other is both smaller and nearer than."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from fastvlm_mlx.errors import printable

    right = ("encoder", "LLM", "bpw", "SNR", "LLM KL", "KL", "median", "sd", "top-1", "changed")
    table = Table(
        Column("", no_wrap=True),
        Column("", no_wrap=True),
        *(Column(name, justify="right", no_wrap=True) for name in right),
        box=None,
        pad_edge=False,
    )
    for row in rows:
        # The name is a path, which may hold what rich would take for markup.
        table.add_row("•" if row.best else "", Text(printable(row.name)), *_cells(row))
    # Wider than the terminal rather than cut.
    width = Console(width=1000).measure(table).maximum
    Console(width=max(Console().width, width), highlight=False).print(table)


def _cells(row: Row) -> list[str]:
    from fastvlm_mlx.cli.show import shown_bytes

    sizes = [shown_bytes(row.bytes["encoder"]), shown_bytes(row.bytes["llm"])]
    sizes.append(f"{row.bits_per_weight:.2f}")
    if row.reference:
        return [*sizes, "reference", "", "", "", "", "", f"of {row.questions}"]
    losses = [row.llm_kl_nats, row.kl_nats, row.kl_median_nats, row.kl_deviation_nats]
    return [
        *sizes,
        f"{row.snr_db:.1f} dB" if row.snr_db is not None else "equal",
        *("" if loss is None else f"{loss:.1e}" for loss in losses),
        f"{row.agreement:.2%}",
        str(row.changed),
    ]
