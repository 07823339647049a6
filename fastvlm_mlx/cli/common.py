"""What the verbs have in common: options, the exporter's packages, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fastvlm_mlx.errors import OptionError

# The modules of the `export` extra, and the packages that they come in.
EXTRA = {
    "torch": "torch",
    "transformers": "transformers",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "scipy": "scipy",
}

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


@contextmanager
def needs_export_extra() -> Iterator[None]:
    """Turns a missing package of the `export` extra, whenever it is missed, into the command that
    installs it. Any other missing module is a bug of ours, and stays one."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in EXTRA:
            raise
        raise OptionError(
            f"this needs {EXTRA[name]} of the `export` extra, which is not installed: run "
            'pip install "fastvlm-mlx[export]"'
        ) from error


def print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))
