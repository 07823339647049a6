"""`fastvlm sweep`: the verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastvlm_mlx.cli.common import Json, option
from fastvlm_mlx.errors import OptionError
from model_export.cli.compare import check_plot, deliver
from model_export.cli.options import CheckpointReference, Count, Plot, Questions
from model_export.options import LAYOUTS
from model_export.options.checks import unknown

EXPORTS = "Exports"


def sweep(
    checkpoint: CheckpointReference,
    out: Annotated[
        Path,
        option("The directory of the bundles and of sweep.json.", group=EXPORTS, value="DIRECTORY"),
    ],
    layout: Annotated[
        str,
        option(
            "Who loads the bundles: app is Apple's demo app, mlx is mlx-vlm and mlx-swift-lm.",
            group=EXPORTS,
            choices=LAYOUTS,
        ),
    ] = "app",
    choices: Annotated[
        Path | None,
        option(
            'A JSON file of the exports to make, such as {"small": {"llm_bits": 4}}.',
            group=EXPORTS,
            value="FILE",
            default="a set of usual ones",
        ),
    ] = None,
    questions: Questions = None,
    count: Count = 200,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Every bundle is compared with the checkpoint as `fastvlm compare` does it. If a sweep was
    stopped, the same command continues where it was."""
    from fastvlm_mlx.cli import show
    from model_export.cli import early
    from model_export.comparison import check_count

    check_count(count)
    check_plot(plot)
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if choices is not None and not choices.expanduser().is_file():
        raise OptionError(
            f'--choices {choices} is no file: expected JSON such as {{"small": {{"llm_bits": 4}}}}'
        )
    early.check_samples("--questions", questions)
    early.check_checkpoint(checkpoint)
    from model_export.comparison.sweep import read_choices
    from model_export.comparison.sweep import sweep as run

    wanted = read_choices(choices, layout)
    with show.stages() as progress:
        rows, refused = run(checkpoint, out, wanted, layout, questions, count, progress)
    deliver(rows, plot, {"refused": refused}, as_json=as_json)
    for name, reason in refused.items():
        show.note(f"{name}: {reason}")
