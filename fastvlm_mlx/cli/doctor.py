"""`fastvlm doctor`: the verb."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm_mlx.cli.app.verbs import Additions
from fastvlm_mlx.cli.common import Json, argument, print_json
from fastvlm_mlx.errors import FastVLMError, GateError

if TYPE_CHECKING:
    from fastvlm_mlx.doctor.report import Exporter


def doctor(
    call: typer.Context,
    bundle: Annotated[
        Path | None,
        argument(
            "[BUNDLE]", "The directory of a bundle; without one the demo is exported and checked."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Each line names a thing that was looked at, says whether it works, and what to do if it does
    not: the packages, the chip, the encoder, the language model and its answers."""
    additions: Additions = call.obj
    examine(bundle, additions.exporter(), as_json=as_json)


def examine(bundle: Path | None, exporter: Exporter, *, as_json: bool) -> None:
    """Print every line about this machine and a bundle.

    Raises:
        BundleError: there is no bundle at all; one that is broken has lines of its own.
        GateError: some lines are problems.
    """
    from fastvlm_mlx import __version__
    from fastvlm_mlx.doctor.report import PROBLEM, diagnose, worst

    if bundle is not None:
        _check_there(bundle)
    lines = []
    for line in diagnose(bundle, exporter):
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


def _check_there(path: Path) -> None:
    """Raises BundleError, ConfigError: there is nothing, or something that is no bundle. One that
    is damaged may be there: it is what the doctor is for."""
    from fastvlm_mlx.bundle.bundle import Bundle
    from fastvlm_mlx.bundle.kind import is_bundle

    try:
        Bundle.open(path)
    except FastVLMError:
        # What is no path at all.
        with suppress(OSError, ValueError, RuntimeError):
            if is_bundle(path.expanduser()):
                return
        raise
