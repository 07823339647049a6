"""`fastvlm compare`: the verb, and the table that it and `fastvlm sweep` print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastvlm_mlx.cli.common import Json, argument, option, print_json
from model_export.cli.options import QUESTIONS, Count, Plot, Questions

if TYPE_CHECKING:
    from model_export.comparison.compare import Row


def compare(
    paths: Annotated[
        list[str],
        argument("A B [C…]", "The directories of bundles and checkpoints, or hub ids of these."),
    ],
    reference: Annotated[
        str | None,
        option(
            "The bundle or checkpoint that all are compared with.",
            group=QUESTIONS,
            value="PATH",
            default="the first checkpoint among them, or the largest bundle",
        ),
    ] = None,
    questions: Questions = None,
    count: Count = 200,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """All models are asked the same questions, and given the reference's answers token by token.
    The table has their sizes, their losses, and how many answers would change. A dot marks a model
    if no other is both smaller and nearer to the reference. The gates of an export ask other
    questions, so their figures differ."""
    from fastvlm_mlx.bundle.files import left_behind
    from fastvlm_mlx.cli import show
    from model_export.cli import early
    from model_export.comparison import RESULTS, check_count

    check_count(count)
    check_plot(plot)
    early.check_samples("--questions", questions)
    # What a sweep leaves beside its bundles, which `sweep/*` names too.
    models = [p for p in paths if (name := Path(p).name) != RESULTS and not left_behind(name)]
    for model in (*models, *([reference] if reference else [])):
        early.check_model(model)
    from model_export.comparison.compare import compare as run

    with show.stages() as progress:
        rows = run(models, reference, questions, count, progress)
    deliver(rows, plot, {}, as_json=as_json)


def check_plot(plot: Path | None) -> None:
    """Raises OptionError, DestinationError: the chart can't be written to this file."""
    if plot is not None:
        from fastvlm_mlx import plotting

        plotting.check(plot)


def deliver(rows: Sequence[Row], plot: Path | None, more: dict[str, Any], *, as_json: bool) -> None:
    """Draw the rows if a plot is wanted, and print them; `more` is printed for programs only."""
    if plot is not None:
        from fastvlm_mlx import plotting
        from model_export.comparison.plot import chart

        plotting.save(chart(rows), plot)
    if as_json:
        print_json({"rows": [row.to_dict() for row in rows], **more})
    else:
        print_rows(rows)


def print_rows(rows: Sequence[Row]) -> None:
    """Print a row for each model, with • where no other is both smaller and nearer to the
    reference."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from fastvlm_mlx.cli import show
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
    show.print_table(table, max(Console().width, width))


def _cells(row: Row) -> list[str]:
    from fastvlm_mlx.bundle.files import shown_bytes

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
