"""What the verbs share: how an option is declared, the `export` extra, JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

# The verbs take them from here.
from fastvlm_mlx.extras import EXTRAS as EXTRAS
from fastvlm_mlx.extras import install as install
from fastvlm_mlx.extras import missing
from fastvlm_mlx.extras import needs_extra as needs_extra

if TYPE_CHECKING:
    from fastvlm_mlx.cli.app.verbs import Additions

# The groups of options that more than one verb has.
OUTPUT = "Output"


def option(
    text: str,
    *names: str,
    group: str,
    value: str = "",
    choices: Iterable[object] = (),
    default: object = None,
) -> Any:
    """An option, for `Annotated`.

    Args:
        text: a sentence that says what the option does.
        names: beside the one that the parameter's name makes; for a flag its only one.
        group: the heading that the help shows it under.
        value: what the help calls the value that it takes.
        choices: the values that there are, in place of `value`. They are shown and completed, and
            checked where all options are, which also knows what fits together.
        default: what holds where the option is not given, if the parameter's default is None.
    """
    words = tuple(map(str, choices))
    return typer.Option(
        *names,
        help=text,
        metavar="|".join((*words, *([value] if value else []))) or None,
        rich_help_panel=group,
        show_default=True if default is None else str(default),
        autocompletion=_completing(words) if words else None,
    )


def argument(name: str, text: str) -> Any:
    """An argument, for `Annotated`, which the help calls `name`."""
    return typer.Argument(metavar=name, help=text, show_default=False)


def _completing(words: tuple[str, ...]) -> Callable[[], list[str]]:
    return lambda: list(words)


Json = Annotated[bool, option("Print the result as one JSON object.", "--json", group=OUTPUT)]
BundlePath = Annotated[
    Path, argument("BUNDLE", "The directory of a bundle, which `fastvlm export` makes.")
]


Model = Annotated[
    str,
    argument(
        "MODEL",
        "The directory of a bundle, which `fastvlm export` makes, or of a checkpoint; a hub id of "
        "either; or a name that `fastvlm models` lists.",
    ),
]


def resolve(call: typer.Context, model: str) -> Path:
    """The directory of the bundle that a verb was given: downloaded if it is on the hub, and
    exported once if it is a checkpoint.

    Raises:
        BundleError, CheckpointError: it is neither, or can't be downloaded.
        OptionError: it is a checkpoint, and the `export` extra is missing.
        GateError: the export failed its check.
        DestinationError: the cache can't be written.
    """
    from fastvlm_mlx.bundle.kind import is_bundle

    # What exports and downloads is not imported for a bundle that is here; what is no path at all
    # is told below.
    with suppress(OSError, RuntimeError, ValueError):
        path = Path(model).expanduser()
        if path.is_dir() and is_bundle(path):
            return path
    additions: Additions = call.obj
    return additions.resolve(model)


def missing_extra() -> list[str]:
    """The packages of the `export` extra that are not installed. None of them is imported."""
    return missing("export")


def print_json(data: dict[str, Any]) -> None:
    from fastvlm_mlx.bundle.schema import to_json

    print(to_json(data, ascii_only=False))
