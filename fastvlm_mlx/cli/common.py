"""What the verbs share: how an option is declared, the `export` extra, JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

# The verbs take them from here.
from fastvlm_mlx.extras import EXTRAS as EXTRAS
from fastvlm_mlx.extras import install as install
from fastvlm_mlx.extras import needs_extra as needs_extra

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


def missing_extra() -> list[str]:
    """The packages of the `export` extra that are not installed. None of them is imported."""
    return [package for module, package in EXTRAS["export"].items() if find_spec(module) is None]


def print_json(data: dict[str, Any]) -> None:
    from fastvlm_mlx.bundle.schema import to_json

    print(to_json(data, ascii_only=False))
