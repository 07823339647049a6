"""`fastvlm convert`: the verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastvlm_mlx.cli.common import print_json


def convert(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's directory.")],
    out: Annotated[Path, typer.Argument(help="Where the new bundle appears.")],
    layout: Annotated[str, typer.Option(help="The new bundle's: app, from one of layout mlx.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Turn an mlx bundle into an app bundle, checked against it; needs no checkpoint."""
    from fastvlm_mlx.cli import show
    from model_export.conversion import convert as run

    with show.stages() as progress:
        result = run(bundle, out, layout, progress, overwrite=overwrite)
    if as_json:
        print_json({"bundle": str(out), **result.manifest})
    else:
        show.print_bundle(show.inspect_bundle(out))
