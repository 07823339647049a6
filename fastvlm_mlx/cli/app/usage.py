"""A wrong command line in one sentence, as all other mistakes are told."""

from __future__ import annotations

import re
from difflib import get_close_matches

# What typer raises of all these but one is not among its public names; pyproject.toml holds its
# minor version.
from typer._click.exceptions import BadParameter, MissingParameter, NoSuchOption, UsageError

# How alike a name and an option are at least that is proposed in its place, from 0 to 1.
NEAR_OPTION = 0.6


def usage_sentence(error: UsageError, arguments: list[str]) -> str:
    """What was given, what was expected, and where to look it up.

    Args:
        arguments: the whole command line's, the verb first, for an error that does not say where.
    """
    path = f"fastvlm {arguments[0]}" if arguments else "fastvlm"
    path = path if error.ctx is None else error.ctx.command_path
    help_ = f"`{path} --help`"
    if isinstance(error, NoSuchOption):
        near = _near(error.option_name, _options(error))
        hint = f"use {near}, or see {help_}" if near else f"see {help_} for those there are"
        return f"{error.option_name} is no option of `{path}`: {hint}"
    if isinstance(error, MissingParameter):
        return f"`{path}` needs {_name(error)}, which is not given: see {help_}"
    if isinstance(error, BadParameter) and error.param is not None:
        return f"{_name(error)} is {_given(error)}: expected {_expected(error)}, see {help_}"
    # The first word of a sentence, unless it is a name.
    text = error.format_message().rstrip(".")
    return f"{text[:1].lower()}{text[1:]}: see {help_}"


def _near(given: str, options: list[str]) -> str | None:
    """The option that was probably meant: one that begins so, or else one spelled much alike."""
    beginning = [option for option in options if option.startswith(given)]
    if beginning:
        return beginning[0]
    # The dashes, which all of them have, would make any two short names alike.
    names = {option.removeprefix("--"): option for option in options}
    near = get_close_matches(given.removeprefix("--"), list(names), 1, NEAR_OPTION)
    return names[near[0]] if near else None


def _options(error: UsageError) -> list[str]:
    command = error.ctx.command if error.ctx is not None else None
    params = command.get_params(error.ctx) if command is not None and error.ctx is not None else []
    return [o for param in params for o in (*param.opts, *param.secondary_opts) if o[:2] == "--"]


def _name(error: BadParameter) -> str:
    """An option's name, or an argument's as the help shows it."""
    if error.param is None or error.ctx is None:
        return "a value"
    if error.param.opts[0].startswith("-"):
        return error.param.opts[0]
    shown = error.param.get_error_hint().strip("'")
    return shown if shown != error.param.name else shown.upper()


def _given(error: BadParameter) -> str:
    errors = getattr(error.__cause__, "errors", None)
    found = errors()[0].get("input") if callable(errors) else None
    return "not what it takes" if found is None else repr(found)


def _expected(error: BadParameter) -> str:
    text = error.message.rstrip(".")
    found = re.match(r"Input should be (.+?)(?:, unable.*)?$", text)
    return found.group(1) if found else f"another value ({text})"
