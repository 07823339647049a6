"""`fastvlm doctor`: the verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastvlm_mlx.cli.common import Json, print_json
from fastvlm_mlx.errors import GateError


def doctor(
    bundle: Annotated[
        Path | None,
        typer.Argument(metavar="[BUNDLE]", help="A bundle's directory; else the demo is exported."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what is here and whether it works: packages, chip, encoder, language model, answers."""
    from fastvlm_mlx import __version__
    from fastvlm_mlx.doctor.report import PROBLEM, diagnose, worst
    from model_export.demo.checkup import exporter

    lines = []
    for line in diagnose(bundle, exporter()):
        lines.append(line)
        if not as_json:
            print(line.text(), flush=True)
    if as_json:
        print_json(
            {
                "fastvlm_mlx": __version__,
                "bundle": None if bundle is None else str(bundle),
                "verdict": worst(lines),
                "lines": [line.to_dict() for line in lines],
            }
        )
    problems = [line.name for line in lines if line.verdict == PROBLEM]
    if problems:
        raise GateError(
            f"{len(problems)} of {len(lines)} lines are problems ({', '.join(problems)}): expected "
            "none, do what they say"
        )
