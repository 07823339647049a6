"""The verbs as a table, and the group that imports a verb's module only when the verb is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer
import typer.main

# typer has these under no public name; pyproject.toml holds its minor version.
from typer._click import Command, Context, HelpFormatter
from typer._click.shell_completion import CompletionItem
from typer.core import TyperCommand, TyperGroup

from fastvlm_mlx.cli.app import help_text
from fastvlm_mlx.errors import OptionError

if TYPE_CHECKING:
    from fastvlm_mlx.doctor.report import Exporter

# What one wants to do, in the order of the help.
GROUPS = ("Export", "Check", "Run", "Share")
# How much two words have in common for one to be meant by the other; difflib's default is 0.6.
NEAR = 0.5


@dataclass(frozen=True)
class Verb:
    """A verb, before anything of it is imported.

    Attributes:
        group: one of `GROUPS`.
        summary: a sentence, for the list of verbs and the top of the verb's own help.
        example: a command line that uses it.
        module: where its function is, which is called like the verb.
        needs_export: whether it needs the packages of the `export` extra.
        writes: whether it makes files, so that an interruption says what becomes of them.
    """

    name: str
    group: str
    summary: str
    example: str
    module: str
    needs_export: bool = False
    writes: bool = False

    def command(self) -> Command:
        """Import the function and make typer's command of it."""
        function = getattr(import_module(self.module), self.name)
        details = (function.__doc__ or "").strip()
        one = typer.Typer(add_completion=False)
        text = f"{self.summary}\n\n{details}"
        one.command(self.name, cls=VerbCommand, help=text, epilog=self.example)(function)
        return typer.main.get_command(one)


@dataclass(frozen=True)
class Additions:
    """What a package that stands on the runtime adds to its command line.

    Attributes:
        checkpoint_facts: what `inspect` shows of a directory that is no bundle.
        exporter: what `doctor` asks of the exporter.
        resolve: the directory of the bundle that a directory, a hub id or a name stands for; of a
            checkpoint the one that it is exported to, once.
    """

    verbs: tuple[Verb, ...]
    checkpoint_facts: Callable[[Path], dict[str, Any]]
    exporter: Callable[[], Exporter]
    resolve: Callable[[str], Path]


class VerbCommand(TyperCommand):
    """A verb's command, with our help."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Raises OptionError: an option that takes one value is given twice, and the parser would
        drop the first."""
        words = args[: args.index("--")] if "--" in args else args
        for param in self.get_params(ctx):
            # Counts of an argument, a flag or a list mean something, or do no harm.
            if getattr(param, "is_flag", True) or getattr(param, "multiple", True):
                continue
            name = param.opts[0]
            count = sum(word == name or word.startswith(f"{name}=") for word in words)
            if count > 1:
                raise OptionError(
                    f"{name} is given {count} times: expected once, leave all but one out"
                )
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        formatter.write(help_text.of_verb(self, ctx))


class Verbs(TyperGroup):
    """The group of all verbs: it knows them from the table, and imports the one that is used."""

    table: ClassVar[Mapping[str, Verb]] = {}

    def list_commands(self, ctx: Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        return self.table[cmd_name].command() if cmd_name in self.table else None

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Without arguments the list of the verbs is what is wanted, and no mistake."""
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: Context, args: list[str]
    ) -> tuple[str | None, Command | None, list[str]]:
        """Raises OptionError: `args` begin with no verb."""
        verbs, given = self.list_commands(ctx), args[0]
        if given not in verbs and not given.startswith("-"):
            near = get_close_matches(given, verbs, 1, NEAR)
            hint = f"use {near[0]}" if near else f"expected one of {', '.join(verbs)}"
            raise OptionError(f"{given} is no verb of {ctx.command_path}: {hint}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: Context, incomplete: str) -> list[CompletionItem]:
        """The verbs from the table; TyperGroup's own would import every one."""
        verbs = [
            CompletionItem(verb.name, help=verb.summary)
            for verb in self.table.values()
            if verb.name.startswith(incomplete)
        ]
        return verbs + Command.shell_complete(self, ctx, incomplete)

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        formatter.write(help_text.of_verbs(self, ctx, GROUPS))


def in_order(verbs: tuple[Verb, ...]) -> dict[str, Verb]:
    """The table of a group: by name, in the order of `GROUPS`."""
    return {v.name: v for v in sorted(verbs, key=lambda verb: GROUPS.index(verb.group))}
