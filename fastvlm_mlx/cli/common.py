"""What the verbs have in common: options, the exporter's packages, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

# The verbs take both from here.
from fastvlm_mlx.extras import EXTRA as EXTRA
from fastvlm_mlx.extras import needs_export_extra as needs_export_extra

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Out = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's directory.")]
Base = Annotated[
    str | None, typer.Option(help="What an adapter adapts, if not the base that it names.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
MinSnr = Annotated[
    float | None, typer.Option(help="Floor of the encoder's signal-to-noise ratio, dB.")
]
MaxKl = Annotated[float | None, typer.Option(help="Ceiling of the KL divergence, nats.")]
MinAgreement = Annotated[float | None, typer.Option(help="Floor of the greedy agreement, 0 to 1.")]


def print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))
