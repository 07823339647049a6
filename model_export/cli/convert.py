"""`fastvlm convert`: the verb."""

from __future__ import annotations

from typing import Annotated

from fastvlm_mlx.cli.common import BundlePath, Json, option, print_json
from model_export.cli.options import BUNDLE, Out, Overwrite


def convert(
    bundle: BundlePath,
    out: Out,
    layout: Annotated[
        str, option("The layout of the new bundle.", group=BUNDLE, choices=("app",))
    ] = "app",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """The new bundle is checked against the one that it is made from. There is no way back from app
    to mlx, because a Core ML encoder has its weights folded."""
    from fastvlm_mlx.bundle.bundle import Bundle
    from fastvlm_mlx.cli import show
    from fastvlm_mlx.inspection import inspect_bundle
    from model_export.cli import early

    early.check_destination(out, overwrite=overwrite)
    Bundle.open(bundle)
    from model_export.conversion import convert as run

    with show.stages() as progress:
        result = run(bundle, out, layout, progress, overwrite=overwrite)
    if as_json:
        print_json({"bundle": str(out), **result.manifest})
    else:
        show.print_facts(inspect_bundle(out))
