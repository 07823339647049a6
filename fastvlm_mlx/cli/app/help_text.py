"""The text of `--help`: a usage line, what the verb does, its options in groups, an example.

typer's own help imports most of rich, which alone takes longer than all of this, and gives a third
of the line to the types of the values.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from inspect import cleandoc
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperArgument, TyperOption

from fastvlm_mlx.cli.common import OUTPUT, install, missing_extra

if TYPE_CHECKING:
    from typer._click import Command, Context

    from fastvlm_mlx.cli.app.verbs import Verbs

WIDEST = 100
# A name that is longer stands on a line of its own.
NAME_COLUMN = 24

Row = tuple[str, str]


def of_verb(command: Command, ctx: Context) -> str:
    """A verb's help."""
    arguments = [p for p in command.get_params(ctx) if isinstance(p, TyperArgument)]
    options = [p for p in command.get_params(ctx) if isinstance(p, TyperOption)]
    sections = {"Arguments": [(_name(argument), argument.help or "") for argument in arguments]}
    for option in options:
        # --help, which is the last, has no group of its own.
        title = option.rich_help_panel or ([*sections][-1] if len(sections) > 1 else OUTPUT)
        sections.setdefault(title, []).append(_row(option, ctx))
    required = [_shown(option) for option in options if option.required]
    usage = " ".join([ctx.command_path, *map(_name, arguments), *required, "[OPTIONS]"])
    summary, *details = cleandoc(command.help or "").split("\n\n")
    lines = [f"{_bold('Usage:')} {usage}", "", *_wrapped(summary)]
    for paragraph in details:
        lines += ["", *_wrapped(paragraph)]
    lines += _sections(sections)
    lines += ["", _bold("Example:"), f"  {command.epilog}"]
    return "\n".join(lines) + "\n"


def of_verbs(group: Verbs, ctx: Context, groups: Sequence[str]) -> str:
    """The list of the verbs, by what one wants to do."""
    missing = missing_extra()
    lines = [f"{_bold('Usage:')} {ctx.command_path} VERB [OPTIONS]", "", *_wrapped(group.help)]
    lines += _sections(
        {
            title: [
                (verb.name, verb.summary + " Needs [export]." * bool(verb.needs_export and missing))
                for verb in group.table.values()
                if verb.group == title
            ]
            for title in groups
        }
    )
    options = [p for p in group.get_params(ctx) if isinstance(p, TyperOption)]
    lines += _sections({"Options": [_row(option, ctx) for option in options]})
    if missing:
        text = f"[export] is an extra that is not installed here: {install('export')} installs it."
        lines += ["", *_wrapped(text)]
    text = (
        f"`{ctx.command_path} VERB -h` shows a verb's options and an example. "
        f"`{ctx.command_path} demo` tries everything on a small model."
    )
    return "\n".join([*lines, "", *_wrapped(text)]) + "\n"


def _name(argument: TyperArgument) -> str:
    return argument.metavar or argument.name.upper()


def _shown(option: TyperOption) -> str:
    """The option's names, and what it takes."""
    names = ", ".join(sorted(option.opts, key=len))
    return names if option.is_flag else f"{names} {option.metavar or option.name.upper()}"


def _row(option: TyperOption, ctx: Context) -> Row:
    text = option.help or ""
    if option.required:
        text += " [required]"
    if option.multiple:
        text += " [may be repeated]"
    default: Any = option.show_default
    if default is True and not option.is_flag and not option.required:
        default = option.get_default(ctx, call=False)
    if not isinstance(default, bool) and default is not None:
        shown = f"{default:g}" if isinstance(default, float) else default
        text += f" [default: {shown}]"
    return _shown(option), text


def _sections(sections: Mapping[str, Sequence[Row]]) -> list[str]:
    """Titles with their rows, all names in one column."""
    names = [name for rows in sections.values() for name, _ in rows]
    column = max((len(name) for name in names if len(name) <= NAME_COLUMN), default=NAME_COLUMN)
    lines = []
    for title, rows in sections.items():
        if rows:
            lines += ["", _bold(f"{title}:")]
        for name, text in rows:
            wrapped = _wrapped(text, column + 4)
            if len(name) > column:
                lines.append(f"  {_coloured(name)}")
            else:
                first = wrapped.pop(0).lstrip() if wrapped else ""
                lines.append(f"  {_coloured(name)}{' ' * (column - len(name))}  {first}".rstrip())
            lines += wrapped
    return lines


def _wrapped(text: str | None, indent: int = 0) -> list[str]:
    width = min(shutil.get_terminal_size().columns, WIDEST)
    margin = " " * indent
    return textwrap.wrap(
        " ".join((text or "").split()),
        max(width, indent + 20),
        initial_indent=margin,
        subsequent_indent=margin,
        break_on_hyphens=False,
    )


def _bold(text: str) -> str:
    return typer.style(text, bold=True) if _styled() else text


def _coloured(name: str) -> str:
    """An option's names in colour, and what it takes plainly; the name of a verb or argument."""
    if not _styled():
        return name
    first, *words = name.split(" ")
    shown = [typer.style(word, fg="cyan") if word.startswith("-") else word for word in words]
    return " ".join([typer.style(first, fg="cyan", bold=True), *shown])


def _styled() -> bool:
    """`typer.echo` takes the styles away where the output is no terminal."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
